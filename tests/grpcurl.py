"""`python -m tests.grpcurl` does as much of grpcurl as the documents use, for machines without it.

Like grpcurl, it knows nothing of this project and asks the server's reflection. tests/shell.py prefers the
real one if it is on the PATH.
"""

from __future__ import annotations

import argparse
import json
import sys

import grpc

from tests.reflection_client import ReflectionClient

__all__ = ["main"]


def main() -> int:
    """Make one call and print its answer as JSON; 0, or as with grpcurl 64 and the code of the refusal."""
    parser = argparse.ArgumentParser(prog="grpcurl", prefix_chars="-", allow_abbrev=False)
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-H", action="append", default=[])
    parser.add_argument("-d", default="{}")
    parser.add_argument("address")
    parser.add_argument("method")
    given = parser.parse_args()
    split = (header.partition(":") for header in given.H)
    metadata = [(name.strip(), value.strip()) for name, _, value in split]
    # grpcurl sends them with its questions to reflection too.
    with ReflectionClient(given.address, metadata=metadata) as client:
        try:
            print(json.dumps(client.call(given.method, json.loads(given.d), metadata=metadata), indent=2))
        except grpc.RpcError as error:
            print(f"ERROR:\n  Code: {error.code().name}\n  Message: {error.details()}", file=sys.stderr)
            return 64 + int(error.code().value[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
