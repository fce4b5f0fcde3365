"""Where processes meet before JAX starts: which are let in, which are refused, and what else may listen there."""

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

from launch import door
from launch.door import GONE_S, Door, Visitor
from tests import runs
from trainer.errors import ConfigError, Stopped


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(door, "PORT_S", 0.3)
    monkeypatch.setattr(door, "ANSWER_S", 1.0)
    monkeypatch.setattr(door, "GONE_S", 0.2)
    yield
    release(door._locks)


def release(locks: list[socket.socket]) -> None:
    while locks:
        locks.pop().close()


def visitor(process: int, run: str = "/runs/a", pid: int = 1) -> Visitor:
    """Another process for each pid."""
    return Visitor.myself(process, run)._replace(pid=1000 * process + pid)


def knocking(port: int, *visitors: Visitor, within_s: float = 10.0):
    """Lets each visitor knock on a thread. Returns the threads, and what each visitor ends with."""
    ended: dict[int, object] = {}

    def knock(i: int) -> None:
        try:
            ended[i] = door.knock(("localhost", port), visitors[i], within_s, lambda reason: None)
        except Exception as e:
            ended[i] = e

    threads = [threading.Thread(target=knock, args=(i,)) for i in range(len(visitors))]
    for thread in threads:
        thread.start()
        time.sleep(0.05)  # they come in this order
    return threads, ended


def opened(size: int, *visitors: Visitor, run: str = "/runs/a") -> tuple[list[str], dict[int, object]]:
    """What process 0 says about visitors that it refuses, and what each visitor ends with."""
    port = runs.free_port()
    threads, ended = knocking(port, *visitors)
    with contextlib.closing(Door(f"localhost:{port}", port, size, run)) as entrance:
        refused = list(entrance.wait())
    for thread in threads:
        thread.join()
    return refused, ended


@pytest.mark.parametrize("size", [1, 2, 30])
def test_all_are_let_in_when_all_have_come(size):
    refused, ended = opened(size, *map(visitor, range(1, size)))
    assert not refused and ended == dict.fromkeys(range(size - 1))


@pytest.mark.parametrize(
    ("stranger", "said"),
    [
        (visitor(1, pid=2), "came as the second of its number, after host "),
        (visitor(1)._replace(host="elsewhere"), "came as the second of its number, after host "),
        (visitor(1)._replace(life="another container"), "came as the second of its number, after host "),
        (visitor(0), "came to a run of 3 processes; give all the same --num_processes"),
        (visitor(7), "came to a run of 3 processes"),
        (visitor(2, "/runs/b"), "is to train --workdir=/runs/b, and process 0 at localhost:"),
    ],
)
def test_who_does_not_belong_is_refused_and_the_others_are_not(stranger, said):
    port, refused = runs.free_port(), []
    with contextlib.closing(Door(f"localhost:{port}", port, 3, "/runs/a")) as entrance:
        waiting = threading.Thread(target=lambda: refused.extend(entrance.wait()))
        waiting.start()
        first, ended = knocking(port, visitor(1))
        runs.wait_until(lambda: entrance.missing == [2])
        for i, who in enumerate((stranger, visitor(2)), 1):
            threads, result = knocking(port, who)
            threads[0].join()
            ended[i] = result[0]
        for thread in (waiting, *first):
            thread.join()
    assert len(refused) == 1 and said in refused[0]
    kind = Stopped if "second" in said else ConfigError  # the first may be gone silently, with its machine
    assert isinstance(ended[1], kind) and said in str(ended[1]) and "pid " in str(ended[1])
    assert ended[0] is None and ended[2] is None


def test_who_went_away_may_come_again():
    port = runs.free_port()
    entrance = Door(f"localhost:{port}", port, 3, "/runs/a")
    waiting = threading.Thread(target=lambda: list(entrance.wait()))
    waiting.start()
    with socket.create_connection(("localhost", port)) as connection:
        assert connection.recv(100) == door.GREETING
        connection.sendall(b'{"process": 1, "run": "/runs/a", "host": "a", "pid": 1}\n')
        end = time.monotonic() + 5
        while entrance.missing != [2]:
            assert time.monotonic() < end
            time.sleep(0.01)
    threads, ended = knocking(port, visitor(1), visitor(2))
    for thread in (waiting, *threads):
        thread.join()
    entrance.close()
    assert ended == {0: None, 1: None}


def spoken(port: int, who: Visitor) -> socket.socket:
    """A connection over which `who` has introduced itself, and sends nothing more, not even that it is gone."""
    connection = socket.create_connection(("localhost", port))
    assert connection.recv(100) == door.GREETING
    connection.sendall(json.dumps(who._asdict()).encode() + b"\n")
    return connection


