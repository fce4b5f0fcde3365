"""EleutherAI's lm-evaluation-harness with a model of ours: it makes the requests of a task, and the metrics of the
answers. The answers are those of its own model for transformers (HFLM), up to rounding.

This module needs the lm-eval package.
"""

import collections
import contextlib
import difflib
import functools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval import evaluator, utils
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from data.errors import DataError, UserError
from model.generate import News
from model.sampling import Sampling
from trainer.errors import ConfigError
from trainer.sampling import TextStream, make_generator
from trainer.tasks.asked import Asked
from trainer.tasks.scorer import Interrupted, Pair, Score, Scorer, of_length
from trainer.tasks.text import Text

SLOTS = 16  # texts that are generated at a time
CHUNK = 16  # tokens between two searches for a text that ends an answer
BOOTSTRAP = 1000  # resamples for the standard error of a metric that is not a mean
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork this process, which has JAX's threads

ScorePairs = Callable[[Sequence[Pair]], list[Score]]
Generate = Callable[..., list[list[int]]]  # (prompts, until=, max_new_tokens=, **sampler) -> tokens


def make_generate(scorer: Scorer, text: Text) -> Generate:
    """(params, prompts, …): continues each prompt up to max_new_tokens, to one of text.stop_ids, or until some tokens
    after one of the texts `until`."""
    program = of_length(scorer.program, scorer.context)
    generator = make_generator(program, slots=SLOTS, chunk=CHUNK, vocab_size=text.tokenizer.vocab_size)

    def generate(
        params: dict, prompts: list[list[int]], *, until: Sequence[str], max_new_tokens: int, **sampler: Any
    ) -> list[list[int]]:
        arrays = [np.array(prompt, np.int32) for prompt in prompts]
        streams = [TextStream(text.tokenizer, text.stop_ids, until) for _ in prompts]

        def on_news(row: int, news: News) -> bool:
            scorer.check_interrupted()
            streams[row].feed(news.tokens, ended=news.ended)
            return streams[row].stopped

        answers = generator.continue_all(
            params, arrays, max_new_tokens=max_new_tokens, sampling=Sampling(**sampler), stop_ids=text.stop_ids,
            on_news=on_news,
        )  # fmt: skip
        return [answer.tolist() for answer in answers]

    return generate


