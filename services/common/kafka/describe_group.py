"""`python -m services.common.kafka.describe_group`: describe consumer groups and end.

In: a JSON object with the client's `config`, the `groups`, the `timeout` in seconds, and `member`: the id of
the only member to tell of, or null for all. Out: a JSON object. By group it holds the `state` and the
`members`, each with its `id`, `client`, `host` and the `owned` partitions of each topic. Where nobody
answered, it holds the `code` and `text` of the `error`, and the exit code is 1.

A process of its own: librdkafka's requests to a group's coordinator are of its admin API, and that one
aborts its process when a connection is lost meanwhile (librdkafka issue 4605). So nothing else may make such
a request; tests/unit/test_coordinator_requests.py checks it. This module imports as little as it can.
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
    for place in member.assignment.topic_partitions if member.assignment else ():
        owned[place.topic].append(place.partition)
    return owned


def _group(future: Any, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        group = future.result(2 * asked["timeout"])
    except KafkaException as error:
        if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
            raise
        return {"state": "DEAD", "members": []}
    members = [
        {"id": one.member_id, "client": one.client_id, "host": one.host.lstrip("/"), "owned": _owned(one)}
        for one in group.members
        if asked["member"] in (None, one.member_id)
    ]
    return {"state": group.state.name, "members": members}


def main() -> int:
    asked = json.load(sys.stdin)
    admin = AdminClient(asked["config"])
    try:
        answers = admin.describe_consumer_groups(asked["groups"], request_timeout=asked["timeout"])
        said: dict[str, Any] = {name: _group(future, asked) for name, future in answers.items()}
        code = 0
    except KafkaException as error:
        said, code = {"error": {"code": error.args[0].code(), "text": error.args[0].str()}}, 1
    except TimeoutError:
        said, code = {"error": {"code": KafkaError._TIMED_OUT, "text": "no answer in time"}}, 1
    print(json.dumps(said), flush=True)
    return code


if __name__ == "__main__":
    # The client's own end may take seconds.
    os._exit(main())
