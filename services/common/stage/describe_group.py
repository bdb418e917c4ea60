"""`python -m services.common.stage.describe_group`: ask the broker what one member of a group owns, and end.

In: a JSON object with the client's `config`, the `group`, the `member` and the `timeout` in seconds. Out:
the partitions of each topic as JSON, or null where the group has no such member; exit code 1 where nobody
answered. A process of its own, since librdkafka's requests to a group's coordinator are of its admin API,
and that one aborts its process when a connection is lost meanwhile (librdkafka issue 4605). It imports as
little as it can.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient


def main() -> int:
    asked = json.load(sys.stdin)
    admin = AdminClient(asked["config"])
    try:
        group = admin.describe_consumer_groups([asked["group"]], request_timeout=asked["timeout"])
        members = group[asked["group"]].result(2 * asked["timeout"]).members
    except (KafkaException, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1
    owned: dict[str, list[int]] | None = None
    for member in members:
        if member.member_id == asked["member"] and member.assignment is not None:
            owned = defaultdict(list)
            for place in member.assignment.topic_partitions:
                owned[place.topic].append(place.partition)
    print(json.dumps(owned), flush=True)
    return 0


if __name__ == "__main__":
    # The client's own end may take seconds.
    os._exit(main())
