"""Numbered records. The text of a record follows from its job and its number."""

import random
import re

NOISE = bytes(random.Random(1).choices(range(33, 127), k=1 << 20))
SEVERITIES = ("info", "warning", "error", "debug")
SIZES = {
    "short": lambda mix: mix // 64 % 150,
    "mixed": lambda mix: mix // 64 % (5000 if mix % 50 == 0 else 150),
    "large": lambda mix: mix // 64 % (1 << 20 if mix % 20 == 0 else 60_000),
}
TEXT = re.compile(rb"(\w+): (\w+) (\d+) ")


class Job:
    """The records of one input, numbered from 1. `with_empty`: one in 40 is empty."""

    def __init__(self, name: str, size: str, with_empty: bool = False) -> None:
        self.name, self.size, self.with_empty = name, SIZES[size], with_empty
        self.written = 0

    def record(self, number: int) -> bytes:
        mix = number * 2654435761 % 2**32
        if self.with_empty and mix % 40 == 0:
            return b""
        start = mix % 9973
        severity = SEVERITIES[number % len(SEVERITIES)]
        return b"%b: %b %d %b" % (severity.encode(), self.name.encode(), number, NOISE[start:start + self.size(mix)])

    def next(self) -> bytes:
        self.written += 1
        return self.record(self.written)


def place_of(text: bytes, jobs: dict[str, Job]) -> tuple[str, int] | None:
    """The job and number of a record; `None` if the text is not exactly a record of a job."""
    if not (found := TEXT.match(text)):
        return None
    job, number = found[2].decode(), int(found[3])
    return (job, number) if job in jobs and jobs[job].record(number) == text else None
