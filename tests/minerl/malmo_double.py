"""
A test double of Minecraft at the network level: a process that MineRL's real launcher starts. It implements the protocol of
Malmo's ``MalmoEnvServer.java`` (length-prefixed messages) for MineRL's real client. Standard library only.

It reads ``plan.json`` in the folder ``MALMO_DOUBLE``, ``{"launches": [plan, ...], "default": plan}``, and writes the received
messages to ``transcript-<launch>.jsonl``. The keys of a plan are:

- ``launch``: ``"silent"`` (never ready) or ``"exit"`` (dies at once);
- ``mission``: ``"hang"`` (never answers a mission);
- ``fault`` and ``at``: the fault and its step in the launch, counted from 1: ``"drop"``, ``"drop in reply"``,
  ``"drop after reply"``, ``"hang"``, ``"kill"`` (of itself) or ``"orphan"`` (its launcher is killed, and it hangs);
- ``done_at``: the tick of an episode at which Minecraft ends it;
- ``attack_reward``: the reward of a tick in which the agent attacks (default: 1);
- ``world``: the entries of each observation apart from the image.
"""

import itertools
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

HELLO = "<MalmoEnv0.37.0/>"


class Gone(Exception):
    """The client has closed the connection, or the double must close it."""


class Connection:
    """
    Messages over a socket: four bytes of length, then the bytes.

    :param sock: A connected socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.number = 0

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(size - len(data))
            if not more:
                raise Gone
            data += more
        return data

    def receive(self) -> str:
        return self._exactly(struct.unpack("!I", self._exactly(4))[0]).decode()

    def send(self, *messages: bytes) -> None:
        self.socket.sendall(b"".join(struct.pack("!I", len(message)) + message for message in messages))


def image(seed: int, tick: int, width: int, height: int) -> bytes:
    """:return: The image of a tick in Minecraft's format, bottom row first; its first two bytes are the tick."""
    return struct.pack("!H", tick) + random.Random(seed).randbytes(width * height * 3 - 2)


class Minecraft:
    """
    The world and its service.

    :param plan: What is to happen.
    :param transcript: Where to write what was received.
    """

    def __init__(self, plan: dict[str, Any], transcript: Path) -> None:
        self.plan = plan
        self.transcript = transcript.open("a", buffering=1)
        self.steps = 0  # of this launch
        self.seed = self.tick = 0
        self.done = False

    def serve(self, server: socket.socket) -> None:
        for number in itertools.count():
            client = Connection(server.accept()[0])
            client.number = number
            threading.Thread(target=self._talk, args=(client,), daemon=True).start()

    def _talk(self, client: Connection) -> None:
        try:
            hello = client.receive()
            self._note(client, hello=hello, nodelay=client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0)
            if not hello.startswith(HELLO):
                raise Gone
            while True:
                self._answer(client, client.receive())
        except (Gone, OSError):
            client.socket.close()

    def _note(self, client: Connection, **what: Any) -> None:
        print(json.dumps({"connection": client.number, **what}), file=self.transcript)

    def _answer(self, client: Connection, message: str) -> None:
        if message.startswith("<StepClient0>"):
            self._step(client, message.removeprefix("<StepClient0>").removesuffix("</StepClient0 >"))
        elif message.startswith("<StepServer>"):
            self._note(client, message=message)
        elif message.startswith("<MissionInit"):
            token = client.receive()
            self._note(client, message="<MissionInit", token=token, xml=message)
            self._mission(client, token)
        elif message.startswith("<Peek"):
            self._note(client, message=message)
            client.send(self._image(), self._info(), struct.pack("!b", self.done))
        elif message.startswith("<Quit"):
            self._note(client, message=message)
            client.send(struct.pack("!I", 1))
        elif message.startswith("<Exit"):
            client.send(struct.pack("!I", 1))
            os._exit(0)
        elif message.startswith("<Disconnect"):
            raise Gone
        else:
            self._note(client, unknown=message)
            raise Gone

    def _mission(self, client: Connection, token: str) -> None:
        if self.plan.get("mission") == "hang":
            time.sleep(3600)
        fields = token.split(":")  # experiment, role, reset, agents, synchronous, and the seed if there is one
        self.seed = int(fields[5]) if len(fields) > 5 else 0
        self.tick, self.done = 0, False
        client.send(struct.pack("!I", 1))

    def _image(self) -> bytes:
        return image(self.seed, self.tick, 64, 64)

    def _info(self) -> bytes:
        return json.dumps(self.plan.get("world", {})).encode()

    def _step(self, client: Connection, command: str) -> None:
        self.steps += 1
        self._note(client, command=command)
        fault = self.plan.get("fault") if self.steps == self.plan.get("at") else None
        if fault == "drop":
            raise Gone
        if fault == "hang":
            time.sleep(3600)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "orphan":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(3600)
        self.tick += 1
        self.done = self.tick == self.plan.get("done_at")
        reward = self.plan.get("attack_reward", 1.0) if "attack 1" in command.split("\n") else 0.0
        reply = struct.pack("!dbb", reward, self.done, 1)
        if fault == "drop in reply":
            client.send(self._image(), reply)
            raise Gone
        client.send(self._image(), reply, self._info())
        if fault == "drop after reply":
            # Any further message is answered with a reset of the connection, read or not.
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise Gone


def next_launch(folder: Path) -> int:
    """:return: The unique number of this launch."""
    number = 0
    while True:
        try:
            (folder / f"launch-{number}").touch(exist_ok=False)
        except FileExistsError:
            number += 1
        else:
            return number


def main() -> None:
    folder = Path(os.environ["MALMO_DOUBLE"])
    plans = json.loads((folder / "plan.json").read_text())
    number = next_launch(folder)
    plan = plans["launches"][number] if number < len(plans["launches"]) else plans["default"]
    if plan.get("launch") == "exit":
        sys.exit("A test has told Minecraft to die.")
    if plan.get("launch") == "silent":
        time.sleep(3600)
    port = int(sys.argv[sys.argv.index("-port") + 1])
    server = socket.create_server(("127.0.0.1", port))
    print(f"***** Start MalmoEnvServer on port {port}", flush=True)
    print("CLIENT enter state: DORMANT", flush=True)
    Minecraft(plan, folder / f"transcript-{number}.jsonl").serve(server)


if __name__ == "__main__":
    main()
