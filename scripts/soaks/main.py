"""main.py PART COUNT SEED: runs a part on the node in AMQP_URL. Exits with 1 if a promise was not kept."""

import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from damage import damage
from kills import kills
from power_cuts import power_cuts
from report import violations

PARTS = {"kills": kills, "power-cuts": power_cuts, "damage": damage}


def main(part: str, count: str, seed: str) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as work:
        if part == "power-cuts":  # a disk in memory is copied fast, and is removed with the mount namespace
            subprocess.run(["mount", "-t", "tmpfs", "none", work], check=True)
        try:
            summary = PARTS[part](int(count), random.Random(seed), Path(work))
        finally:
            if part == "power-cuts":
                subprocess.run(["umount", work], check=True)
    verdict = f"FAILED with {len(violations)} violations" if violations else "passed"
    print(f"soak: {part} {verdict}: {summary}; --seed {seed}")
    sys.exit(bool(violations))


main(*sys.argv[1:])