class Model(TemplateLM):
    """The harness's view of a model.

    Args:
      score: the scores of pairs.
      generate: the continuations of prompts.
      context: the most tokens that the model reads.
    """

    def __init__(self, text: Text, score: ScorePairs, generate: Generate, context: int):
        super().__init__()
        self.text = text
        self._score = score
        self._generate = generate
        self._context = context

    @property
    def eot_token_id(self) -> int | None:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text.first_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode(string, add=add_special_tokens)

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
        for (_, continuation), _, ids in requests:
            if not ids:
                raise DataError(f"a task asks how likely {continuation!r} is, which has no tokens")
        return [(score.logprob, score.greedy) for score in self._score([pair for _, *pair in requests])]

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each whole text, in windows of the context; each token is predicted once."""
        windows: list[Pair] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.text.encode(request.args[0])
            rolled = utils.get_rolling_token_windows(ids, self.prefix_token_id, self._context, 1)
            windows += [utils.make_disjoint_window(window) for window in rolled]
            owners += [i] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for i, score in zip(owners, self._score(windows), strict=True):
            totals[i] += score.logprob
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        groups = collections.defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(request.args[1])].append(i)
        texts: dict[int, str] = {}
        for members in groups.values():
            contexts = [requests[i].args[0] for i in members]
            texts |= dict(zip(members, self._continuations(contexts, requests[members[0]].args[1]), strict=True))
        return [texts[i] for i in range(len(requests))]

    def _continuations(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        """What follows each context, up to the first of the texts options["until"]."""
        options = dict(normalize_gen_kwargs(options))
        until = handle_stop_sequences(options["until"], self.text.name(self.text.eos_id) or None)
        wanted, sampled = options["max_gen_toks"], bool(options.get("do_sample"))
        if (room := self._context - wanted) < 1:
            raise ConfigError(f"a task asks for {wanted} new tokens, and the model's context has {self._context}")
        prompts = [self.text.encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        answers = self._generate(
            prompts, until=until, max_new_tokens=wanted,
            temperature=options.get("temperature", 1.0) if sampled else 0.0,
            top_k=options.get("top_k", 0) if sampled else 0, top_p=options.get("top_p", 1.0) if sampled else 1.0,
        )  # fmt: skip
        return [postprocess_generated_text(self.text.decode(ids), until, None) for ids in answers]


class Harness:
    """Tasks of the harness, and a model.

    asked.of_harness has names of tasks, groups or tags, or patterns such as `arc_*`. asked.num_fewshot counts unless
    the number in a task's file is 0.

    Attributes:
      names: of the single tasks.

    Raises:
      ConfigError: there is no task of a name.
      DataError: a task or its data cannot be read.
    """

    def __init__(self, asked: Asked, text: Text, scorer: Scorer):
        self._asked, self._text, self._scorer = asked, text, scorer
        self._generate = make_generate(scorer, text)
        with _one_line(asked):
            self._loaded = _load(asked.of_harness, asked.folder, asked.setting)
        for name, task in self._loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise ConfigError(
                    f"{asked.setting}={name} runs code that the model writes, which this command does not do"
                )
            if getattr(task, "MULTIMODAL", False):
                raise ConfigError(f"{asked.setting}={name} has pictures or sounds, and the model reads only text")
        self.names = list(self._loaded["tasks"])

    def check(self, score: ScorePairs, on_prompts: Callable[[list[list[int]]], None]) -> None:
        """Makes all requests, without an answer of the model. Raises ConfigError and DataError.

        Args:
          score: checks pairs instead of scoring them.
          on_prompts: is called with prompts that would be continued.
        """

        def generate(prompts: list[list[int]], *, until: Sequence[str], max_new_tokens: int, **sampler: Any):
            on_prompts(prompts)
            Sampling(**sampler)  # raises ValueError
            return [[] for _ in prompts]

        model = Model(self._text, score, generate, self._scorer.context)
        with _one_line(self._asked):
            self._begin()
            for task in self._loaded["tasks"].values():
                task.build_all_requests(limit=self._asked.limit)
                by_kind = collections.defaultdict(list)
                for request in task.instances:
                    by_kind[request.request_type].append(request)
                for kind, requests in by_kind.items():
                    getattr(model, kind)(requests)

    def measure(self, params: dict) -> dict[str, dict[str, float]]:
        """The metrics of each task and group. Raises as `run` does."""
        return numbers(self.run(params))

    def run(self, params: dict) -> dict[str, Any]:
        """The harness's results: of each task and group the metrics ("results", see `numbers`), and of each task the
        examples with the model's answers ("samples").

        Raises:
          DataError: a task has a mistake.
          Diverged, Interrupted: see Scorer.
        """
        score, generate = functools.partial(self._scorer.score, params), functools.partial(self._generate, params)
        model = Model(self._text, score, generate, self._scorer.context)
        with _one_line(self._asked):
            self._begin()
            limit = self._asked.limit
            return dict(evaluator.evaluate(model, self._loaded, limit=limit, bootstrap_iters=BOOTSTRAP))

    def _begin(self) -> None:
        """Sets what the examples in a prompt depend on."""
        wanted = self._asked.num_fewshot
        for task in self._loaded["tasks"].values():
            default = task.get_config("num_fewshot")
            if default is None or (wanted is not None and default != 0):
                task.set_config(key="num_fewshot", value=wanted or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextlib.contextmanager
def _one_line(asked: Asked) -> Iterator[None]:
    """Makes a DataError of what the harness raises: task files have expressions, templates and code."""
    try:
        yield
    except (UserError, Interrupted, jax.errors.JaxRuntimeError):
        raise
    except Exception as e:
        reason = " ".join(str(e.args[0] if e.args else e).split())[:300]
        raise DataError(f"{asked.setting}={','.join(asked.of_harness)}: {type(e).__name__}: {reason}") from e


def numbers(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The metrics by task: "acc,none" is acc, and "exact_match,strict" keeps the name of its filter. Those that have no
    value (a standard error of one example) are left out."""
    found: dict[str, dict[str, float]] = {}
    for task, row in results["results"].items():
        metrics = {name: value for name, value in row.items() if "," in name and isinstance(value, int | float)}
        found[task] = {name.removesuffix(",none"): x for name, x in metrics.items() if not math.isnan(x)}
    return found


def _load(names: Sequence[str], folder: pathlib.Path | None, setting: str) -> dict[str, Any]:
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"{setting}_path={folder} is not a folder with .yaml files of tasks")
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    known = manager.all_tasks
    for name in names:
        if not manager.match_tasks([name]) and not pathlib.Path(name).is_file():
            near = difflib.get_close_matches(name, known, n=1) or known[:1]
            there = f", such as {near[0]}" if near else ""
            raise ConfigError(f"there is no task {name!r} among the {len(known)} of {folder or 'lm-eval'}{there}")
    found = [task for name in names for task in manager.match_tasks([name]) or [name]]
    return dict(manager.load(list(dict.fromkeys(found))))
