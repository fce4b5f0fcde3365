"""The life of the server: it listens, answers, and after a signal finishes what it has accepted."""

import asyncio
import contextlib
import math
import os
import signal
import socket
from collections.abc import Callable

import uvicorn

from launch import ENDED, cli
from launch.serving.app import App, Model
from launch.serving.engine import Engine
from model.generate import Batch

LAST_WRITES_S = 1.0  # for clients to read that their answer is cut short
POLL_S = 0.05
CONNECTIONS = (
    200  # beyond those that the queue allows: of idle clients, and of those that have yet to read their answer
)


class _Server(uvicorn.Server):
    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()  # signals are handled below

    def is_idle(self) -> bool:
        """Whether all answers are written, and have left this process."""
        unsent = (connection.transport.get_write_buffer_size() for connection in self.server_state.connections)
        return not self.server_state.tasks and not any(unsent)


async def serve(
    model: Model, batch: Batch, listener: socket.socket, *, most: int, grace_s: float, on_ready: Callable[[], None]
) -> None:
    """Answers until a signal asks to stop, then finishes what it has accepted within `grace_s`.

    Args:
      listener: a bound socket.
      most: how many texts may be generated or wait at a time.

    Raises:
      Exception: what the engine failed with.
    """
    stop = asyncio.Event()
    engine = Engine(batch, most=most, on_error=stop.set)
    app = App(model, engine)
    config = uvicorn.Config(
        app.asgi, lifespan="off", ws="none", log_config=None, access_log=False, server_header=False,
        limit_concurrency=2 * most + CONNECTIONS, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = _Server(config)
    _stop_at_signals(stop, engine, grace_s)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        await _until(lambda: server.started or serving.done())
        if server.started:
            on_ready()
            await stop.wait()
        engine.accepts = False
        await _until(server.is_idle, 0 if engine.error else grace_s)
    finally:
        await engine.close()
    await _until(server.is_idle, LAST_WRITES_S)
    for connection in server.server_state.connections:
        connection.transport.abort()  # of clients that do not read
    server.should_exit = True
    await serving
    if engine.error:
        raise engine.error


async def _until(true: Callable[[], bool], within_s: float = math.inf) -> None:
    deadline = asyncio.get_running_loop().time() + within_s
    while not true() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(POLL_S)


def _stop_at_signals(stop: asyncio.Event, engine: Engine, grace_s: float) -> None:
    """The first SIGINT or SIGTERM sets `stop`; a second one ends the process at once."""

    def handle(number: int) -> None:
        if stop.is_set():
            os._exit(ENDED + number)
        stop.set()
        cli.log.info("Stopping: %d texts have %g s to finish; a second signal ends at once.", engine.count, grace_s)

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, handle, number)