def test_who_comes_again_takes_its_place():
    """Its connection was lost silently, and process 0 still counts it."""
    port = runs.free_port()
    with contextlib.closing(Door(f"localhost:{port}", port, 3, "/runs/a")) as entrance:
        refused: list[str] = []
        waiting = threading.Thread(target=lambda: refused.extend(entrance.wait()))
        waiting.start()
        with spoken(port, visitor(1)) as lost:
            runs.wait_until(lambda: entrance.missing == [2])
            threads, ended = knocking(port, visitor(1))
            runs.wait_until(lambda: lost.recv(100) == b"")  # it was closed
            more, ended_2 = knocking(port, visitor(2))
            for thread in (waiting, *threads, *more):
                thread.join()
    assert ended == ended_2 == {0: None} and not refused


def test_what_a_closed_connection_still_said_is_not_heard():
    """Two send at the same time; when process 0 reads the later one, it closes the other."""
    port = runs.free_port()
    with contextlib.closing(Door(f"localhost:{port}", port, 3, "/runs/a")) as entrance:
        lost, again = (socket.create_connection(("localhost", port)) for _ in range(2))
        with lost, again:
            entrance._accept()
            entrance._accept()
            first, second = entrance._heard
            for connection in (lost, again):
                connection.sendall(json.dumps(visitor(1)._asdict()).encode() + b"\n")
            time.sleep(0.1)
            assert [entrance._listen(connection) for connection in (first, second, first)] == [""] * 3
            assert entrance.missing == [2] and list(entrance._heard) == [second]


def test_a_machine_that_is_gone_is_noticed():
    """It sends nothing: the kernel probes it (keep-alive)."""
    port, asked = runs.free_port(), socket.SO_KEEPALIVE
    with contextlib.closing(Door(f"localhost:{port}", port, 3, "/runs/a")) as entrance:
        waiting = threading.Thread(target=lambda: list(entrance.wait()), daemon=True)
        waiting.start()
        with spoken(port, visitor(1)) as connection:
            runs.wait_until(lambda: entrance.missing == [2])
            (here, _), *_ = entrance._here.values()
            assert here.getsockopt(socket.SOL_SOCKET, asked)
            assert here.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
            door._keep_alive(connection)
            assert connection.getsockopt(socket.SOL_SOCKET, asked)
            with spoken(port, visitor(2)):
                waiting.join(10)


