"""The node of the soak tests, and emit-log."""

import os
import re
import signal
import subprocess
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path

import pika

URL = os.environ["AMQP_URL"]
NOWHERE = "amqp://127.0.0.1:1"
EMIT_LOG = os.environ["EMIT_LOG"]


@contextmanager
def channel():
    with closing(pika.BlockingConnection(pika.URLParameters(URL))) as connection:
        yield connection.channel()


def bind(name: str) -> None:
    """Declares a durable exchange, and a durable queue that is bound to it."""
    with channel() as broker:
        broker.exchange_declare(name, "fanout", durable=True)
        broker.queue_declare(name, durable=True)
        broker.queue_bind(name, name)


class Emitter:
    """emit-log with a spool. The end of the `with` block kills it."""

    def __init__(self, spool: Path, *options: str, url: str = URL, exchange: str = "soak",
                 stdin: int = subprocess.DEVNULL, under: tuple[str, ...] = ()) -> None:
        self.log = tempfile.TemporaryFile()
        command = [*under, EMIT_LOG, "--lines", "--durable", "--exchange", exchange, "--uri", url, "--spool", spool,
                   *options]
        self.process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.DEVNULL, stderr=self.log)

    def __enter__(self) -> "Emitter":
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)
        self.log.close()

    def end(self, number: int) -> int | None:
        self.process.send_signal(number)
        return self.wait()

    def wait(self, patience: float = 180) -> int | None:
        """Waits for the exit status; None if the process does not exit."""
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            return None

    def stderr(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def count(self, what: str) -> int:
        """N, if the last line on stderr has "N what"; else 0."""
        counts = re.findall(rf"(\d+) {what}", self.stderr().rstrip().rpartition("\n")[2])
        return int(counts[0]) if counts else 0
