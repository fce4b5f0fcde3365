"""Generate text with a trained model.

  python -m launch.sample --workdir=runs/tiny --prompt='def ' [--max_new_tokens=500 --temperature=0.8 --top_p=0.95]

Text is printed as it is made. Sample i depends only on --seed and i. --temperature=0 always takes the most likely
token. With --json each sample is one line {"step", "sample", "seed", "prompt", "text"}, where text does not include the
prompt, and --logprobs adds the log-probability of each token.
"""

import json
import pathlib
import sys
import time
from typing import TYPE_CHECKING

from absl import flags

from data.storage import malloc
from launch import cli, inference
from trainer.errors import ConfigError

if TYPE_CHECKING:  # these import JAX; a mistyped flag is reported before that
    from model.generate import Generator, News
    from model.sampling import Sampling
    from trainer.sampling import Language, TextStream

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
MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Sample from tokens that are at least this many times as likely as the most likely one.",
    lower_bound=0.0, upper_bound=1.0,
)  # fmt: skip
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Above 1: tokens that the text has become less likely.", lower_bound=0.0
)
STOP = flags.DEFINE_multi_string("stop", [], "A string that ends the text; may be given several times.")
LOGPROBS = flags.DEFINE_bool("logprobs", False, "Add the log-probability of each token; needs --json or --prompts.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of weights and computation; default: that of the run."
)
INT8 = flags.DEFINE_bool("int8", False, "Hold the weights in int8; the computation is in --dtype.")
PROMPTS = cli.define_path("prompts", None, "File of prompts, one JSON object a line; needs --out.")
OUT = cli.define_path("out", None, "File for the answers to --prompts, which a killed command resumes.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Number of samples.", lower_bound=1)
CHAT = flags.DEFINE_bool("chat", False, "The prompt is a message, in the chat template that came with the model.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random choices.", lower_bound=0, upper_bound=2**32 - 1)


def main() -> int:
    with inference.memory_of_devices("lower --num_samples or --max_new_tokens, or use more or larger devices"):
        return write()


def write() -> int:
    if bool(PROMPTS.value) != bool(OUT.value):
        raise ConfigError("--prompts=FILE.jsonl and --out=FILE.jsonl go together")
    if PROMPTS.value and (flags.FLAGS["prompt"].present or NUM_SAMPLES.value > 1 or inference.JSON.value):
        raise ConfigError("--prompts has one answer for each of its lines; leave --prompt, --num_samples, --json out")
    if LOGPROBS.value and not (inference.JSON.value or PROMPTS.value):
        raise ConfigError("--logprobs needs --json, or --prompts and --out")
    if not PROMPT.value:
        raise ConfigError("--prompt is empty; give at least one character, for example --prompt=$'\\n'")
    malloc.tune_allocator()
    run = inference.open_run(DTYPE.value, int8=INT8.value)
    sampling = checked_sampling()
    from trainer.sampling import Language

    language = Language.of(run.path, chat=CHAT.value, vocab_size=run.config.model.vocab_size)
    start = time.monotonic()
    if PROMPTS.value:
        from launch import prompt_file

        generator = run.generator(language.tokenizer, slots=prompt_file.SLOTS, read=prompt_file.READ)
        task = prompt_file.Task(
            run, generator, language, sampling, MAX_NEW_TOKENS.value, SEED.value, tuple(STOP.value), LOGPROBS.value
        )
        tokens = task.answer(pathlib.Path(PROMPTS.value), pathlib.Path(OUT.value))
    else:
        generator = run.generator(language.tokenizer, chunk=CHUNK)
        tokens = write_samples(run, generator, language, sampling)
    if sys.stderr.isatty():
        seconds = time.monotonic() - start
        print(f"{tokens:,} tokens in {seconds:,.1f} s{speed_of(generator)}", file=sys.stderr)
    return 0


def checked_sampling() -> "Sampling":
    """What the flags say about sampling. Raises ConfigError."""
    from model.sampling import Sampling

    try:
        return Sampling(
            REPETITION_PENALTY.value, TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value, min_p=MIN_P.value
        )
    except ValueError as e:
        raise ConfigError(f"--{e}") from None


def speed_of(generator: "Generator") -> str:
    """Tokens a second without compilation, and the share of the memory's bandwidth (MBU) if the chip is known."""
    import jax

    from trainer import chips

    said = ""
    if generator.reading.seconds:
        said += f"; reading {generator.reading.tokens / generator.reading.seconds:,.0f} tokens/s"
    if writing := generator.writing.seconds:
        rate, chip = generator.writing.bytes / writing, chips.chip_of(jax.devices()[0].device_kind)
        said += f"; generating {generator.writing.tokens / writing:,.0f} tokens/s, {rate / 1e9:,.1f} GB/s"
        said += f" (MBU {rate / chip.hbm:.0%})" if chip is not None else ""
    return said


def write_samples(run: inference.LoadedRun, generator: "Generator", language: "Language", sampling: "Sampling") -> int:
    """Prints --num_samples continuations of --prompt; returns the number of their tokens."""
    prompt = language.encode([{"role": "user", "content": PROMPT.value}] if CHAT.value else PROMPT.value)
    if len(prompt) >= run.context:
        cli.log.warning(
            "--prompt has %d tokens, and the context of the model %d: it sees only the last %d of them",
            len(prompt), run.context, run.context // 2,
        )  # fmt: skip
    show = Show(run.meta["step"], [language.stream(STOP.value) for _ in range(NUM_SAMPLES.value)])
    texts = generator.continue_all(
        run.fast_params, [prompt] * NUM_SAMPLES.value, max_new_tokens=MAX_NEW_TOKENS.value, seed=SEED.value,
        sampling=sampling, stop_ids=language.stop_ids, on_news=show.add,
    )  # fmt: skip
    return sum(map(len, texts))


class Show:
    """Prints samples in their order, the one that is next as it is made."""

    def __init__(self, step: int, streams: list["TextStream"]):
        self._step = step
        self._streams = streams
        self._logprobs: list[list[float]] = [[] for _ in streams]
        self._printed = [0] * len(streams)  # characters
        self._ended = [False] * len(streams)
        self._next = 0

    def add(self, i: int, news: "News") -> bool:
        """Prints what can be printed with these tokens of sample i. Returns whether a stop string ends it."""
        stream = self._streams[i]
        stream.feed(news.tokens, ended=news.ended)
        self._logprobs[i] += news.logprobs.tolist()
        self._ended[i] = news.ended or stream.stopped
        while self._next < len(self._streams):
            (self._print_row if inference.JSON.value else self._print_text)(self._next)
            if not self._ended[self._next]:
                break
            self._next += 1
        return stream.stopped

    def _print_row(self, i: int) -> None:
        if self._ended[i]:
            stream = self._streams[i]
            row = {"step": self._step, "sample": i, "seed": SEED.value, "prompt": PROMPT.value, "text": stream.text}
            row |= {"logprobs": self._logprobs[i][: len(stream.ids)]} if LOGPROBS.value else {}
            print(json.dumps(row), flush=True)

    def _print_text(self, i: int) -> None:
        """Prints what is new of sample i."""
        text = self._streams[i].text
        begin = ""
        if not self._printed[i] and (text or self._ended[i]):
            begin = ("\n---\n" if i else "") + ("" if CHAT.value else PROMPT.value)
        print(begin + text[self._printed[i] :], end="\n" if self._ended[i] else "", flush=True)
        self._printed[i] = len(text)


if __name__ == "__main__":
    cli.run(main)
