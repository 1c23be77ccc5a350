"""The programs of a round, and the threads that feed, read and restart them."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from bisect import bisect_right
from pathlib import Path

from records import Job

BANNER = "Waiting for logs"
END_LIMIT = 90
"""Seconds within which each program ends after the last fault."""


class Life:
    """A process. Its standard error is recorded by line, with times."""

    def __init__(self, name: str, round_, command: list, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) -> None:
        self.name, self.history = name, round_.history
        self.notes: list[tuple[float, str]] = []
        self.signals: list[tuple[float, int]] = []
        self.was_stopped = False
        self.copier: threading.Thread | None = None
        """Copies the output, if it is read slowly."""
        self.memory = self.threads = self.files = 0
        self.started, self.ended = time.monotonic(), None
        self.history.add(f"{name} starts: {' '.join(map(str, command))}")
        # With a faked clock, the library of libfaketime reads the offset from a file.
        self.process = subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE,
                                        env=round_.environment(name.split(".")[0]))
        self.reader = threading.Thread(target=self.read_notes, daemon=True)
        self.reader.start()
        round_.lives.append(self)

    def read_notes(self) -> None:
        for line in self.process.stderr:
            self.notes.append((time.monotonic(), text := line.decode(errors="replace").rstrip("\n")))
            self.history.add(f"{self.name}: {text}")

    def send(self, number: int) -> None:
        if self.status is None:
            self.signals.append((time.monotonic(), number))
            self.history.add(f"{self.name} gets {signal.Signals(number).name}")
            self.was_stopped |= number == signal.SIGSTOP
            self.process.send_signal(number)

    @property
    def status(self) -> int | None:
        return self.process.poll()

    def has_ended(self, patience: float = 0) -> bool:
        """Waits for the end, and for the last line of standard error."""
        if self.ended is None:
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                return False
            self.ended = time.monotonic()
            self.reader.join()
            self.process.stderr.close()
            self.history.add(f"{self.name} ends with {self.status}")
        return True

    def got(self, number: int) -> bool:
        return any(sent == number for _, sent in self.signals)

    def text(self) -> str:
        return "\n".join(text for _, text in self.notes)

    def times(self, pattern: str) -> list[float]:
        return [at for at, text in self.notes if re.search(pattern, text)]

    def sample(self) -> None:
        """Records the peak memory (bytes), and the maximum of threads and open files."""
        try:
            proc = Path(f"/proc/{self.process.pid}")
            fields = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
            self.memory = max(self.memory, 1024 * int(fields["VmHWM"].split()[0]))
            self.threads = max(self.threads, int(fields["Threads"]))
            self.files = max(self.files, len(list((proc / "fd").iterdir())))
        except (OSError, KeyError, ValueError):
            pass  # the process has exited

    def cpu(self) -> float:
        """Seconds of processor time."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Input:
    """What one life of emit-log could read: the records from `first` on. `reads` are times and bytes read by then."""

    def __init__(self, job: Job) -> None:
        self.job, self.first, self.ends = job, job.written + 1, [0]
        self.reads: list[tuple[float, int]] = []
        self.is_complete = False

    def open(self, terminator: bytes) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.terminator, self.pending, self.written = terminator, b"", 0

    def add(self) -> None:
        text = self.job.next()
        self.pending += text + self.terminator
        self.ends.append(self.ends[-1] + len(text) + 1)

    def write(self) -> None:
        try:
            size = os.write(self.writer, self.pending) if self.pending else 0
            self.written, self.pending = self.written + size, self.pending[size:]
        except BlockingIOError:
            time.sleep(0.002)
        self.record_reads()

    def record_reads(self) -> None:
        waiting = fcntl.ioctl(self.reader, termios.FIONREAD, bytes(4))
        self.reads.append((time.monotonic(), self.written - int.from_bytes(waiting, sys.byteorder)))

    def close(self) -> None:
        self.is_complete = not self.pending
        os.close(self.writer)

    def last(self) -> int:
        return self.first + len(self.ends) - 2

    def read_by(self, when: float) -> int:
        """Bytes that were read by this time, at least."""
        return max((size for at, size in self.reads if at <= when), default=0)

    def fragment(self) -> bytes:
        """The part of a record that was read last."""
        size = self.reads[-1][1] if self.reads else 0
        whole = self.whole(size)
        start = self.ends[whole]
        return self.job.record(self.first + whole)[:size - start] if whole < len(self.ends) - 1 else b""

    def whole(self, size: int) -> int:
        """The number of whole records in this number of bytes."""
        return bisect_right(self.ends, size) - 1


