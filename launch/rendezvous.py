"""Who comes to a run, found out before JAX's coordination service starts: a stranger who joins that ends the run.

Process 0 has the port for itself at first. The others say there who they are and wait until all have come; then the
port is given to JAX. Whatever listens there and does not answer like this (the service of a run that has begun, another
program) is left alone.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from trainer.errors import ConfigError, Stopped

GREETING = b"meshlm\n"
PORT_S = 5.0  # that a process 0 before this one may take to give the port back
ANSWER_S = 5.0  # from a connection to the greeting
MAX_MESSAGE_BYTES = 1 << 16  # bytes that a visitor may say
OTHER_DESCRIPTORS = 256  # descriptors that are not connections
NO_ROOM_S = 0.2  # until it is tried again to take a connection for which there is no descriptor
# A peer whose machine is gone says nothing: it is asked after ten seconds, and three times more.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
GONE_S = 40.0  # that the second of a number comes again: process 0 finds out within 25 that the first is gone
NOT_ALL = "not all processes have come to process 0"

_locks: list[socket.socket] = []  # held until this process ends
_LIFE_ID = secrets.token_hex(8)


class Peer(NamedTuple):
    """A process as it introduces itself.

    `run` is the folder of --workdir, however that was typed; `life` tells processes of one host and pid apart, as they
    are in two containers.
    """

    process: int
    run: str
    host: str
    pid: int
    life: str = ""

    @classmethod
    def myself(cls, process: int, run: str) -> "Peer":
        return cls(process, _folder(run), platform.node(), os.getpid(), _LIFE_ID)


def _folder(run: str) -> str:
    with contextlib.suppress(OSError):  # the current folder is gone; who uses the path says so
        return os.path.realpath(run) if run else run
    return run


class Rendezvous:
    """Of process 0. Raises ConfigError where another has the port, Stopped where it stays with an earlier life.

    Args:
      timeout_s: how long an earlier life of this run, which is ending, may keep the port.
      progress: called with the reason for waiting, a few times a second.

    Attributes:
      missing: processes that are not here yet.
    """

    def __init__(
        self,
        address: str,
        port: int,
        size: int,
        run: str,
        *,
        timeout_s: float = PORT_S,
        progress: Callable[[str], None] = lambda reason: None,
    ):
        self._address = address
        self._run = _folder(run)
        self._size = size
        self._arrived: dict[int, tuple[socket.socket, Peer]] = {}
        self._received: dict[socket.socket, bytes] = {}
        self._warned_full = False
        _allow_files(size)
        self._socket = _bind(port, self._run, timeout_s, progress)
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._socket, selectors.EVENT_READ)

    @property
    def missing(self) -> list[int]:
        return [i for i in range(1, self._size) if i not in self._arrived]

    def wait(self) -> Iterator[str]:
        """Until all have come, and lets them in. Yields why somebody was refused, once for each reason."""
        said = {""}
        while len(self._arrived) < self._size - 1:
            for key, _ in self._ready.select():
                if key.fileobj is self._socket:
                    if full := self._accept():
                        yield full
                elif (refused := self._receive(key.fileobj)) not in said:  # type: ignore[arg-type]
                    said.add(refused)
                    yield refused
        for connection, _ in self._arrived.values():
            _send(connection, {"let in": True})

    def close(self) -> None:
        """Gives the port back."""
        self._ready.close()
        self._socket.close()
        for connection in self._received:
            connection.close()

    def _accept(self) -> str:
        """Lets somebody speak; why that cannot be, if it cannot."""
        try:
            connection, _ = self._socket.accept()
        except OSError as e:  # no descriptor is free, or it has gone again
            return self._make_room(e)
        connection.setblocking(False)
        _keep_alive(connection)
        with contextlib.suppress(OSError):  # it has gone; that is heard below
            connection.send(GREETING)
        self._received[connection] = b""
        self._ready.register(connection, selectors.EVENT_READ)
        return ""

    def _make_room(self, error: OSError) -> str:
        """Closes what has not introduced itself: a process comes again. If nothing has, the limit is too low."""
        here = {connection for connection, _ in self._arrived.values()}
        silent = [connection for connection in self._received if connection not in here]
        for connection in silent:
            self._disconnect(connection)
        if silent:
            return ""
        time.sleep(NO_ROOM_S)
        said = self._warned_full
        self._warned_full = True
        return "" if said else f"a connection ({error.strerror}); raise the limit of open files (ulimit -n)"

    def _receive(self, connection: socket.socket) -> str:
        """Takes in what a visitor says; why it is refused, if it is."""
        if connection not in self._received:  # closed by what was heard just before it
            return ""
        try:
            said = connection.recv(MAX_MESSAGE_BYTES)
        except OSError:
            said = b""
        self._received[connection] += said
        if not said or len(self._received[connection]) > MAX_MESSAGE_BYTES:
            self._disconnect(connection)
            return ""
        if b"\n" not in said:
            return ""
        peer = _parse_peer(self._received[connection])
        if peer is None:  # not one of us
            self._disconnect(connection)
            return ""
        refused = self._refusal(peer)
        if refused is not None:
            _send(connection, {"refused": str(refused), "code": refused.exit_code})
            self._disconnect(connection)
            return str(refused)
        if peer.process in self._arrived:  # the connection that it had before was lost
            self._disconnect(self._arrived[peer.process][0])
        self._arrived[peer.process] = (connection, peer)
        return ""

    def _refusal(self, peer: Peer) -> ConfigError | Stopped | None:
        who = f"process {peer.process} (host {peer.host}, pid {peer.pid})"
        if peer.run != self._run:
            return ConfigError(
                f"{who} is to train --workdir={peer.run}, and process 0 at {self._address} --workdir={self._run}; "
                "give all processes of a run the same, and each run a port of its own with --coordinator_address"
            )
        if not 0 < peer.process < self._size:
            return ConfigError(f"{who} came to a run of {self._size} processes; give all the same --num_processes")
        _, first = self._arrived.get(peer.process, (None, peer))
        if (first.host, first.pid, first.life) != (peer.host, peer.pid, peer.life):
            return Stopped(
                f"{who} came as the second of its number, after host {first.host}, pid {first.pid}; start it again if "
                "that one is gone, else give each process its own --process_id, and each run a port of its own"
            )
        return None

    def _disconnect(self, connection: socket.socket) -> None:
        self._ready.unregister(connection)
        del self._received[connection]
        self._arrived = {i: here for i, here in self._arrived.items() if here[0] is not connection}
        connection.close()


def _parse_peer(said: bytes) -> Peer | None:
    try:
        peer = Peer(**json.loads(said))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = Peer.__annotations__.values()
    return peer if all(type(value) is kind for value, kind in zip(peer, kinds, strict=True)) else None


def join(address: tuple[str, int], me: Peer, timeout_s: float, progress: Callable[[str], None]) -> None:
    """Waits until process 0 at `address` has let all in. Raises ConfigError, Stopped.

    Args:
      progress: called with the reason for waiting, every half a second at least.
    """
    shown, end = f"{address[0]}:{address[1]}", time.monotonic() + timeout_s
    stranger = met = False
    refused_until = math.inf
    while True:
        try:
            with socket.create_connection(address, timeout=min(5.0, max(end - time.monotonic(), 0.1))) as connection:
                _keep_alive(connection)
                stranger = not _is_rendezvous(connection)
                reason = "what listens there does not wait for the processes of a run"
                if not stranger:
                    met = True
                    reason = _wait_for_start(connection, me, end, progress)
                    if not reason:
                        return
        except Stopped as e:  # the second of its number; the first may be gone, and process 0 does not know it yet
            refused_until = min(refused_until, time.monotonic() + GONE_S, end)
            if time.monotonic() >= refused_until:
                raise
            reason = str(e)
        except OSError as e:
            stranger, reason = False, e.strerror or str(e)
        if time.monotonic() > end:
            break
        progress(reason)
        time.sleep(0.5)
    if stranger and not met:
        raise ConfigError(
            f"{shown} is taken: {reason}; it is a run that has begun, or another program; name another port with "
            "--coordinator_address"
        )
    if reason == NOT_ALL:
        raise Stopped(
            f"not all processes came to process 0 at {shown} within {timeout_s:.0f} s; start the missing ones, which "
            "its log names"
        )
    if met:
        raise Stopped(f"process 0 at {shown} is gone: {reason}; see its log, and start all processes again")
    raise Stopped(
        f"no coordinator at {shown} after {timeout_s:.0f} s: {reason}; start process 0 there, open the port, or "
        "correct --coordinator_address"
    )


def _is_rendezvous(connection: socket.socket) -> bool:
    connection.settimeout(ANSWER_S)
    try:
        return _line(connection) == GREETING
    except OSError:
        return False


def _wait_for_start(connection: socket.socket, me: Peer, end: float, progress: Callable[[str], None]) -> str:
    """'' when all have been let in, else why to come again. Raises ConfigError when this process is refused."""
    connection.sendall(json.dumps(me._asdict()).encode() + b"\n")
    connection.settimeout(0.5)
    while time.monotonic() < end:
        try:
            line = _line(connection)
        except TimeoutError:
            progress("process 0 waits for the others")
            continue
        if not line.endswith(b"\n"):
            return "process 0 has ended"
        try:
            answer = json.loads(line)
            refused, code = answer.get("refused"), answer.get("code")
        except (ValueError, AttributeError, RecursionError):
            return "what listens there does not speak as process 0 does"
        if refused:
            raise (Stopped if code == Stopped.exit_code else ConfigError)(str(refused))
        return ""
    return NOT_ALL


def _line(connection: socket.socket) -> bytes:
    """Up to a line feed or the end, or what came within ANSWER_S of its first byte: JAX's service says something, and
    no line feed. Raises TimeoutError when nothing comes."""
    line, end = b"", math.inf
    while not line.endswith(b"\n") and len(line) < MAX_MESSAGE_BYTES and time.monotonic() < end:
        try:
            byte = connection.recv(1)
        except TimeoutError:
            if line:
                continue
            raise
        end = min(end, time.monotonic() + ANSWER_S)
        if not byte:
            break
        line += byte
    return line


def _send(connection: socket.socket, answer: dict) -> None:
    with contextlib.suppress(OSError):  # it has gone; whoever waits for it hears of that
        connection.send(json.dumps(answer).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    """As far as this system knows how to: gVisor and WSL1 refuse some of the options."""
    options = [(socket.SOL_SOCKET, "SO_KEEPALIVE", 1)]
    options += [(socket.IPPROTO_TCP, name, value) for name, value in KEEP_ALIVE.items() if hasattr(socket, name)]
    for level, name, value in options:
        with contextlib.suppress(OSError):
            connection.setsockopt(level, getattr(socket, name), value)


def _bind(port: int, run: str, timeout_s: float, progress: Callable[[str], None]) -> socket.socket:
    """Listens on `port`, which nobody else may: JAX's service would share it with whoever is there, or crash."""
    started, names = time.monotonic(), _lock_names(port, run)
    while True:
        try:
            if not _locks:
                _locks.extend(_acquire_locks(names))
            return _listening(port)
        except OSError as e:
            waited = time.monotonic() - started
            if not _locks and any(map(_is_locked, names[1:])):
                progress(f"an earlier life of this run still has port {port}")
                if waited > timeout_s:
                    raise Stopped(
                        f"port {port} of this host is not free: an earlier life of this run, or another job on it, has "
                        f"had it for {waited:.0f} s; start again when that has ended"
                    ) from None
            elif waited > PORT_S:
                raise ConfigError(
                    f"port {port} of this host is not free ({e.strerror}): another run or program has it; name another "
                    "with --coordinator_address, or with JAX_COORDINATOR_PORT where the cluster tells processes apart"
                ) from None
        time.sleep(0.2)


def _lock_names(port: int, run: str) -> list[str]:
    """Of locks: that of the port keeps others from the moment in which it is given from here to JAX, the other one says
    whose it is. Names of Linux (abstract sockets), not files; they go with the process."""
    if sys.platform != "linux":
        return []
    of_port = f"\0meshlm-coordinator-{port}"
    return [of_port, f"{of_port}-{hashlib.sha256(os.fsencode(run)).hexdigest()[:16]}"]


def _acquire_locks(names: list[str]) -> list[socket.socket]:
    """The locks. Raises OSError when another has one."""
    locks: list[socket.socket] = []
    try:
        for name in names:
            locks.append(socket.socket(socket.AF_UNIX))
            locks[-1].bind(name)
    except OSError:
        for lock in locks:
            lock.close()
        raise
    return locks


def _is_locked(name: str) -> bool:
    try:
        _acquire_locks([name])[0].close()
    except OSError:
        return True
    return False


def _listening(port: int) -> socket.socket:
    """On all addresses, as JAX's service does."""
    six = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if six else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=six)


def _allow_files(size: int) -> None:
    """A connection of each process, here and in JAX's service."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = size + OTHER_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
