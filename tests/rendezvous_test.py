"""The rendezvous of processes before JAX starts: which ones it accepts or refuses, and what else may have its port."""

import contextlib
import http.server
import itertools
import json
import os
import resource
import socket
import threading
import time

import pytest

from launch import rendezvous
from launch.rendezvous import GONE_S, Peer, Rendezvous
from tests import runs
from trainer.errors import ConfigError, Stopped


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(rendezvous, "PORT_S", 0.3)
    monkeypatch.setattr(rendezvous, "ANSWER_S", 1.0)
    monkeypatch.setattr(rendezvous, "GONE_S", 0.2)
    yield
    release(rendezvous._locks)


def release(locks: list[socket.socket]) -> None:
    while locks:
        locks.pop().close()


def peer(process: int, run: str = "/runs/a", pid: int = 1) -> Peer:
    """A process of a run; each pid makes it a different process."""
    return Peer.myself(process, run)._replace(pid=1000 * process + pid)


def joining(port: int, *peers: Peer, within_s: float = 10.0):
    """Lets each peer join in a thread. Returns the threads, and by peer its result or error."""
    ended: dict[int, object] = {}

    def join(i: int) -> None:
        try:
            ended[i] = rendezvous.join(("localhost", port), peers[i], within_s, lambda reason: None)
        except Exception as e:
            ended[i] = e

    threads = [threading.Thread(target=join, args=(i,)) for i in range(len(peers))]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # peers connect in this order
    return threads, ended


def opened(size: int, *peers: Peer, run: str = "/runs/a") -> tuple[list[str], dict[int, object]]:
    """What process 0 says about peers that it refuses, and by peer its result or error."""
    port = runs.free_port()
    threads, ended = joining(port, *peers)
    with contextlib.closing(Rendezvous(f"localhost:{port}", port, size, run)) as meeting:
        refused = list(meeting.wait())
    for thread in threads:
        thread.join()
    return refused, ended


@pytest.mark.parametrize("size", [1, 2, 30])
def test_all_are_let_in_when_all_have_come(size):
    refused, ended = opened(size, *map(peer, range(1, size)))
    assert not refused and ended == dict.fromkeys(range(size - 1))


@pytest.mark.parametrize(
    ("stranger", "said"),
    [
        (peer(1, pid=2), "is the second with its number, after host "),
        (peer(1)._replace(host="elsewhere"), "is the second with its number, after host "),
        (peer(1)._replace(life="another container"), "is the second with its number, after host "),
        (peer(0), "joined a run of 3 processes; give all the same --num_processes"),
        (peer(7), "joined a run of 3 processes"),
        (peer(2, "/runs/b"), "has --workdir=/runs/b, and process 0 at localhost:"),
    ],
)
def test_who_does_not_belong_is_refused_and_the_others_are_not(stranger, said):
    port, refused = runs.free_port(), []
    with contextlib.closing(Rendezvous(f"localhost:{port}", port, 3, "/runs/a")) as meeting:
        waiting = threading.Thread(target=lambda: refused.extend(meeting.wait()))
        waiting.start()
        first, ended = joining(port, peer(1))
        runs.wait_until(lambda: meeting.missing == [2])
        for i, who in enumerate((stranger, peer(2)), 1):
            threads, result = joining(port, who)
            threads[0].join()
            ended[i] = result[0]
        for thread in (waiting, *first):
            thread.join()
    assert len(refused) == 1 and said in refused[0]
    kind = Stopped if "second" in said else ConfigError  # the first process may have died silently
    assert isinstance(ended[1], kind) and said in str(ended[1]) and "pid " in str(ended[1])
    assert ended[0] is None and ended[2] is None


def test_who_went_away_may_come_again():
    port = runs.free_port()
    meeting = Rendezvous(f"localhost:{port}", port, 3, "/runs/a")
    waiting = threading.Thread(target=lambda: list(meeting.wait()))
    waiting.start()
    with socket.create_connection(("localhost", port)) as connection:
        assert connection.recv(100) == rendezvous.GREETING
        connection.sendall(b'{"process": 1, "run": "/runs/a", "host": "a", "pid": 1}\n')
        end = time.monotonic() + 5
        while meeting.missing != [2]:
            assert time.monotonic() < end
            time.sleep(0.01)
    threads, ended = joining(port, peer(1), peer(2))
    for thread in (waiting, *threads):
        thread.join()
    meeting.close()
    assert ended == {0: None, 1: None}