@pytest.mark.parametrize("option", ["SO_KEEPALIVE", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"])
def test_what_a_kernel_does_not_know_keeps_nobody_out(option, monkeypatch):
    """gVisor and WSL1 refuse some of the options that detect a machine that is gone."""
    monkeypatch.setattr(socket, option, 9999)
    port = runs.free_port()
    entrance = Door(f"localhost:{port}", port, 2, "/runs/a")
    with contextlib.closing(entrance), socket.create_connection(("localhost", port), timeout=1.0) as connection:
        entrance._accept()
        assert connection.recv(100) == door.GREETING
        door._keep_alive(connection)  # nor does a visitor fail by itself


def test_the_second_of_a_number_comes_in_when_the_first_is_found_to_be_gone(monkeypatch):
    """Its machine died silently, and is replaced before the kernel of process 0 notices."""
    monkeypatch.setattr(door, "GONE_S", 10.0)
    assert door.KEEP_ALIVE["TCP_KEEPIDLE"] + door.KEEP_ALIVE["TCP_KEEPINTVL"] * door.KEEP_ALIVE["TCP_KEEPCNT"] < GONE_S
    port, refused = runs.free_port(), []
    with contextlib.closing(Door(f"localhost:{port}", port, 3, "/runs/a")) as entrance:
        waiting = threading.Thread(target=lambda: refused.extend(entrance.wait()), daemon=True)
        waiting.start()
        with spoken(port, visitor(1)):
            runs.wait_until(lambda: entrance.missing == [2])
            threads, ended = knocking(port, visitor(1, pid=2))
            time.sleep(1.2)  # it has knocked three times
            assert not ended
        runs.wait_until(lambda: len(entrance._here) == 1 and entrance._here[1][1] == visitor(1, pid=2))
        more, ended_2 = knocking(port, visitor(2))
        for thread in (waiting, *threads, *more):
            thread.join()
    assert ended == ended_2 == {0: None} and len(refused) == 1


def test_one_folder_by_any_name(tmp_path, monkeypatch):
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs")
    monkeypatch.chdir(tmp_path)
    names = ["runs/a", "./runs//a/", "runs/b/../a", str(tmp_path / "link/a"), "link/a"]
    visitors = [Visitor.myself(i, name) for i, name in enumerate(names, 1)]
    refused, ended = opened(len(names) + 1, *visitors, run="link/../runs/a")
    assert not refused and ended == dict.fromkeys(range(len(names)))


@pytest.mark.parametrize("ends", [True, False])
def test_the_earlier_life_of_process_0_is_waited_for(ends, tmp_path):
    """It may still be saving. That its port is not free is not a mistake in the settings."""
    port, reasons = runs.free_port(), []
    earlier = [*door._held(door._names(port, str(tmp_path))), socket.create_server(("", port))]
    if ends:
        threading.Timer(1.0, release, [earlier]).start()
        Door(f"localhost:{port}", port, 2, str(tmp_path), 10.0, reasons.append).close()
    else:
        with pytest.raises(Stopped, match=f"port {port} of this host is not free: an earlier life of this run"):
            Door(f"localhost:{port}", port, 2, str(tmp_path), 1.0, reasons.append)
        with pytest.raises(ConfigError, match="another run or program has it"):
            Door(f"localhost:{port}", port, 2, str(tmp_path / "other"), 1.0, reasons.append)
    assert set(reasons) == {f"an earlier life of this run still has port {port}"}
    release(earlier)


@contextlib.contextmanager
def descriptors(left: int):
    """Lets this process open only `left` more."""
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
    """Silent connections are closed to make room. If there are none, it says so once, and retries now and then."""
    monkeypatch.setattr(door, "_allow_files", lambda size: None)
    port, said, tried = runs.free_port(), [], []
    real = Door._make_room
    monkeypatch.setattr(Door, "_make_room", lambda self, error: tried.append(error) or real(self, error))
    entrance = Door(f"localhost:{port}", port, 2, "/runs/a")
    with contextlib.closing(entrance), contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(socket.create_connection(("localhost", port))) for _ in range(10)]
        waiting = threading.Thread(target=lambda: said.extend(entrance.wait()))
        with descriptors(left):
            waiting.start()
            time.sleep(1.0)
            assert 0 < len(tried) <= 10
        visitors[-1].sendall(json.dumps(visitor(1)._asdict()).encode() + b"\n")
        waiting.join(10)
        assert not waiting.is_alive() and len(said) == (left == 0), said


@pytest.mark.parametrize("then", ["nothing", "another"])
def test_a_process_0_that_goes_away_is_what_is_missing(then):
    """The error names process 0 and not the others, and does not take the port for another run's."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        threads, ended = knocking(port, visitor(1), within_s=2.0)
        connection, _ = server.accept()
        with connection:
            connection.sendall(door.GREETING)
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
    entrance = Door(f"localhost:{port}", port, 2, "/runs/a")
    with contextlib.closing(entrance), socket.create_connection(("localhost", port)) as connection:
        connection.sendall(said)
        threads, ended = knocking(port, visitor(1))
        assert list(entrance.wait()) == []
        threads[0].join()
    assert ended == {0: None}


def http_server():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_port_that_another_program_has():
    """JAX's service crashed there (139)."""
    server = http_server()
    port = server.server_address[1]
    with pytest.raises(ConfigError, match=f"port {port} of this host is not free .*another run or program") as e:
        Door(f"localhost:{port}", port, 2, "/runs/a")
    assert "\n" not in str(e.value)
    threads, ended = knocking(port, visitor(1), within_s=1.5)
    threads[0].join()
    server.shutdown()
    assert isinstance(ended[0], ConfigError) and "does not wait for the processes of a run" in str(ended[0])


@pytest.mark.parametrize("said", [b"", b"\x00\x00\x18\x04", door.GREETING[:-1]])
def test_who_says_half_a_line_and_then_nothing_is_not_waited_for(said):
    """The service of a run that has begun behaves like this until a connection sends its first bytes."""
    with socket.create_server(("localhost", 0)) as server:
        threads, ended = knocking(server.getsockname()[1], visitor(1), within_s=0.5)
        connection, _ = server.accept()
        with connection:
            connection.sendall(said)
            threads[0].join(10)
    assert isinstance(ended.get(0), ConfigError) and "does not wait for the processes of a run" in str(ended[0])


def test_two_runs_never_have_one_port_not_even_for_a_moment():
    port = runs.free_port()
    first = Door(f"localhost:{port}", port, 2, "/runs/a")
    first.close()  # and JAX has not begun yet
    held = door._locks.copy()
    door._locks.clear()
    with pytest.raises(ConfigError, match="is not free"):
        Door(f"localhost:{port}", port, 2, "/runs/b")
    release(held)
    Door(f"localhost:{port}", port, 2, "/runs/b").close()


def test_nobody_there():
    threads, ended = knocking(port := runs.free_port(), visitor(1), within_s=0.7)
    threads[0].join()
    assert isinstance(ended[0], Stopped) and f"no coordinator at localhost:{port} after 1 s: Connection" in str(
        ended[0]
    )


def test_connections_of_thousands_are_allowed(monkeypatch):
    limits = [(100, 1000)]
    monkeypatch.setattr(door.resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(door.resource, "setrlimit", lambda _, new: limits.append(new))
    for size in (200, 4096):
        door._allow_files(size)
    assert limits[1:] == [(456, 1000), (1000, 1000)]
