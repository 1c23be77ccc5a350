"""The parts of the benchmark. In each round of a part, the contestants run one after another."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from time import sleep
from typing import TypeVar

from contestants import BATCH, BOUND, BROKER, C, CAT, CONFIRMED, CROWD, EMPTY, FAR, LINES, LINGERING, ONE_MESSAGE
from contestants import PIKA_BOTH, PUBLISHERS, READERS, RECEIVERS, SHIPPERS, TRIPS, UNBOUND, Pair, Reader
from measure import INSTRUCTIONS, STALLED, SYSTEM_CALLS, Counter, Delivery, Lines, Process, Usage, check_same
from measure import declare, delayed, deliver, follow, make_lines, now, publish, read_history, ship, stopped_reader
from measure import time_of, wait_until
from table import Row, Section

EACH_WAY = 50
"""Milliseconds to a distant broker, and back."""
LARGE = 10 << 10
"""A body of at least this size gets three times the rounds, because these vary most. In bytes."""
REST = 0.02
"""Seconds in which the broker closes the connection of the previous contestant."""
T = TypeVar("T")
R = TypeVar("R")
SIDES = [("publisher", "publishing", PUBLISHERS), ("receiver", "receiving", RECEIVERS)]
CPU_OF = {"publisher": "the publisher", "receiver": "all receivers together"}
if sys.platform == "linux":
    CPU_OF["broker"] = "the broker"


@dataclass(frozen=True)
class Plan:
    """The amounts to measure."""

    rounds: int
    """The maximum. A single message has ten times as many, and large bodies three times."""
    seconds: float
    """A round starts only if it is expected to end within this time, so that a slow machine measures less. Parts with
    long or important rounds have a multiple of it."""
    lines: int
    sizes: dict[int, int]
    """The size of a body in bytes, and the number of messages."""
    receivers: list[int]
    deliveries: int
    """The number of messages to all receivers together."""
    counted: tuple[int, int]
    """Two numbers of lines for which instructions are counted. Their difference excludes start and end."""
    lengths: dict[Pair, list[int]]
    """The numbers of lines for which the peak memory is measured."""
    stopped: int
    """The number of messages that wait for a receiver with a stopped reader."""
    rates: dict[int, dict[int, int]]
    """For each number of receivers: lines per second, and seconds in all rounds together."""
    counted_rates: dict[int, int]
    """Lines per second, and the seconds in which system calls are counted."""
    linger: int
    """Seconds with 2,000 lines each to 50 receivers."""
    history: int
    """The number of lines in a stream or a queue before a receiver starts."""
    bound: int
    """The number of lines that are published with and without a stream."""


QUICK = Plan(
    rounds=3, seconds=6, lines=50_000, receivers=[10, 50], deliveries=50_000, counted=(1_000, 6_000),
    sizes={16: 50_000, 1 << 10: 20_000, 10 << 10: 2_000, 100 << 10: 400, 1 << 20: 40}, stopped=100_000,
    lengths={CONFIRMED: [10_000, 100_000], BATCH: [10_000, 100_000, 1_000_000]},
    rates={1: {100: 2, 1_000: 2, 3_000: 2, 10_000: 2}, 10: {1_000: 2}}, counted_rates={1_000: 1}, linger=1,
    history=100_000, bound=50_000)
FULL = Plan(
    rounds=5, seconds=40, lines=500_000, receivers=[1, 10, 50], deliveries=200_000, counted=(20_000, 120_000),
    sizes={16: 500_000, 100: 500_000, 1 << 10: 200_000, 10 << 10: 20_000, 100 << 10: 2_500, 1 << 20: 250},
    stopped=1_000_000,
    lengths={CONFIRMED: [10**4, 10**5, 10**6], BATCH: [10**4, 10**5, 10**6, 10**7]},
    rates=dict.fromkeys([1, 10], {100: 20, 1_000: 10, 3_000: 10, 10_000: 10}),
    counted_rates={500: 4, 1_000: 3, 3_000: 2}, linger=5, history=1_000_000, bound=200_000)


class Parts:
    """Each part returns its sections. Runs that two parts need are measured once."""

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan, self.work = plan, work
        self.make_lines = cache(lambda count, size: make_lines(work / f"lines-{count}-{size}", count, size))
        self.idle = cache(lambda pair: deliver(pair, self.make_lines(1, 100)))
        self.all_lines = cache(lambda: self.by_turns("lines", LINES, self.deliver_lines, seconds=3 * plan.seconds))

    def oneshot(self) -> list[Section]:
        """One message: the whole process, including the connection."""
        usages: dict[str, list[Usage]] = defaultdict(list)
        output, sent = self.work / "received", []
        with output.open("wb") as file, Process(C.consume, self.work, stdout=file) as receiver:
            receiver.wait_ready()
            for turn in rounds("oneshot", 10 * self.plan.rounds, self.plan.seconds):
                for name, command in ONE_MESSAGE.items():
                    sleep(REST)
                    with Process(command(f"{name}, round {turn}"), self.work) as process:
                        usages[name].append(process.wait())
                    sent += [f"{name}, round {turn}\n"] if name != EMPTY else []
            expected = Lines(self.work / "sent", len(sent), len("".join(sent)))
            expected.path.write_text("".join(sent))
            wait_until(lambda: output.stat().st_size >= expected.bytes, "all single messages have arrived", STALLED)
        check_same(output, expected, "one message")
        times = {name: [usage.seconds * 1000 for usage in taken] for name, taken in usages.items()}
        reference = next(iter(times))
        return [Section("oneshot", "One message, whole process: less is better", reference, [
            Row(name, taken, "ms", times[reference], f"CPU {median(usage.cpu for usage in usages[name]) * 1000:.1f} ms, "
                f"{median(usage.peak for usage in usages[name]):.1f} MiB") for name, taken in times.items()])]

    def trips(self) -> list[Section]:
        """Round trips, computed from the time that a delay adds. The minimum counts, because noise only adds time."""
        for command in reversed(TRIPS.values()):
            time_of(command, self.work, BROKER)  # the receivers first, because they create exchange, queue and stream
        with delayed(EACH_WAY, self.work) as far:
            times = self.by_turns("trips", list(TRIPS), lambda name: [
                time_of(TRIPS[name], self.work, broker) for broker in (BROKER, far)], seconds=5 * self.plan.seconds)
        least = {name: map(min, zip(*of)) for name, of in times.items()}
        trips = {name: [(there - here) / (2 * EACH_WAY / 1000)] for name, (here, there) in least.items()}
        reference = next(iter(trips))
        title = "Round trips to the broker for one message, or until a receiver is subscribed: less is better"
        return [Section("trips", title, reference, [
            Row(name, of, "", trips[reference], decimals=1) for name, of in trips.items()])]

    def far(self) -> list[Section]:
        """Lines to a distant broker."""
        lines = self.make_lines(40_000, 100)
        with delayed(EACH_WAY, self.work) as far:
            taken = self.by_turns("far", FAR, lambda pair: deliver(pair, lines, broker=far))
        title = f"{lines.count:,} lines of 100 bytes to a broker {EACH_WAY} ms away, whole process: less is better"
        return [compare(Section("far", title, FAR[0].publisher), taken, lambda _, one: one.publisher.seconds, "s")]

    def lines(self) -> list[Section]:
        """Lines end to end."""
        rates = {pair: [self.count(pair) / delivery.seconds for delivery in taken]
                 for pair, taken in self.all_lines().items()}
        title = f"{self.plan.lines:,} lines of 100 bytes, end to end, one receiver: more is better"
        section = Section("lines", title, C.publisher)
        for pair, rate in rates.items():
            note = f"to {pair.receiver}" + (f", {self.count(pair):,} lines" if pair.share < 1 else "")
            section.rows.append(Row(pair.publisher, rate, "msg/s", rates[C], note))
        return [section]

    def sizes(self) -> list[Section]:
        """Bodies of different sizes."""
        section = Section("sizes", "Size of a body, end to end, one receiver: more is better", C.publisher)
        for size, count in self.plan.sizes.items():
            lines = make_lines(self.work / "sizes", count, size)
            more = 3 if size >= LARGE else 1
            taken = self.by_turns(f"sizes: {size:,} bytes", [C, CONFIRMED], lambda pair: deliver(pair, lines),
                                  more * self.plan.rounds, more * self.plan.seconds)
            rates = {pair: [count * size / 1e6 / delivery.seconds for delivery in of] for pair, of in taken.items()}
            for pair, rate in rates.items():
                note = f"{median(rate) * 1e6 / size:,.0f} msg/s"
                name = f"{binary(size)}: {pair.publisher}"
                section.rows.append(Row(name, rate, "MB/s", rates[C], note, size, pair.publisher))
        return [section]

    def receivers(self) -> list[Section]:
        """Several receivers, each of which gets all lines."""
        title = "Lines of 100 bytes to several receivers, until all have all lines: less is better"
        elapsed = Section("receivers", title, CROWD[0].publisher)
        costs = {side: Section(f"{side}-cpu", f"CPU of {who} per line, by number of receivers: less is better",
                               CROWD[0].publisher) for side, who in CPU_OF.items()}
        for receivers in self.plan.receivers:
            lines = self.make_lines(self.plan.deliveries // receivers, 100)
            taken = self.by_turns(f"receivers: {receivers}", CROWD, lambda pair: deliver(pair, lines, receivers),
                                  seconds=2 * self.plan.seconds)
            prefix = f"{receivers}: "
            compare(elapsed, taken, lambda _, one: one.seconds, "s", prefix, receivers, f"{lines.count:,} lines")
            for side, section in costs.items():
                compare(section, taken, partial(self.cpu_cost, side), "us", prefix, receivers)
        return [elapsed, *costs.values()]

    def cost(self) -> list[Section]:
        """CPU, instructions and memory."""
        return [*self.cpu(), *self.instructions(), *self.memory(), self.stopped()]

    def cpu(self) -> list[Section]:
        """The CPU of each side, from the same runs as `lines`."""
        sections = []
        for side, verb, pairs in SIDES:
            title = f"CPU of {verb} a line of 100 bytes: less is better"
            taken = {pair: self.all_lines()[pair] for pair in pairs}
            section = Section(f"{side}-lines-cpu", title, getattr(C, side))
            sections.append(compare(section, taken, partial(self.cpu_cost, side), "us", side=side))
        return sections

    def instructions(self) -> list[Section]:
        """The instructions of each side in user mode: the difference of two lengths, which excludes start and end."""
        counter = Counter(INSTRUCTIONS, self.work)
        sections = []
        for side, verb, pairs in SIDES if counter.tool else []:
            section = Section(f"{side}-instructions", f"Instructions of {verb} 100,000 lines, by {counter.tool}: "
                              "less is better", getattr(C, side))
            for pair in pairs:
                if pair is PIKA_BOTH:
                    continue  # Python takes minutes under callgrind
                say(f"cost: instructions of {getattr(pair, side)}")
                low, high = (self.make_lines(round(count * pair.share), 100) for count in self.plan.counted)
                less, more = (counter.count(side, lambda under: deliver(pair, lines, ends=True, under=under))
                              for lines in (low, high))
                count = [(more - less) / (high.count - low.count) / 1e6 * 100_000]
                reference = section.rows[0].values if section.rows else count
                note = f"{low.count:,} to {high.count:,} lines"
                section.rows.append(Row(getattr(pair, side), count, "million", reference, note))
            sections.append(section)
        return sections

    def memory(self) -> list[Section]:
        """The memory of each side, by the number of lines."""
        sections = [Section(f"{side}-memory", f"Peak memory of {verb} lines of 16 bytes: less is better",
                            "the fewest lines") for side, verb, _ in SIDES]
        for pair, lengths in self.plan.lengths.items():
            first: list[list[float]] = []
            for count in lengths:
                say(f"cost: memory of {pair.publisher}, {count:,} lines")
                delivery = deliver(pair, make_lines(self.work / "memory", count, 16))
                peaks = [[delivery.publisher.peak], [delivery.receivers[0].peak]]
                first = first or peaks
                for section, name, peak, reference in zip(sections, (pair.publisher, pair.receiver), peaks, first):
                    section.rows.append(Row(f"{name}, {count:,}", peak, "MiB", reference, "", count, name))
        return sections

    def stopped(self) -> Section:
        """The memory of a receiver with a stopped reader."""
        say("cost: memory with a stopped reader")
        waiting = self.make_lines(self.plan.stopped, 100)
        peaks = {pair: [stopped_reader(pair, waiting).peak] for pair in (C, CONFIRMED)}
        title = f"Peak memory of a receiver whose reader has stopped, {waiting.count:,} messages waiting: less is better"
        rows = [Row(pair.receiver, peak, "MiB", peaks[C]) for pair, peak in peaks.items()]
        return Section("stopped-memory", title, C.receiver, rows)

    def latency(self) -> list[Section]:
        """The time from writing a line until it is in a receiver's file, and the CPU of the publisher."""
        title = "Time from writing a line until it is in the file of {}: less is better"
        cpu = Section("latency-cpu", "CPU of publishing a line that is sent alone: less is better", C.publisher)
        sections = []
        for receivers, rates in self.plan.rates.items():
            section = Section(f"latency-{receivers}", title.format(
                "one receiver" if receivers == 1 else f"one of {receivers} receivers"), C.publisher)
            for rate, seconds in rates.items():
                pairs = [C, CONFIRMED, CAT] if (receivers, rate) == (1, 1_000) else [C, CONFIRMED]
                count = rate * seconds // self.plan.rounds
                taken = self.by_turns(f"latency: {rate:,} lines/s to {receivers}", pairs, lambda pair: follow(
                    pair, rate, count, self.work, receivers), seconds=10 * seconds)
                compare_latencies(section, taken, f"{rate:,}/s, ", rate)
                taken.pop(CAT, None)
                compare(cpu, taken, partial(self.cpu_cost, "publisher"), "us", f"{rate:,}/s to {receivers}: ", rate)
            sections.append(section)
        return [*sections, cpu]

    def calls(self) -> list[Section]:
        """System calls of each side if lines are sent one by one: the difference of two lengths."""
        counter = Counter(SYSTEM_CALLS, self.work)
        sections = []
        for side, verb, _ in SIDES if counter.tool else []:
            def count(pair: Pair, rate: int, lines: int) -> int:
                return counter.count(side, lambda under: follow(pair, rate, lines, self.work, ends=True, under=under))

            title = f"System calls of {verb} a line that is sent alone, by {counter.tool}: less is better"
            section = Section(f"{side}-calls", title, getattr(C, side))
            first = {pair: count(pair, 1, 1) for pair in (C, CONFIRMED)}
            for rate, seconds in self.plan.counted_rates.items():
                lines = rate * seconds
                taken = self.by_turns(f"calls: {verb} {rate:,} lines/s", [C, CONFIRMED], lambda pair: (
                    count(pair, rate, lines) - first[pair]) / (lines - 1))
                compare(section, taken, lambda _, calls: calls, "", f"{rate:,}/s: ", rate, side=side)
            sections.append(section)
        return sections

    def linger(self) -> list[Section]:
        """The gain for many receivers if lines wait for others, and the cost."""
        lines = 2_000 * self.plan.linger
        taken = self.by_turns("linger", LINGERING, lambda pair: follow(pair, 2_000, lines, self.work, receivers=50),
                              seconds=3 * self.plan.seconds)
        title = "2,000 lines/s to 50 receivers by emit-log -l --batch"
        latency = Section("linger", f"{title}, time from writing a line until it is in the file of one receiver: "
                          "less is better", LINGERING[0].publisher)
        compare_latencies(latency, taken)
        cpu = Section("linger-cpu", f"{title}, CPU per line: less is better", LINGERING[0].publisher)
        for side, who in CPU_OF.items():
            compare(cpu, taken, partial(self.cpu_cost, side), "us", f"{who}: ")
        return [latency, cpu]

    def history(self) -> list[Section]:
        """Reading lines that were published before, and the cost of a stream for publishers."""
        lines = self.make_lines(self.plan.history, 100)
        for source in dict.fromkeys(reader.source for reader in READERS):
            declare(source, self.work)
            if source.keeps:
                say(f"history: publishing into {source.name}")
                publish(source.publish, lines)
        taken = self.by_turns("history", READERS, lambda reader: self.read(reader, lines),
                              seconds=5 * self.plan.seconds)
        title = f"History: {lines.count:,} lines of 100 bytes, published before"
        rate = Section("history", f"{title}, read by one receiver: more is better", READERS[0].name)
        memory = Section("history-memory", f"{title}, peak memory of the receiver: less is better", READERS[0].name)
        rates = {reader: [lines.count / usage.seconds for usage in of] for reader, of in taken.items()}
        peaks = {reader: [usage.peak for usage in of] for reader, of in taken.items()}
        for reader in READERS:
            rate.rows.append(Row(reader.name, rates[reader], "lines/s", rates[READERS[0]]))
            memory.rows.append(Row(reader.name, peaks[reader], "MiB", peaks[READERS[0]]))
        return [rate, memory, self.publishing_history()]

    def files(self) -> list[Section]:
        """Sending the lines of a file."""
        lines = self.make_lines(self.plan.history, 100)
        taken = self.by_turns("files", list(SHIPPERS), lambda name: ship(SHIPPERS[name], lines))
        first = next(iter(SHIPPERS))
        title = f"{lines.count:,} lines of 100 bytes in a file, each confirmed, without a queue"
        rate = Section("files", f"{title}: more is better", first)
        cpu = Section("files-cpu", f"{title}, CPU per line: less is better", first)
        memory = Section("files-memory", f"{title}, peak memory: less is better", first)
        for section, value, unit in ((rate, lambda usage: lines.count / usage.seconds, "lines/s"),
                                     (cpu, lambda usage: usage.cpu / lines.count * 1e6, "us"),
                                     (memory, lambda usage: usage.peak, "MiB")):
            values = {name: [value(usage) for usage in of] for name, of in taken.items()}
            section.rows.extend(Row(name, of, unit, values[first]) for name, of in values.items())
        return [rate, cpu, memory]

    def read(self, reader: Reader, lines: Lines) -> Usage:
        """Reads all lines. A queue is filled first, because the previous reading has emptied it."""
        if not reader.source.keeps:
            publish(reader.source.publish, lines)
        return read_history(reader, lines)

    def publishing_history(self) -> Section:
        """Publishing into an exchange with a stream, and into one without a queue."""
        declare(BOUND, self.work)
        lines = self.make_lines(self.plan.bound, 100)
        commands = {"no stream bound": UNBOUND, "a stream bound": BOUND.publish}
        taken = self.by_turns("history: publishing", list(commands), lambda name: publish(commands[name], lines))
        rates = {name: [lines.count / usage.seconds for usage in of] for name, of in taken.items()}
        title = f"History: {lines.count:,} lines published by emit-log -l, each confirmed: more is better"
        rows = [Row(name, of, "lines/s", rates["no stream bound"]) for name, of in rates.items()]
        return Section("history-publishing", title, "no stream bound", rows)

    def count(self, pair: Pair) -> int:
        """The number of lines for this contestant."""
        return round(self.plan.lines * pair.share)

    def deliver_lines(self, pair: Pair) -> Delivery:
        """All lines."""
        return deliver(pair, self.make_lines(self.count(pair), 100))

    def cpu_cost(self, side: str, pair: Pair, delivery: Delivery) -> float:
        """CPU microseconds of a side per line, without the cost of start and end. That cost is measured with a single
        line. It varies by more than the cost of batches."""
        processes = len(delivery.receivers) if side == "receiver" else 1
        single = processes * self.idle(pair).cpu(side)
        return max(0.0, delivery.cpu(side) - single) / (delivery.lines - 1) * 1e6

    def by_turns(self, what: str, contestants: list[T], work: Callable[[T], R], turns: int = 0,
                 seconds: float = 0) -> dict[T, list[R]]:
        """Runs the contestants in turn: A, B, A, B. By default with the rounds and the time of the plan."""
        results: dict[T, list[R]] = {contestant: [] for contestant in contestants}
        for _ in rounds(what, turns or self.plan.rounds, seconds or self.plan.seconds):
            for contestant in contestants:
                results[contestant].append(work(contestant))
        return results


