"""The faults. Each one is a context: it lasts as long as the `with` block."""

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from nodes import SECRET, USER
from proxy import FROM_BROKER, TO_BROKER, Proxy, Rules

ALL = ("tools", "broker", "disk", "clock", "cluster")


@dataclass
class Fault:
    begin: Callable
    weight: int
    lasts: bool
    scenarios: tuple[str, ...]


FAULTS: dict[str, Fault] = {}


def fault(weight: int, lasts: bool = True, scenarios: tuple[str, ...] = ALL) -> Callable:
    def register(begin: Callable) -> Callable:
        name = begin.__name__.replace("_", " ")
        FAULTS[name] = Fault(contextmanager(begin), weight, lasts, scenarios)
        return begin
    return register


## Tools

def send(round_, rng: random.Random, number: int) -> None:
    rng.choice(round_.programs).send(number)


@fault(8, lasts=False)
def kill_of_a_tool(round_, rng: random.Random) -> Iterator[None]:
    send(round_, rng, signal.SIGKILL)
    yield


@fault(4, lasts=False)
def term(round_, rng: random.Random) -> Iterator[None]:
    send(round_, rng, signal.SIGTERM)
    yield


@fault(1, lasts=False)
def hup(round_, rng: random.Random) -> Iterator[None]:
    send(round_, rng, signal.SIGHUP)
    yield


@fault(1, lasts=False)
def usr1(round_, rng: random.Random) -> Iterator[None]:
    send(round_, rng, signal.SIGUSR1)
    yield


@fault(4)
def stop_of_a_tool(round_, rng: random.Random) -> Iterator[None]:
    program = rng.choice(round_.programs)
    if not program.lives:
        yield
        return
    life = program.lives[-1]
    life.send(signal.SIGSTOP)
    try:
        yield
    finally:
        life.send(signal.SIGCONT)


@fault(3, lasts=False)
def rotation(round_, rng: random.Random) -> Iterator[None]:
    followers = [program for program in round_.programs if hasattr(program, "rotate")]
    if followers:
        rng.choice(followers).rotate()
    yield


## Network

def choose_proxy(round_, rng: random.Random) -> Proxy:
    return rng.choice(round_.cluster.nodes).proxy


def choose_rules(round_, rng: random.Random) -> Rules:
    return rng.choice(choose_proxy(round_, rng).rules)


@fault(5, lasts=False)
def cut(round_, rng: random.Random) -> Iterator[None]:
    choose_proxy(round_, rng).cut()
    yield


@fault(6, lasts=False)
def cut_of_one_connection(round_, rng: random.Random) -> Iterator[None]:
    choose_proxy(round_, rng).cut_one(rng)
    yield


@fault(2, lasts=False)
def half_close(round_, rng: random.Random) -> Iterator[None]:
    choose_proxy(round_, rng).half_close(rng.choice([TO_BROKER, FROM_BROKER]))
    yield


@fault(3)
def outage(round_, rng: random.Random) -> Iterator[None]:
    with closed(choose_proxy(round_, rng)):
        yield


@fault(4)
def stall(round_, rng: random.Random) -> Iterator[None]:
    rules = choose_rules(round_, rng)
    rules.flowing.clear()
    try:
        yield
    finally:
        rules.flowing.set()


@fault(2)
def delay(round_, rng: random.Random) -> Iterator[None]:
    rules = choose_rules(round_, rng)
    rules.delay = rng.uniform(0.01, 0.3)
    try:
        yield
    finally:
        rules.delay = 0.0


@fault(2)
def slices_of_one_byte(round_, rng: random.Random) -> Iterator[None]:
    rules = choose_rules(round_, rng)
    rules.slice = 1
    try:
        yield
    finally:
        rules.slice = 1 << 16


@contextmanager
def closed(proxy: Proxy) -> Iterator[None]:
    """Cuts all connections, and accepts no others."""
    proxy.closed_by += 1
    proxy.cut()
    try:
        yield
    finally:
        proxy.closed_by -= 1


## The broker. RabbitMQ confirms and loses messages while it recovers streams, so the tools cannot connect until then.

@contextmanager
def away(round_, node, begin: Callable, end: Callable) -> Iterator[None]:
    """From `begin` to `end`, the node serves nobody."""
    with closed(node.proxy):
        begin()
        try:
            yield
        finally:
            end()
            round_.wait_until_whole()


@fault(4, scenarios=("broker", "disk"))
def kill_of_the_broker(round_, _: random.Random) -> Iterator[None]:
    node = round_.cluster.first
    with round_.broker_lock, away(round_, node, lambda: node.run("kill"), lambda: node.run("start")):
        yield


@fault(1, scenarios=("broker",))
def term_of_the_broker(round_, _: random.Random) -> Iterator[None]:
    node = round_.cluster.first

    def end() -> None:
        os.kill(node.pid(), signal.SIGTERM)
        round_.wait_for(lambda: not node.is_running(), "the broker ends")

    with round_.broker_lock, away(round_, node, end, lambda: node.run("start")):
        yield


@fault(1, lasts=False, scenarios=("broker",))
def hup_of_the_broker(round_, _: random.Random) -> Iterator[None]:
    """RabbitMQ logs the signal and continues."""
    with round_.broker_lock:
        os.kill(round_.cluster.first.pid(), signal.SIGHUP)
    yield


@fault(2, scenarios=("broker",))
def restart_of_the_broker(round_, _: random.Random) -> Iterator[None]:
    node = round_.cluster.first
    with round_.broker_lock, away(round_, node, lambda: node.ctl("stop_app"), lambda: node.ctl("start_app")):
        yield


