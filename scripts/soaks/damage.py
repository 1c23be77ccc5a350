"""Damage to the files of a spool."""

import os
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from broker import NOWHERE, Emitter, bind
from lines import Producer, Received
from report import progress, violate

FULL = ("--spool-size", "1MiB", "--when-full", "drop-oldest")
SPOOLS = {  # lines a second, lines, options, and the signals that end the emitters
    "single": (20_000, 2000, (), "TERM"),
    "batch": (20_000, 6000, ("--batch",), "TERM"),
    "full": (20_000, 9000, FULL, "TERM"),
    "log": (20_000, 2000, (), "KILL"),
    "log-synced": (1000, 2000, (), "KILL"),
    "both": (1000, 2000, (), "TERM KILL"),
    "both-full": (5000, 9000, FULL, "TERM KILL"),
}


def fill(spool: Path, seed: float, rate: int, last: int, options: tuple[str, ...], ends: str) -> int:
    """Fills a spool with lines. Returns the number of records that it reports."""
    producer = Producer(seed, [rate], last)
    writer = os.dup(producer.writer)
    for number, end in enumerate(ends.split(), 1):
        with Emitter(spool, *options, url=NOWHERE, stdin=producer.reader) as emitter:
            while producer.read() < producer.ends[-1] or producer.lines() < last * number // len(ends.split()):
                time.sleep(0.01)
            time.sleep(0.3)  # three times the promised time
            emitter.end(signal.Signals[f"SIG{end}"])
    os.close(writer)
    os.close(producer.reader)
    return stored(spool)[0]


def stored(spool: Path) -> tuple[int | None, int]:
    """The stored and the dropped records that a spool reports; None if it cannot be read."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(spool, copy, dirs_exist_ok=True)  # a copy, because SQLite may change the files
        with closing(sqlite3.connect(f"{copy}/spool.db")) as database:
            try:
                return database.execute("SELECT records, dropped FROM facts").fetchone() or (None, 0)
            except sqlite3.Error:
                return None, 0


def hurt(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    kind, place = rng.choice(["flip", "overwrite", "zero", "swap", "truncate"]), rng.randrange(len(content))
    page, other = (slice(at // 4096 * 4096, at // 4096 * 4096 + 4096) for at in (place, rng.randrange(len(content))))
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        content[place:place + 200] = rng.randbytes(rng.randint(1, 200))[:len(content) - place]
    elif kind == "zero":
        content[page] = bytes(len(content[page]))
    elif kind == "swap":
        content[page], content[other] = content[other], content[page]
    else:
        del content[place:]
    file.write_bytes(content)
    return f"{kind} in {file.name} at {place}"


def damage(count: int, rng: random.Random, work: Path) -> str:
    held = {work / name: fill(work / name, rng.random(), *what) for name, what in SPOOLS.items()}
    statuses, seeds = [], [rng.random() for _ in range(count)]
    with ThreadPoolExecutor(8) as pool:
        for status, what in pool.map(lambda seed: damage_one(random.Random(seed), held, work / f"soak-{seed}"), seeds):
            statuses.append(f"{status} after damage to the {what}")
            progress(f"{len(statuses)} of {count} damaged spools")
    return f"{count} damaged spools; status " + ", ".join(f"{s}: {statuses.count(s)}" for s in sorted(set(statuses)))


def damage_one(rng: random.Random, held: dict[Path, int], spool: Path) -> tuple[int | None, str]:
    template = rng.choice(list(held))
    shutil.copytree(template, spool)
    file = rng.choice([file for file in sorted(spool.iterdir()) if file.stat().st_size])
    what = f"{spool.name}, {template.name}, {hurt(file, rng)}"
    before, (reported, dropped) = (spool / "spool.db").read_bytes(), stored(spool)
    is_log = file.name.endswith("-wal")
    bind(spool.name)
    with Emitter(spool, exchange=spool.name) as emitter:
        status, text = emitter.wait(60), emitter.stderr()
        counts = [emitter.count(count) for count in ("confirmed", "in doubt", "left", "dropped")]
    received = Received().take(spool.name)
    arrived, counted = len(received.lines), " confirmed, " in text
    if status not in (0, 69, 78) or "panicked" in text or received.fragments:
        violate(f"{what}: status {status}: {text}")
    # SQLite ignores its log from the damage on. The spool then reports an earlier state.
    elif status == 0 and (arrived != (reported or 0 if is_log else held[template]) or stored(spool)[0] != 0):
        violate(f"{what}: status 0, {arrived} of {held[template]} or {reported} lines, {stored(spool)} left: {text}")
    elif counted and (counts[0] > arrived or reported is not None and sum(counts) != reported + dropped):
        violate(f"{what}: status {status}, {arrived} of {reported} lines, {dropped} dropped: {text}")
    elif status == 78 and not counted and (spool / "spool.db").read_bytes() != before:
        violate(f"{what}: status 78, and the database was changed: {text}")
    shutil.rmtree(spool)
    return status, "log" if is_log else "database"
