"""A TCP proxy before a broker, which disturbs its connections."""

import random
import socket
import struct
import threading
import time

RESET = struct.pack("ii", 1, 0)
TO_BROKER, FROM_BROKER = 0, 1


class Rules:
    """What happens to the bytes of one direction."""

    def __init__(self) -> None:
        self.flowing = threading.Event()
        self.heal()

    def heal(self) -> None:
        self.delay, self.slice = 0.0, 1 << 16
        self.flowing.set()


class Proxy:
    def __init__(self, port: int) -> None:
        self.target = ("127.0.0.1", port)
        self.rules = (Rules(), Rules())
        self.closed_by, self.lock = 0, threading.Lock()
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                near = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.serve, args=(near,), daemon=True).start()

    def serve(self, near: socket.socket) -> None:
        try:
            if self.closed_by:  # faults
                raise OSError
            far = socket.create_connection(self.target, timeout=5)
        except OSError:
            reset(near)
            return
        far.settimeout(None)
        pair = (near, far)
        for end in pair:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.lock:
            self.pairs.append(pair)
        back = threading.Thread(target=pump, args=(far, near, self.rules[FROM_BROKER]), daemon=True)
        back.start()
        pump(near, far, self.rules[TO_BROKER])
        back.join()
        for end in pair:
            end.close()
        with self.lock:
            self.pairs = [other for other in self.pairs if other is not pair]

    def current(self) -> list[tuple[socket.socket, socket.socket]]:
        with self.lock:
            return list(self.pairs)

    def cut(self) -> None:
        """Resets all connections."""
        for pair in self.current():
            cut(pair)

    def cut_one(self, rng: random.Random) -> None:
        """Resets one connection."""
        if pairs := self.current():
            cut(rng.choice(pairs))

    def half_close(self, direction: int) -> None:
        """Sends an end of file in one direction."""
        for near, far in self.current():
            shut(far if direction == TO_BROKER else near, socket.SHUT_WR)

    def heal(self) -> None:
        for rules in self.rules:
            rules.heal()

    def close(self) -> None:
        shut(self.listener, socket.SHUT_RDWR)
        self.listener.close()
        self.cut()


def pump(source: socket.socket, target: socket.socket, rules: Rules) -> None:
    try:
        while data := source.recv(1 << 16):
            if rules.delay:
                time.sleep(rules.delay)
            rules.flowing.wait()
            while data:
                size = rules.slice
                target.sendall(data[:size])
                data = data[size:]
                if size == 1 and data:
                    time.sleep(0.0005)
        rules.flowing.wait()
        shut(target, socket.SHUT_WR)
    except OSError:
        reset(source)
        reset(target)


def cut(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        reset(end)


def shut(end: socket.socket, how: int) -> None:
    try:
        end.shutdown(how)
    except OSError:
        pass


def reset(end: socket.socket) -> None:
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    except OSError:
        return
    # Wakes the threads that read from the socket.
    shut(end, socket.SHUT_RD)
    end.close()
