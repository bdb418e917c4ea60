"""`python3 -m deploy.local.dns`: an authoritative name server for the names of zone.py, by UDP and TCP.

The control file makes names misbehave while the stack runs. The server reads it again when it changes:

    {"names": {"good.test": "servfail", "*": "delay-300"}}

A value is a label of zone.py's table of misbehaviours (`servfail`, `refused`, `timeout`, `nxdomain`,
`truncated`, `delay-N`, `flaky-N`); `*` is for every name. Each change also resets the counts of the `flaky`
names.

With `--forward` the server answers for `.test` only, and asks the machine's resolver for all other names.
"""

import argparse
import asyncio
import json
import signal
import struct
from collections import Counter
from pathlib import Path
from typing import cast

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype
import dns.rrset
import uvloop

from deploy.local.forwarding import Forwarder, system_resolvers
from deploy.local.zone import TABLE, Misbehaviour, misbehaviour, records

__all__ = ["NameServer", "main", "serve"]

TTL = 60
SOA = f"ns.post.test. hostmaster.post.test. 1 3600 600 86400 {TTL}"
APEX = dns.name.from_text("test.")
MAX_CNAMES = 8
MOST_CACHED = 50_000


class NameServer:
    """Answers questions, rightly or as the control file orders. `control` is the path of that file."""

    def __init__(self, control: Path | None) -> None:
        self._control = control
        self._stamp = 0
        self._ordered: dict[str, Misbehaviour] = {}
        self._asked: Counter[str] = Counter()
        # By question, both without their ids: to answer a known question costs two microseconds.
        self._cache: dict[bytes, bytes] = {}

    def _read_control(self) -> None:
        if self._control is None:
            return
        try:
            stamp = self._control.stat().st_mtime_ns
        except FileNotFoundError:
            stamp = 0
        if stamp == self._stamp:
            return
        try:
            names = json.loads(self._control.read_text()).get("names", {}) if stamp else {}
            ordered = {}
            for name, label in names.items():
                if (fault := misbehaviour(label)) is None:
                    raise ValueError(f"unknown misbehaviour {label!r}")
                ordered[name.lower().rstrip(".")] = fault
        except (ValueError, AttributeError) as error:
            # The file is half-written or wrong. The old orders hold until its time stamp changes again.
            print(f"{self._control}: {error}", flush=True)
            self._stamp = stamp
            return
        self._stamp, self._ordered = stamp, ordered
        self._asked.clear()
        self._cache.clear()

    def _misbehaviour(self, name: dns.name.Name) -> Misbehaviour | None:
        text = name.to_text(omit_final_dot=True)
        fault = self._ordered.get(text) or self._ordered.get("*")
        if fault is None and len(name.labels) > 2:
            fault = misbehaviour(name.labels[-3].decode("ascii", "replace"))
        if fault is None or not fault.first:
            return fault
        self._asked[text] += 1
        return fault if self._asked[text] <= fault.first else None

    def answer(self, question: bytes, *, tcp: bool) -> tuple[bytes | None, float]:
        """Return the answer to a message, None for no answer, and the seconds to wait before it is sent."""
        self._read_control()
        if cached := self._cache.get(question[2:]):
            return question[:2] + cached, 0
        try:
            query = dns.message.from_wire(question, ignore_trailing=True)
        except dns.exception.DNSException:
            return None, 0
        reply = dns.message.make_response(query, recursion_available=False)
        if query.opcode() != dns.opcode.QUERY or len(query.question) != 1:
            reply.set_rcode(dns.rcode.NOTIMP)
            return reply.to_wire(), 0
        name = query.question[0].name.canonicalize()
        fault = self._misbehaviour(name)
        kind = fault.kind if fault else ""
        if kind == "timeout":
            return None, 0
        if kind in {"servfail", "refused"}:
            reply.set_rcode(dns.rcode.SERVFAIL if kind == "servfail" else dns.rcode.REFUSED)
            return reply.to_wire(), 0
        reply.flags |= dns.flags.AA
        if kind == "truncated" and not tcp:
            reply.flags |= dns.flags.TC
            return reply.to_wire(), 0
        if kind == "nxdomain":
            reply.set_rcode(dns.rcode.NXDOMAIN)
            _add_soa(reply)
        else:
            _fill(reply, name, query.question[0].rdtype)
        wire = reply.to_wire()
        if fault is None and not self._asked[name.to_text(omit_final_dot=True)]:
            if len(self._cache) > MOST_CACHED:
                self._cache.clear()
            self._cache[question[2:]] = wire[2:]
        return wire, fault.milliseconds / 1000 if fault else 0