def spoken(port: int, who: Peer) -> socket.socket:
    """A connection on which `who` introduces itself and then sends nothing more, not even when it is gone."""
    connection = socket.create_connection(("localhost", port))
    assert connection.recv(100) == rendezvous.GREETING
    connection.sendall(json.dumps(who._asdict()).encode() + b"\n")
    return connection


def test_who_comes_again_takes_its_place():
    """The first connection of a peer was lost silently, and process 0 still counts it."""
    port = runs.free_port()
    with contextlib.closing(Rendezvous(f"localhost:{port}", port, 3, "/runs/a")) as meeting:
        refused: list[str] = []
        waiting = threading.Thread(target=lambda: refused.extend(meeting.wait()))
        waiting.start()
        with spoken(port, peer(1)) as lost:
            runs.wait_until(lambda: meeting.missing == [2])
            threads, ended = joining(port, peer(1))
            runs.wait_until(lambda: lost.recv(100) == b"")  # process 0 closed it
            more, ended_2 = joining(port, peer(2))
            for thread in (waiting, *threads, *more):
                thread.join()
    assert ended == ended_2 == {0: None} and not refused


def test_what_a_closed_connection_still_said_is_not_heard():
    """Two connections of a peer send at the same time; when process 0 reads the second, it closes the first."""
    port = runs.free_port()
    with contextlib.closing(Rendezvous(f"localhost:{port}", port, 3, "/runs/a")) as meeting:
        lost, again = (socket.create_connection(("localhost", port)) for _ in range(2))
        with lost, again:
            meeting._accept()
            meeting._accept()
            first, second = meeting._received
            for connection in (lost, again):
                connection.sendall(json.dumps(peer(1)._asdict()).encode() + b"\n")
            time.sleep(0.1)
            assert [meeting._receive(connection) for connection in (first, second, first)] == [""] * 3
            assert meeting.missing == [2] and list(meeting._received) == [second]


def test_a_machine_that_is_gone_is_noticed():
    """A machine that is gone sends nothing, so the kernel must probe it (keep-alive)."""
    port, asked = runs.free_port(), socket.SO_KEEPALIVE
    with contextlib.closing(Rendezvous(f"localhost:{port}", port, 3, "/runs/a")) as meeting:
        waiting = threading.Thread(target=lambda: list(meeting.wait()), daemon=True)
        waiting.start()
        with spoken(port, peer(1)) as connection:
            runs.wait_until(lambda: meeting.missing == [2])
            (here, _), *_ = meeting._arrived.values()
            assert here.getsockopt(socket.SOL_SOCKET, asked)
            assert here.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
            rendezvous._keep_alive(connection)
            assert connection.getsockopt(socket.SOL_SOCKET, asked)
            with spoken(port, peer(2)):
                waiting.join(10)


@pytest.mark.parametrize("option", ["SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"])
def test_what_a_kernel_does_not_know_keeps_nobody_out(option, monkeypatch):
    """gVisor and WSL1 refuse some of the options that detect a machine that is gone."""
    monkeypatch.setattr(socket, option, 9999)
    port = runs.free_port()
    meeting = Rendezvous(f"localhost:{port}", port, 2, "/runs/a")
    with contextlib.closing(meeting), socket.create_connection(("localhost", port), timeout=1.0) as connection:
        meeting._accept()
        assert connection.recv(100) == rendezvous.GREETING
        rendezvous._keep_alive(connection)  # this does not fail in a peer, either


