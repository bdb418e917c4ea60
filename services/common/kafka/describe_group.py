"""`python -m services.common.kafka.describe_group`: describes consumer groups, and ends.

stdin has a JSON object: the client's `config`, the `groups`, the `timeout` in seconds, and `member`. That is
the id of the only member to describe, or null for all. stdout gets a JSON object. For each group it has the
`state` and the `members`, each with its `id`, `client`, `host` and the `owned` partitions by topic. Where the
coordinator did not answer, it has the `code` and the `text` of the `error`, and the exit code is 1.

It is a process of its own because librdkafka's requests to a group's coordinator belong to its admin API.
That API aborts its process when it loses a connection meanwhile (librdkafka issue 4605). No other code may
make such a request: tests/unit/test_coordinator_requests.py checks that. This module imports as little as it
can.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from typing import Any

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient


def _owned(member: Any) -> dict[str, list[int]]:
    owned: dict[str, list[int]] = defaultdict(list)
    for partition in member.assignment.topic_partitions if member.assignment else ():
        owned[partition.topic].append(partition.partition)
    return owned


def _group(future: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        group = future.result(2 * request["timeout"])
    except KafkaException as error:
        if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
            raise
        return {"state": "DEAD", "members": []}
    members = [
        {"id": one.member_id, "client": one.client_id, "host": one.host.lstrip("/"), "owned": _owned(one)}
        for one in group.members
        if request["member"] in (None, one.member_id)
    ]
    return {"state": group.state.name, "members": members}


def main() -> int:
    """Read the request, write the response, and return the exit code. Blocks."""
    request = json.load(sys.stdin)
    admin = AdminClient(request["config"])
    try:
        futures = admin.describe_consumer_groups(request["groups"], request_timeout=request["timeout"])
        response: dict[str, Any] = {name: _group(future, request) for name, future in futures.items()}
        code = 0
    except KafkaException as error:
        response, code = {"error": {"code": error.args[0].code(), "text": error.args[0].str()}}, 1
    except TimeoutError:
        response, code = {"error": {"code": KafkaError._TIMED_OUT, "text": "no answer in time"}}, 1
    print(json.dumps(response), flush=True)
    return code


if __name__ == "__main__":
    # To destroy the client may take seconds.
    os._exit(main())
