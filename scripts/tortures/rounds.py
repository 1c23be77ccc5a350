"""A round: programs run under faults, then all faults end, the programs end, and the promises are checked."""

import os
import random
import shutil
import subprocess
import threading
import time
from collections import Counter
from glob import glob
from pathlib import Path

from faults import FAULTS
from history import History
from nodes import SECRET, USER, Cluster, NotRecovered, trigger_election
from plan import Plan
from programs import EMITTERS, END_LIMIT, Receiver
from promises import WITNESSES, Check

DISK = "128m"
LIBFAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"
SETTLING = 7
"""Seconds from the declaration of the queues to the first fault. RabbitMQ saves a new quorum queue in its directory
(`ra_directory`, a DETS table) after five seconds. A kill before that loses all messages of the queue."""
QUIET_LIMIT = 60
"""Seconds after which receivers have written everything."""


class Round:
    def __init__(self, plan: Plan, cluster: Cluster, directory: Path, tools: Path, is_verbose: bool) -> None:
        self.plan, self.cluster, self.directory, self.tools = plan, cluster, directory, tools
        self.disk = directory / "disk"
        self.disk.mkdir(parents=True)
        self.history = History(directory / "history", is_verbose)
        self.random = random.Random(plan.seed_of_timing)
        self.emit_log, self.receive_logs = tools / "emit-log", tools / "receive-logs"
        self.vhost = f"torture-{plan.seed}"
        self.is_over, self.over_at = threading.Event(), float("inf")
        self.broker_lock = threading.RLock()
        self.lives, self.jobs, self.done, self.failures = [], {}, Counter(), []
        self.damaged_queues: set[str] = set()
        self.not_recovered, self.is_abandoned = "", False
        self.sizes: list[int] = []
        self.exchange_deleted = self.disk_was_full = self.node_was_lost = False
        self.emitters = [EMITTERS[spec["kind"]](f"e{number}", spec, self) for number, spec in enumerate(plan.emitters)]
        self.receivers = [Receiver(f"r{number}", spec, self) for number, spec in enumerate(plan.receivers)]
        self.programs = [*self.emitters, *self.receivers]

    def run(self) -> Check | None:
        """Returns `None` if the broker has not recovered from a fault. Then nothing can be checked."""
        for line in self.plan.describe():
            self.history.add(line)
        if has_disk := self.plan.scenario == "disk":
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", self.disk], check=True)
        self.set_up()
        sampling = threading.Thread(target=self.sample, daemon=True)
        try:
            sampling.start()
            for receiver in self.receivers:
                receiver.start()
            self.wait_for(lambda: all(receiver.has_banner() for receiver in self.receivers), "all receivers are ready")
            if self.plan.scenario != "tools":
                time.sleep(SETTLING)
            for emitter in self.emitters:
                emitter.start()
            self.disturb()
            if self.not_recovered:
                return None
            check = Check(self)
            self.finish(check)
            check.run()
            return check
        except NotRecovered as error:
            self.not_recovered = str(error)
            return None
        finally:
            self.is_abandoned = True
            self.is_over.set()
            while any(program.is_alive() for program in self.programs):
                for life in self.lives:
                    if life.status is None:
                        life.process.kill()
                time.sleep(0.05)
            if not self.not_recovered:
                self.cluster.first.ctl("delete_vhost", self.vhost)
            if has_disk:
                subprocess.run(["umount", self.disk], check=True)

    def set_up(self) -> None:
        for name in (program.name for program in self.programs):
            self.set_clock(name, 0)
        node = self.cluster.first
        node.ctl("add_vhost", self.vhost)
        node.ctl("set_permissions", "--vhost", self.vhost, USER, ".*", ".*", ".*")
        node.ctl("set_permissions", "--vhost", self.vhost, "guest", ".*", ".*", ".*")
        with self.channel() as channel:
            self.declare(channel)

    def declare(self, channel) -> None:
        channel.exchange_declare("logs", self.plan.type, durable=True)
        for queue in WITNESSES:
            channel.queue_declare(queue, durable=True, arguments={"x-queue-type": queue.partition("-")[0]})
            channel.queue_bind(queue, "logs", "#" if self.plan.type == "topic" else "")

    def channel(self):
        return self.cluster.first.channel(self.vhost)

    def disturb(self) -> None:
        deadline = time.monotonic() + self.plan.seconds
        tracks = [threading.Thread(target=self.follow, args=(track, deadline), daemon=True)
                  for track in self.plan.tracks]
        for track in tracks:
            track.start()
        for track in tracks:
            track.join()
        for node in self.cluster.nodes:
            node.proxy.heal()

    def follow(self, track: list[tuple[float, str, float, float]], deadline: float) -> None:
        for pause, name, seed, seconds in track:
            time.sleep(pause)
            if time.monotonic() > deadline or self.not_recovered:
                break
            try:
                self.history.add(f"fault: {name}, {seconds:.1f} s")
                with FAULTS[name].begin(self, random.Random(seed)):
                    time.sleep(seconds)
                self.history.add(f"end of fault: {name}")
                self.done[name] += 1
            except NotRecovered as error:
                self.history.add(f"the broker has not recovered: {error}")
                self.not_recovered = str(error)
            except Exception as error:
                # A fault that cannot be made is no fault of the tools, but this round shows nothing.
                output = getattr(error, "stderr", "")
                self.failures.append(f"{name}: {error!r} {output}")
                self.history.add(f"fault {name} failed: {error!r} {output}")

    def finish(self, check: Check) -> None:
        """Waits until emit-log has ended everywhere and the receivers have everything, and ends them."""
        self.history.add("end of the faults")
        self.over_at = time.monotonic()
        self.is_over.set()
        for emitter in self.emitters:
            emitter.join(2 * END_LIMIT)
            check.that(not emitter.is_alive(), f"{emitter.name} does not end")
        self.history.add("all of emit-log has ended")
        self.wait_for(self.is_quiet, "the receivers have all messages", QUIET_LIMIT)
        running = [life for life in (receiver.lives[-1] for receiver in self.receivers) if life.status is None]
        before = [life.cpu() for life in running]
        time.sleep(1)
        for life, used in zip(running, before):
            if life.status is None:
                check.idle(life, life.cpu() - used)
        for receiver in self.receivers:
            receiver.stop()
        columns = ["name", "messages", "messages_unacknowledged", "consumers"]
        state = self.cluster.first.ctl("list_queues", "--vhost", self.vhost, "--quiet", "--no-table-headers", *columns)
        self.history.add(f"queues after the end of all receivers, with {', '.join(columns)}:\n{state}")
        self.left = {name: int(count) for name, count, *_ in map(str.split, state.splitlines())}

    def is_late(self) -> bool:
        """Whether each program should have ended."""
        return time.monotonic() > self.over_at + END_LIMIT

    def is_quiet(self) -> bool:
        """Whether all receivers are subscribed, no message waits in a queue, and no output grows."""
        sizes = [receiver.output(len(receiver.lives)).stat().st_size for receiver in self.receivers]
        if sizes != self.sizes or not all(map(is_subscribed, self.receivers)):
            self.sizes, self.same_since = sizes, time.monotonic()
            return False
        # After a partition, RabbitMQ may no longer serve the consumer of a stream. A receiver consumes it again after 30 s.
        if time.monotonic() < self.same_since + (2.5 if self.plan.nodes == 1 else 35):
            return False
        queues = {receiver.spec["queue"] for receiver in self.receivers if receiver.spec["kind"] in ("queue", "shared")}
        with self.channel() as channel:
            return not any(channel.queue_declare(queue, passive=True).method.message_count for queue in queues)

    def wait_for(self, condition, what: str, seconds: float = 60) -> None:
        """If the condition is not met in time, this is recorded, and the checks find the consequence."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.history.add(f"not in time: {what}")
                break
            time.sleep(0.1)

    def wait_until_whole(self) -> None:
        queues = {receiver.spec["queue"] for receiver in self.receivers} - {None}
        self.cluster.wait_until_whole(self.vhost, sorted({*WITNESSES, *queues} - self.damaged_queues))
        # A receiver has declared these again, or will.
        for queue in self.damaged_queues:
            if queue.startswith("quorum"):
                trigger_election(self.cluster.first, self.vhost, queue)

    def choose_queue(self, rng: random.Random) -> list[str]:
        """A queue of a receiver, if there is one. From now on, nothing is promised of it."""
        others = [receiver for receiver in self.receivers if receiver.spec["kind"] != "copy"]
        queues = sorted({receiver.spec["queue"] for receiver in others} - {None})
        chosen = rng.choices(queues) if queues else []
        self.damaged_queues.update(chosen)
        return [queue for queue in chosen if not queue.startswith("stream")]

    def sample(self) -> None:
        while not self.is_over.wait(0.5):
            for life in self.lives:
                if life.ended is None:
                    life.sample()

    def environment(self, program: str) -> dict[str, str]:
        query = "heartbeat=3&connection_timeout=4000"
        ports = [node.proxy.port for node in self.cluster.nodes]
        urls = [f"amqp://{USER}:{SECRET}@127.0.0.1:{port}/{self.vhost}?{query}" for port in ports]
        variables = {"AMQP_URL": " ".join(urls), "HOME": str(self.directory), "PATH": os.environ["PATH"],
                     "LANG": "C.UTF-8", "RUST_BACKTRACE": "1"}
        if next(other for other in self.programs if other.name == program).spec["clock"]:
            clock = self.directory / f"{program}.clock"
            variables |= {"LD_PRELOAD": glob(LIBFAKETIME)[0], "FAKETIME_TIMESTAMP_FILE": str(clock),
                          "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
        return variables

    def set_clock(self, program: str, offset: int) -> None:
        path = self.directory / f"{program}.clock"
        new = path.with_suffix(".new")
        new.write_text(f"{offset:+d}\n")
        new.rename(path)

    def remove(self) -> None:
        shutil.rmtree(self.directory)


def is_subscribed(receiver: Receiver) -> bool:
    life = receiver.lives[-1]
    subscribed, lost = life.times("Waiting for logs|Subscribed again"), life.times("subscribing again")
    return life.status is None and max(subscribed, default=0) > max(lost, default=0)


