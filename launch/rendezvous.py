"""The processes of a run meet before JAX's coordination service starts: an unrelated process that joined it would end
the run.

At first, process 0 listens on the coordinator's port itself. The others connect, introduce themselves and wait until
all have connected; then JAX gets the port. A listener that does not answer like this is the service of a running job or
another program, and processes do not join it.
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
PORT_S = 5.0  # how long an earlier process 0 may take to release the port
ANSWER_S = 5.0  # how long a greeting may take after the connection
MAX_MESSAGE_BYTES = 1 << 16  # longest message of a peer
OTHER_DESCRIPTORS = 256  # descriptors that are not connections
NO_DESCRIPTOR_S = 0.2  # before retrying to accept a connection for which there was no descriptor
# If a peer's machine is gone, its connection is silent: the kernel probes it after ten seconds, three times in all.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
GONE_S = 40.0  # how long a process retries if its number is taken; process 0 notices a dead owner within 25 s
NOT_ALL = "not all processes have connected to process 0"

_locks: list[socket.socket] = []  # held until this process ends
_LIFE_ID = secrets.token_hex(8)


class Peer(NamedTuple):
    """How a process introduces itself.

    `run` is the real path of --workdir; `life` distinguishes processes with the same host and pid, as in two
    containers.
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
    with contextlib.suppress(OSError):  # the current folder was deleted; the first use of the path reports it
        return os.path.realpath(run) if run else run
    return run


