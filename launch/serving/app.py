"""The routes of the server, and the path of a request: checks, the queue of the engine, an answer or a stream."""

import asyncio
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from data.errors import UserError
from launch.serving import requests
from launch.serving.answers import Answer, ChatAnswer, CompletionAnswer, Part
from launch.serving.engine import Engine, Job
from launch.serving.errors import ApiError
from launch.serving.requests import ChatRequest, CompletionRequest
from model.generate import Text
from trainer.sampling import Language

PAGE = pathlib.Path(__file__).with_name("page.html")
MOST_BYTES = 1 << 20  # of a request
GONE = 499  # a client that is gone; the code of nginx
# The page may only run what is written in it, and speak with this server.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies between server and client


@dataclasses.dataclass(frozen=True)
class Model:
    """What is served.

    Attributes:
      name: what requests call it.
      step: of the checkpoint.
      language: of completions.
      chat: of chats; or why there are none.
      context: how many tokens the model has seen at a time.
      max_len: the most tokens of prompt and answer together.
    """

    name: str
    step: int
    language: Language
    chat: Language | str
    context: int
    max_len: int

    @property
    def longest_prompt(self) -> int:
        """In tokens: there is room for one token after it."""
        return min(self.context, self.max_len) - 1


class App:
    """The ASGI application of a model and its engine."""

    def __init__(self, model: Model, engine: Engine):
        self._model = model
        self._engine = engine
        self._started = int(time.time())
        # Tokenizing a long prompt takes longer than the event loop may wait.
        self._encoder = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.asgi = Starlette(
            routes=[
                Route("/", self._page), Route("/health", self._health), Route("/v1/models", self._models),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={ApiError: _refuse, HTTPException: _refuse_route, ClientDisconnect: _gone, 500: _fail},
        )  # fmt: skip

    async def _page(self, _: Request) -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    async def _health(self, _: Request) -> Response:
        status = {"status": "ok" if self._engine.accepts else "stopping", "texts": self._engine.count}
        return JSONResponse(status, 200 if self._engine.accepts else 503)

    async def _models(self, _: Request) -> Response:
        model = self._model
        row = {
            "id": model.name, "object": "model", "created": self._started, "owned_by": "meshlm", "step": model.step,
            "context": model.context, "max_model_len": model.max_len, "chat": isinstance(model.chat, Language),
        }  # fmt: skip
        return JSONResponse({"object": "list", "data": [row]})

    async def _complete(self, request: Request) -> Response:
        body = requests.parse(CompletionRequest, await self._body(request))
        ids = await self._tokens(self._model.language, body.prompt, "prompt")
        return await self._answer(request, CompletionAnswer, body, self._model.language, ids)

    async def _chat(self, request: Request) -> Response:
        language = self._model.chat
        if isinstance(language, str):
            raise ApiError(400, f"{language}; use /v1/completions", code="no_chat_template")
        body = requests.parse(ChatRequest, await self._body(request))
        ids = await self._tokens(language, [message.plain() for message in body.messages], "messages")
        return await self._answer(request, ChatAnswer, body, language, ids)

    async def _body(self, request: Request) -> bytes:
        self._engine.check()
        # A page of another site can make a browser send any other type without asking this server first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the header Content-Type must be application/json")
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > MOST_BYTES:
                raise ApiError(413, f"the request has more than {MOST_BYTES:,} bytes")
        return bytes(raw)

    async def _tokens(self, language: Language, prompt: Any, name: str) -> np.ndarray:
        """The tokens of a prompt that fits in the context. Raises ApiError."""
        if isinstance(prompt, list) and name == "prompt":
            ids = _checked_ids(prompt, language.tokenizer.vocab_size)
        else:
            if prompt == "":
                raise ApiError(400, "prompt is empty; give at least one character", param="prompt")
            encode = functools.partial(language.encode, prompt, name)
            try:
                ids = await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
            except UserError as e:
                raise ApiError(400, str(e), param=name) from None
        longest = self._model.longest_prompt
        if len(ids) > longest:
            raise _too_long(f"{name}: {len(ids):,} tokens, and at most {longest:,} are possible", name)
        return ids

    async def _answer(
        self,
        request: Request,
        kind: type[Answer],
        body: CompletionRequest | ChatRequest,
        language: Language,
        ids: np.ndarray,
    ) -> Response:
        if body.model not in (None, self._model.name):
            message = f"there is no model {body.model!r}; this server has {self._model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        room = self._model.max_len - len(ids)
        if (tokens := body.most_tokens(room)) > room:
            raise _too_long(
                f"{len(ids):,} tokens of the prompt and max_tokens={tokens:,} exceed {self._model.max_len:,}"
            )
        seed = secrets.randbits(32) if body.seed is None else body.seed
        text = Text(ids, max_new_tokens=tokens, seed=seed, sampling=body.sampling())
        answer = kind(body, language, model=self._model.name, prompt_tokens=len(ids))
        job = self._engine.submit(text)
        if body.stream:
            return _Stream(job, answer)
        watch = asyncio.create_task(_end_if_gone(request, job))
        try:
            async for _ in _parts(job, answer):
                pass
        finally:
            watch.cancel()
            job.cancel()
        return JSONResponse(answer.complete())


class _Stream(StreamingResponse):
    """An answer as server-sent events. Its slot is free when the answer is complete, or the client is gone."""

    def __init__(self, job: Job, answer: Answer):
        super().__init__(_events(job, answer), media_type="text/event-stream", headers=NO_BUFFER)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _parts(job: Job, answer: Answer) -> AsyncIterator[Part]:
    """The parts of an answer as they are made."""
    async for news in job.news():
        part = answer.add(news)
        if answer.finished:
            job.cancel()  # a stop string was found, perhaps long before the text would end
        yield part
        if answer.finished:
            return


async def _events(job: Job, answer: Answer) -> AsyncIterator[str]:
    for choice in answer.opening():
        yield _event(answer.chunk(choice))
    try:
        async for part in _parts(job, answer):
            if part.text or part.finish_reason or answer.request.wants_logprobs:
                yield _event(answer.chunk(answer.chunk_choice(part)))
    except ApiError as e:
        yield _event(e.body())
        return
    if answer.request.wants_usage:
        yield _event(answer.chunk())
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    # ASCII, because some clients split lines at characters such as U+2028.
    return f"data: {json.dumps(content)}\n\n"


async def _end_if_gone(request: Request, job: Job) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    job.put(ApiError(GONE, "the client is gone"))


def _checked_ids(prompt: list[int], vocab_size: int) -> np.ndarray:
    if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
        raise ApiError(400, f"prompt must have token ids from 0 to {vocab_size - 1}, at least one", param="prompt")
    return np.array(prompt, np.int32)


def _too_long(message: str, name: str | None = None) -> ApiError:
    return ApiError(400, message, param=name, code="context_length_exceeded")


def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)


def _fail(_: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, f"{type(error).__name__} in the server; its console has more").body(), 500)


def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=GONE)  # no one reads it