def test_the_second_of_a_number_comes_in_when_the_first_is_found_to_be_gone(monkeypatch):
    """The first process's machine died silently, and was replaced before the kernel of process 0 noticed."""
    monkeypatch.setattr(rendezvous, "GONE_S", 10.0)
    assert (
        rendezvous.KEEP_ALIVE["TCP_KEEPIDLE"]
        + rendezvous.KEEP_ALIVE["TCP_KEEPINTVL"] * rendezvous.KEEP_ALIVE["TCP_KEEPCNT"]
        < GONE_S
    )
    port, refused = runs.free_port(), []
    with contextlib.closing(Rendezvous(f"localhost:{port}", port, 3, "/runs/a")) as meeting:
        waiting = threading.Thread(target=lambda: refused.extend(meeting.wait()), daemon=True)
        waiting.start()
        with spoken(port, peer(1)):
            runs.wait_until(lambda: meeting.missing == [2])
            threads, ended = joining(port, peer(1, pid=2))
            time.sleep(1.2)  # the second process has tried three times
            assert not ended
        runs.wait_until(lambda: len(meeting._arrived) == 1 and meeting._arrived[1][1] == peer(1, pid=2))
        more, ended_2 = joining(port, peer(2))
        for thread in (waiting, *threads, *more):
            thread.join()
    assert ended == ended_2 == {0: None} and len(refused) == 1


def test_one_folder_by_any_name(tmp_path, monkeypatch):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs")
    monkeypatch.chdir(tmp_path)
    names = ["runs/a", "./runs//a/", "runs/b/../a", str(tmp_path / "link/a"), "link/a"]
    peers = [Peer.myself(i, name) for i, name in enumerate(names, 1)]
    refused, ended = opened(len(names) + 1, *peers, run="link/../runs/a")
    assert not refused and ended == dict.fromkeys(range(len(names)))


@pytest.mark.parametrize("ends", [True, False])
def test_the_earlier_attempt_of_process_0_is_waited_for(ends, tmp_path):
    """The earlier attempt may still be saving, so a port that is not free is not a mistake in the settings."""
    port, reasons = runs.free_port(), []
    earlier = [
        *rendezvous._acquire_locks(rendezvous._lock_names(port, str(tmp_path))),
        socket.create_server(("", port)),
    ]
    if ends:
        threading.Timer(1.0, release, [earlier]).start()
        Rendezvous(f"localhost:{port}", port, 2, str(tmp_path), timeout_s=10.0, progress=reasons.append).close()
    else:
        with pytest.raises(Stopped, match=f"port {port} of this host is not free: an earlier attempt of this run"):
            Rendezvous(f"localhost:{port}", port, 2, str(tmp_path), timeout_s=1.0, progress=reasons.append)
        with pytest.raises(ConfigError, match="another run or program has it"):
            Rendezvous(f"localhost:{port}", port, 2, str(tmp_path / "other"), timeout_s=1.0, progress=reasons.append)
    assert set(reasons) == {f"an earlier attempt of this run still has port {port}"}
    release(earlier)


