"""Runs two receivers and a publisher in terminals, kills their broker, and draws the terminals: main.py FILE.svg"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import draw

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds

# Prints a line per second until a file `stop` exists.
APP = """#!/usr/bin/env bash
for ((i = 1; ; i++)); do
    case $((i % 8)) in
        3) echo "warning: request $i took 812 ms" ;;
        6) echo "error: request $i failed: disk is full" ;;
        *) echo "info: request $i served in $((i * 37 % 90 + 4)) ms" ;;
    esac
    sleep 1
    [ ! -e stop ] || exit 0
done
"""

TERMINALS = [("receiver", 7), ("receiver", 11), ("publisher", 4), ("broker", 3)]


def play(stage, directory):
    to_file, to_screen, publisher, broker = range(len(TERMINALS))
    stage.type(to_file, "receive-logs > logs_from_rabbit.log")
    stage.wait_for(to_file, "Waiting for logs")
    stage.type(to_screen, "receive-logs")
    stage.wait_for(to_screen, "Waiting for logs")
    stage.type(publisher, "app | emit-log --lines")
    stage.wait_for(to_screen, "request 4")
    stage.type(broker, "broker kill")
    stage.wait_for(to_screen, "subscribing again")
    stage.type(broker, "broker start")
    stage.wait_for(to_screen, "Subscribed again")
    stage.wait_for(publisher, "connected to .* again")
    stage.watch(4)
    (directory / "stop").touch()
    sent = stage.wait_for(publisher, r"Sent (\d+) messages")[1]
    stage.watch(1)
    stage.press(to_file, "C-c")
    stage.type(to_file, "wc -l logs_from_rabbit.log")
    written = stage.wait_for(to_file, r"^(\d+) logs_from_rabbit.log")[1]
    if sent != written:
        sys.exit(f"picture: {sent} messages were sent, {written} are in the file")


class Stage:
    """Shells in tmux sessions, and their contents so far: `frames`."""

    def __init__(self, directory, environment):
        self.server = f"picture-{os.getpid()}"
        self.frames = []
        shell = shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), "bash", "--norc"])
        for index, (_, rows) in enumerate(TERMINALS):
            size = ["-x", str(draw.COLUMNS), "-y", str(rows)]
            self.tmux("new-session", "-d", "-s", f"t{index}", "-c", str(directory), *size, shell)
            self.wait_for(index, r"^\$")

    def close(self):
        self.tmux("kill-server")

    def tmux(self, *arguments):
        command = ["tmux", "-L", self.server, "-f", "/dev/null", *arguments]
        return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout

    def press(self, terminal, *keys):
        self.tmux("send-keys", "-t", f"t{terminal}", *keys)

    def type(self, terminal, command):
        self.watch(0.5)
        self.press(terminal, "-l", command)
        self.watch(0.5)
        self.press(terminal, "Enter")

    def wait_for(self, terminal, pattern):
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.screen(terminal, "-p"), re.MULTILINE)):
            if time.monotonic() > deadline:
                sys.exit(f"picture: no '{pattern}' in terminal {terminal}:\n{self.screen(terminal, '-p')}")
            self.watch(0.05)
        return found

    def watch(self, seconds):
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            opened = self.tmux("list-sessions", "-F", "#S").split()
            screens = [self.screen(index, "-p", "-e").splitlines() for index in range(len(opened))]
            self.frames.append((now, screens + [[]] * (len(TERMINALS) - len(opened))))
            time.sleep(0.05)

    def screen(self, terminal, *options):
        return self.tmux("capture-pane", "-t", f"t{terminal}", *options)


def main(picture):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        programs = directory / "bin"
        programs.mkdir()
        broker = f"#!/bin/sh\nexec '{ROOT}/scripts/broker' \"$@\"\n"
        for program, text in [("app", APP), ("broker", broker)]:
            (programs / program).write_text(text)
            (programs / program).chmod(0o755)
        stage = Stage(
            directory,
            {
                "PATH": f"{programs}:{ROOT / 'target/release'}:{os.environ['PATH']}",
                "PS1": r"\[\e[36m\]$\[\e[0m\] ",
                "AMQP_URL": os.environ["AMQP_URL"],
                "BROKER_NAME": os.environ["BROKER_NAME"],
            },
        )
        try:
            play(stage, directory)
            stage.watch(0.5)
        finally:
            stage.close()
    Path(picture).write_text(draw.svg(TERMINALS, stage.frames))


main(sys.argv[1])
