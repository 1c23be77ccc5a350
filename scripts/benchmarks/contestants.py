"""The programs that are compared, and their commands. All read the URL of the broker from AMQP_URL."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELEASE = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
BENCH = ROOT / "target" / "bench"
HERE = Path(__file__).resolve().parent

Command = tuple[str, ...]

BROKER = os.environ.get("AMQP_URL", "")
EMIT_LOG = str(RELEASE / "emit-log")
RECEIVE_LOGS = str(RELEASE / "receive-logs")
YARDSTICK = str(BENCH / "yardstick")
FLOOR = str(BENCH / "floor")
LATENCY = str(BENCH / "latency")
LAUNCH = str(BENCH / "launch")
DELAY = str(BENCH / "delay")
PIKA = (sys.executable, str(HERE / "pika_lines.py"))
PIKA_EXAMPLE = (sys.executable, str(ROOT / "tests" / "pika" / "emit_log.py"))
AMQP_PUBLISH = ("amqp-publish", "--url", BROKER, "--exchange", "logs", "--routing-key", "")


@dataclass(frozen=True)
class Pair:
    """A publisher of the lines on its standard input, and a receiver that writes lines to its standard output.

    The receiver prints "Waiting for logs" to standard error when it is subscribed, and has the option `-n COUNT`.
    """

    publisher: str
    receiver: str
    publish: Command
    consume: Command
    share: float = 1.0
    """The part of the lines that it gets. Slow programs get fewer lines, and are compared by rate."""


C = Pair("C yardstick", "C consumer", (YARDSTICK, "publish"), (YARDSTICK, "consume"))
C_NO_ACK = Pair("C yardstick, no acks", "C consumer, no acks", (YARDSTICK, "publish"), (YARDSTICK, "consume", "-a"))
CONFIRMED = Pair("emit-log -l", "receive-logs -r", (EMIT_LOG, "-l"), (RECEIVE_LOGS, "-r"))
UNCONFIRMED = Pair("emit-log -l --no-confirm", "receive-logs -r", (EMIT_LOG, "-l", "--no-confirm"), CONFIRMED.consume)
BATCH = Pair("emit-log -l --batch", "receive-logs -r (batches)", (EMIT_LOG, "-l", "--batch"), CONFIRMED.consume)
TOPIC = ("-e", "logs_topic", "--exchange-type", "topic")
KEYED = Pair("emit-log -l -k '{tag}.{severity}'", "receive-logs -r (topic)",
             (EMIT_LOG, "-l", *TOPIC, "--tag", "app", "-k", "{tag}.{severity}"), (RECEIVE_LOGS, "-r", *TOPIC))
# amqp-consume would start a process for every message, so the yardstick receives.
AMQP_PUBLISH_LINES = Pair("amqp-publish -l", "C consumer", (*AMQP_PUBLISH, "-l"), (YARDSTICK, "consume", "-b"))
PIKA_BOTH = Pair("pika (Python)", "pika (Python)", (*PIKA, "publish"), (*PIKA, "consume"), share=0.1)

LINES = [C, C_NO_ACK, CONFIRMED, KEYED, UNCONFIRMED, BATCH, AMQP_PUBLISH_LINES, PIKA_BOTH]
PUBLISHERS = [C, CONFIRMED, UNCONFIRMED, BATCH, AMQP_PUBLISH_LINES, PIKA_BOTH]
RECEIVERS = [C, C_NO_ACK, CONFIRMED, BATCH, PIKA_BOTH]
"""The pairs of LINES that differ in the publisher, or in the receiver."""

FAR = [UNCONFIRMED, CONFIRMED, BATCH, AMQP_PUBLISH_LINES]
CROWD = [C_NO_ACK, C, CONFIRMED, UNCONFIRMED, BATCH]
"""The pairs with many receivers."""
LINGERING = [Pair(f"--linger {time}", BATCH.receiver, (*BATCH.publish, "--linger", time), BATCH.consume)
             for time in ("0", "1ms", "5ms", "20ms", "100ms")]
CAT = Pair("cat (the error of the instrument)", "", ("cat",), ())


@dataclass(frozen=True)
class Source:
    """A stream or a queue, bound to an exchange of the same name."""

    name: str
    declare: Command
    """A receiver. When it prints "Waiting for logs", it has created and bound the source."""
    publish: Command
    """A publisher of the lines on its standard input."""
    keeps: bool
    """Whether lines can be read more than once."""


def stream(name: str, *publishing: str) -> Source:
    """A stream, and the command of emit-log that publishes into it."""
    declare = (RECEIVE_LOGS, "-r", "-e", name, "--stream", name)
    return Source(name, declare, (EMIT_LOG, "-l", "-e", name, *publishing), keeps=True)


def queue(name: str, *publishing: str) -> Source:
    """A classic queue, and the command of emit-log that publishes into it."""
    declare = (RECEIVE_LOGS, "-r", "-e", name, "--queue", name, "--queue-type", "classic")
    return Source(name, declare, (EMIT_LOG, "-l", "-e", name, *publishing), keeps=False)


@dataclass(frozen=True)
class Reader:
    """A receiver that exits when it has read the lines that were published before."""

    name: str
    source: Source
    read: Command
    """With `{count}` for the number of lines. The output is written to the file `{output}` or to standard output."""
    pattern: str = ""
    """The lines to write, as a regular expression."""


def reader(label: str, source: Source, pattern: str = "") -> Reader:
    """receive-logs."""
    ends = ("--from-start", "--no-follow") if source.keeps else ("-n", "{count}")
    # In a format string, braces are doubled.
    filters = ("--grep", pattern.replace("{", "{{").replace("}", "}}")) if pattern else ()
    return Reader(label, source, (*source.declare, *ends, *filters, "-o", "{output}"), pattern)


STREAM = stream("stream")
ONE_OF_A_HUNDRED = "^[0-9]{8}00 "
"""A pattern for the numbers at the start of lines."""
READERS = [
    Reader("C consumer", STREAM, (YARDSTICK, "consume", "-s", STREAM.name, "-n", "{count}")),
    reader("receive-logs -r --stream", STREAM),
    reader("receive-logs -r --stream --grep (1 % match)", STREAM, ONE_OF_A_HUNDRED),
    reader("receive-logs -r --queue", queue("queue")),
    reader("receive-logs -r --stream (batches)", stream("stream-of-batches", "--batch")),
    reader("receive-logs -r --queue (batches)", queue("queue-of-batches", "--batch")),
]
UNBOUND: Command = (EMIT_LOG, "-l", "-e", "unbound")
BOUND = stream("bound")

SHIPPED = ("-e", "unbound")
SHIPPERS: dict[str, Command] = {
    "tail | emit-log -l": ("sh", "-c", f"tail -n +1 {{path}} | {EMIT_LOG} -l -e unbound"),
    "emit-log --follow": (EMIT_LOG, *SHIPPED, "--no-follow", "--position", "{path}.position", "--follow", "{path}"),
    "tail | emit-log -l --batch": ("sh", "-c", f"tail -n +1 {{path}} | {EMIT_LOG} -l --batch -e unbound"),
    "emit-log --follow --batch": (
        EMIT_LOG, *SHIPPED, "--batch", "--no-follow", "--position", "{path}.position", "--follow", "{path}"),
}
"""The commands that send the lines of a file."""

TRIPS: dict[str, Command] = {
    "amqp-publish (C)": (*AMQP_PUBLISH, "--body", "far"),
    "emit-log": (EMIT_LOG, "far"),
    "emit-log --no-confirm": (EMIT_LOG, "--no-confirm", "far"),
    "pika (Python)": (*PIKA_EXAMPLE, "far"),
    "receive-logs": (RECEIVE_LOGS,),
    "receive-logs --queue": queue("far-queue").declare,
    "receive-logs --stream": stream("far-stream").declare,
}
"""The commands that publish one message, or subscribe."""

ONE_MESSAGE = {
    "amqp-publish (C)": lambda body: (*AMQP_PUBLISH, "--body", body),
    "emit-log": lambda body: (EMIT_LOG, body),
    "pika (Python)": lambda body: (*PIKA_EXAMPLE, body),
    "floor: raw socket": lambda body: (FLOOR, body),
    "floor: empty process": lambda body: (FLOOR,),
}
EMPTY = "floor: empty process"
