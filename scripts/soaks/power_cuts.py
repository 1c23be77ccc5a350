"""Power cuts, with the spool on a disk image."""

import os
import random
import signal
import subprocess
import time
from contextlib import closing, contextmanager
from pathlib import Path

from broker import NOWHERE, URL, Emitter, bind
from lines import Producer, Received
from report import progress, violate

NOT_SYNCED = 2.5
"""Seconds after which a power cut must not lose a line that was read. Two seconds are promised."""


@contextmanager
def mounted(image: Path, place: Path):
    """Mounts a disk image. Yields the number of its loop device."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield os.minor(place.stat().st_dev)
    finally:
        subprocess.run(["umount", place], check=True)


class SlowDisk:
    """A control group whose processes write at most 6 MB a second."""

    def __init__(self) -> None:
        root, old = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/blkio")
        self.group = (old if old.exists() else root) / f"soak-{os.getpid()}"
        self.limit = ("blkio.throttle.write_bps_device", "") if old.exists() else ("io.max", "wbps=")

    def add(self, pid: int, disk: int) -> bool:
        """Adds a process. Returns whether the system supports this."""
        try:
            self.group.mkdir(exist_ok=True)
            (self.group / self.limit[0]).write_text(f"7:{disk} {self.limit[1]}6000000")
            (self.group / "cgroup.procs").write_text(str(pid))
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self.group.exists():
            self.group.rmdir()


def cut_power(disk: int, image: Path, rng: random.Random) -> tuple[float, bytes]:
    """Returns the time, and the image after a power failure of a disk with a cache: each sector that was written since
    the last flush is old or new. No flush ends between the two copies, because a flush makes earlier writes safe."""
    stat = Path(f"/sys/dev/block/7:{disk}/stat")
    while True:
        flushes, now = stat.read_text().split()[15], time.monotonic()
        old = image.read_bytes()
        time.sleep(rng.choice([0, 0.01, 0.1, 0.3]))
        new = bytearray(image.read_bytes())
        if stat.read_text().split()[15] == flushes:
            break
    for page in range(0, len(new), 4096):
        if old[page:page + 4096] != new[page:page + 4096]:
            for sector in range(page, page + 4096, 512):
                if rng.random() < 0.5:
                    new[sector:sector + 512] = old[sector:sector + 512]
    return now, new


def power_cuts(count: int, rng: random.Random, work: Path) -> str:
    with closing(SlowDisk()) as slow:
        return cut_often(count, rng, work, slow)


def cut_often(count: int, rng: random.Random, work: Path, slow: SlowDisk) -> str:
    bind("soak")
    disk, image, kinds, total, lost, oldest = work / "disk", work / "image", [], 0, 0, 0.0
    for number in range(count):
        with image.open("wb") as file:
            file.truncate(64 * 1024 * 1024)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        full = ("--spool-size", "2MiB", "--when-full", rng.choice(["block", "drop-oldest", "drop-newest"]))
        kind, options = rng.choice([("no broker", ()), ("full", full), ("confirming", ())])
        producer, url = Producer(rng.random(), [100, 1000, 5000, 10_000]), URL if kind == "confirming" else NOWHERE
        with mounted(image, disk) as device:
            if url == URL:  # first fills the spool, so that records are confirmed and deleted
                with Emitter(disk / "spool", url=NOWHERE, stdin=producer.reader) as emitter:
                    time.sleep(rng.uniform(0.5, 3))
                    emitter.end(signal.SIGTERM)
            with Emitter(disk / "spool", *options, url=url, stdin=producer.reader) as emitter:
                is_slow = rng.random() < 0.4 and slow.add(emitter.process.pid, device)
                time.sleep(rng.uniform(0.1, 5) + 3 * (url == URL))
                cut_at, content = cut_power(device, image, rng)
        producer.stop()
        image.write_bytes(content)
        what = f"cut {number}, {kind} {' '.join(options[3:])}{' slow' if is_slow else ''}"
        with mounted(image, disk), Emitter(disk / "spool") as emitter:
            status, dropped, text = emitter.wait(), emitter.count("dropped"), emitter.stderr()
        received = Received().take("soak")
        there, last = len(received.lines) + dropped, max(received.lines, default=0)
        first = min(received.lines, default=dropped + 1)
        if status != (69 if dropped else 0) or received.fragments or last - len(received.lines) > dropped:
            violate(f"{what}: status {status}, {len(received.lines)} up to {last}, {dropped} dropped: {text}")
        if "newest" not in what and first != dropped + 1:
            violate(f"{what}: {dropped} dropped, and the first is {first}")
        least, most = producer.lines_read(cut_at - NOT_SYNCED), producer.lines()
        if not least <= there <= most:
            violate(f"{what}: {there} of {least} to {most} lines: {text}")
        if (missing := producer.lines_read(cut_at) - there) > 0:
            lost, oldest = lost + missing, max(oldest, cut_at - producer.read_at(producer.ends[there + 1]))
        total, kinds = total + there, kinds + [kind + " slow" * is_slow]
        progress(f"{number + 1} of {count} cuts, {total} lines, {lost} lost")
    return (f"{count} cuts ({', '.join(f'{kinds.count(kind)} {kind}' for kind in sorted(set(kinds)))}), {total} lines; "
            f"{lost} were lost by cuts, the oldest read {oldest:.2f} s before")
