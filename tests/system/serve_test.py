"""launch.serve as its clients see it: OpenAI's own client, plain HTTP, clients that leave, and signals."""

import concurrent.futures
import contextlib
import http.client
import json
import pathlib
import signal
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from tests import runs

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("jinja2")

CONTEXT, MAX_LEN = 32, 10_000_000  # texts of MAX_LEN tokens take longer than a test waits
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
PROMPT = "mesh shard"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """A run with a chat template, as converted chat models have one."""
    folder = tmp_path_factory.mktemp("serve")
    runs.train(folder / "tiny", runs.dataset(folder), num_train_steps=10)
    (folder / "tiny/hf").mkdir()
    (folder / "tiny/hf/chat_template.jinja").write_text(TEMPLATE)
    return folder / "tiny"


class Server:
    def __init__(self, process: subprocess.Popen, url: str):
        self.process = process
        self.url = url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def connect(self) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(self.url)
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=runs.TIMEOUT_S)

    def send(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of the answer; without a body the request is a GET."""
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = self.connect()
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request("GET" if raw is None else "POST", path, raw, headers)
        with contextlib.closing(connection), connection.getresponse() as response:
            return response.status, json.loads(response.read()), dict(response.headers)

    def complete(self, **fields: Any) -> Any:
        return self.client.completions.create(**{"model": "tiny", "prompt": PROMPT, "seed": 1} | fields)

    def chat(self, content: str = PROMPT, **fields: Any) -> Any:
        fields = {"model": "tiny", "messages": [{"role": "user", "content": content}], "seed": 1} | fields
        return self.client.chat.completions.create(**fields)

    def stream(self, **fields: Any) -> http.client.HTTPResponse:
        """A stream of which only the headers are read."""
        connection = self.connect()
        body = {"prompt": PROMPT, "stream": True, **fields}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse()

    def texts(self) -> int:
        return self.send("/health")[1]["texts"]


def command(run: pathlib.Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "launch.serve", f"--workdir={run}", "--port=0", "--json", *flags]


@contextlib.contextmanager
def serving(run: pathlib.Path, *flags: str, devices: int = 1, **environment: str) -> Iterator[Server]:
    process = runs.start(command(run, *flags), devices, **environment)
    with runs.ending(process):
        line, before = process.stdout.readline(), ""
        while not line.startswith("{"):
            assert line, f"the server ended:\n{before}"
            line, before = process.stdout.readline(), before + line
        yield Server(process, json.loads(line)["url"])


@pytest.fixture(scope="module")
def server(run) -> Iterator[Server]:
    with serving(run, f"--max_len={MAX_LEN}") as server:
        yield server


def events(response: http.client.HTTPResponse) -> list[str]:
    """The data of each event of a stream, up to its end."""
    with contextlib.closing(response):
        return [line[6:] for line in response.read().decode().split("\n\n") if line]


def test_a_completion_streamed_or_not_is_the_same_for_the_same_seed(server):
    whole = server.complete(max_tokens=50)
    assert whole.object == "text_completion" and whole.model == "tiny" and whole.id.startswith("cmpl-")
    (choice,) = whole.choices
    assert len(choice.text) == 50 and choice.finish_reason == "length" and choice.logprobs is None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (10, 50, 60)
    chunks = list(server.complete(max_tokens=50, stream=True))
    assert len(chunks) > 3 and "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks)
    assert server.complete(max_tokens=50, seed=2).choices[0].text != choice.text
    assert len({server.complete(max_tokens=50, seed=None).choices[0].text for _ in range(3)}) == 3
    assert len(server.complete().choices[0].text) == 16  # as at OpenAI
    greedy = {server.complete(temperature=0, seed=seed, max_tokens=20).choices[0].text for seed in (1, 2, 3)}
    assert len(greedy) == 1


def test_the_prompt_may_be_its_tokens(server):
    """The tokens of this run are its characters, in the order of their code points, after the special ones."""
    words = sorted(set(runs.text()))
    with pytest.raises(openai.BadRequestError, match="token ids from 0 to"):
        server.complete(prompt=[1000])
    ids = next(
        [first + words.index(c) for c in PROMPT]
        for first in (0, 1)
        if server.complete(prompt=[first + words.index("m")], max_tokens=1).usage.prompt_tokens == 1
    )
    assert server.complete(prompt=[PROMPT]).choices[0].text == server.complete().choices[0].text
    assert server.complete(prompt=ids).usage.prompt_tokens == len(PROMPT)


def test_a_chat_streamed_or_not_is_the_completion_of_its_template(server):
    whole = server.chat(max_tokens=30)
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert choice.message.content == server.complete(prompt=f"{PROMPT}\n", max_tokens=30).choices[0].text
    chunks = list(server.chat(max_completion_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == choice.message.content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage and chunks[-2].usage is None
    parts = [{"type": "text", "text": PROMPT[:4]}, {"type": "text", "text": PROMPT[4:]}]
    assert server.chat(parts, max_tokens=30).choices[0].message.content == choice.message.content
    ignored = {"user": "me", "metadata": {"a": "b"}, "n": 1, "tools": [], "logit_bias": None, "presence_penalty": 0.0}
    assert server.chat(max_tokens=30, extra_body=ignored).choices[0].message.content == choice.message.content


def test_a_stop_string_ends_an_answer_at_the_same_token_streamed_or_not(server):
    text = server.complete(max_tokens=400).choices[0].text
    stop = text[37:40]
    end = text.index(stop)
    whole = server.complete(max_tokens=400, stop=["?!", stop])
    assert whole.choices[0].text == text[:end] and whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == end + len(stop)
    chunks = list(server.complete(max_tokens=400, stop=stop, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text[:end] and chunks[-1].usage == whole.usage
    runs.wait_until(lambda: server.texts() == 0, server.process)


def test_log_probabilities_of_the_tokens(server):
    whole = server.complete(max_tokens=20, logprobs=0).choices[0]
    assert "".join(whole.logprobs.tokens) == whole.text and whole.logprobs.text_offset == list(range(20))
    assert all(-20 < logprob <= 0 for logprob in whole.logprobs.token_logprobs)
    chunks = list(server.complete(max_tokens=20, logprobs=0, stream=True))
    for name in ("tokens", "token_logprobs", "text_offset"):
        streamed = [value for chunk in chunks for value in getattr(chunk.choices[0].logprobs, name)]
        assert streamed == pytest.approx(getattr(whole.logprobs, name)) if name == "token_logprobs" else streamed
    content = server.chat(max_tokens=20, logprobs=True).choices[0].logprobs.content
    assert len(content) == 20 and all(one.logprob <= 0 and bytes(one.bytes).decode() == one.token for one in content)


def test_a_text_is_the_same_in_any_company(server):
    """64 requests at once, for 8 slots; each answer is that of the request by itself, and none is mixed."""
    lengths = {seed: 1 + 7 * seed % 90 for seed in range(64)}

    def text(seed: int, stream: bool) -> str:
        fields = {"seed": seed, "max_tokens": lengths[seed], "prompt": PROMPT[: 1 + seed % 10]}
        if not stream:
            return server.complete(**fields).choices[0].text
        return "".join(chunk.choices[0].text for chunk in server.complete(**fields, stream=True))

    alone = {seed: text(seed, stream=False) for seed in lengths}
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = dict(zip(lengths, pool.map(lambda seed: text(seed, stream=seed % 4 > 0), lengths), strict=True))
    assert together == alone and all(len(alone[seed]) == lengths[seed] for seed in lengths)


@pytest.mark.parametrize("devices", [1, 2])
def test_nothing_is_compiled_once_the_server_is_ready(run, devices):
    with serving(run, f"--max_len={MAX_LEN}", devices=devices, JAX_LOG_COMPILES="1") as server:
        for length in (1, 2, 5, 9, 17, CONTEXT - 1):
            server.complete(prompt="m" * length, max_tokens=3 * CONTEXT, temperature=length % 2, top_p=0.9, stop="?!")
        server.process.send_signal(signal.SIGTERM)
        out = runs.finish(server.process, 0)
        assert "Stopping" in out and "ompil" not in out


def chat_of(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


USER = {"role": "user", "content": "mesh"}


@pytest.mark.parametrize(
    ("chat", "body", "status", "said"),
    [
        (False, b"{", 400, "is not JSON"),
        (False, b'{"prompt": "mesh", "temperature": NaN}', 400, "is not JSON"),
        (False, b"[" * 100_000, 400, "is not JSON"),
        (False, b'{"prompt": "\\ud800"}', 400, "is not JSON"),
        (False, b"[]", 400, "not a JSON object"),
        (False, b'"' + b"m" * 2**20 + b'"', 413, "more than 1,048,576 bytes"),
        (False, {}, 400, "prompt: Field required"),
        (False, {"prompt": ""}, 400, "prompt is empty"),
        (False, {"prompt": []}, 400, "token ids"),
        (False, {"prompt": [True]}, 400, "one text, or a list"),
        (False, {"prompt": [-1]}, 400, "token ids from 0"),
        (False, {"prompt": ["mesh", "mesh"]}, 400, "one text, or a list"),
        (False, {"prompt": "é"}, 400, "'é' (U+00E9)"),
        (False, {"prompt": "mesh", "tempratur": 1}, 400, "there is no field tempratur"),
        (False, {"prompt": "mesh", "temperature": -0.1}, 400, "temperature"),
        (False, {"prompt": "mesh", "temperature": "1"}, 400, "temperature: Input should be a valid number"),
        (False, b'{"prompt": "mesh", "temperature": 1e400}', 400, "temperature"),
        (False, b'{"prompt": "mesh", "temperature": 1' + b"0" * 400 + b"}", 400, "temperature"),
        (
            False,
            b'{"prompt": "mesh", "max_tokens": 1' + b"0" * 400 + b"}",
            400,
            "max_tokens: Input should be less than",
        ),
        (False, {"prompt": "mesh", "top_p": 0}, 400, "top_p"),
        (False, {"prompt": "mesh", "top_p": 1.1}, 400, "top_p"),
        (False, {"prompt": "mesh", "top_k": 1.5}, 400, "top_k"),
        (False, {"prompt": "mesh", "max_tokens": 0}, 400, "max_tokens"),
        (False, {"prompt": "mesh", "max_tokens": True}, 400, "max_tokens"),
        (False, {"prompt": "mesh", "seed": -1}, 400, "seed"),
        (False, {"prompt": "mesh", "stop": ""}, 400, "stop"),
        (False, {"prompt": "mesh", "stop": ["a"] * 17}, 400, "stop"),
        (False, {"prompt": "mesh", "stream": "yes"}, 400, "stream"),
        (False, {"prompt": "mesh", "stream_options": {"include": 1}}, 400, "there is no field stream_options.include"),
        (False, {"prompt": "mesh", "logprobs": 1}, 400, "logprobs: Input should be less than or equal to 0"),
        (False, {"prompt": "mesh", "logprobs": True}, 400, "logprobs: Input should be a valid integer"),
        (False, {"prompt": "mesh", "n": 2}, 400, "n is not supported"),
        (False, {"prompt": "mesh", "best_of": 2}, 400, "best_of is not supported"),
        (False, {"prompt": "mesh", "echo": True}, 400, "echo is not supported"),
        (False, {"prompt": "mesh", "logit_bias": {"1": 5}}, 400, "logit_bias is not supported"),
        (False, {"prompt": "mesh", "model": "gpt-4"}, 404, "there is no model 'gpt-4'"),
        (True, {}, 400, "messages: Field required"),
        (True, chat_of(), 400, "messages"),
        (True, chat_of({"role": "user"}), 400, "messages.0.content: Field required"),
        (True, chat_of({"role": "robot", "content": "mesh"}), 400, "messages.0.role"),
        (True, chat_of({"role": "user", "content": [{"type": "image_url"}]}), 400, "messages.0.content"),
        (True, chat_of({**USER, "name": "x"}), 400, "there is no field messages.0.name"),
        (True, chat_of({"role": "user", "content": "é"}), 400, "'é' (U+00E9)"),
        (True, chat_of(USER) | {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
        (True, chat_of(USER) | {"top_logprobs": 3}, 400, "top_logprobs is not supported"),
        (True, chat_of(USER) | {"response_format": {"type": "json_object"}}, 400, "response_format is not"),
    ],
)
def test_a_request_that_is_wrong_is_refused_in_one_line(server, chat, body, status, said):
    found, content, _ = server.send("/v1/chat/completions" if chat else "/v1/completions", body)
    error = content["error"]
    assert found == status and said in error["message"] and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and len(error["message"]) < 300 and {"param", "code"} <= set(error)


def test_texts_that_are_too_long_have_the_code_of_openai(server):
    for fields in (
        {"prompt": "m" * CONTEXT},
        {"prompt": "m" * 5000},
        {"prompt": "m", "max_tokens": MAX_LEN},
    ):
        status, content, _ = server.send("/v1/completions", fields)
        assert status == 400 and content["error"]["code"] == "context_length_exceeded", fields
    status, content, _ = server.send("/v1/chat/completions", chat_of({"role": "user", "content": "m" * CONTEXT}))
    assert status == 400 and content["error"]["code"] == "context_length_exceeded"
    assert server.complete(prompt="m" * (CONTEXT - 1), max_tokens=1).usage.prompt_tokens == CONTEXT - 1
    assert server.complete(max_tokens=4 * CONTEXT).usage.completion_tokens == 4 * CONTEXT  # longer than the context


def test_routes_and_types_that_there_are_not(server):
    assert server.send("/v1/embeddings", {})[0] == 404
    status, content, _ = server.send("/v1/completions")
    assert status == 405 and "GET /v1/completions: Method Not Allowed" in content["error"]["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert server.send("/v1/completions", {"prompt": "mesh"}, Content_Type=kind)[0] == 415
    assert server.send("/v1/completions", {"prompt": "mesh"}, Content_Type="Application/JSON; charset=utf-8")[0] == 200
    with socket.create_connection(urllib.parse.urlsplit(server.url).netloc.split(":")) as raw:
        raw.sendall(b"mesh\r\n\r\n")
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")


def test_models_health_and_the_page(server):
    (model,) = server.client.models.list().data
    assert (model.id, model.step, model.context, model.max_model_len, model.chat) == ("tiny", 10, 32, MAX_LEN, True)
    assert server.send("/health")[:2] == (200, {"status": "ok", "texts": 0})
    connection = server.connect()
    connection.request("GET", "/")
    with contextlib.closing(connection), connection.getresponse() as response:
        page = response.read().decode()
        assert response.headers["Content-Type"].startswith("text/html") and "//" not in page.replace("// ", "")
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_and_its_place(run, stream):
    with serving(run, f"--max_len={MAX_LEN}", "--slots=1", "--queue=1") as server:
        clients = []
        for _ in range(2):
            clients.append(server.connect())
            body = {"prompt": "m", "max_tokens": MAX_LEN - 1, "stream": stream}
            clients[-1].request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        runs.wait_until(lambda: server.texts() == 2, server.process)
        status, content, headers = server.send("/v1/completions", {"prompt": "mesh"})
        assert status == 429 and content["error"]["code"] == "queue_full" and int(headers["retry-after"]) >= 1
        for client in clients:
            client.close()
        runs.wait_until(lambda: server.texts() == 0, server.process)
        assert server.complete(max_tokens=3).usage.completion_tokens == 3


def test_replicas_share_any_number_of_slots(run, server):
    with serving(run, f"--max_len={MAX_LEN}", "--slots=3", devices=2) as shared:
        words = [one.complete(max_tokens=8, temperature=0).choices[0].text for one in (server, shared)]
    assert words[0] == words[1] and len(words[0])


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(run):
    with serving(run, f"--max_len={MAX_LEN}", "--slots=2") as server:
        streams = [server.stream(max_tokens=1000, seed=seed) for seed in range(5)]
        server.process.send_signal(signal.SIGTERM)
        runs.wait_until(lambda: server.send("/health")[0] == 503, server.process)
        status, content, headers = server.send("/v1/completions", {"prompt": "mesh"})
        assert status == 503 and content["error"]["code"] == "stopping" and "retry-after" in headers
        for stream in streams:
            found = events(stream)
            assert found[-1] == "[DONE]"
            assert sum(len(json.loads(event)["choices"][0]["text"]) for event in found[:-1]) == 1000
        out = runs.finish(server.process, 0)
        assert "Stopping: 5 texts have 30 s to finish" in out and "Traceback" not in out


def test_after_the_time_of_grace_answers_end_with_an_error(run):
    with serving(run, f"--max_len={MAX_LEN}", "--grace_s=0") as server:
        stream, stalled = (server.stream(max_tokens=MAX_LEN - 10, seed=seed, logprobs=0) for seed in range(2))
        server.process.send_signal(signal.SIGINT)
        assert json.loads(events(stream)[-1])["error"]["code"] == "stopping"
        assert "Traceback" not in runs.finish(server.process, 0)
        stalled.close()


def test_a_second_signal_ends_at_once(run):
    with serving(run, f"--max_len={MAX_LEN}") as server:
        stream = server.stream(max_tokens=MAX_LEN - 10)
        server.process.send_signal(signal.SIGTERM)
        assert "Stopping" in server.process.stdout.readline()
        server.process.send_signal(signal.SIGINT)
        runs.finish(server.process, 130, within_s=5)
        stream.close()


def test_mistakes_end_in_one_line(run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = runs.finish(runs.start([*command(run), f"--port={port}"]), 2).splitlines()
        assert f"--port={port}: Address already in use" in line
    for flag, said in (("--max_len=1", "--max_len"), ("--slots=0", "--slots"), ("--host=no.such.host", "no.such.host")):
        (line,) = runs.finish(runs.start(command(run, flag)), 2).splitlines()
        assert said in line
    assert "no checkpoint" in runs.finish(runs.start(command(run, "--step=7")), 3)


def test_a_run_without_a_chat_template_completes_only(run, tmp_path):
    bare = tmp_path / "bare"
    bare.symlink_to(run)  # the name of the model is that of the run itself
    (run / "hf").rename(run / "hidden")
    try:
        with serving(bare) as server:
            status, content, _ = server.send("/v1/chat/completions", chat_of(USER))
            assert status == 400 and "has no chat template" in content["error"]["message"]
            assert "--chat" not in content["error"]["message"] and len(server.complete().choices[0].text) == 16
    finally:
        (run / "hidden").rename(run / "hf")