class Program(threading.Thread):
    """A program that is started again when it ends, until the round is over."""

    def __init__(self, name: str, spec: dict, round_) -> None:
        super().__init__(daemon=True, name=name)
        self.spec, self.round = spec, round_
        self.lives: list[Life] = []

    def start_life(self, command: list, **pipes) -> Life:
        life = Life(f"{self.name}.{len(self.lives) + 1}", self.round, command, **pipes)
        self.lives.append(life)
        return life

    def send(self, number: int) -> None:
        if self.lives:
            self.lives[-1].send(number)

    def is_over(self) -> bool:
        return self.round.is_over.is_set()

    def pause(self) -> None:
        self.round.is_over.wait(0.3)


class Emitter(Program):
    """emit-log with words, or with lines from a pipe."""

    def __init__(self, name: str, spec: dict, round_) -> None:
        super().__init__(name, spec, round_)
        self.inputs: list[Input] = []
        self.budget = spec["records"]
        """How many records it may still write, so that the end of a round does not take long."""

    def command(self) -> list:
        return [self.round.emit_log, "--durable", *self.spec["options"]]

    def new_job(self) -> Job:
        job = Job(f"{self.name}x{len(self.inputs) + 1}", self.spec["size"], self.spec["with_empty"])
        self.round.jobs[job.name] = job
        return job

    def run(self) -> None:
        while not self.is_over() and self.budget > 0:
            self.words() if self.spec["kind"] == "words" else self.feed(self.new_job())
            self.pause()

    def words(self) -> None:
        job = self.new_job()
        self.inputs.append(given := Input(job))
        text = job.next()
        given.ends.append(len(text) + 1)
        given.is_complete = True
        self.budget -= 1
        self.start_life([*self.command(), "--", text]).has_ended(END_LIMIT)
        self.round.is_over.wait(1 / self.spec["rate"])

    def feed(self, job: Job) -> None:
        """Feeds one life until its end, or until it has its number of records."""
        given, due = Input(job), time.monotonic()
        given.open(b"\0" if "--null" in self.spec["options"] else b"\n")
        life = self.start_life(self.command(), stdin=given.reader)
        self.inputs.append(given)
        count = min(self.budget, self.round.random.choice([100, 2_000, 1_000_000]))
        while life.status is None and (given.pending or count > 0 and not self.is_over()):
            while count > 0 and len(given.pending) < 4096 and due <= time.monotonic() and not self.is_over():
                given.add()
                count, self.budget, due = count - 1, self.budget - 1, due + 1 / self.spec["rate"]
            given.write()
            if not given.pending:
                time.sleep(min(0.02, max(0.0, due - time.monotonic())))
        given.close()
        while not life.has_ended(0.05) and not self.round.is_late():
            given.record_reads()
        given.record_reads()
        os.close(given.reader)


class Spooling(Emitter):
    """emit-log --spool. All its lives have one directory, and records of one job."""

    def command(self) -> list:
        return [*super().command(), "--spool", self.round.disk / self.name]

    def run(self) -> None:
        job = self.new_job()
        while not self.is_over() and self.budget > 0:
            self.feed(job)
            self.pause()
        self.round.is_over.wait()
        self.budget = 0
        self.feed(job)  # sends the rest


