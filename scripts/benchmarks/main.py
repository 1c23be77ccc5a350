"""Measures the requested parts, prints their tables, and writes the results and the plot."""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import plot
from contestants import BENCH, EMIT_LOG, ROOT, YARDSTICK
from measure import Failure
from parts import FULL, QUICK, Parts, say
from table import Section

PARTS = ("oneshot", "trips", "far", "lines", "sizes", "receivers", "cost", "latency", "calls", "linger", "history",
         "files")
DOCUMENT = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- scripts/bench --document writes from here -->", "<!-- to here -->"


def main() -> None:
    """Exit status 1 means that a contestant has failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--document", action="store_true")
    parser.add_argument("parts", nargs="*")
    options = parser.parse_args()
    for name in ("SIGHUP", "SIGTERM"):
        signal.signal(getattr(signal, name), stopped)  # so that all `with` blocks end and stop their processes

    machine = describe_machine()
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), end="\n\n")
    sections: list[Section] = []
    try:
        with TemporaryDirectory(dir=BENCH) as work:
            parts = Parts(QUICK if options.quick else FULL, Path(work))
            for name in options.parts or PARTS:
                new = getattr(parts, name)()
                say("")
                print("\n".join(section.text() for section in new), flush=True)
                sections += new
    except Failure as failure:
        say("")
        sys.exit(f"bench: {failure}")
    keep(machine, sections, options.quick, options.document)


def stopped(number: int, _frame: object) -> NoReturn:
    """Ends the program with the status of a signal, after all `with` blocks."""
    sys.exit(128 + number)


def keep(machine: dict[str, str], sections: list[Section], quick: bool, document: bool) -> None:
    """Writes results.json and benchmarks.svg, and the page in docs/ if requested."""
    data = [section.data() for section in sections]
    results = {"machine": machine, "quick": quick, "sections": data}
    (BENCH / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot.draw(data, BENCH / "benchmarks.svg")
    if document:
        plot.draw(data, DOCUMENT.with_suffix(".svg"))
        page = DOCUMENT.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        facts = "\n".join(f"| {name} | {value} |" for name, value in machine.items())
        run = f"`scripts/bench{' --quick' if quick else ''}` on this machine:"
        tables = "\n".join(section.markdown() for section in sections)
        DOCUMENT.write_text(f"{before}{BEGIN}\n\n{run}\n\n| | |\n| --- | --- |\n{facts}\n\n{tables}\n{END}{after}")


def describe_machine() -> dict[str, str]:
    """The machine and the versions that the figures depend on."""
    processor = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", processor.read_text()) if processor.exists() else None
    commit = output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return {
        "processor": f"{model[1] if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}",
        "broker": output(str(ROOT / "scripts" / "broker"), "status").rpartition("version: ")[2],
        "ours": f"{output(EMIT_LOG, '--version')}, commit {commit}, {output('rustc', '--version')}",
        "peers": f"librabbitmq {output(YARDSTICK, 'version')}, pika {version('pika')} on Python {sys.version.split()[0]}",
    }


def output(*command: str) -> str:
    """The output of a command, or "unknown"."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


if __name__ == "__main__":
    main()
