"""Decides which source a sequence of the run comes from: by shuffled blocks with exact counts, in stages of weights.

Sequence g of the run is in the stage with the largest start <= g, in its block (g - start) // BLOCK. A block has
a fixed number of sequences of each source, in an order permuted by a key (as in Levanter's MixtureDataset). Each source
is consumed in its own order, without gaps, across blocks and stages. So the source and its sequence are a function of
(seed, stages, g), and the number of sequences consumed is still the only state.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from data import order
from data.errors import DataError

VERSION = "mixture-1"  # part of the fingerprint of a mixture
LAST_START = 1 << 62  # all stages start before it: sequence numbers are int64
BLOCK = 2048


@dataclasses.dataclass(frozen=True)
class Stage:
    start: int  # the first sequence of the run that these weights apply to
    weights: tuple[float, ...]  # one for each source, in any unit


def parse_stages(text: str, num_sources: int) -> tuple[Stage, ...]:
    """Parses '0.7,0.3', or stages '0:0.7,0.3; 50000:0.5,0.5', each with its first sequence; '' gives equal weights.

    Raises:
      ValueError: the text does not have this form, or the weights are impossible.
    """
    stages = []
    for part in (text or ",".join(["1"] * num_sources)).split(";"):
        start, _, weights = part.rpartition(":")
        try:
            stages.append(Stage(int(start or 0), tuple(map(float, weights.split(",")))))
        except ValueError:
            raise ValueError(
                f"data.weights has {part.strip()!r}; write the weights of the sources as 0.7,0.3, and for stages the "
                "first sequence of each before them: 0:0.7,0.3; 50000:0.5,0.5"
            ) from None
    for stage in stages:
        if len(stage.weights) != num_sources:
            raise ValueError(
                f"data.weights has {len(stage.weights)} weights from sequence {stage.start} on, but data.path has "
                f"{num_sources} sources"
            )
        _counts(stage)
    starts = [stage.start for stage in stages]
    if starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= LAST_START:
        raise ValueError(
            f"data.weights has stages from sequences {starts}; the first must be 0, each above the one before, and all "
            "below 2^62"
        )
    return tuple(stages)


def _counts(stage: Stage) -> np.ndarray:
    """Sequences of each source in a block, int64; the largest remainders are rounded up. Raises ValueError."""
    weights = np.array(stage.weights)
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not ((weights >= 0).all() and 0 < total < np.inf):  # every comparison with NaN is false
        raise ValueError(
            f"data.weights has {stage.weights}; weights must be 0 or above, one above 0, and their sum finite"
        )
    wanted = weights / total * BLOCK
    counts = np.floor(wanted).astype(np.int64)
    # In a tie, the source that is named first gets the sequence.
    largest = np.argsort(counts - wanted, kind="stable")[: BLOCK - counts.sum()]
    counts[largest] += 1
    if (lost := (counts == 0) & (weights > 0)).any():
        raise ValueError(
            f"data.weights has {weights[lost][0]:g} of {total:g} for source {int(lost.argmax())}: less than "
            f"one of the {BLOCK} sequences of a block; use 0 or at least {total / BLOCK:.2g}"
        )
    return counts


class Mixture:
    """Maps sequences of the run to (source, sequence of the source), and counts the sequences of each source."""

    def __init__(self, stages: Sequence[Stage], seed: int):
        self.stages = tuple(stages)
        self.seed = seed
        self.num_sources = len(stages[0].weights)
        self.counts = [_counts(stage) for stage in stages]
        self._block = functools.lru_cache(maxsize=8)(self._shuffled_block)
        self._before = [np.zeros(self.num_sources, np.int64)]  # sequences consumed of each source before each stage
        for i, (stage, following) in enumerate(itertools.pairwise(stages)):
            self._before.append(self._before[-1] + self._within(i, following.start - stage.start))

    def locate(self, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sequence g of the run, and its number in that source: int64, both [len(g)]."""
        g = np.asarray(g, np.int64)
        if self.num_sources == 1:
            return np.zeros_like(g), g
        source, index = np.empty_like(g), np.empty_like(g)
        stages = np.searchsorted([stage.start for stage in self.stages], g, side="right") - 1
        for stage in np.unique(stages):
            of_stage = np.flatnonzero(stages == stage)
            blocks, slots = np.divmod(g[of_stage] - self.stages[stage].start, BLOCK)
            for block in np.unique(blocks):
                here = blocks == block
                sources, ranks = self._block(int(stage), int(block))
                s = sources[slots[here]]
                source[of_stage[here]] = s
                index[of_stage[here]] = (self._before[stage] + block * self.counts[stage])[s] + ranks[slots[here]]
        return source, index

    def consumed(self, sequences: int) -> np.ndarray:
        """How many of the first `sequences` sequences of the run come from each source, int64 [num_sources]."""
        if self.num_sources == 1:
            return np.array([sequences])
        stage = max(i for i, stage in enumerate(self.stages) if stage.start <= sequences)
        return self._before[stage] + self._within(stage, sequences - self.stages[stage].start)

    def _within(self, stage: int, sequences: int) -> np.ndarray:
        """How many of the first `sequences` sequences of a stage come from each source, int64 [num_sources]."""
        blocks, rest = divmod(sequences, BLOCK)
        sources, _ = self._block(stage, blocks)
        return blocks * self.counts[stage] + np.bincount(sources[:rest], minlength=self.num_sources)

    def _shuffled_block(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each slot, and how many earlier slots have the same source; int64 [BLOCK]."""
        slots = order.permute(np.arange(BLOCK), BLOCK, self.seed, VERSION, self.stages[stage].start, block)
        sources = np.repeat(np.arange(self.num_sources), self.counts[stage])[slots]
        ranks = np.empty(BLOCK, np.int64)
        for source, count in enumerate(self.counts[stage]):
            ranks[sources == source] = np.arange(count)
        return sources, ranks


def check_change(old: Sequence[Stage], new: Sequence[Stage], sequences: int) -> None:
    """Raises DataError if `new` changes the weights of the `sequences` sequences that the run has consumed already."""
    if [s for s in old if s.start < sequences] != [s for s in new if s.start < sequences]:
        raise DataError(
            f"config.data.weights is changed for sequences before {sequences}, on which this run was already trained; "
            f"keep the old weights ({format_stages(old)}) and add a stage that begins at sequence {sequences} or later"
        )


def format_stages(stages: Sequence[Stage]) -> str:
    """The text that parse_stages reads as `stages`."""
    return "; ".join(f"{stage.start}:{','.join(f'{w:g}' for w in stage.weights)}" for stage in stages)
