"""The DNS resolver of the settings."""

import socket

import dns.asyncresolver
import dns.nameserver
import dns.resolver

__all__ = ["make_resolver", "parse_servers"]


def parse_servers(text: str) -> list[tuple[str, int]]:
    """Return (address, port) for each server of a comma list; the port is 53 if it is not given.

    A server is written `host`, `host:port`, `[v6]` or `[v6]:port`. May block: the system resolves host names.
    Raises ValueError for a server that cannot be read or does not resolve.
    """
    servers = []
    for item in map(str.strip, text.split(",")):
        try:
            host, port = _split(item)
            where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][4]
        except (OSError, ValueError) as error:
            raise ValueError(f"DNS server {item!r}: {error}") from error
        servers.append((str(where[0]), port))
    return servers


def _split(item: str) -> tuple[str, int]:
    if item.startswith("["):
        host, _, rest = item[1:].partition("]")
        port = rest.removeprefix(":")
    elif item.count(":") > 1:
        host, port = item, ""
    else:
        host, _, port = item.partition(":")
    number = int(port or 53)
    if not host or not 0 < number < 65536:
        raise ValueError("write host or host:port")
    return host, number


def make_resolver(servers: str, timeout: float = 2.0) -> dns.asyncresolver.Resolver:
    """Return a stub resolver without a cache that asks `servers` (see `parse_servers`), or the system's if
    empty.

    It waits `timeout` seconds for a server, and repeats a question over TCP after a truncated answer. May
    block. Raises ValueError for servers that cannot be used, and if the system has none.
    """
    try:
        resolver = dns.asyncresolver.Resolver(configure=not servers.strip())
    except dns.resolver.NoResolverConfiguration:
        raise ValueError("must be set: the system has no resolver") from None
    if servers.strip():
        resolver.nameservers = [dns.nameserver.Do53Nameserver(*server) for server in parse_servers(servers)]
    resolver.timeout = timeout
    return resolver