@fault(2, scenarios=("broker", "clock", "cluster"))
def stop_of_the_broker(round_, rng: random.Random) -> Iterator[None]:
    with round_.broker_lock:
        node = rng.choice(round_.cluster.nodes)
        pid = node.pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)
            round_.wait_until_whole()


@fault(2, lasts=False, scenarios=("broker", "disk"))
def connections_closed_by_the_operator(round_, _: random.Random) -> Iterator[None]:
    with round_.broker_lock:
        round_.cluster.first.ctl("close_all_connections", "--vhost", round_.vhost, "torture")
    yield


@fault(2, scenarios=("broker", "disk", "clock"))
def memory_alarm(round_, _: random.Random) -> Iterator[None]:
    with setting(round_, ["set_vm_memory_high_watermark", "0"], ["set_vm_memory_high_watermark", "0.4"]):
        yield


@fault(1, scenarios=("broker", "disk"))
def disk_alarm(round_, _: random.Random) -> Iterator[None]:
    with setting(round_, ["set_disk_free_limit", "900GB"], ["set_disk_free_limit", "1MB"]):
        yield


@fault(1, scenarios=("broker",))
def permission_revoked(round_, _: random.Random) -> Iterator[None]:
    vhost = ["--vhost", round_.vhost]
    with setting(round_, ["clear_permissions", *vhost, USER], ["set_permissions", *vhost, USER, *[".*"] * 3]):
        yield


@fault(1, scenarios=("broker",))
def password_changed(round_, _: random.Random) -> Iterator[None]:
    with setting(round_, ["change_password", USER, "another"], ["change_password", USER, SECRET]):
        round_.cluster.first.proxy.cut()
        yield


@contextmanager
def setting(round_, begin: list[str], end: list[str]) -> Iterator[None]:
    with round_.broker_lock:
        round_.cluster.first.ctl(*begin)
    try:
        yield
    finally:
        # The node may be down now. The lock may be held by a fault that waits for this end.
        round_.wait_for(lambda: succeeds(round_.cluster.first, end), f"{end[0]} succeeds")


def succeeds(node, command: list[str]) -> bool:
    try:
        node.ctl(*command)
        return True
    except subprocess.CalledProcessError:
        return False


## Queues and the exchange

@fault(2, scenarios=("broker", "tools", "cluster"))
def full_queue(round_, _: random.Random) -> Iterator[None]:
    """A queue that nacks messages."""
    arguments = {"x-max-length": 3, "x-overflow": "reject-publish"}
    with round_.broker_lock, round_.channel() as channel:
        channel.queue_declare("full", arguments=arguments)
        channel.queue_bind("full", "logs", "#")
    try:
        yield
    finally:
        with round_.broker_lock, round_.channel() as channel:
            channel.queue_delete("full")


@fault(1, lasts=False, scenarios=("broker",))
def queue_purged(round_, rng: random.Random) -> Iterator[None]:
    with round_.broker_lock, round_.channel() as channel:
        for queue in round_.choose_queue(rng):
            channel.queue_purge(queue)
    yield


@fault(1, lasts=False, scenarios=("broker",))
def queue_deleted(round_, rng: random.Random) -> Iterator[None]:
    with round_.broker_lock, round_.channel() as channel:
        for queue in round_.choose_queue(rng):
            channel.queue_delete(queue)
    yield


@fault(1, lasts=False, scenarios=("broker",))
def exchange_deleted(round_, _: random.Random) -> Iterator[None]:
    with round_.broker_lock, round_.channel() as channel:
        round_.history.add("the exchange is deleted")
        round_.exchange_deleted = True
        channel.exchange_delete("logs")
        round_.declare(channel)
    yield


## Files and clocks

@fault(8, scenarios=("disk",))
def full_disk(round_, rng: random.Random) -> Iterator[None]:
    ballast = round_.disk / f"ballast-{rng.random()}"
    try:
        with open(ballast, "wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
        round_.disk_was_full = True
        yield
    finally:
        ballast.unlink()


@fault(8, scenarios=("clock",))
def clock_set(round_, rng: random.Random) -> Iterator[None]:
    program, offset = rng.choice(round_.programs), rng.choice([-86_400, -60, -1, 1, 60, 86_400])
    round_.set_clock(program.name, offset)
    round_.history.add(f"the clock of {program.name} is off by {offset} s")
    try:
        yield
    finally:
        round_.set_clock(program.name, 0)


## A cluster of three nodes

@fault(5, scenarios=("cluster",))
def kill_of_a_node(round_, rng: random.Random) -> Iterator[None]:
    with round_.broker_lock:
        node = rng.choice(round_.cluster.nodes)
        round_.node_was_lost = True
        with away(round_, node, lambda: node.run("kill"), lambda: node.run("start")):
            yield


@fault(4, scenarios=("cluster",))
def partition(round_, rng: random.Random) -> Iterator[None]:
    """A node that refuses the cookie of the others pauses, as a minority."""
    with round_.broker_lock:
        node = rng.choice(round_.cluster.nodes)
        round_.node_was_lost = True
        others = [text.strip() for text in node.ctl("eval", "nodes().").strip("[]\n").split(",")]
        names = f"[{','.join(others)}]"
        node.ctl("eval", f"[begin erlang:set_cookie(N, wrong), erlang:disconnect_node(N) end || N <- {names}].")
        try:
            yield
        finally:
            node.ctl("eval", f"[begin erlang:set_cookie(N, erlang:get_cookie()), net_adm:ping(N) end || N <- {names}].")
            round_.wait_until_whole()


@fault(3, lasts=False, scenarios=("cluster",))
def leaders_moved(round_, _: random.Random) -> Iterator[None]:
    with round_.broker_lock:
        round_.cluster.first.ctl("eval", 'rabbit_amqqueue:rebalance(all, ".*", ".*").')
    yield
