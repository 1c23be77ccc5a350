"""The parts of the benchmark. In each, the contestants take turns, round by round."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from time import sleep
from typing import TypeVar

from contestants import BATCH, BOUND, C, CONFIRMED, EMPTY, LINES, ONE_MESSAGE, PIKA_BOTH, PUBLISHERS, READERS
from contestants import RECEIVERS, UNBOUND, Pair, Reader
from measure import STALLED, Delivery, InstructionCounter, Lines, Process, Usage, check_same, declare, deliver, latency
from measure import make_lines, now, publish, read_history, stopped_reader, wait_until
from table import Row, Section

REST = 0.02
"""Seconds in which the broker gets done with the connection of the contestant before."""
T = TypeVar("T")
R = TypeVar("R")
SIDES = [("publisher", "publishing", PUBLISHERS), ("receiver", "receiving", RECEIVERS)]


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    rounds: int
    """At most; the one for a single message has ten times as many."""
    seconds: float
    """No further round begins that would not end within this time (three times as much for the plain lines, on which
    most depends, five times as much for history), so that a slow machine does less, not longer."""
    lines: int
    sizes: dict[int, int]
    """Bytes of a body, and how many of them are sent."""
    receivers: list[int]
    deliveries: int
    """Messages to all receivers together."""
    counted: tuple[int, int]
    """Lines for which instructions are counted; the difference is free of start and end."""
    lengths: dict[Pair, list[int]]
    """Lines for which the peak memory is taken."""
    stopped: int
    """Messages that wait for a receiver whose reader has stopped."""
    rates: dict[int, int]
    """Lines a second, and for how many seconds."""
    history: int
    """Lines that a stream or a queue holds before a receiver starts."""
    bound: int
    """Lines that are published with and without a stream."""


QUICK = Plan(
    rounds=3, seconds=6, lines=50_000, receivers=[1, 10, 50], deliveries=100_000, counted=(1_000, 6_000),
    sizes={16: 50_000, 1 << 10: 20_000, 100 << 10: 400, 1 << 20: 40}, stopped=100_000,
    lengths={CONFIRMED: [10_000, 100_000], BATCH: [10_000, 100_000, 1_000_000]}, rates={1: 3, 1_000: 3, 10_000: 3},
    history=100_000, bound=50_000)
FULL = Plan(
    rounds=5, seconds=40, lines=500_000, receivers=[1, 2, 5, 10, 50], deliveries=1_000_000, counted=(20_000, 120_000),
    sizes={16: 500_000, 100: 500_000, 1 << 10: 200_000, 10 << 10: 20_000, 100 << 10: 2_500, 1 << 20: 250},
    stopped=1_000_000,
    lengths={CONFIRMED: [10**4, 10**5, 10**6], BATCH: [10**4, 10**5, 10**6, 10**7]},
    rates={1: 30, 1_000: 20, 10_000: 20}, history=1_000_000, bound=200_000)


class Parts:
    """Each part returns its sections; what two of them need is measured once."""

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan, self.work = plan, work
        self.make_lines = cache(lambda count, size: make_lines(work / f"lines-{count}-{size}", count, size))
        self.idle = cache(lambda pair: deliver(pair, self.make_lines(1, 100)))
        self.all_lines = cache(lambda: self.by_turns("lines", LINES, self.deliver_lines, seconds=3 * plan.seconds))

    def oneshot(self) -> list[Section]:
        """One message: the whole process, connection and all."""
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

    def lines(self) -> list[Section]:
        """Lines from end to end."""
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
            taken = self.by_turns(f"sizes: {size:,} bytes", [C, CONFIRMED], lambda pair: deliver(pair, lines))
            rates = {pair: [count * size / 1e6 / delivery.seconds for delivery in of] for pair, of in taken.items()}
            for pair, rate in rates.items():
                note = f"{median(rate) * 1e6 / size:,.0f} msg/s"
                name = f"{binary(size)}: {pair.publisher}"
                section.rows.append(Row(name, rate, "MB/s", rates[C], note, size, pair.publisher))
        return [section]

    def receivers(self) -> list[Section]:
        """Several receivers, each of which gets everything."""
        rate = Section("receivers", "Messages published to so many receivers: more is better", C.publisher)
        title = "CPU of {} for 100,000 messages, by receivers: less is better"
        sides = {"publisher": Section("publisher-cpu", title.format("the publisher"), "one receiver"),
                 "receiver": Section("receiver-cpu", title.format("each receiver"), "one receiver")}
        first: dict[str, list[float]] = {}
        for receivers in self.plan.receivers:
            lines = self.make_lines(min(self.plan.lines, self.plan.deliveries // receivers), 100)
            taken = self.by_turns(f"receivers: {receivers}", [C, CONFIRMED],
                                  lambda pair: deliver(pair, lines, receivers))
            rates = {pair: [lines.count / delivery.seconds for delivery in of] for pair, of in taken.items()}
            for pair, of in taken.items():
                rate.rows.append(Row(f"{receivers}: {pair.publisher}", rates[pair], "msg/s", rates[C],
                                     f"{lines.count:,} messages", receivers, pair.publisher))
                for side, section in sides.items():
                    costs = [self.cpu_cost(pair, side, delivery, lines.count) for delivery in of]
                    name = getattr(pair, side)
                    reference = first.setdefault(side + name, costs)
                    section.rows.append(Row(f"{receivers}: {name}", costs, "s", reference, "", receivers, name))
        return [rate, *sides.values()]

    def cost(self) -> list[Section]:
        """CPU, instructions and memory."""
        return [*self.cpu(), *self.instructions(), *self.memory(), self.stopped()]

    def cpu(self) -> list[Section]:
        """Of each side, from the same runs as `lines`."""
        sections = []
        for side, verb, pairs in SIDES:
            costs = {pair: [self.cpu_cost(pair, side, delivery, self.count(pair))
                            for delivery in self.all_lines()[pair]] for pair in pairs}
            rows = [Row(getattr(pair, side), of, "s", costs[C]) for pair, of in costs.items()]
            title = f"CPU of {verb} 100,000 lines of 100 bytes: less is better"
            sections.append(Section(f"{side}-lines-cpu", title, getattr(C, side), rows))
        return sections

    def instructions(self) -> list[Section]:
        """Of each side, in user mode: the difference of two lengths, free of start and end."""
        counter = InstructionCounter(self.work)
        sections = []
        for side, verb, pairs in SIDES if counter.tool else []:
            section = Section(f"{side}-instructions", f"Instructions of {verb} 100,000 lines, by {counter.tool}: "
                              "less is better", getattr(C, side))
            for pair in pairs:
                if pair is PIKA_BOTH:
                    continue  # Python takes minutes under callgrind
                say(f"cost: instructions of {getattr(pair, side)}")
                low, high = (self.make_lines(round(count * pair.share), 100) for count in self.plan.counted)
                less, more = (getattr(counter, side)(pair, lines) for lines in (low, high))
                count = [(more - less) / (high.count - low.count) / 1e6 * 100_000]
                reference = section.rows[0].values if section.rows else count
                note = f"{low.count:,} to {high.count:,} lines"
                section.rows.append(Row(getattr(pair, side), count, "million", reference, note))
            sections.append(section)
        return sections

    def memory(self) -> list[Section]:
        """Of each side, by the number of lines."""
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
        """The memory of a receiver, while nobody takes what it writes."""
        say("cost: memory with a stopped reader")
        waiting = self.make_lines(self.plan.stopped, 100)
        peaks = {pair: [stopped_reader(pair, waiting).peak] for pair in (C, CONFIRMED)}
        title = f"Peak memory of a receiver whose reader has stopped, {waiting.count:,} messages waiting: less is better"
        rows = [Row(pair.receiver, peak, "MiB", peaks[C]) for pair, peak in peaks.items()]
        return Section("stopped-memory", title, C.receiver, rows)

    def latency(self) -> list[Section]:
        """From writing a line to its appearing in the receiver's file."""
        title = "From writing a line to finding it in the receiver's file: less is better"
        section = Section("latency", title, C.publisher)
        commands: dict[str, tuple] = {pair.publisher: (pair.publish, pair.consume) for pair in (C, CONFIRMED)}
        for rate, seconds in self.plan.rates.items():
            if rate == 1_000:
                commands |= {"cat (the error of the instrument)": (("cat",), None)}
            turns = 1 if rate == 1 else self.plan.rounds
            taken = self.by_turns(f"latency: {rate:,} lines/s", list(commands), lambda name: latency(
                *commands[name], rate, seconds / turns, self.work), turns, seconds=10 * seconds)
            for index, quantile in enumerate(("median", "p99", "max")):
                values = {name: [figures[index] for figures in of] for name, of in taken.items()}
                section.rows.extend(Row(f"{rate:,}/s, {quantile}: {name}", of, "ms", values[C.publisher], "", rate,
                                        f"{name}, {quantile}") for name, of in values.items())
            commands.pop("cat (the error of the instrument)", None)
        return [section]

    def history(self) -> list[Section]:
        """What was published before a receiver starts, and what a stream costs those who publish."""
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

    def read(self, reader: Reader, lines: Lines) -> Usage:
        """All lines, which come into a queue only now, as reading has taken them out."""
        if not reader.source.keeps:
            publish(reader.source.publish, lines)
        return read_history(reader, lines)

    def publishing_history(self) -> Section:
        """Into an exchange with a stream, and one with nothing."""
        declare(BOUND, self.work)
        lines = self.make_lines(self.plan.bound, 100)
        commands = {"no stream bound": UNBOUND, "a stream bound": BOUND.publish}
        taken = self.by_turns("history: publishing", list(commands), lambda name: publish(commands[name], lines))
        rates = {name: [lines.count / usage.seconds for usage in of] for name, of in taken.items()}
        title = f"History: {lines.count:,} lines published by emit-log -l, each confirmed: more is better"
        rows = [Row(name, of, "lines/s", rates["no stream bound"]) for name, of in rates.items()]
        return Section("history-publishing", title, "no stream bound", rows)

    def count(self, pair: Pair) -> int:
        """Lines for this contestant."""
        return round(self.plan.lines * pair.share)

    def deliver_lines(self, pair: Pair) -> Delivery:
        """All lines."""
        return deliver(pair, self.make_lines(self.count(pair), 100))

    def cpu_cost(self, pair: Pair, side: str, delivery: Delivery, count: int) -> float:
        """CPU seconds of a side for 100,000 messages, less those of a single one: the cost of start and end."""
        whole, single = (one.publisher.cpu if side == "publisher" else fmean(usage.cpu for usage in one.receivers)
                         for one in (delivery, self.idle(pair)))
        return (whole - single) / (count - 1) * 100_000

    def by_turns(self, what: str, contestants: list[T], work: Callable[[T], R], turns: int = 0,
                 seconds: float = 0) -> dict[T, list[R]]:
        """A, B, A, B and so on; by default as the plan has it."""
        results: dict[T, list[R]] = {contestant: [] for contestant in contestants}
        for _ in rounds(what, turns or self.plan.rounds, seconds or self.plan.seconds):
            for contestant in contestants:
                results[contestant].append(work(contestant))
        return results


def rounds(what: str, most: int, seconds: float) -> Iterator[int]:
    """The numbers of the rounds, until there are enough, or another would take too long."""
    start = now()
    for turn in range(1, most + 1):
        say(f"{what}: round {turn} of {most}")
        yield turn
        took = now() - start
        if took + took / turn > seconds:
            break


def say(what: str) -> None:
    """Progress: one line that the next one replaces, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def binary(size: int) -> str:
    """Bytes for people."""
    for unit, bytes in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= bytes:
            return f"{size // bytes} {unit}"
    return f"{size} B"
