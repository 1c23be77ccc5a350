"""Numbered lines, which are written into a pipe and compared with the content of a queue at the end."""

import fcntl
import os
import random
import sys
import termios
import threading
import time
from array import array
from bisect import bisect_left, bisect_right

from broker import channel
from report import violate

NOISE = bytes(random.Random(1).choices(range(33, 127), k=110_000))


def line(number: int) -> bytes:
    """Most lines are short. One in 50 can exceed a page of the database, and one in 5,000 exceeds a pipe."""
    mix = number * 2654435761 % 2**32
    length = 100_000 if mix % 5000 == 0 else mix // 50 % (5000 if mix % 50 == 0 else 150)
    return b"%d %b" % (number, NOISE[mix % 9973:][:length])


def number_of(text: bytes) -> int:
    """The number of a line; 0 if the text is not a whole line."""
    digits = text.split(b" ", 1)[0]
    number = int(digits) if digits.isdigit() and len(digits) < 10 else 0
    return number if text == line(number) else 0


class Producer(threading.Thread):
    """Writes numbered lines into a pipe at varying rates. Records how many bytes are read at which time."""

    def __init__(self, seed: float, rates: list[int], last: int = 10**9) -> None:
        super().__init__(daemon=True)
        self.rng, self.rates, self.last = random.Random(seed), rates, last
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.lock, self.stopping = threading.Lock(), threading.Event()
        self.written, self.ends = 0, array("Q", [0])  # bytes in total, and up to the end of each line
        self.times, self.reads = array("d", [time.monotonic()]), array("Q", [0])
        self.start()

    def run(self) -> None:
        while not self.stopping.is_set() and self.lines() < self.last:
            rate, due = self.rng.choice(self.rates), time.monotonic()
            end = due + self.rng.uniform(0.05, 1)
            while due < end and not self.stopping.wait(0.003) and self.lines() < self.last:
                count = int((time.monotonic() - due) * rate)
                due = due + count / rate if rate else time.monotonic()
                for _ in range(min(count, self.last - self.lines(), 1000)):
                    self.write(line(self.lines() + 1) + b"\n")
                self.read()
        os.close(self.writer)

    def write(self, text: bytes) -> None:
        self.ends.append(self.ends[-1] + len(text))
        while text:
            try:
                with self.lock:
                    length = os.write(self.writer, text)
                    self.written += length
                text = text[length:]
            except BlockingIOError:
                self.read()
                time.sleep(0.002)

    def stop(self) -> None:
        """Stops after a whole line. No other process may read the pipe."""
        self.stopping.set()
        while self.is_alive():
            os.read(self.reader, self.written - self.read())
            self.join(0.005)
        os.close(self.reader)

    def lines(self) -> int:
        return len(self.ends) - 1

    def read(self) -> int:
        """The number of bytes that were read. The lock prevents writes meanwhile, so it is exact."""
        with self.lock:
            waiting = fcntl.ioctl(self.reader, termios.FIONREAD, bytes(4))
            self.reads.append(self.written - int.from_bytes(waiting, sys.byteorder))
            self.times.append(time.monotonic())
            return self.reads[-1]

    def read_at(self, length: int) -> float:
        """The latest time at which this number of bytes had been read."""
        place = bisect_left(self.reads, length)
        return self.times[place] if place < len(self.times) else time.monotonic()

    def lines_read(self, before: float) -> int:
        """The minimum number of whole lines that were read before a time."""
        return bisect_right(self.ends, self.reads[max(bisect_right(self.times, before) - 1, 0)]) - 1

    def lateness(self, start: float, end: float) -> float:
        """The longest pause of this thread between two times. Another process may have paused as long."""
        times = [*self.times[bisect_right(self.times, start):bisect_right(self.times, end)], end]
        return max((after - before for before, after in zip(times, times[1:])), default=0.0)


class Received:
    """The messages of a queue. Checks the promises that hold even if lines are missing."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.lines: set[int] = set()
        self.fragments: list[bytes] = []
        self.last: dict[str, tuple[int, int]] = {}
        self.repeats = 0

    def add(self, message_id: str, kind: str | None, body: bytes) -> None:
        if message_id in self.bodies:
            self.repeats += 1
            if self.bodies[message_id] != body:
                violate(f"{message_id} arrived with two contents")
            return
        self.bodies[message_id] = body
        _, run, first = message_id.split("/")
        for place, text in enumerate(body.split(b"\n") if kind == "lines" else [body], int(first)):
            number, (last_place, last) = number_of(text), self.last.get(run, (0, 0))
            # A signal splits a line: one emitter sends the part that it has read, the next one sends the rest.
            if not number and self.fragments and (number := number_of(self.fragments[-1] + text)):
                self.fragments.pop()
            if place <= last_place or number and number <= last:
                violate(f"{message_id}, line {number}: after {last}")
            if number in self.lines:
                violate(f"line {number} arrived again, as {message_id}")
            if number:
                self.lines.add(number)
            else:
                self.fragments.append(text)
            self.last[run] = (place, number or last)

    def take(self, queue: str) -> "Received":
        """Reads a whole queue."""
        with channel() as broker:
            while count := broker.queue_declare(queue, passive=True).method.message_count:
                messages = broker.consume(queue, auto_ack=True)
                for _ in range(count):
                    _, properties, body = next(messages)
                    self.add(properties.message_id, properties.type, body)
                broker.cancel()
        return self