def _add_soa(reply: dns.message.Message) -> None:
    """Add the SOA record, which makes a negative answer cacheable (RFC 2308)."""
    reply.authority.append(dns.rrset.from_text(APEX, TTL, "IN", "SOA", SOA))


def _fill(reply: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType) -> None:
    """Answer as an authoritative server does, and follow aliases within the zone."""
    wanted = dns.rdatatype.to_text(kind)
    for _ in range(MAX_CNAMES):
        found = records(name)
        if found is None:
            reply.set_rcode(dns.rcode.NXDOMAIN)
            break
        if wanted in found:
            reply.answer.append(dns.rrset.from_text(name, TTL, "IN", wanted, *found[wanted]))
            return
        if "CNAME" not in found:
            break
        reply.answer.append(dns.rrset.from_text(name, TTL, "IN", "CNAME", *found["CNAME"]))
        name = dns.name.from_text(found["CNAME"][0])
    _add_soa(reply)


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: NameServer, forwarder: Forwarder | None) -> None:
        self._server, self._forwarder = server, forwarder
        self._forwarding: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if self._forwarder and self._forwarder.takes(data):
            task = asyncio.create_task(self._forward(self._forwarder, data, addr))
            self._forwarding.add(task)
            task.add_done_callback(self._forwarding.discard)
            return
        wire, delay = self._server.answer(data, tcp=False)
        if wire is None:
            return
        if delay:
            asyncio.get_running_loop().call_later(delay, self._transport.sendto, wire, addr)
        else:
            self._transport.sendto(wire, addr)

    async def _forward(self, forwarder: Forwarder, question: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(await forwarder.answer(question, tcp=False), addr)


async def _tcp(
    server: NameServer,
    forwarder: Forwarder | None,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Serve one connection. Each message has its length in front (RFC 1035, 4.2.2)."""
    try:
        while True:
            (length,) = struct.unpack("!H", await reader.readexactly(2))
            question = await reader.readexactly(length)
            wire: bytes | None
            if forwarder and forwarder.takes(question):
                wire, delay = await forwarder.answer(question, tcp=True), 0.0
            else:
                wire, delay = server.answer(question, tcp=True)
            if wire is None:
                continue
            await asyncio.sleep(delay)
            writer.write(struct.pack("!H", len(wire)) + wire)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def serve(host: str, port: int, control: Path | None, forwarder: Forwarder | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError when the port is taken.

    `forwarder` answers for the names outside `test.`; without one, zone.py answers for all names.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    server = NameServer(control)
    listener = await asyncio.start_server(lambda r, w: _tcp(server, forwarder, r, w), host, port)
    port = listener.sockets[0].getsockname()[1]
    udp, _ = await loop.create_datagram_endpoint(lambda: _Udp(server, forwarder), (host, port))
    print(f"listening on {host}:{port}", flush=True)
    await ended.wait()
    udp.close()
    listener.close()


def main() -> None:
    """Run by the command line: `--listen HOST:PORT`, `--control FILE`, `--forward`, `--table`."""
    parser = argparse.ArgumentParser(prog="python3 -m deploy.local.dns", description="The local name server.")
    parser.add_argument("--listen", default="127.0.0.1:0", metavar="HOST:PORT")
    parser.add_argument("--control", type=Path, metavar="FILE")
    parser.add_argument(
        "--forward",
        action="store_true",
        help="answer for .test alone; ask the machine's resolver for the rest",
    )
    parser.add_argument("--table", action="store_true", help="print what the names are, and end")
    arguments = parser.parse_args()
    if arguments.table:
        for label, text in TABLE.items():
            print(f"{label:16} {text}")
        return
    host, _, port = arguments.listen.rpartition(":")
    forwarder = Forwarder(system_resolvers()) if arguments.forward else None
    uvloop.run(serve(host, int(port), arguments.control, forwarder))


if __name__ == "__main__":
    main()
