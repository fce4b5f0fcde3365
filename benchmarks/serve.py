"""Many clients of launch.serve at once: whether each answer is the right one, and how long they wait.

  python -m benchmarks.serve --workdir=RUN [--clients=64 --seconds=120 --slots=8 --max_tokens=100]

Starts the server, asks for some texts one by one, and then for the same texts with many streaming clients, each of
which sends its next request as soon as it has an answer. Every answer must be the text that the request has by itself.
At the same time one client reads nothing of its stream, and others leave in the middle of an answer.

Exit codes: 0 all answers were right, 1 an answer was lost, late, or not that of its request.
"""

import argparse
import asyncio
import contextlib
import json
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

SEEDS = 100  # different requests
LATE_S = 60


class Client:
    """Speaks plain HTTP, so that the clients take little of the machine's time from the server."""

    def __init__(self, url: str):
        parts = urllib.parse.urlsplit(url)
        self.host, self.port = parts.hostname, parts.port

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream. Raises EOFError if it ends before its last event."""
        reader, writer = await self.begin(body)
        with contextlib.closing(writer):
            status = await reader.readline()
            if b"200" not in status:
                raise EOFError(f"{status.decode().strip()}, {(await reader.read()).decode()}")
            async for line in reader:
                if line == b"data: [DONE]\n":
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])
            raise EOFError("the stream ended early")

    async def begin(self, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        raw = json.dumps({**body, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw)
        await writer.drain()
        return reader, writer


class Load:
    """Sends requests, compares the answers, and measures.

    Attributes:
      first, whole: seconds from a request to its first text and to its end.
      wrong: what is wrong with answers.
    """

    def __init__(self, client: Client, prompt: str, max_tokens: int):
        self.client = client
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.by_itself: dict[int, str] = {}
        self.first: list[float] = []
        self.whole: list[float] = []
        self.tokens = 0
        self.left = 0
        self.wrong: list[str] = []

    def body(self, seed: int) -> dict[str, Any]:
        """One of the requests: prompts, lengths and temperatures differ."""
        tokens = 1 + random.Random(seed).randrange(self.max_tokens)
        temperature = 0.0 if seed % 7 == 0 else 0.5 + seed % 5 / 4
        return {
            "prompt": (self.prompt * 50)[: 1 + seed % 50],
            "seed": seed,
            "max_tokens": tokens,
            "temperature": temperature,
        }

    async def text(self, seed: int) -> str:
        return "".join([part["choices"][0]["text"] async for part in self.client.stream(self.body(seed))])

    async def one_by_one(self) -> None:
        for seed in range(SEEDS):
            self.by_itself[seed] = await self.text(seed)

    async def ask(self, seed: int) -> None:
        start, parts = time.monotonic(), []
        async for part in self.client.stream(self.body(seed)):
            if not parts:
                self.first.append(time.monotonic() - start)
            parts.append(part["choices"][0]["text"])
        self.whole.append(time.monotonic() - start)
        self.tokens += self.body(seed)["max_tokens"]
        if "".join(parts) != self.by_itself[seed]:
            self.wrong.append(f"seed {seed}: {''.join(parts)!r} instead of {self.by_itself[seed]!r}")

    async def leave(self, seed: int) -> None:
        """Reads a little of a stream, and closes it."""
        async with contextlib.aclosing(self.client.stream(self.body(seed) | {"max_tokens": self.max_tokens})) as parts:
            async for _ in parts:
                break
        self.left += 1

    async def keep_asking(self, number: int, until: float) -> None:
        choose = random.Random(number)
        while time.monotonic() < until:
            seed = choose.randrange(SEEDS)
            try:
                async with asyncio.timeout(LATE_S):
                    await (self.leave(seed) if choose.random() < 0.05 else self.ask(seed))
            except (OSError, EOFError, TimeoutError) as e:
                self.wrong.append(f"seed {seed}: {type(e).__name__}: {e}")

    async def run(self, clients: int, seconds: float, longest: int) -> float:
        """Returns how many seconds the load took."""
        await self.one_by_one()
        _, stalled = await self.client.begin({"prompt": self.prompt, "max_tokens": longest, "logprobs": 0})
        with contextlib.closing(stalled):
            start = time.monotonic()
            await asyncio.gather(*(self.keep_asking(number, start + seconds) for number in range(clients)))
            return time.monotonic() - start


def table(load: Load, options: argparse.Namespace, seconds: float) -> str:
    def tail(values: list[float]) -> str:
        hundredths = statistics.quantiles(values, n=100)
        return f"{statistics.median(values):.2f} s, {hundredths[98]:.2f} s, {max(values):.2f} s"

    return "\n".join([
        f"{options.clients} clients, {options.slots} slots, {seconds:.0f} s, one stalled client", "",
        "| | |", "|---|---|",
        f"| answers | {len(load.whole):,} |",
        f"| wrong or lost | {len(load.wrong)} |",
        f"| clients that left | {load.left:,} |",
        f"| tokens a second | {load.tokens / seconds:,.0f} |",
        f"| request to first text: median, 99 %, longest | {tail(load.first)} |",
        f"| request to end: median, 99 %, longest | {tail(load.whole)} |",
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max_tokens", type=int, default=100)
    parser.add_argument("--prompt", default="mesh shard token ", help="Prompts begin with it.")
    options = parser.parse_args()
    longest = 100_000  # the text of the stalled client
    words = ["launch.serve", f"--workdir={options.workdir}", "--port=0", "--json", f"--slots={options.slots}"]
    words += [f"--queue={options.clients + 1}", f"--max_len={longest + 10}", "--grace_s=1"]
    server = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        if not (ready := server.stdout.readline()):
            return 1
        load = Load(Client(json.loads(ready)["url"]), options.prompt, options.max_tokens)
        seconds = asyncio.run(load.run(options.clients, options.seconds, longest))
        print(table(load, options, seconds))
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
    print("\n".join(load.wrong[:20]), file=sys.stderr)
    return int(bool(load.wrong) or code != 0)


if __name__ == "__main__":
    sys.exit(main())