def compare(section: Section, taken: dict[Pair, list[R]], value: Callable[[Pair, R], float], unit: str,
            prefix: str = "", x: float | None = None, note: str = "", side: str = "publisher") -> Section:
    """Adds a row for each contestant, with its ratio to the first one. Returns the section."""
    values = {pair: [value(pair, one) for one in of] for pair, of in taken.items()}
    reference = next(iter(values.values()))
    for pair, of in values.items():
        name = getattr(pair, side)
        section.rows.append(Row(prefix + name, of, unit, reference, note, x, name))
    return section


def compare_latencies(section: Section, taken: dict[Pair, list[Delivery]], prefix: str = "",
                      x: float | None = None) -> None:
    """Adds the rows of median and 99th percentile."""
    for index, quantile in enumerate(("median", "p99")):
        values = {pair: [delivery.latencies[index] for delivery in of] for pair, of in taken.items()}
        reference = next(iter(values.values()))
        section.rows.extend(Row(f"{prefix}{quantile}: {pair.publisher}", of, "ms", reference, "", x,
                                f"{pair.publisher}, {quantile}") for pair, of in values.items())


def rounds(what: str, most: int, seconds: float) -> Iterator[int]:
    """The numbers of the rounds, until there are enough or the next one would take too long."""
    start = now()
    for turn in range(1, most + 1):
        say(f"{what}: round {turn} of {most}")
        yield turn
        took = now() - start
        if took + took / turn > seconds:
            break


def say(what: str) -> None:
    """Prints the progress, if stderr is a terminal. Each line replaces the previous one."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def binary(size: int) -> str:
    """A size in bytes as text."""
    for unit, bytes in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= bytes:
            return f"{size // bytes} {unit}"
    return f"{size} B"
