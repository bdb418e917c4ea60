"""What the replicas of a whole system say of themselves over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from tests.stack import Stack

__all__ = ["busy", "metric", "problems"]


def metric(stack: Stack, name: str, line: str) -> float:
    """Return the value of one line of a replica's metrics, 0 if it is not there yet."""
    address = stack.env()[f"POSTROAD_HTTP_{name.upper().replace('-', '_')}"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        found = [row for row in answer.read().decode().splitlines() if row.startswith(line)]
    return sum(float(row.rpartition(" ")[2]) for row in found)


def busy(stack: Stack, name: str) -> float:
    """Return how many mails a sender is sending."""
    return metric(stack, name, 'postroad_sender_sessions{state="busy"}')


def problems(stack: Stack, name: str) -> list[str]:
    """Return the problems that a replica names."""
    address = stack.env()[f"POSTROAD_HTTP_{name.upper().replace('-', '_')}"]
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=10) as answer:
            found: list[str] = json.load(answer)["problems"]
    except urllib.error.HTTPError as error:
        found = json.load(error)["problems"]
    return found
