"""`python -m services.common.probe HOST:PORT` exits with 0 if that service is ready; for health checks.

The image has no curl. The probe uses only the standard library, so that it starts fast.
"""

import http.client
import sys

__all__ = ["main"]


def main(address: str) -> int:
    """Ask `address` for /readyz; return 0 if it answers 200 within 3 seconds, otherwise 1."""
    connection = http.client.HTTPConnection(address, timeout=3)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        print(response.read().decode())
        return int(response.status != 200)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
