"""The RabbitMQ nodes, each behind a proxy."""

import re
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pika

from proxy import Proxy

BROKER = Path(__file__).resolve().parents[1] / "broker"
CONFIG = Path(__file__).resolve().with_name("rabbitmq.conf")
SECRET = "s3cr3t-p4ss"
USER = "torture"
PROBE = b"probe"
"""The text of a message that shows that a queue works. It has no number."""


class NotRecovered(Exception):
    """The broker did not recover."""


class Node:
    def __init__(self, name: str, *options: str) -> None:
        self.name = name
        self.run("start", *options)
        self.port = int(re.search(r":(\d+)/", self.run("status"))[1])
        self.proxy = Proxy(self.port)

    def run(self, *args: str) -> str:
        return subprocess.run([BROKER, args[0], "--name", self.name, *args[1:]], check=True, text=True,
                              capture_output=True).stdout

    def ctl(self, *args: str) -> str:
        return self.run("ctl", *args)

    def pid(self) -> int:
        return int(re.search(r"pid: (\d+)", self.run("status"))[1])

    def is_running(self) -> bool:
        return subprocess.run([BROKER, "status", "--name", self.name], capture_output=True).returncode == 0

    @contextmanager
    def channel(self, vhost: str):
        """A channel that does not use the proxy."""
        parameters = pika.ConnectionParameters("127.0.0.1", self.port, vhost, heartbeat=0)
        connection = pika.BlockingConnection(parameters)
        try:
            yield connection.channel()
        finally:
            # pika nacks what it has read ahead, which a stream answers with an error.
            with suppress(pika.exceptions.AMQPError):
                connection.close()


class Cluster:
    """One node, or three. `scripts/broker run` has started the first one for the first cluster."""

    def __init__(self, first: str, size: int) -> None:
        self.nodes = [Node(first, "--config", CONFIG)]
        try:
            for number in range(1, size):
                self.nodes.append(Node(f"{first}-{number}", "--config", CONFIG, "--join", first))
            self.version = re.search(r"version: RabbitMQ (\S+)", self.nodes[0].run("status"))[1]
            self.nodes[0].ctl("add_user", USER, SECRET)
        except BaseException:
            self.close()
            raise

    @property
    def first(self) -> Node:
        return self.nodes[0]

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.proxy.close()
            node.run("stop")

    def wait_until_whole(self, vhost: str, queues: list[str], patience: float = 60) -> None:
        """Waits until each node serves each queue. After a kill, RabbitMQ may leave a quorum queue without a leader
        until an election is triggered, and may never recover a stream: `NotRecovered`."""
        deadline = time.monotonic() + patience
        for node in self.nodes:
            for queue in queues:
                while not serves(node, vhost, queue):
                    if time.monotonic() > deadline:
                        raise NotRecovered(f"node {node.name} does not serve queue '{queue}' after {patience} s")
                    if queue.startswith("quorum"):
                        trigger_election(node, vhost, queue)
                    time.sleep(0.2)


def trigger_election(node: Node, vhost: str, queue: str) -> None:
    with suppress(subprocess.CalledProcessError):  # the process of the queue may start later, or never
        node.ctl("eval", f"ra:trigger_election({{'{vhost}_{queue}', node()}}).")


def serves(node: Node, vhost: str, queue: str) -> bool:
    """Whether the queue confirms a message, and whether a stream can be read at this node."""
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(probe(node, vhost, queue)), daemon=True)
    thread.start()
    thread.join(5)
    return outcome == [True]


def probe(node: Node, vhost: str, queue: str) -> bool:
    try:
        with node.channel(vhost) as channel:
            channel.confirm_delivery()
            channel.basic_publish("", queue, PROBE, pika.BasicProperties(delivery_mode=2), mandatory=True)
            if queue.startswith("stream"):
                channel.basic_qos(prefetch_count=1)
                channel.basic_consume(queue, lambda *_: None, arguments={"x-stream-offset": "next"})
            return True
    except (pika.exceptions.AMQPError, OSError):
        return False
