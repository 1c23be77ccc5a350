"""Runs contestants, measures their time, CPU and memory, and compares the output with the input."""

import filecmp
import os
import random
import re
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from contestants import BROKER, DELAY, LATENCY, LAUNCH, ROOT, Command, Pair, Reader, Source

Under = Mapping[str, Command]
"""For each side, publisher or receiver: the start of a command that runs it under another program."""
PATIENCE = 300.0
"""The longest wait in seconds."""
STALLED = 10.0
"""Seconds without another byte after the end of the publisher. The remaining lines then count as lost."""
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RUST_LOG"}


class Failure(Exception):
    """A contestant has failed, or its result is wrong, so that there is nothing to compare."""


@dataclass(frozen=True)
class Usage:
    """The resources of a process, including its start and end."""

    started: float
    """In seconds of the monotonic clock, as all times in this file."""
    seconds: float
    cpu: float
    """Seconds of user and system time."""
    peak: float
    """MiB of resident memory."""


class Process:
    """A contestant, run and measured by `launch`. The end of the `with` block kills it if it still runs."""

    started = 0

    def __init__(self, command: Command, work: Path, stdin: IO | int = subprocess.DEVNULL,
                 stdout: IO | int = subprocess.DEVNULL, broker: str = BROKER) -> None:
        Process.started += 1
        self.command = tuple(broker if word == BROKER else word for word in command)
        self.report, self.stderr = (work / f"{Process.started}.{kind}" for kind in ("report", "stderr"))
        with self.stderr.open("wb") as stderr:
            self.launch = subprocess.Popen([LAUNCH, self.report, *self.command], stdin=stdin, stdout=stdout,
                                           stderr=stderr, env=ENVIRONMENT | {"AMQP_URL": broker})

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        while self.running():  # repeated, because launch may not have started its process at the first signal
            self.launch.send_signal(signal.SIGUSR1)
            time.sleep(0.01)
        for end in filter(None, (self.launch.stdin, self.launch.stdout)):
            end.close()

    def running(self) -> bool:
        """Whether the process runs."""
        return self.launch.poll() is None

    def is_ready(self) -> bool:
        """Whether a receiver is subscribed."""
        return "Waiting for logs" in self.said()

    def wait_ready(self) -> None:
        """Returns when the receiver is subscribed."""
        wait_until(lambda: not self.running() or self.is_ready(), f"{self} is subscribed")
        if not self.running():
            self.fail("has exited too early")

    def wait(self, accepted: tuple[int, ...] = (0,)) -> Usage:
        """Waits for the end with an accepted status. A negative status is a signal."""
        wait_until(lambda: not self.running(), f"{self} ends")
        if self.launch.returncode != 0:
            self.fail("cannot be run")
        started, took, cpu, peak, status = map(int, self.report.read_text().split())
        if status not in accepted:
            self.fail(f"status {status}")
        return Usage(started / 1e9, took / 1e9, cpu / 1e6, peak / 1024)

    def stop(self) -> Usage:
        """Stops a receiver as a user does. The other programs end by the signal, or by the broken pipe."""
        if self.running():
            self.launch.send_signal(signal.SIGTERM)
        return self.wait((0, -signal.SIGTERM, -signal.SIGPIPE))

    def said(self) -> str:
        """The standard error of the process so far."""
        return self.stderr.read_text(errors="replace")

    def fail(self, what: str) -> None:
        """Raises the failure, with the last lines of the process on standard error."""
        raise Failure(f"{self}: {what}\n{self.said()[-500:]}".rstrip())

    def __str__(self) -> str:
        """The command without the paths of its programs and the address of the broker."""
        return " ".join(re.sub(r"amqp://\S+", "...", re.sub(r"^/\S*/", "", word)) for word in self.command)


@contextmanager
def delayed(milliseconds: int, work: Path) -> Iterator[str]:
    """The address of the broker through a proxy with this delay in each direction."""
    head, port, tail = re.split(r":(\d+)(?=/)", BROKER)
    with Process((DELAY, str(milliseconds), port), work, stdout=subprocess.PIPE) as proxy:
        yield f"{head}:{int(proxy.launch.stdout.readline())}{tail}"


@cache
def broker_clock() -> int:
    """The clock of the CPU time of the broker, as clock_getcpuclockid(3) of Linux returns it."""
    status = subprocess.check_output([ROOT / "scripts" / "broker", "status"], text=True)
    return ~int(re.findall(r"pid: (\d+)", status)[0]) << 3 | 2


def broker_cpu() -> float:
    """CPU seconds of the broker so far; 0 if the system does not report them."""
    return time.clock_gettime(broker_clock()) if sys.platform == "linux" else 0.0


