"""The promises of docs/guarantees.md, as checks of what the programs of a round have done."""

import base64
import json
import re
import signal
from collections import Counter
from dataclasses import dataclass, field

from nodes import PROBE, SECRET, NotRecovered
from records import place_of

MIB = 1 << 20
WITNESSES = ("quorum-witness", "stream-witness")
"""Queues that are bound all the time. They show which messages the broker has got."""
MEMORY = {"emit-log": 64 * MIB, "receive-logs": 96 * MIB}
THREADS, FILES = 20, 64
IN_MEMORY = 0.4
"""Seconds after which a kill must not lose a line that a spool has read. 100 ms are promised; the machine is busy."""
STOP = {"emit-log": 7, "receive-logs": 4.5}
"""Seconds to end after SIGTERM: 5 and 2 are promised."""
IDLE = 0.05
"""Seconds of processor time in an idle second."""
READ_LIMIT = 60
"""Seconds in which a queue delivers something, until its last message."""
COUNTS = re.compile(r"(\d+) confirmed, (\d+) in doubt(?:, (\d+) read and not sent)?")
GAP = re.compile(r"missed (?:up to )?\d+ messages? from run (\w+) \((\d+)(?: to (\d+))?\)")

ENDS = "Every program ends in time, within its limits, with a status of the table, without a panic or a printed password"
NUMBERS = "A record that is sent again has the same number; the records of an input arrive in order"
CONFIRMED = "emit-log: status 0 means that every durable queue has every record; the counts are right"
SPOOL = "emit-log --spool: every line that was read is sent, across kills"
FOLLOW = "emit-log --follow: every line of the files is sent, across kills and rotations"
EXCLUSIVE = "receive-logs: every record is written once, whole and in order; exactly the missing ones are reported"
QUEUE = "receive-logs --queue: every record is written, across kills"
STREAM = "receive-logs --stream: the output is a part of the stream, without gaps"
COPY = "receive-logs --stream --resume --output: the file has every record exactly once, across kills"
KINDS = {"exclusive": EXCLUSIVE, "queue": QUEUE, "shared": QUEUE, "stream": STREAM, "copy": COPY}


@dataclass
class Record:
    run: str
    number: int
    text: bytes
    key: str


@dataclass
class Store:
    """The records of a queue: all copies, and the first ones."""
    copies: list[Record] = field(default_factory=list)
    first: dict[tuple[str, int], Record] = field(default_factory=dict)

    def add(self, message_id: str, kind: str | None, key: str, body: bytes) -> str | None:
        """Returns a violation."""
        if not (found := re.fullmatch(r"emit-log/(\w+)/(\d+)", message_id or "")):
            return f"a message has the id {message_id}"
        texts = body.split({"lines": b"\n", "records": b"\0"}[kind]) if kind else [body]
        for number, text in enumerate(texts, int(found[2])):
            record = Record(found[1], number, text, key)
            self.copies.append(record)
            if self.first.setdefault((record.run, number), record).text != text:
                return f"number {number} of run {record.run} has two texts: {text[:80]!r}"
        return None


def last_counts(life) -> re.Match | None:
    """The counts in the last line of an emit-log."""
    return COUNTS.search(life.notes[-1][1]) if life.notes else None