@contextlib.contextmanager
def descriptors(left: int):
    """Lets this process open only `left` more file descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = (fd for fd in range(soft) if not os.path.exists(f"/proc/self/fd/{fd}"))
    most = max((fd + 1 for fd in itertools.islice(free, left)), default=0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("left", [0, 3])
def test_without_descriptors_it_does_not_spin(left, monkeypatch):
    """Process 0 closes silent connections to make room. If there are none, it warns once and retries now and then."""
    monkeypatch.setattr(rendezvous, "_allow_files", lambda size: None)
    port, said, tried = runs.free_port(), [], []
    real = Rendezvous._make_room
    monkeypatch.setattr(Rendezvous, "_make_room", lambda self, error: tried.append(error) or real(self, error))
    meeting = Rendezvous(f"localhost:{port}", port, 2, "/runs/a")
    with contextlib.closing(meeting), contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.create_connection(("localhost", port))) for _ in range(10)]
        waiting = threading.Thread(target=lambda: said.extend(meeting.wait()))
        with descriptors(left):
            waiting.start()
            time.sleep(1.0)
            assert 0 < len(tried) <= 10
        peers[-1].sendall(json.dumps(peer(1)._asdict()).encode() + b"\n")
        waiting.join(10)
        assert not waiting.is_alive() and len(said) == (left == 0), said


@pytest.mark.parametrize("then", ["nothing", "another"])
def test_a_process_0_that_goes_away_is_what_is_missing(then):
    """The error names process 0, not the other processes, and does not say that another run has the port."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        threads, ended = joining(port, peer(1), within_s=2.0)
        connection, _ = server.accept()
        with connection:
            connection.sendall(rendezvous.GREETING)
            connection.recv(1000)
        server.settimeout(0.1)
        while then == "another" and threads[0].is_alive():
            with contextlib.suppress(TimeoutError), server.accept()[0] as connection:
                connection.sendall(b"\x00\x00\x18\x04")
        if then == "nothing":
            server.close()
        threads[0].join(10)
    assert isinstance(ended[0], Stopped) and f"process 0 at localhost:{port} is gone: " in str(ended[0]), ended


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"{}\n",
        b"[1]\n",
        b"\xff\n",
        b"{" * 70000,
        b"[" * 60000 + b"\n",
        b'{"process": "1", "run": "/runs/a", "host": "h", "pid": 1}\n',
        b'{"process": 1, "run": ["/runs/a"], "host": "h", "pid": 1}\n',
        b'{"process": true, "run": "/runs/a", "host": "h", "pid": 1}\n',
    ],
)
def test_whatever_else_comes_in_changes_nothing(said):
    port = runs.free_port()
    meeting = Rendezvous(f"localhost:{port}", port, 2, "/runs/a")
    with contextlib.closing(meeting), socket.create_connection(("localhost", port)) as connection:
        connection.sendall(said)
        threads, ended = joining(port, peer(1))
        assert list(meeting.wait()) == []
        threads[0].join()
    assert ended == {0: None}


def http_server():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_port_that_another_program_has():
    """JAX's own service crashed on such a port (exit code 139)."""
    server = http_server()
    port = server.server_address[1]
    with pytest.raises(ConfigError, match=f"port {port} of this host is not free .*another run or program") as e:
        Rendezvous(f"localhost:{port}", port, 2, "/runs/a")
    assert "\n" not in str(e.value)
    threads, ended = joining(port, peer(1), within_s=1.5)
    threads[0].join()
    server.shutdown()
    assert isinstance(ended[0], ConfigError) and "does not wait for the processes of a run" in str(ended[0])


@pytest.mark.parametrize("said", [b"", b"\x00\x00\x18\x04", rendezvous.GREETING[:-1]])
def test_who_says_half_a_line_and_then_nothing_is_not_waited_for(said):
    """JAX's service, once a run has started, behaves like this until a client sends its first bytes."""
    with socket.create_server(("localhost", 0)) as server:
        threads, ended = joining(server.getsockname()[1], peer(1), within_s=0.5)
        connection, _ = server.accept()
        with connection:
            connection.sendall(said)
            threads[0].join(10)
    assert isinstance(ended.get(0), ConfigError) and "does not wait for the processes of a run" in str(ended[0])


def test_two_runs_never_have_one_port_not_even_for_a_moment():
    port = runs.free_port()
    first = Rendezvous(f"localhost:{port}", port, 2, "/runs/a")
    first.close()  # JAX has not taken the port yet
    held = rendezvous._locks.copy()
    rendezvous._locks.clear()
    with pytest.raises(ConfigError, match="is not free"):
        Rendezvous(f"localhost:{port}", port, 2, "/runs/b")
    release(held)
    Rendezvous(f"localhost:{port}", port, 2, "/runs/b").close()


def test_nobody_there():
    threads, ended = joining(port := runs.free_port(), peer(1), within_s=0.7)
    threads[0].join()
    assert isinstance(ended[0], Stopped) and f"no coordinator at localhost:{port} after 1 s: Connection" in str(
        ended[0]
    )


def test_connections_of_thousands_are_allowed(monkeypatch):
    limits = [(100, 1000)]
    monkeypatch.setattr(rendezvous.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(rendezvous.resource, "setrlimit", lambda _, new: limits.append(new))
    for size in (200, 4096):
        rendezvous._allow_files(size)
    assert limits[1:] == [(456, 1000), (1000, 1000)]
