"""Points in time as requests carry them."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

__all__ = ["micros"]


def micros(moment: Timestamp) -> int:
    """Return microseconds since the Unix epoch, rounded up: no sooner than what was said.

    Raises ValueError outside RFC 3339's years, which google.protobuf.Timestamp demands.
    """
    if not (-62135596800 <= moment.seconds < 253402300800 and 0 <= moment.nanos < 10**9):
        raise ValueError("is no time of RFC 3339: the years 1 to 9999, and nanos from 0 to 999999999")
    return moment.seconds * 10**6 - (-moment.nanos // 1000)
