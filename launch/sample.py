"""Generate text with a trained model.

  python -m launch.sample --workdir=runs/tiny --prompt='def ' [--max_new_tokens=500 --temperature=0.8 --top_p=0.95]

Text is printed as it is made. Sample i depends only on --seed and i. --temperature=0 always takes the most likely
token. With --json each sample is one line {"step", "sample", "seed", "prompt", "text"}, where text does not include the
prompt.
"""

import json
import math
import pathlib
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from data.storage import malloc
from launch import cli, inference
from trainer.errors import ConfigError

if TYPE_CHECKING:  # it imports JAX; a mistyped flag is reported before that
    from trainer import sampling

CHUNK = 8  # tokens between two prints
PROMPT = flags.DEFINE_string("prompt", "\n", "Text to continue.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 500, "Number of tokens to generate.", lower_bound=1, upper_bound=2**30
)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Below 1: more likely tokens; above 1: less likely ones; 0: greedy.", lower_bound=0.0
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: from all.", lower_bound=0)
TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "Sample from the most likely tokens that have this total probability.",
    lower_bound=0.0,
    upper_bound=1.0,
)
PROMPTS = cli.define_path("prompts", None, "File of prompts, one JSON object a line; needs --out.")
OUT = cli.define_path("out", None, "File for the answers to --prompts, which a killed command resumes.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Number of samples.", lower_bound=1)
CHAT = flags.DEFINE_bool("chat", False, "The prompt is a message, in the chat template that came with the model.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random choices.", lower_bound=0, upper_bound=2**32 - 1)


def main() -> int:
    with inference.memory_of_devices("lower --num_samples or --max_new_tokens, or use more or larger devices"):
        return write()


def write() -> int:
    if not math.isfinite(TEMPERATURE.value):
        raise ConfigError(
            f"--temperature={TEMPERATURE.value} is not a finite number; 1 samples from the predicted distribution"
        )
    if bool(PROMPTS.value) != bool(OUT.value):
        raise ConfigError("--prompts=FILE.jsonl and --out=FILE.jsonl go together")
    if PROMPTS.value and (flags.FLAGS["prompt"].present or NUM_SAMPLES.value > 1 or inference.JSON.value):
        raise ConfigError("--prompts has one answer for each of its lines; leave --prompt, --num_samples, --json out")
    if not PROMPT.value:
        raise ConfigError("--prompt is empty; give at least one character, for example --prompt=$'\\n'")
    malloc.tune_allocator()
    run = inference.open_run()
    from trainer import sampling

    language = sampling.Language.of(run.path, chat=CHAT.value)
    sampler = {
        "temperature": TEMPERATURE.value, "top_k": TOP_K.value, "top_p": TOP_P.value,
        "vocab_size": language.tokenizer.vocab_size,
    }  # fmt: skip
    start = time.monotonic()
    if PROMPTS.value:
        from launch import prompt_file

        task = prompt_file.Task(run, language, sampler, MAX_NEW_TOKENS.value, SEED.value)
        tokens = task.answer(pathlib.Path(PROMPTS.value), pathlib.Path(OUT.value))
    else:
        prompt = language.encode([{"role": "user", "content": PROMPT.value}] if CHAT.value else PROMPT.value)
        show = Show(run.meta["step"], [language.stream() for _ in range(NUM_SAMPLES.value)])
        texts = sampling.make_generator(run.program, chunk=CHUNK, **sampler).continue_all(
            run.params, [prompt] * NUM_SAMPLES.value, max_new_tokens=MAX_NEW_TOKENS.value, seed=SEED.value,
            stop_ids=language.stop_ids, on_tokens=show.add,
        )  # fmt: skip
        tokens = sum(map(len, texts))
    if sys.stderr.isatty():
        seconds = time.monotonic() - start
        print(f"{tokens:,} tokens, {tokens / seconds:,.0f} a second with compilation", file=sys.stderr)
    return 0


class Show:
    """Prints samples in their order, the one that is next as it is made."""

    def __init__(self, step: int, streams: list["sampling.TextStream"]):
        self._step = step
        self._streams = streams
        self._ready = [""] * len(streams)
        self._ended = [False] * len(streams)
        self._next = 0
        self._begun = False

    def add(self, i: int, ids: np.ndarray, ended: bool) -> None:
        if inference.JSON.value:
            self._streams[i].collect(ids)
        else:
            self._ready[i] += self._streams[i].feed(ids, ended=ended)
        self._ended[i] = ended
        while self._next < len(self._streams):
            if not self._print(self._next):
                return
            self._next += 1
            self._begun = False

    def _print(self, i: int) -> bool:
        """Prints what is ready of sample i. Returns whether it has ended."""
        if inference.JSON.value:
            if self._ended[i]:
                text = self._streams[i].text()
                row = {"step": self._step, "sample": i, "seed": SEED.value, "prompt": PROMPT.value, "text": text}
                print(json.dumps(row), flush=True)
            return self._ended[i]
        if not self._begun and (self._ready[i] or self._ended[i]):
            print(("\n---\n" if i else "") + ("" if CHAT.value else PROMPT.value), end="")
            self._begun = True
        print(self._ready[i], end="\n" if self._ended[i] else "", flush=True)
        self._ready[i] = ""
        return self._ended[i]


if __name__ == "__main__":
    cli.run(main)