class Check:
    def __init__(self, round_) -> None:
        self.round, self.promise = round_, ENDS
        self.violations: list[tuple[str, str]] = []
        self.checked: Counter = Counter()
        """Records by promise."""
        self.losses: dict[str, int] = {}
        """Confirmed records that the broker has lost, or did not deliver and still has, by queue."""

    def that(self, holds: bool, violation: str) -> None:
        if not holds:
            self.violations.append((self.promise, violation))
            self.round.history.add(f"VIOLATION: {self.promise}: {violation}")

    def none(self, found, what: str) -> None:
        """Nothing must be found. `what` says what it would be."""
        examples = ", ".join(str(example)[:100] for example in sorted(found)[:3])
        self.that(not found, f"{what}: {len(found)}, such as {examples}")

    def promises(self, promise: str, records: int) -> None:
        """The following checks are of this promise, with this number of records."""
        self.promise = promise
        self.checked[promise] += records

    def records(self) -> int:
        return self.checked[NUMBERS]

    def run(self) -> None:
        self.promises(ENDS, len(self.round.lives))
        for life in self.round.lives:
            self.life(life)
        self.read_stores()
        self.numbers()
        self.broker_losses()
        for emitter in self.round.emitters:
            if emitter.spec["kind"] in ("words", "lines"):
                self.lines(emitter)
            elif emitter.spec["kind"] == "spool":
                self.spool(emitter)
            else:
                self.follow(emitter)
        for receiver in self.round.receivers:
            self.receiver(receiver)
        self.queues()

    ## Every program: it ends, within its limits, with a status of the table, without a panic or a secret

    def life(self, life) -> None:
        text, name = life.text(), life.process.args[0].name
        self.that("panicked" not in text, f"{life.name} panicked")
        self.that(SECRET not in text, f"{life.name} printed a password")
        self.that(life.ended is not None, f"{life.name} does not end")
        self.that(life.status in self.statuses(life, name), f"{life.name} ended with {life.status}: {text[-300:]}")
        self.that(life.memory <= MEMORY[name], f"{life.name} used {life.memory / MIB:.0f} MiB")
        self.that(life.threads <= THREADS, f"{life.name} had {life.threads} threads")
        self.that(life.files <= FILES, f"{life.name} had {life.files} open files")
        terms = [at for at, number in life.signals if number == signal.SIGTERM]
        if terms and life.ended and not life.was_stopped:
            self.that(life.ended - terms[0] <= STOP[name], f"{life.name} took {life.ended - terms[0]:.1f} s to end")

    def statuses(self, life, name: str) -> set[int]:
        """The exit statuses that the faults explain. The negative ones are signals."""
        done = self.round.done
        ends = {-number for _, number in life.signals if number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)}
        if name == "emit-log":
            ends |= {0, 69}
            if self.round.exchange_deleted:
                ends.add(67)
        elif life.got(signal.SIGTERM) or life.got(signal.SIGHUP):
            ends |= {0, 74}
        if done["permission revoked"] or done["password changed"]:
            ends.add(77)
        if self.round.disk_was_full:
            ends.add(74)
        return ends

    def idle(self, life, seconds: float) -> None:
        self.promise = ENDS
        self.that(seconds <= IDLE, f"{life.name} used {seconds:.2f} s of processor time in an idle second")

    ## What the broker has got

    def read_stores(self) -> None:
        streams = {r.spec["queue"] for r in self.round.receivers if r.spec["kind"] in ("stream", "copy")}
        self.stores = {queue: self.read(queue) for queue in sorted({*WITNESSES, *streams})}
        self.promise, self.all = NUMBERS, {}
        for queue, store in self.stores.items():
            for place, record in store.first.items():
                self.that(self.all.setdefault(place, record).text == record.text, f"{place} has two texts, in {queue}")
        self.places = {record.text: place for place, record in self.all.items()}
        self.promises(NUMBERS, len(self.all))
        self.sent_again = {place for store in self.stores.values() for place, count in Counter(
            (record.run, record.number) for record in store.copies).items() if count > 1}
        self.fragments = {given.fragment() for emitter in self.round.emitters for given in emitter.inputs} - {b""}

    def read(self, queue: str) -> Store:
        """Reads a queue to a message that is sent now, and the messages of the next second."""
        store, is_at_end, silent = Store(), False, 0
        with self.round.channel() as channel:
            channel.confirm_delivery()
            channel.basic_publish("", queue, b"end")
            channel.basic_qos(prefetch_count=2000)
            arguments = {"x-stream-offset": "first"} if queue.startswith("stream") else {}
            messages = channel.consume(queue, arguments=arguments, inactivity_timeout=1)
            for count, (method, properties, body) in enumerate(messages, 1):
                if method is None and is_at_end:
                    break
                if method is None:
                    silent += 1
                    if silent > READ_LIMIT:
                        raise NotRecovered(f"queue '{queue}' does not deliver its last message in {READ_LIMIT} s")
                    continue
                silent = 0
                if properties.message_id is None and body == b"end":
                    is_at_end = True
                    continue
                if properties.message_id is None and body == PROBE:
                    continue
                if violation := store.add(properties.message_id, properties.type, method.routing_key, body):
                    self.that(False, f"{queue}: {violation}")
                if count % 1000 == 0:
                    channel.basic_ack(method.delivery_tag, multiple=True)
        return store

    def numbers(self) -> None:
        """A record that is sent again has the same number. The records of an input arrive in their order."""
        self.by_job: dict[str, dict[str, set[int]]] = {}
        sent = Counter(record.text for record in self.all.values() if record.text)
        again = [text for text, count in sent.items() if count > 1 and text not in self.fragments]
        self.none(again, "records with several numbers")
        for queue, store in self.stores.items():
            last, late, unknown = Counter(), [], []
            jobs = self.by_job[queue] = {}
            for numbered, record in store.first.items():
                if place := place_of(record.text, self.round.jobs):
                    job, number = place
                    # A queue without its leader nacks messages, and gets them when they are sent again.
                    was_nacked = self.round.node_was_lost and numbered in self.sent_again
                    # A queue that is bound again may get a record only when it is sent again.
                    is_damaged = self.round.exchange_deleted or queue in self.round.damaged_queues
                    if number <= last[job] and not is_damaged and not was_nacked:
                        late.append(f"record {number} of {job} after {last[job]}")
                    last[job] = max(last[job], number)
                    jobs.setdefault(job, set()).add(number)
                elif record.text and record.text not in self.fragments:
                    unknown.append(record.text[:80])
            self.none(late, f"late records in {queue}")
            self.none(unknown, f"records in {queue} that nobody has sent")

    def arrived(self, job: str) -> set[int]:
        """The numbers of the records of a job that a witness has got. Empty records are not among them."""
        return set().union(*(self.by_job[queue].get(job, ()) for queue in WITNESSES))

    def missing(self, job, numbers) -> list[int]:
        """The numbers of the records that have not arrived. Empty records count as arrived."""
        arrived = self.arrived(job.name)
        return [number for number in numbers if number not in arrived and job.record(number)]

    def broker_losses(self) -> None:
        """A message goes to all queues. If a queue has not got it, although emit-log has seen it confirmed, the broker
        has lost it. That is not counted as a violation."""
        doubtful = self.in_doubt() | self.fragments
        for queue in WITNESSES:
            first = self.stores[queue].first
            lost = sum(place not in first and record.text not in doubtful for place, record in self.all.items())
            if lost and not self.round.exchange_deleted:
                self.losses[queue] = lost
                self.round.history.add(f"RabbitMQ has lost {lost} confirmed records in {queue}")

    ## emit-log: exit status 0 means that the broker has confirmed every message, in input order

    def lines(self, emitter) -> None:
        for life, given in zip(emitter.lives, emitter.inputs):
            job, numbers = given.job, range(given.first, given.last() + 1)
            self.promises(CONFIRMED, len(numbers))
            missing = self.missing(job, numbers)
            if self.round.exchange_deleted:
                continue
            if life.status == 0:
                self.that(given.is_complete, f"{life.name} ended with 0 before the end of its input")
                self.none(missing, f"records missing although {life.name} ended with 0")
            arrived = self.arrived(job.name)
            later = [number for number in missing if number < max(arrived, default=0)]
            self.none(later, f"records that {life.name} left out")
            if (counts := last_counts(life)) and not emitter.spec["with_empty"]:
                confirmed, doubt, _ = (int(count or 0) for count in counts.groups())
                fragment = given.fragment()
                is_partial = fragment and place_of(fragment, self.round.jobs) is None
                count = len(arrived) + bool(is_partial and fragment in self.places)
                is_right = confirmed <= count <= confirmed + doubt
                self.that(is_right, f"{life.name} counts {counts[0]}; {count} have arrived")

    ## emit-log --spool: each line that emit-log has read is confirmed, or on disk

    def spool(self, emitter) -> None:
        self.promises(SPOOL, emitter.inputs[0].job.written)
        self.last_life(emitter)
        for life, given in zip(emitter.lives, emitter.inputs):
            size = given.reads[-1][1] if given.reads else 0
            if life.status == -signal.SIGKILL:
                risky = [at for at, number in life.signals if number in (signal.SIGKILL, signal.SIGSTOP)]
                size = 0 if self.round.disk_was_full else given.read_by(min(risky) - IN_MEMORY)
            kept = range(given.first, given.first + given.whole(size))
            missing = self.missing(given.job, kept)
            if not self.round.exchange_deleted and len(missing) > self.lost_by(life):
                self.none(missing, f"lines of {len(kept)} that {life.name} has read and lost")

    ## emit-log --follow: each line of the files is sent, under the same number each time

    def follow(self, emitter) -> None:
        self.promises(FOLLOW, emitter.job.written)
        self.last_life(emitter)
        missing = self.missing(emitter.job, range(1, emitter.job.written + 1))
        if not self.round.exchange_deleted:
            self.none(missing, f"lines of {emitter.job.written} that {emitter.name} has lost")

    def lost_by(self, life) -> int:
        """The records that an emit-log with a spool counts in its last line as neither confirmed nor on disk."""
        if not self.round.disk_was_full or not life.notes:
            return 0
        counts = re.search(r" (\d+) in doubt(?:.* (\d+) dropped)?", life.notes[-1][1])
        return sum(int(count or 0) for count in counts.groups()) if counts else 0

    def last_life(self, emitter) -> None:
        """The last life has no faults and no new input."""
        status = emitter.lives[-1].status
        self.that(status == 0, f"the last life of {emitter.name} ended with {status}")

    ## receive-logs writes each message that its queue receives once, whole, in each publisher's order

    def receiver(self, receiver) -> None:
        kind, is_json = receiver.spec["kind"], receiver.spec["format"] == "json"
        self.promise = KINDS[kind]
        receiver.written = []
        lives = receiver.lives[-1:] if kind == "copy" else receiver.lives
        for number, life in enumerate(lives, 1):
            written = self.written(receiver, life, number, is_json)
            receiver.written.append(written)
            self.promises(KINDS[kind], len(written))
            counts = Counter(token for token in written if token not in self.fragments)
            twice = [token for token, count in counts.items() if count > 1]
            # Of a shared queue, a receiver remembers only 4,096 separate numbers of a run.
            if kind != "shared" or len(written) <= 4096:
                self.none(twice, f"records that {life.name} wrote twice")
            if kind == "exclusive":
                self.exclusive(receiver, life, written, life is receiver.lives[-1])
            if kind == "stream" and not self.is_damaged(receiver):
                self.stream(receiver, life, written, life is receiver.lives[-1])
            if kind == "copy":
                expected = self.tokens(self.stores[receiver.spec["queue"]].first.values(), receiver)
                self.same(written, expected, f"the file of {receiver.name}")
            if kind == "exclusive":
                self.order(life, written)

    def is_damaged(self, receiver) -> bool:
        queue = receiver.spec["queue"]
        return (self.round.exchange_deleted or queue in self.round.damaged_queues
                or queue.startswith("classic") and self.round.node_was_lost)

    def tokens(self, records, receiver) -> list:
        """What identifies the records in the output: the number in JSON, else the text. Raw empty records have none."""
        is_json = receiver.spec["format"] == "json"
        expected = self.expected(records, receiver)
        return [(record.run, record.number) if is_json else record.text for record in expected]

    def expected(self, records, receiver) -> list[Record]:
        """The records that the receiver has bound. Raw empty records cannot be told apart, and are not among them."""
        is_json, has_all = receiver.spec["format"] == "json", "*.error" not in receiver.spec["options"]
        return [record for record in records
                if (is_json or record.text) and (has_all or record.key.endswith(".error"))]

    def written(self, receiver, life, number: int, is_json: bool) -> list:
        data = receiver.output(number).read_bytes()
        *lines, rest = data.split(b"\n")
        may_tear = life.got(signal.SIGKILL) or re.search("could be written|not written in time", life.text())
        self.that(not rest or may_tear, f"{life.name} ended in the middle of a record: {rest[:80]!r}")
        written, unknown = [], []
        for line in lines:
            text, token = line, line
            if line == PROBE or is_json and b'"body":"probe"' in line:
                continue
            if is_json:
                line = json.loads(line)
                text = line["body"].encode() if "body" in line else base64.b64decode(line["body_base64"])
                run, last = line["properties"]["message_id"].split("/")[1:]
                token = (run, int(last))
                known = self.all.get(token)
                self.that(known is None or known.text == text, f"{life.name} wrote a wrong text for {token}")
            if text and text not in self.places and text not in self.fragments and not place_of(text, self.round.jobs):
                unknown.append(text[:80])
            if token:
                written.append(token)
        self.none(unknown, f"records that {life.name} wrote and nobody has sent")
        return written

    def place(self, token) -> tuple[str, int] | None:
        return token if isinstance(token, tuple) else self.places.get(token)

    def order(self, life, written: list) -> None:
        """Only a record that was sent again may come late."""
        last, late = Counter(), []
        for token in written:
            if (place := self.place(token)) and token not in self.fragments:
                run, number = place
                if number <= last[run] and place not in self.sent_again:
                    late.append(f"number {number} of run {run} after {last[run]}")
                last[run] = max(number, last[run])
        self.none(late, f"records that {life.name} wrote late")

    def exclusive(self, receiver, life, written: list, is_last: bool) -> None:
        """What is missing after the first record of a run was reported, and what was reported is missing."""
        places = [place for token in written if (place := self.place(token))]
        present = set(places)
        reported: set[tuple[str, int]] = set()
        for run, start, end in GAP.findall(life.text()):
            reported |= {(run, number) for number in range(int(start), int(end or start) + 1)}
        more = sum(map(int, re.findall(r"missed (\d+) messages? in more gaps", life.text())))
        late = sum(map(int, re.findall(r"(\d+) messages? reported as missed arrived late", life.text())))
        wanted = {(record.run, record.number) for record in self.expected(self.all.values(), receiver)}
        wrong = reported & present
        # A kill prevents the note about late messages.
        if len(wrong) > late and life.status != -signal.SIGKILL:
            self.none(wrong, f"records that {life.name} wrote and reported as missed")
        first, last = dict(reversed(places)), {}
        for run, number in places:
            last[run] = max(number, last.get(run, 0))
        silent = [(run, number) for run, number in wanted - present - reported
                  if run in last and first[run] < number < last[run]]
        # A kill may come before the report.
        if len(silent) > more and not life.got(signal.SIGKILL):
            self.none(silent, f"missing records that {life.name} did not report")
        # During a partition, the other nodes send nothing to the queue, and the receiver cannot know.
        if is_last and not self.round.exchange_deleted and not self.round.node_was_lost:
            since = max(life.times(r"Waiting for logs|ubscribed again"), default=float("inf"))
            runs = self.runs_since(since)
            absent = [place for place in wanted - present - reported if place[0] in runs]
            if len(absent) > more:
                self.none(absent, f"missing records, sent after {life.name} had subscribed")

    def runs_since(self, since: float) -> set[str]:
        """The runs of the programs that were started after this time."""
        jobs = {given.job.name for emitter in self.round.emitters if emitter.spec["kind"] in ("words", "lines")
                for life, given in zip(emitter.lives, emitter.inputs) if life.started > since}
        return {place[0] for text, place in self.places.items()
                if (found := place_of(text, self.round.jobs)) and found[0] in jobs}

    def stream(self, receiver, life, written: list, is_last: bool) -> None:
        """The output is a part of the stream, without gaps. The last life reads to the end."""
        copies = self.tokens(self.stores[receiver.spec["queue"]].copies, receiver)
        if not written:
            return
        starts = [place for place, token in enumerate(copies) if token == written[0]]
        rests = [list(dict.fromkeys(copies[start:])) for start in starts]
        self.that(any(rest[:len(written)] == written for rest in rests), f"{life.name} wrote no part of the stream")
        if is_last:
            self.that(any(rest == written for rest in rests), f"{life.name} did not read to the end of the stream")

    def same(self, written: list, expected: list, what: str) -> None:
        if written != expected:
            pairs = enumerate(zip(written, expected))
            place = next((place for place, (a, b) in pairs if a != b), min(len(written), len(expected)))
            self.that(False, f"{what} has {len(written)} records of {len(expected)}, and differs at {place}: "
                             f"{written[place:place + 1]} for {expected[place:place + 1]}")

    def in_doubt(self) -> set[bytes]:
        """The records that emit-log has not seen confirmed. Some queues may have them, and others not: the channel of a
        lost connection takes those with it that a quorum queue has not accepted yet."""
        doubtful = set()
        for emitter in self.round.emitters:
            if emitter.spec["kind"] in ("words", "lines"):
                for life, given in zip(emitter.lives, emitter.inputs):
                    if life.status != 0:
                        counts = last_counts(life)
                        confirmed = int(counts[1]) if counts else 0
                        numbers = range(given.first + confirmed, given.last() + 1)
                        doubtful |= {given.job.record(number) for number in numbers}
            if emitter.spec["kind"] == "spool":
                for life, given in zip(emitter.lives, emitter.inputs):
                    if self.lost_by(life):
                        doubtful |= {given.job.record(number) for number in range(given.first, given.last() + 1)}
        return doubtful

    def queues(self) -> None:
        """A queue loses nothing: one of its receivers has written each message."""
        doubtful = self.in_doubt() | self.fragments
        self.promise, by_queue = QUEUE, {}
        for receiver in self.round.receivers:
            if receiver.spec["kind"] in ("queue", "shared") and not self.is_damaged(receiver):
                by_queue.setdefault(receiver.spec["queue"], []).append(receiver)
        for queue, receivers in by_queue.items():
            tokens = (token for receiver in receivers for life in receiver.written for token in life)
            written = {self.place(token) or token for token in tokens}
            expected = (record for record in self.all.values() if record.text not in doubtful)
            missing = [token for token in self.tokens(expected, receivers[0])
                       if (self.place(token) or token) not in written]
            if missing and len(missing) <= self.round.left[queue]:
                self.losses[queue] = len(missing)
                continue
            self.none(missing, f"records of {queue} that nobody has written")
