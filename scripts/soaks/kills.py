"""Emitters that are killed one after another, during outages of the broker."""

import random
import re
import shutil
import signal
import subprocess
import threading
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from broker import Emitter, bind
from lines import Producer, Received, line
from report import progress, violate

BROKER = Path(__file__).resolve().parents[1] / "broker"
IN_MEMORY = 0.15
"""Seconds after which a kill must not lose a line that was read. 100 ms are promised; a busy machine is slower."""
SLOW_SYNC = tuple("strace -D -f -qqq --seccomp-bpf -o /dev/null -e trace=fsync,fdatasync "
                  "-e inject=fsync,fdatasync:delay_enter=300000".split()) if shutil.which("strace") else ()
OUTAGES = [
    (["kill"], ["start"]),
    (["ctl", "stop_app"], ["ctl", "start_app"]),
    (["ctl", "set_vm_memory_high_watermark", "0"], ["ctl", "set_vm_memory_high_watermark", "0.4"]),
    (["ctl", "close_all_connections", "soak"], ["status"]),
]
LINGER = ["1ms", "20ms", "300ms", "5s"]
LIVES = [(0.02, 0.3), (0.02, 0.3), (0.3, 2), (2, 7)]
"""Ranges of the lifetime of an emitter in seconds."""


def take_broker_away(seed: float, stopping: threading.Event, counted: list[str]) -> None:
    rng = random.Random(seed)
    while not stopping.wait(rng.uniform(0.5, 6)):
        begin, end = rng.choice(OUTAGES)
        subprocess.run([BROKER, *begin], check=True, capture_output=True)
        stopping.wait(rng.uniform(0, 4))
        subprocess.run([BROKER, *end], check=True, capture_output=True)
        counted.append(begin[-1])


def kills(count: int, rng: random.Random, work: Path) -> str:
    bind("soak")
    producer = Producer(rng.random(), [0, 5, 100, 1000, 1000, 5000, 20_000])
    stopping, outages, rounds = threading.Event(), [], []
    with ThreadPoolExecutor(1) as thread:
        taking = thread.submit(take_broker_away, rng.random(), stopping, outages)
        try:
            for number in range(count):
                options = rng.choice([(), ("--batch",), ("--batch", "--linger", rng.choice(LINGER))])
                under = SLOW_SYNC if rng.random() < 0.2 else ()
                life = rng.uniform(*rng.choice(LIVES))
                what = f"emitter {number} ({' '.join((*under[:1], *options))}, {life:.2f} s)"
                with Emitter(work / "spool", *options, stdin=producer.reader, under=under) as emitter:
                    time.sleep(life)
                    killed = time.monotonic()
                    status, text = emitter.end(signal.SIGKILL), emitter.stderr()
                if status != -signal.SIGKILL or re.search("dropped|damaged|panicked|cannot be used", text):
                    violate(f"{what} ended with {status}: {text}")
                rounds.append((producer.read(), killed, what))
                progress(f"{number + 1} of {count} kills, {producer.lines()} lines, {len(outages)} outages")
        finally:
            stopping.set()
        taking.result()
    producer.stopping.set()
    with Emitter(work / "spool", stdin=producer.reader) as emitter:
        if (status := emitter.wait()) != 0:
            violate(f"the last emitter: status {status}: {emitter.stderr()}")
    received = Received().take("soak")
    lost, oldest = check_kills(producer, rounds, received)
    return (f"{count} kills, {len(outages)} outages, {producer.lines()} lines; {lost} were lost by kills, the oldest "
            f"read {1000 * oldest:.0f} ms before; {received.repeats} repeats, {len(received.fragments)} lines in part")


def check_kills(producer: Producer, rounds: list[tuple[int, float, str]], received: Received) -> tuple[int, float]:
    """The number of lost lines, and the age of the oldest one: the seconds from its reading to the kill of its reader.
    The lines of an emitter are those between the bytes that were read at its start and at its kill."""
    boundaries = [boundary for boundary, _, _ in rounds]
    lost, oldest, rests = 0, 0.0, set()
    for number in sorted(set(range(1, producer.lines() + 1)) - received.lines):
        start, end = producer.ends[number - 1], producer.ends[number]
        lost, age, late, by = lost + 1, 99.0, 0.0, "none"
        for boundary, killed, what in rounds[bisect_right(boundaries, start):]:
            # This emitter has read the line, or a part of it, and was killed.
            read_at = producer.read_at(min(end, boundary))
            age, late, by = min((age, late, by), (killed - read_at, producer.lateness(read_at, killed), what))
            if boundary >= end:
                break
            rests.add(line(number)[boundary - start:])
        oldest = max(oldest, age)
        if age - late > IN_MEMORY:
            violate(f"line {number} is lost, read {age:.3f} s before the kill ({late:.3f} s late) of {by}")
    for text in set(received.fragments) - rests:
        violate(f"never written: {text[:100]!r}")
    return lost, oldest
