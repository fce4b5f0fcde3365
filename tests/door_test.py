"""Where processes meet before JAX does: who is let in, who is refused, and what else may be listening there."""

import contextlib
import http.server
import socket
import threading
import time

import pytest

from launch import door
from launch.door import Door, Visitor
from tests import runs
from trainer.errors import ConfigError, Stopped


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(door, "PORT_S", 0.3)
    monkeypatch.setattr(door, "ANSWER_S", 1.0)
    yield
    if door._lock is not None:
        door._lock.close()
    door._lock = None


def visitor(process: int, run: str = "runs/a") -> Visitor:
    return Visitor.myself(process, run)


def knocking(port: int, *visitors: Visitor, within_s: float = 10.0):
    """Each on a thread; what each ends with."""
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


def opened(size: int, *visitors: Visitor, run: str = "runs/a") -> tuple[list[str], dict[int, object]]:
    """Whom process 0 refuses, and with what all end."""
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
        (visitor(1), "came as the second of its number, after host "),
        (visitor(0), "came to a run of 3 processes; give all the same --num_processes"),
        (visitor(7), "came to a run of 3 processes"),
        (visitor(2, "runs/b"), "is to train --workdir=runs/b, and process 0 at localhost:"),
    ],
)
def test_who_does_not_belong_is_refused_and_the_others_are_not(stranger, said):
    refused, ended = opened(3, visitor(1), stranger, visitor(2))
    assert len(refused) == 1 and said in refused[0]
    assert isinstance(ended[1], ConfigError) and said in str(ended[1]) and "pid " in str(ended[1])
    assert ended[0] is None and ended[2] is None


def test_who_went_away_may_come_again():
    port = runs.free_port()
    entrance = Door(f"localhost:{port}", port, 3, "runs/a")
    waiting = threading.Thread(target=lambda: list(entrance.wait()))
    waiting.start()
    with socket.create_connection(("localhost", port)) as connection:
        assert connection.recv(100) == door.GREETING
        connection.sendall(b'{"process": 1, "run": "runs/a", "host": "a", "pid": 1}\n')
        end = time.monotonic() + 5
        while entrance.missing != [2]:
            assert time.monotonic() < end
            time.sleep(0.01)
    threads, ended = knocking(port, visitor(1), visitor(2))
    for thread in (waiting, *threads):
        thread.join()
    entrance.close()
    assert ended == {0: None, 1: None}


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
        b'{"process": "1", "run": "runs/a", "host": "h", "pid": 1}\n',
        b'{"process": 1, "run": ["runs/a"], "host": "h", "pid": 1}\n',
        b'{"process": true, "run": "runs/a", "host": "h", "pid": 1}\n',
    ],
)
def test_whatever_else_comes_in_changes_nothing(said):
    port = runs.free_port()
    entrance = Door(f"localhost:{port}", port, 2, "runs/a")
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
        Door(f"localhost:{port}", port, 2, "runs/a")
    assert "\n" not in str(e.value)
    threads, ended = knocking(port, visitor(1), within_s=1.5)
    threads[0].join()
    server.shutdown()
    assert isinstance(ended[0], ConfigError) and "does not wait for the processes of a run" in str(ended[0])


@pytest.mark.parametrize("said", [b"", b"\x00\x00\x18\x04", door.GREETING[:-1]])
def test_who_says_half_a_line_and_then_nothing_is_not_waited_for(said):
    """As the service of a run that has begun does, until it has a connection's first words."""
    with socket.create_server(("localhost", 0)) as server:
        threads, ended = knocking(server.getsockname()[1], visitor(1), within_s=0.5)
        connection, _ = server.accept()
        with connection:
            connection.sendall(said)
            threads[0].join(10)
    assert isinstance(ended.get(0), ConfigError) and "does not wait for the processes of a run" in str(ended[0])


def test_two_runs_never_have_one_port_not_even_for_a_moment():
    port = runs.free_port()
    first = Door(f"localhost:{port}", port, 2, "runs/a")
    first.close()  # and JAX has not begun yet
    held, door._lock = door._lock, None
    with pytest.raises(ConfigError, match="is not free"):
        Door(f"localhost:{port}", port, 2, "runs/b")
    assert held is not None
    held.close()
    Door(f"localhost:{port}", port, 2, "runs/b").close()


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