def now() -> float:
    """Seconds of the clock of `launch`."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def wait_until(condition: Callable[[], bool], what: str, limit: float = PATIENCE) -> None:
    """Checks every half millisecond, which needs about 1% of a core."""
    end = now() + limit
    while not condition():
        if now() > end:
            raise Failure(f"condition not met after {limit:.0f} s: {what}")
        time.sleep(0.0005)


@dataclass(frozen=True)
class Lines:
    """A file of generated lines."""

    path: Path
    count: int
    bytes: int
    """The size of all lines, including newlines."""

    def matching(self, pattern: str) -> "Lines":
        """The lines that match a regular expression, in a file of their own."""
        if not pattern:
            return self
        is_match = re.compile(pattern.encode()).search
        path = self.path.with_name("matching")
        with self.path.open("rb") as file:
            found = [line for line in file if is_match(line)]
        path.write_bytes(b"".join(found))
        return Lines(path, len(found), path.stat().st_size)


def make_lines(path: Path, count: int, size: int) -> Lines:
    """Writes numbered lines of `size` bytes (at least 11) without the newline. They are the same in every run."""
    filler = b64encode(random.Random(6).randbytes(size + 64))
    with path.open("wb") as file:
        for index in range(count):
            shift = index % 61
            file.write(b"%010d %s\n" % (index, filler[shift:shift + size - 11]))
    return Lines(path, count, count * (size + 1))


@dataclass(frozen=True)
class Delivery:
    """Lines that went from a publisher to receivers."""

    lines: int
    seconds: float
    """From the start of the publisher until the file of the last receiver is complete."""
    publisher: Usage
    receivers: list[Usage]
    broker: float
    """CPU seconds in that time."""
    latencies: tuple[float, ...] = ()
    """Milliseconds from writing a line until it is in the file: median, 99th percentile and maximum."""

    def cpu(self, side: str) -> float:
        """CPU seconds of the publisher, of all receivers together, or of the broker."""
        if side == "receiver":
            return sum(usage.cpu for usage in self.receivers)
        return self.publisher.cpu if side == "publisher" else self.broker


def deliver(pair: Pair, lines: Lines, receivers: int = 1, ends: bool = False, under: Under = {},
            broker: str = BROKER) -> Delivery:
    """Sends the lines to receivers, each with a file of its own, and compares all files with the input.

    With `ends`, the receivers stop after the last line. `broker` is the address of the broker for the publisher.
    """
    work = lines.path.parent
    outputs = [work / f"received{index}" for index in range(receivers)]
    consume = (*under.get("receiver", ()), *pair.consume, *(("-n", str(lines.count)) if ends else ()))
    with ExitStack() as stack:
        consumers = []
        for output in outputs:
            with output.open("wb") as file:
                consumers.append(stack.enter_context(Process(consume, work, stdout=file)))
        for consumer in consumers:
            consumer.wait_ready()
        before = broker_cpu()
        publish = (*under.get("publisher", ()), *pair.publish)
        with lines.path.open("rb") as file:
            publisher = stack.enter_context(Process(publish, work, stdin=file, broker=broker))
        all(is_completed(*receiving, lines.bytes, publisher) for receiving in zip(outputs, consumers))
        end, broker_took = now(), broker_cpu() - before
        published = publisher.wait()
        received = [consumer.wait() if ends else consumer.stop() for consumer in consumers]
    for output in outputs:
        check_same(output, lines, f"{pair.publisher} to {pair.receiver}")
        output.unlink()
    return Delivery(lines.count, end - published.started, published, received, broker_took)


def is_completed(output: Path, consumer: Process, size: int, publisher: Process) -> bool:
    """Waits until the file has its size, or does not grow any more. The comparison then reports the missing lines."""
    seen, since = 0, now()

    def complete_or_stalled() -> bool:
        nonlocal seen, since
        grown = output.stat().st_size
        if grown != seen or publisher.running():
            seen, since = grown, now()
        return grown >= size or not consumer.running() or now() > since + STALLED

    wait_until(complete_or_stalled, f"all lines of {publisher} have arrived")
    return seen >= size


def check_same(output: Path, lines: Lines, who: str) -> None:
    """Checks that the output is the input, byte by byte. A wrong result does not count, even if it is fast."""
    if filecmp.cmp(output, lines.path, shallow=False):
        return
    with output.open("rb") as arrived, lines.path.open("rb") as sent:
        first = next((number for number, line in enumerate(sent, 1) if line != arrived.readline()), lines.count + 1)
    raise Failure(f"{who}: the output differs from the input: {output.stat().st_size:,} of {lines.bytes:,} bytes, "
                  f"and line {first:,} of {lines.count:,} differs")


def stopped_reader(pair: Pair, lines: Lines) -> Usage:
    """The resources of a receiver that writes into a pipe without a reader, while all lines wait in the broker."""
    work = lines.path.parent
    with Process(pair.consume, work, stdout=subprocess.PIPE) as consumer:
        consumer.wait_ready()
        with lines.path.open("rb") as file, Process(pair.publish, work, stdin=file) as publisher:
            publisher.wait()
        time.sleep(1)  # the broker may still send messages
        if not consumer.running():
            consumer.fail("has exited although its reader had only stopped")
        consumer.launch.stdout.close()
        usage = consumer.stop()
    # The broker slows down publishers to the exchange until it has dropped all waiting messages.
    queues = (str(ROOT / "scripts" / "broker"), "ctl", "-q", "list_queues", "name")
    wait_until(lambda: "amq.gen" not in subprocess.check_output(queues, text=True), "the broker has dropped its queue")
    return usage


def declare(source: Source, work: Path) -> None:
    """Creates a stream or a queue, which remains."""
    with Process(source.declare, work) as receiver:
        receiver.wait_ready()
        receiver.stop()


def publish(command: Command, lines: Lines) -> Usage:
    """Publishes the lines."""
    with lines.path.open("rb") as file, Process(command, lines.path.parent, stdin=file) as publisher:
        return publisher.wait()


def ship(command: Command, lines: Lines) -> Usage:
    """Sends the lines of a file from its beginning."""
    lines.path.with_name(f"{lines.path.name}.position").unlink(missing_ok=True)
    command = tuple(word.format(path=lines.path) for word in command)
    with Process(command, lines.path.parent) as shipper:
        return shipper.wait()


def read_history(reader: Reader, lines: Lines) -> Usage:
    """Reads the lines that were published before, and compares them with the input, or with the lines that match."""
    output = lines.path.parent / "history"
    command = tuple(word.format(count=lines.count, output=output) for word in reader.read)
    with output.open("wb") as file, Process(command, output.parent, stdout=file) as process:
        usage = process.wait()
    check_same(output, lines.matching(reader.pattern), reader.name)
    output.unlink()
    return usage


def follow(pair: Pair, rate: int, count: int, work: Path, receivers: int = 1, ends: bool = False,
           under: Under = {}) -> Delivery:
    """Sends one line and then `count` more at a rate per second, and watches the file of the first receiver.

    Without a receiver, the "publisher" writes the file, which measures the error of the instrument.
    """
    output = work / "followed"
    with output.open("wb") as file, ExitStack() as stack:
        consume = (*under.get("receiver", ()), *pair.consume, *(("-n", str(count + 1)) if ends else ()))
        consumers = [stack.enter_context(Process(consume, work, stdout=subprocess.DEVNULL if index else file))
                     for index in range(receivers if pair.consume else 0)]
        for consumer in consumers:
            consumer.wait_ready()
        before = broker_cpu()
        instrument = Process((LATENCY, str(rate), str(count), str(output)), work, stdout=subprocess.PIPE)
        lines = stack.enter_context(instrument).launch.stdout
        publish = (*under.get("publisher", ()), *pair.publish)
        publisher = stack.enter_context(Process(publish, work, lines, subprocess.DEVNULL if consumers else file))
        lines.close()
        try:
            took = instrument.wait().seconds
        except Failure as failure:
            arrived = output.read_bytes().count(b"\n")
            raise Failure(f"{publisher}: {arrived:,} of {count + 1:,} lines arrived; stderr: {publisher.said()!r}\n"
                          f"{failure}") from failure
        broker_took = broker_cpu() - before
        latencies = tuple(float(word) / 1000 for word in instrument.said().split())
        published = publisher.wait()
        received = [consumer.wait() if ends else consumer.stop() for consumer in consumers]
        return Delivery(count + 1, took, published, received, broker_took, latencies)


def time_of(command: Command, work: Path, broker: str) -> float:
    """Seconds from the start of a publisher until it exits, or of a receiver until it is subscribed."""
    with Process(command, work, broker=broker) as process:
        wait_until(lambda: not process.running() or process.is_ready(), f"{process} is done or subscribed")
        ready, usage = now(), process.stop()
        return min(usage.seconds, ready - usage.started)


INSTRUCTIONS = {
    "perf": ("perf stat -x, -e instructions:u -o {output}", r"(?m)^(\d+),.*instructions"),
    "callgrind": ("valgrind --tool=callgrind --callgrind-out-file=/dev/null --log-file={output}", r"Collected : (\d+)"),
}
SYSTEM_CALLS = {
    "perf": ("perf stat -x, -e raw_syscalls:sys_enter -o {output}", r"(?m)^(\d+),.*sys_enter"),
    "strace": ("strace -f -c -o {output}", r"(\d+)(?: +\d+)? total"),
}
"""perf is preferred. strace stops a process at each call, so it is slower and processes more at once."""


class Counter:
    """Counts events of a process with the first tool that works on this machine; with none, `tool` is empty."""

    def __init__(self, tools: Mapping[str, tuple[str, str]], work: Path) -> None:
        self.output = work / "counted"
        for self.tool, (command, self.pattern) in tools.items():
            self.under = tuple(command.format(output=self.output).split())
            if self.works():
                return
        self.tool = ""

    def works(self) -> bool:
        """Whether the command of the tool exists and has the permission to count."""
        try:
            subprocess.run([*self.under, "true"], capture_output=True, timeout=60, check=True)
            return self.read() > 0
        except (OSError, subprocess.SubprocessError, Failure):
            return False

    def read(self) -> int:
        """The count of the last process."""
        found = re.search(self.pattern, self.output.read_text())
        if not found:
            raise Failure(f"{self.under[0]} printed no count")
        return int(found[1])

    def count(self, side: str, run: Callable[[Under], Delivery]) -> int:
        """The count of one side in a run; the other side runs without the tool."""
        run({side: self.under})
        return self.read()
