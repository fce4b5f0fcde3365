"""The server's parts in one process: a client that reads nothing delays no other, and an engine that fails says so."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import jax.numpy as jnp
import pytest

from data.tokenizers import ByteTokenizer
from model.config import ModelConfig
from model.generate import Batch, Generator
from tests import tiny_models
from trainer.sampling import Language

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from launch.serving.app import App, Model
from launch.serving.engine import Engine
from launch.serving.errors import ApiError
from launch.serving.requests import NEUTRAL, ChatRequest, CompletionRequest, parse

CONTEXT, TIMEOUT_S = 32, 60
LONG = 10**7  # tokens; a text that takes longer than TIMEOUT_S
TOKENIZER = ByteTokenizer(["<eos>"])
CONFIG = ModelConfig(
    num_layers=1, embed_dim=32, num_heads=2, vocab_size=TOKENIZER.vocab_size, max_seq_len=CONTEXT, mlp="gelu"
)
LANGUAGE = Language(TOKENIZER, frozenset([TOKENIZER.eos_id]))


class Client:
    """Calls the application without a network, so that a test decides when the client reads."""

    def __init__(self, app: App, body: dict[str, Any], reads: asyncio.Event | None = None):
        self.messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self.status = 0
        self.raw = b""
        self.left = asyncio.Event()
        self._reads = reads
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        self.call = asyncio.create_task(app.asgi(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self.messages:
            return self.messages.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._reads:
            await self._reads.wait()
        self.status = message.get("status", self.status)
        self.raw += message.get("body", b"")

    async def text(self) -> str:
        await self.call
        events = [line[6:] for line in self.raw.decode().split("\n\n") if line]
        assert events.pop() == "[DONE]"
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def with_app(
    test: Callable[[App, Engine], Awaitable[None]], slots: int = 2, most: int = 10, params: Any = None
) -> None:
    """Runs the test with an application whose texts may be longer than what this test waits for."""
    apply, right = tiny_models.make(CONFIG)
    generator = Generator(CONFIG, apply, context=CONTEXT, read=1, chunk=4, slots=slots)
    batch = Batch(generator, params or right, wanted=2 * LONG, size=slots)

    async def run() -> None:
        engine = Engine(batch, most=most, on_error=lambda: None)
        try:
            app = App(Model("tiny", 1, LANGUAGE, "no chats", CONTEXT, 2 * LONG), engine)
            async with asyncio.timeout(TIMEOUT_S):
                await test(app, engine)
        finally:
            await engine.close()

    asyncio.run(run())


def body(seed: int, max_tokens: int = 20, **fields: Any) -> dict[str, Any]:
    return {"prompt": "abc", "seed": seed, "max_tokens": max_tokens, "stream": True, **fields}


def test_a_client_that_reads_nothing_delays_no_other():
    async def test(app: App, engine: Engine) -> None:
        reads = asyncio.Event()
        stalled = [Client(app, body(seed), reads) for seed in range(6)]
        others = [await Client(app, body(seed)).text() for seed in range(10)]
        assert engine.count == 0 and not any(client.raw for client in stalled)  # their slots are free all the same
        reads.set()
        assert [await client.text() for client in stalled] == others[:6] and len(set(others)) == 10

    with_app(test)


def test_a_client_that_leaves_while_nothing_is_sent_frees_its_slot():
    async def test(app: App, engine: Engine) -> None:
        never = asyncio.Event()
        leaving = [Client(app, body(1, max_tokens=LONG, stream=stream), never) for stream in (True, False)]
        waiting = asyncio.create_task(Client(app, body(2)).text())
        while engine.count < 3:
            await asyncio.sleep(0.01)
        for client in leaving:
            client.left.set()
        never.set()
        assert await waiting == await Client(app, body(2)).text() and engine.count == 0

    with_app(test)


def test_an_engine_that_fails_ends_every_answer_with_an_error():
    async def test(app: App, engine: Engine) -> None:
        clients = [Client(app, body(seed)) for seed in range(3)]
        for client in clients:
            await client.call
            last = json.loads(client.raw.decode().split("\n\n")[-2][6:])
            assert last["error"]["type"] == "server_error" and "has failed" in last["error"]["message"]
        assert isinstance(engine.error, TypeError | KeyError | ValueError | AttributeError) and not engine.accepts
        refused = Client(app, body(1))
        await refused.call
        assert refused.status == 503

    with_app(test, params={"embedding": jnp.zeros(3)})


def test_the_queue_has_an_end():
    async def test(app: App, engine: Engine) -> None:
        first = [Client(app, body(seed, max_tokens=LONG)) for seed in range(4)]
        while engine.count < 4:
            await asyncio.sleep(0.01)
        refused = Client(app, body(5))
        await refused.call
        assert refused.status == 429 and json.loads(refused.raw)["error"]["code"] == "queue_full"
        for client in first:
            client.left.set()
            await client.call
        assert len((await Client(app, body(6)).text()).encode()) >= 1 and engine.count == 0

    with_app(test, most=4)


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_implemented_is_refused_unless_it_asks_for_nothing(name):
    for kind, prompt in (
        (CompletionRequest, {"prompt": "a"}),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}]}),
    ):
        for value in (None, *NEUTRAL[name]):
            assert parse(kind, json.dumps({**prompt, name: value}).encode()) == parse(kind, json.dumps(prompt).encode())
        with pytest.raises(ApiError, match=f"{name} is not supported") as e:
            parse(kind, json.dumps({**prompt, name: "something"}).encode())
        assert e.value.status == 400 and e.value.param == name
