"""main.py DIRECTORY SEED MINUTES SCENARIO TOOLS VERBOSE REPEAT: runs rounds. Exits with 1 if a promise was not kept."""

import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from datetime import date
from glob import glob
from pathlib import Path

from nodes import Cluster
from plan import SCENARIOS, Plan
from rounds import LIBFAKETIME, Round


class Run:
    """Rounds with consecutive seeds, and their results."""

    def __init__(self, tools: Path, directory: Path, is_verbose: bool) -> None:
        self.tools, self.directory, self.is_verbose = tools, directory, is_verbose
        self.cluster: Cluster | None = None
        self.rounds = self.unchecked = self.records = 0
        self.faults: Counter = Counter()
        self.failed: list[int] = []

    def round(self, plan: Plan, suffix: str = "") -> bool:
        """Returns whether all promises were kept."""
        if self.cluster and len(self.cluster.nodes) != plan.nodes:
            self.close()
        self.cluster = self.cluster or Cluster(os.environ["BROKER_NAME"], plan.nodes)
        round_ = Round(plan, self.cluster, self.directory / f"seed-{plan.seed}{suffix}", self.tools, self.is_verbose)
        name, started = f"seed {plan.seed}, {plan.scenario}", time.monotonic()
        check = round_.run()
        if check is None:
            self.unchecked += 1
            print(f"torture: {name}: not checked: {round_.not_recovered}", flush=True)
            self.close()
            round_.remove()
            return True
        self.faults += round_.done
        records = check.records()
        self.records += records
        print(f"torture: {name}: {records} records, {round_.done.total()} faults, {len(check.violations)} violations, "
              f"{time.monotonic() - started:.0f} s", flush=True)
        for queue, count in check.losses.items():
            print(f"torture: seed {plan.seed}: RabbitMQ has lost or kept {count} confirmed records in {queue}",
                  flush=True)
        problems = [f"{promise}: {text}" for promise, text in check.violations] + round_.failures
        for problem in problems:
            print(f"torture: seed {plan.seed}: {problem[:1000]}", flush=True)
        if problems:
            print(f"torture: seed {plan.seed}: history in {round_.directory}/history", flush=True)
        else:
            round_.remove()
        self.record(plan, check, round_.done)
        return not problems

    def record(self, plan: Plan, check, done: Counter) -> None:
        """Adds the round to the results, from which `report.py` makes tables."""
        violations = Counter(promise for promise, _ in check.violations)
        result = {"date": date.today().isoformat(), "rabbitmq": self.cluster.version, "seed": plan.seed,
                  "scenario": plan.scenario, "faults": done, "checked": check.checked, "violations": violations,
                  "losses": check.losses}
        with open(self.directory.parent / "rounds.jsonl", "a") as file:
            print(json.dumps(result), file=file)

    def close(self) -> None:
        if self.cluster:
            self.cluster.close()
            self.cluster = None


def possible(only: str) -> list[str]:
    """The scenarios that this machine can run."""
    is_possible = {"disk": "CAN_MOUNT" in os.environ, "clock": bool(glob(LIBFAKETIME))}
    scenarios = [name for name in ([only] if only else SCENARIOS) if is_possible.get(name, True)]
    for name in is_possible:
        if name not in scenarios and only in ("", name):
            print(f"torture: no scenario {name}: {'mount is not permitted' if name == 'disk' else 'no libfaketime'}")
    return scenarios or sys.exit(1)


def main(directory: str, seed: str, minutes: str, only: str, tools: str, verbose: str, repeat: str) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    scenarios = possible(only)
    end = time.monotonic() + 60 * float(minutes)
    run = Run(Path(tools), Path(directory), bool(verbose))
    try:
        while not run.rounds or time.monotonic() < end:
            plan = Plan(int(seed) + run.rounds, scenarios)
            run.rounds += 1
            if not (run.round(plan) or repeat and run.round(plan, "-again")):
                run.failed.append(plan.seed)
    finally:
        run.close()
    if not any(run.directory.glob("seed-*")):
        shutil.rmtree(directory)
    verdict = f"FAILED, seeds {' '.join(map(str, run.failed))}" if run.failed else "passed"
    print("torture: " + ", ".join(f"{count} {name}" for name, count in sorted(run.faults.items())))
    print(f"torture: {run.rounds} rounds ({run.unchecked} not checked), {run.records} records, {run.faults.total()} "
          f"faults: {verdict}")
    sys.exit(bool(run.failed))


main(*sys.argv[1:])
