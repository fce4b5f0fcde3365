"""launch.sample for a file of prompts: answers are written in order to a file, which a killed command resumes.

A line of the input is an object with "prompt", a text, or (with --chat) "messages", a list of {"role", "content"}. A
line of the output has its index, the prompt or messages, text, tokens (how many), end ("stop" or "length"), with
--logprobs the log-probability of each token, and settings, the digest of all that the answers depend on. A command that
was killed writes the rest, with the same bytes.
"""

import dataclasses
import json
import pathlib
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from data.errors import DataError
from data.storage import files
from launch import cli
from model.generate import Generator, News
from model.sampling import Sampling
from trainer.errors import ConfigError
from trainer.reliability import identity
from trainer.sampling import Language

if TYPE_CHECKING:  # it defines flags
    from launch.inference import LoadedRun

SLOTS, READ = 16, 4  # prompts that are answered, and read, at a time


def read_prompts(path: pathlib.Path, key: str) -> list[Any]:
    """The value of `key` in each line. Raises DataError, which names the first line that is wrong."""
    is_valid = {"prompt": _is_text, "messages": _is_chat}[key]
    prompts: list[Any] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[key]
            if not is_valid(value):
                raise TypeError(f"{key} is {value!r}"[:200])
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise DataError(f"{path}, line {number} is not an object with {key!r}: {e}") from None
        prompts.append(value)
    if not prompts:
        raise DataError(f"{path} has no prompts")
    return prompts


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_chat(value: Any) -> bool:
    """Whether it is a list of {"role", "content"} with texts."""
    fields = ("role", "content")
    messages = value if isinstance(value, list) else []
    return bool(messages) and all(
        isinstance(message, dict) and all(isinstance(message.get(field), str) for field in fields)
        for message in messages
    )


class Answers:
    """The file of answers, to which complete lines are appended in order.

    Attributes:
      count: how many answers it has.
    """

    def __init__(self, path: pathlib.Path, settings: str):
        """Raises ConfigError if the file has other lines than answers that were made with `settings`."""
        self.path = path
        self.settings = settings
        self.count = 0
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a file; name another --out")
        raw = path.read_bytes() if path.exists() else b""
        whole = raw.rfind(b"\n") + 1
        for line in raw[:whole].splitlines():
            if not self._is_next(line):
                raise self._another()
            self.count += 1
        torn, begin = raw[whole:], b'{"index": %d, ' % self.count
        if torn[: len(begin)] != begin[: len(torn)]:  # else it is the torn line of a killed command
            raise self._another()
        self._file: IO[bytes] = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(whole)
        self._file.seek(whole)

    def _another(self) -> ConfigError:
        return ConfigError(
            f"{self.path} has something else than answers to these prompts with these settings; name another --out, or "
            "remove it"
        )

    def _is_next(self, line: bytes) -> bool:
        try:
            row = json.loads(line)
            return bool(row["settings"] == self.settings and row["index"] == self.count)
        except (ValueError, TypeError, KeyError, RecursionError):
            return False

    def append(self, row: dict[str, Any]) -> None:
        line = {"index": self.count, **row, "settings": self.settings}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self.count += 1

    def close(self) -> None:
        files.close_durably(self._file)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked of a run, for each of many prompts.

    Attributes:
      stop: strings that end an answer.
      logprobs: whether an answer has the log-probabilities of its tokens.
    """

    run: "LoadedRun"
    generator: Generator
    language: Language
    sampling: Sampling
    max_new_tokens: int
    seed: int
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    @property
    def key(self) -> str:
        return "prompt" if self.language.chat is None else "messages"

    def settings(self, prompts: list[Any], ids: list[np.ndarray]) -> str:
        """The digest of all that the answers depend on."""
        config = self.run.config
        weights = self.run.meta | ({"int8": True} if self.run.int8 else {})
        return identity.digest({
            "weights": weights, "model": repr(config.model), "context": config.data.seq_len, "prompts": prompts,
            "ids": [one.tolist() for one in ids], "tokenizer": identity.tokenizer_sha256(self.language.tokenizer),
            "sampling": dataclasses.asdict(self.sampling), "seed": self.seed, "max_new_tokens": self.max_new_tokens,
            "stop_ids": sorted(self.language.stop_ids), "stop": self.stop, "logprobs": self.logprobs,
        })  # fmt: skip

    def answer(self, source: pathlib.Path, out: pathlib.Path) -> int:
        """Writes the answers that `out` lacks; returns the number of their tokens. Raises ConfigError, DataError."""
        out = out.resolve()  # the lock is that of the file, whatever name it was given
        if out == source.resolve():
            raise ConfigError(f"--out={out} is the file of the prompts; name another")
        prompts = read_prompts(source, self.key)
        ids = [self.language.encode(prompt, f"prompt {i} of {source}") for i, prompt in enumerate(prompts, 1)]
        if long := sum(len(one) >= self.run.context for one in ids):
            cli.log.warning(
                "%d of %d prompts have %d tokens, the context of the model, or more: it sees only the last %d of them",
                long, len(ids), self.run.context, self.run.context // 2,
            )  # fmt: skip
        try:
            with files.locked(out):
                answers = Answers(out, self.settings(prompts, ids))
                if answers.count:
                    cli.log.info("%s has %d of %d answers", out, answers.count, len(prompts))
                try:
                    return self._write(answers, prompts, ids)
                finally:
                    answers.close()
        except files.LockHeld as e:
            raise ConfigError(f"{e} is writing {out}") from None

    def _write(self, answers: Answers, prompts: list[Any], ids: list[np.ndarray]) -> int:
        begin = answers.count
        streams = [self.language.stream(self.stop) for _ in prompts[begin:]]
        logprobs: list[list[float]] = [[] for _ in streams]
        ready: dict[int, dict[str, Any]] = {}

        def add(i: int, news: News) -> bool:
            stream = streams[i]
            stream.feed(news.tokens, ended=news.ended)
            if self.logprobs:
                logprobs[i] += news.logprobs.tolist()
            if news.ended or stream.stopped:
                end = "stop" if stream.stopped or news.tokens[-1] in self.language.stop_ids else "length"
                row = {self.key: prompts[begin + i], "text": stream.text, "tokens": len(stream.ids), "end": end}
                ready[begin + i] = row | ({"logprobs": logprobs[i][: len(stream.ids)]} if self.logprobs else {})
            while answers.count in ready:
                answers.append(ready.pop(answers.count))
            return stream.stopped

        texts = self.generator.continue_all(
            self.run.fast_params, ids[begin:], max_new_tokens=self.max_new_tokens, seed=self.seed,
            sampling=self.sampling, first=begin, longest=max(map(len, ids)), stop_ids=self.language.stop_ids,
            on_news=add,
        )  # fmt: skip
        return sum(map(len, texts))
