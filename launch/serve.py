"""Serve a trained model over HTTP, with OpenAI's interface and a chat page; for trying a model, not for production.

  python -m launch.serve --workdir=runs/tiny [--port=8000 --slots=8 --max_len=2048]

It answers /v1/completions, /v1/chat/completions, /v1/models and /health (docs/serving.md). Requests are batched as they
come; with the same seed a request has the same answer, whatever else is in the batch. Ctrl-C finishes what was
accepted.
"""

import asyncio
import dataclasses
import importlib.util
import json
import socket
import time
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from data.storage import malloc
from launch import cli, inference
from trainer.errors import ConfigError

if TYPE_CHECKING:  # these import JAX; a mistyped flag is reported before that
    from launch.serving.app import Model
    from model.generate import Batch

CHUNK = 8  # tokens between two looks at what clients want
READ = 1  # prompts at a time: more are hardly faster, and each would cost as much as all of them
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on. Others than this machine's have no password.")
PORT = flags.DEFINE_integer("port", 8000, "Port to listen on; 0: one that is free.", lower_bound=0, upper_bound=65535)
SLOTS = flags.DEFINE_integer("slots", 8, "Texts that are generated at a time.", lower_bound=1, upper_bound=4096)
QUEUE = flags.DEFINE_integer("queue", 64, "Texts that may wait for a slot; more are refused.", lower_bound=0)
MAX_LEN = flags.DEFINE_integer(
    "max_len",
    None,
    "The most tokens of a prompt and its answer; default: the context of the model. Longer texts continue with the "
    "last half of their context, as in launch.sample.",
    lower_bound=2,
    upper_bound=2**24,
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of weights and computation; default: that of the run."
)
INT8 = flags.DEFINE_bool("int8", False, "Hold the weights in int8; the computation is in --dtype.")
GRACE_S = flags.DEFINE_float("grace_s", 30.0, "Seconds to finish accepted requests after a signal.", lower_bound=0.0)


def main() -> int:
    with inference.memory_of_devices("lower --slots or --max_len, or use more or larger devices"):
        return serve()


def serve() -> int:
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise ConfigError('launch.serve needs more packages: pip install "meshlm[serve]"')
    with bind(HOST.value, PORT.value) as listener:
        malloc.tune_allocator()
        run = inference.open_run(DTYPE.value, int8=INT8.value)
        from launch.serving import server
        from model.generate import Batch

        model = model_of(run)
        generator = run.generator(model.language.tokenizer, slots=SLOTS.value, read=READ, chunk=CHUNK)
        batch = Batch(
            generator, run.fast_params, wanted=model.max_len, size=generator.slots, stop_ids=model.language.stop_ids
        )
        compile_programs(batch, model.longest_prompt)
        asyncio.run(
            server.serve(
                model, batch, listener, most=generator.slots + QUEUE.value, grace_s=GRACE_S.value,
                on_ready=lambda: say_ready(model, listener),
            )
        )  # fmt: skip
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound before the model is loaded, so that a taken port is reported at once; clients can connect
    only when it listens. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as e:
        raise ConfigError(f"--host={host} --port={port}: {e.strerror or e}; name others, or --port=0") from None
    return listener


def model_of(run: inference.LoadedRun) -> "Model":
    """What is served of a run. Raises ConfigError if it has no tokenizer."""
    from launch.serving.app import Model
    from trainer.sampling import Language

    chat: Language | str
    try:
        chat = Language.of(run.path, chat=True, vocab_size=run.config.model.vocab_size)
        language = dataclasses.replace(chat, chat=None)  # a turn also ends a text that is continued
    except ConfigError as e:
        chat = str(e).partition("; leave out")[0]
        language = Language.of(run.path, chat=False, vocab_size=run.config.model.vocab_size)
    name = run.path.resolve().name
    return Model(name, run.meta["step"], language, chat, run.context, MAX_LEN.value or run.context)


def compile_programs(batch: "Batch", longest: int) -> None:
    """Generates texts after prompts of all sizes, so that no client waits for the compiler."""
    from model.generate import Text

    start = time.monotonic()
    for length in sorted({min(2**i, longest) for i in range(longest.bit_length() + 1)}):
        tokens = 1 if length == longest else 2
        batch.add(Text(np.zeros(length, np.int32), max_new_tokens=tokens, seed=0))
        while not batch.idle:
            batch.step()
    cli.log.info("Compiled in %.1f s.", time.monotonic() - start)


def say_ready(model: "Model", listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if inference.JSON.value:
        print(json.dumps({"url": url, "model": model.name, "step": model.step}), flush=True)
        return
    chats = f" ({model.chat}, so there are no chats)" if isinstance(model.chat, str) else ""
    cli.log.info("Ready: %s serves %s, step %d%s", url, model.name, model.step, chats)


if __name__ == "__main__":
    cli.run(main)
