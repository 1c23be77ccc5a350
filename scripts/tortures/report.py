"""report.py FILE...: prints the tables of docs/reliability.md from the results of rounds."""

import fileinput
import json
from collections import Counter

import promises

PROMISES = [promises.ENDS, promises.CONFIRMED, promises.NUMBERS, promises.SPOOL, promises.FOLLOW, promises.EXCLUSIVE,
            promises.QUEUE, promises.STREAM, promises.COPY]


def table(head: list[str], rows: list[list]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in row) + " |")


rounds = [json.loads(line) for line in fileinput.input()]
checked, faults, violations, runs, kinds = Counter(), Counter(), Counter(), Counter(), Counter()
for result in rounds:
    for promise, records in result["checked"].items():
        checked[promise] += records
        runs[promise] += 1
        faults[promise] += sum(result["faults"].values())
    violations += Counter(result["violations"])
    kinds += Counter(result["faults"])
versions = Counter(result["rabbitmq"] for result in rounds)
print(f"{len(rounds):,} rounds until {max(result['date'] for result in rounds)}: "
      + ", ".join(f"{count:,} on RabbitMQ {version}" for version, count in sorted(versions.items())) + ".\n")
table(["promise", "rounds", "faults meanwhile", "records", "violations"],
      [[promise, runs[promise], faults[promise], checked[promise], violations[promise]] for promise in PROMISES])
print()
table(["fault", "times"], [[name, count] for name, count in kinds.most_common()])