class Rendezvous:
    """Process 0's side. Raises ConfigError if another program has the port, Stopped if an earlier attempt keeps it.

    Args:
      timeout_s: how long an earlier attempt of this run, which is ending, may keep the port.
      progress: called with the reason for waiting, a few times a second.

    Attributes:
      missing: the processes that have not connected yet.
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
        """Waits until all have connected, then lets them continue. Yields each reason for a refusal once."""
        reported = {""}
        while len(self._arrived) < self._size - 1:
            for key, _ in self._ready.select():
                if key.fileobj is self._socket:
                    if full := self._accept():
                        yield full
                elif (refused := self._receive(key.fileobj)) not in reported:  # type: ignore[arg-type]
                    reported.add(refused)
                    yield refused
        for connection, _ in self._arrived.values():
            _send(connection, {"let in": True})

    def close(self) -> None:
        """Releases the port."""
        self._ready.close()
        self._socket.close()
        for connection in self._received:
            connection.close()

    def _accept(self) -> str:
        """Accepts a connection; returns why that failed, or ''."""
        try:
            connection, _ = self._socket.accept()
        except OSError as e:  # no descriptor is free, or the peer is gone again
            return self._make_room(e)
        connection.setblocking(False)
        _keep_alive(connection)
        with contextlib.suppress(OSError):  # the peer is gone, which is noticed below
            connection.send(GREETING)
        self._received[connection] = b""
        self._ready.register(connection, selectors.EVENT_READ)
        return ""

    def _make_room(self, error: OSError) -> str:
        """Closes connections whose peer has not introduced itself: our processes retry. Returns an error if none is."""
        here = {connection for connection, _ in self._arrived.values()}
        silent = [connection for connection in self._received if connection not in here]
        for connection in silent:
            self._disconnect(connection)
        if silent:
            return ""
        time.sleep(NO_DESCRIPTOR_S)
        warned = self._warned_full
        self._warned_full = True
        return "" if warned else f"a connection ({error.strerror}); raise the limit of open files (ulimit -n)"

    def _receive(self, connection: socket.socket) -> str:
        """Reads from a peer; returns why it is refused, or ''."""
        if connection not in self._received:  # it was closed while an earlier message was handled
            return ""
        try:
            message = connection.recv(MAX_MESSAGE_BYTES)
        except OSError:
            message = b""
        self._received[connection] += message
        if not message or len(self._received[connection]) > MAX_MESSAGE_BYTES:
            self._disconnect(connection)
            return ""
        if b"\n" not in message:
            return ""
        peer = _parse_peer(self._received[connection])
        if peer is None:  # another program
            self._disconnect(connection)
            return ""
        refused = self._refusal(peer)
        if refused is not None:
            _send(connection, {"refused": str(refused), "code": refused.exit_code})
            self._disconnect(connection)
            return str(refused)
        if peer.process in self._arrived:  # the process's earlier connection was lost
            self._disconnect(self._arrived[peer.process][0])
        self._arrived[peer.process] = (connection, peer)
        return ""

    def _refusal(self, peer: Peer) -> ConfigError | Stopped | None:
        who = f"process {peer.process} (host {peer.host}, pid {peer.pid})"
        if peer.run != self._run:
            return ConfigError(
                f"{who} has --workdir={peer.run}, and process 0 at {self._address} has --workdir={self._run}; give all "
                "processes of a run the same, and each run its own port with --coordinator_address"
            )
        if not 0 < peer.process < self._size:
            return ConfigError(f"{who} joined a run of {self._size} processes; give all the same --num_processes")
        _, first = self._arrived.get(peer.process, (None, peer))
        if (first.host, first.pid, first.life) != (peer.host, peer.pid, peer.life):
            return Stopped(
                f"{who} is the second with its number, after host {first.host}, pid {first.pid}; start it again if "
                "that one has ended, or give each process its own --process_id, and each run its own port"
            )
        return None

    def _disconnect(self, connection: socket.socket) -> None:
        self._ready.unregister(connection)
        del self._received[connection]
        self._arrived = {i: here for i, here in self._arrived.items() if here[0] is not connection}
        connection.close()


def _parse_peer(message: bytes) -> Peer | None:
    try:
        peer = Peer(**json.loads(message))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = Peer.__annotations__.values()
    return peer if all(type(value) is kind for value, kind in zip(peer, kinds, strict=True)) else None


def join(address: tuple[str, int], me: Peer, timeout_s: float, progress: Callable[[str], None]) -> None:
    """Connects to process 0 at `address` and waits until all processes have connected. Raises ConfigError, Stopped.

    Args:
      progress: called with the reason for waiting, at least every half second.
    """
    shown, end = f"{address[0]}:{address[1]}", time.monotonic() + timeout_s
    stranger = met = False
    refused_until = math.inf
    while True:
        try:
            with socket.create_connection(address, timeout=min(5.0, max(end - time.monotonic(), 0.1))) as connection:
                _keep_alive(connection)
                stranger = not _is_rendezvous(connection)
                reason = "the program that listens there does not wait for the processes of a run"
                if not stranger:
                    met = True
                    reason = _wait_for_start(connection, me, end, progress)
                    if not reason:
                        return
        except Stopped as e:  # the first process with this number may be gone, and process 0 may not know it yet
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
            f"{shown} is in use: {reason}; it is a running job, or another program; name another port with "
            "--coordinator_address"
        )
    if reason == NOT_ALL:
        raise Stopped(
            f"not all processes connected to process 0 at {shown} within {timeout_s:.0f} s; start the missing ones, "
            "which its log names"
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
    """'' when all processes may continue, otherwise why to reconnect. Raises ConfigError or Stopped if refused."""
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
            return "the program that listens there does not answer as process 0 does"
        if refused:
            raise (Stopped if code == Stopped.exit_code else ConfigError)(str(refused))
        return ""
    return NOT_ALL


def _line(connection: socket.socket) -> bytes:
    """Reads to a line feed, to the end, or for ANSWER_S after the first byte: JAX's service sends bytes without a line
    feed. Raises TimeoutError if nothing arrives."""
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
    with contextlib.suppress(OSError):  # the peer is gone; processes that wait for it notice
        connection.send(json.dumps(answer).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    """Sets the options that this system has: gVisor and WSL1 refuse some of them."""
    options = [(socket.SOL_SOCKET, "SO_KEEPALIVE", 1)]
    options += [(socket.IPPROTO_TCP, name, value) for name, value in KEEP_ALIVE.items() if hasattr(socket, name)]
    for level, name, value in options:
        with contextlib.suppress(OSError):
            connection.setsockopt(level, getattr(socket, name), value)


def _bind(port: int, run: str, timeout_s: float, progress: Callable[[str], None]) -> socket.socket:
    """Listens on `port` exclusively: otherwise JAX's service would share it with another program, or crash."""
    started, names = time.monotonic(), _lock_names(port, run)
    while True:
        try:
            if not _locks:
                _locks.extend(_acquire_locks(names))
            return _listening(port)
        except OSError as e:
            waited = time.monotonic() - started
            if not _locks and any(map(_is_locked, names[1:])):
                progress(f"an earlier attempt of this run still has port {port}")
                if waited > timeout_s:
                    raise Stopped(
                        f"port {port} of this host is not free: an earlier attempt of this run, or another job on it, "
                        f"has had it for {waited:.0f} s; start again when that has ended"
                    ) from None
            elif waited > PORT_S:
                raise ConfigError(
                    f"port {port} of this host is not free ({e.strerror}): another run or program has it; name another "
                    "with --coordinator_address, or with JAX_COORDINATOR_PORT if the cluster numbers the processes"
                ) from None
        time.sleep(0.2)


def _lock_names(port: int, run: str) -> list[str]:
    """The names of two locks: one keeps the port reserved while JAX takes it over, the other names the run. They are
    abstract sockets of Linux, not files, and end with the process."""
    if sys.platform != "linux":
        return []
    of_port = f"\0meshlm-coordinator-{port}"
    return [of_port, f"{of_port}-{hashlib.sha256(os.fsencode(run)).hexdigest()[:16]}"]


def _acquire_locks(names: list[str]) -> list[socket.socket]:
    """Acquires the locks. Raises OSError if another process has one."""
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
    """A socket that listens on all addresses, as JAX's service does."""
    six = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if six else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=4096, dualstack_ipv6=six)


def _allow_files(size: int) -> None:
    """Raises the limit of open files: each process opens a connection here, and later one to JAX's service."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = size + OTHER_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