class Following(Emitter):
    """emit-log --follow of a file that a thread writes."""

    def command(self) -> list:
        return [*super().command(), "--from-start", "--position", self.round.disk / f"{self.name}.position",
                "--follow", self.path()]

    def path(self) -> Path:
        return self.round.directory / f"{self.name}.log"

    def run(self) -> None:
        self.job, self.lock, self.rotations = self.new_job(), threading.Lock(), 0
        self.file = open(self.path(), "ab", buffering=0)
        writer = threading.Thread(target=self.write, daemon=True)
        writer.start()
        while not self.is_over():
            life = self.start_life(self.command())
            while not life.has_ended(0.1) and not self.is_over():
                pass
            self.pause()
        writer.join()
        life.send(signal.SIGTERM)
        if life.has_ended(END_LIMIT):
            self.start_life([*self.command(), "--no-follow"]).has_ended(END_LIMIT)

    def write(self) -> None:
        due = time.monotonic()
        while not self.is_over() and self.budget > 0:
            with self.lock:
                while due <= time.monotonic() and self.budget > 0:
                    self.file.write(self.job.next() + b"\n")
                    self.budget, due = self.budget - 1, due + 1 / self.spec["rate"]
            time.sleep(0.005)

    def rotate(self) -> None:
        # A file that emit-log has never seen is none of its files.
        if not (self.round.disk / f"{self.name}.position").exists():
            return
        with self.lock:
            self.rotations += 1
            old = self.path().with_name(f"{self.name}.log.{self.rotations}")
            self.round.history.add(f"{self.name} rotates its file to {old.name}")
            if self.spec["copytruncate"]:
                old.write_bytes(self.path().read_bytes())
                self.file.truncate(0)
            else:
                self.path().rename(old)
                self.file.close()
                self.file = open(self.path(), "ab", buffering=0)


class Receiver(Program):
    """receive-logs. Each life writes a file of its own, except with --output."""

    def output(self, life: int) -> Path:
        if self.spec["kind"] == "copy":
            return self.round.disk / f"{self.name}.out"
        return self.round.directory / f"{self.name}.{life}.out"

    def command(self) -> list:
        command = [self.round.receive_logs, "--durable", "-f", self.spec["format"], *self.spec["options"]]
        if self.spec["kind"] == "copy":
            command += ["--resume", self.round.disk / f"{self.name}.resume", "-o", self.output(0)]
        return command

    def run(self) -> None:
        while True:
            life = self.start_receiver(len(self.lives) + 1)
            while not life.has_ended(0.1) and not self.is_over():
                pass
            if not life.has_ended() or self.round.is_abandoned:
                break
            self.pause()

    def start_receiver(self, number: int) -> Life:
        if self.spec["kind"] == "copy":
            return self.start_life(self.command())
        with open(self.output(number), "ab", buffering=0) as file:
            if not self.spec["pace"]:
                return self.start_life(self.command(), stdout=file)
            reader, writer = os.pipe()
            copier = threading.Thread(target=self.copy, args=(reader, os.dup(file.fileno())), daemon=True)
            copier.start()
            life = self.start_life(self.command(), stdout=writer)
            os.close(writer)
        life.copier = copier
        return life

    def copy(self, reader: int, file: int) -> None:
        """Reads slowly, and stops at times."""
        while data := os.read(reader, 1 << 14):
            os.write(file, data)
            if not self.is_over():
                self.round.is_over.wait(self.spec["pace"] * (20 if len(data) % 37 == 0 else 1))
        os.close(reader)
        os.close(file)

    def has_banner(self) -> bool:
        return bool(self.lives and self.lives[-1].times(BANNER))

    def stop(self) -> None:
        """Ends the last life, and waits until its output is read."""
        self.join()
        life = self.lives[-1]
        life.send(signal.SIGTERM)
        if life.has_ended(20) and life.copier:
            life.copier.join()


EMITTERS = {"words": Emitter, "lines": Emitter, "spool": Spooling, "follow": Following}
