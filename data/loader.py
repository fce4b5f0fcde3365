"""Batches from token files: a pure function of (seed, dataset, sequences consumed), read ahead by one thread.

Indices used here:
  g       the number of a sequence in the run, 0, 1, 2, …; never resets
  epoch   g // num_windows
  window  permute(g % num_windows): which seq_len + 1 consecutive tokens; windows of one epoch do not overlap, except
          for the one token that is both the last target of a window and the first input of the next
  phase   where the first window of a shard starts in this epoch, so that window borders move between epochs
Packed documents (data.packed) have rows instead of windows: every epoch has the same rows, in another order. Chats are
always packed; the dataset says which of their tokens are targets.
"""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from data import mixture, order, packing
from data.errors import DataError
from data.storage import mmap_advice
from data.token_files.formats import TokenFiles

if TYPE_CHECKING:  # launch.inspect reads windows without JAX
    import jax

    from data.batch import Batch

# Positions permuted in one call: it costs nearly the same for one as for thousands, and batches need them in order.
BLOCK = 1 << 14
# The most memory that mapped files may take: touched pages count as memory of this process. Releasing pages more often
# would cost more than the gather, because the pages must be mapped again.
RESIDENT_BYTES = mmap_advice.memory_bytes() // 4
CHECK_ROWS = 1 << 14  # rows that are read between two checks of the memory


@dataclasses.dataclass(frozen=True)
class Unreached:
    """The tokens that no window of any epoch contains."""

    files: int  # files shorter than a window
    tokens: int  # the tokens of these files
    tails: int  # tokens at the ends of other files, fewer than seq_len in each

    def __str__(self) -> str:
        """The tokens in words; '' if all tokens are read."""
        parts = []
        if self.files:
            parts.append(f"{self.files:,} file(s) shorter than a window ({self.tokens:,} tokens)")
        if self.tails:
            parts.append(f"{self.tails:,} tokens at the ends of files")
        return " and ".join(parts)


class Windows:
    """Rows of seq_len + 1 tokens of a split, in the order of a keyed permutation. A subclass defines the windows.

    Attributes:
      num_windows: the number of windows in an epoch.
      dtype: the dtype of the files.
      unreached: the tokens that are never read.
    """

    unreached = Unreached(0, 0, 0)

    def __init__(self, files: TokenFiles, num_windows: int, *, seq_len: int, seed: int, split: str):
        self.files = files
        self.num_windows = num_windows
        self.seq_len = seq_len
        self.seed = seed
        self.split = split
        self.dtype = files.shards[0].dtype
        self._unchecked = 0  # rows read since the last check of the memory
        self._block = functools.lru_cache(maxsize=4)(self._permuted_block)

    def rows(self, g: np.ndarray) -> np.ndarray:
        """Tokens of the sequences g: [len(g), seq_len + 1] in the dtype of the files."""
        out = self._gather(g)
        self.files.check_ids(out, f"the {self.split} split")
        self._bound_memory(len(g))
        return out

    def loss_mask(self, g: np.ndarray) -> np.ndarray | None:
        """Which targets of the sequences g count: bool [len(g), seq_len]; None: all of them."""
        return None

    def begins(self, g: np.ndarray) -> np.ndarray | None:
        """The tokens of the sequences g at which documents begin: bool [len(g), seq_len + 1]; None: those after an
        end-of-text token."""
        return None

    def reference(self, g: np.ndarray) -> np.ndarray | None:
        """Of pairs of chats, if a run needs it: float32 [len(g)], see Batch.reference."""
        return None

    def will_need(self, g: np.ndarray) -> None:
        """Asks the kernel to read the sequences g from disk, if they are not cached: `rows` needs them next."""
        raise NotImplementedError

    def _gather(self, g: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _shuffled(self, g: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each epoch in g: its number, the indices into g that belong to it, and their windows."""
        epochs, position = np.divmod(np.asarray(g, np.int64), self.num_windows)
        for epoch, here in _groups(epochs):
            yield epoch, here, self._windows(epoch, position[here])

    def _bound_memory(self, rows: int) -> None:
        """Releases mapped files before their pages take more memory than this process may use for them."""
        self._unchecked += rows
        if self._unchecked >= CHECK_ROWS:
            self._unchecked = 0
            if mmap_advice.mapped_bytes() > RESIDENT_BYTES:
                for shard in self.files.shards:
                    mmap_advice.release(shard)

    def _windows(self, epoch: int, position: np.ndarray) -> np.ndarray:
        """The numbers of the windows at these positions of an epoch, from cached blocks of the permutation."""
        out = np.empty_like(position)
        for block, here in _groups(position // BLOCK):
            out[here] = self._block(epoch, block)[position[here] - block * BLOCK]
        return out

    def _permuted_block(self, epoch: int, block: int) -> np.ndarray:
        positions = np.arange(block * BLOCK, min((block + 1) * BLOCK, self.num_windows))
        return order.permute(positions, self.num_windows, self.seed, self.split, epoch)


class TokenWindows(Windows):
    """Consecutive windows over the shards of a split."""

    def __init__(self, files: TokenFiles, *, seq_len: int, seed: int, split: str = "train"):
        # Each shard has one window fewer than fits, so that its windows fit at every phase in [0, seq_len).
        counts = [
            max(len(shard) // seq_len - 1, 1) if len(shard) > seq_len else 0  # a shorter shard is not used
            for shard in files.shards
        ]
        self.first_window = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        lengths = [len(shard) for shard in files.shards]
        short = [length for length in lengths if 0 < length <= seq_len]
        # The windows of the last phase end at a multiple of seq_len. A shard of one window uses every phase that fits.
        tails = [length % seq_len for length in lengths if length >= 2 * seq_len]
        self.unreached = Unreached(len(short), sum(short), sum(tails))
        super().__init__(files, int(self.first_window[-1]), seq_len=seq_len, seed=seed, split=split)
        if self.num_windows == 0:
            where = files.paths[0] if len(files.paths) == 1 else files.paths[0].parent
            raise DataError(
                f"{where} has {files.tokens} tokens in its {split} split, and at most "
                f"{max(lengths, default=0)} in a file; a window needs {seq_len + 1} (data.seq_len + 1): prepare a "
                "longer corpus or lower data.seq_len"
            )

    def _gather(self, g: np.ndarray) -> np.ndarray:
        """One gather for each (epoch, shard) in g."""
        out = None
        for here, shard, windows in self._places(g):
            gathered = shard.gather(windows).view(self.dtype).reshape(-1, self.seq_len + 1)
            if len(gathered) == len(g):  # the usual case: nothing to join, no second copy
                out = gathered
            else:
                out = np.empty((len(g), self.seq_len + 1), self.dtype) if out is None else out
                out[here] = gathered
        assert out is not None
        return out

    def will_need(self, g: np.ndarray) -> None:
        for _, shard, windows in self._places(g):
            mmap_advice.will_need(shard.rows, windows * shard.rows.strides[0], shard.rows.itemsize)

    def _places(self, g: np.ndarray) -> Iterator[tuple[np.ndarray, ShardWindows, np.ndarray]]:
        """For each (epoch, shard) in g: the indices into g, the shard's windows, and the numbers of those to read."""
        for epoch, of_epoch, windows in self._shuffled(g):
            for shard, mine in _groups(np.searchsorted(self.first_window, windows, side="right") - 1):
                yield of_epoch[mine], self._rows_of(shard, epoch), windows[mine] - self.first_window[shard]

    def _rows_of(self, shard: int, epoch: int) -> ShardWindows:
        """The windows of a shard in this epoch."""
        tokens = self.files.shards[shard]
        count = int(self.first_window[shard + 1] - self.first_window[shard])
        phases = min(self.seq_len, len(tokens) - count * self.seq_len)
        phase = int.from_bytes(order.derive(self.seed, self.split, "phase", epoch, shard)[:8], "little") % phases
        return ShardWindows(tokens[phase : phase + count * self.seq_len + 1], count, self.seq_len)


class ShardWindows:
    """`count` windows of seq_len + 1 tokens, seq_len apart, as views: no token is copied.

    Attributes:
      rows: the windows, void [count]: each is one item. NumPy gathers items of a one-dimensional array faster than rows
        of a two-dimensional view.
    """

    def __init__(self, tokens: np.ndarray, count: int, seq_len: int):
        width, stride = (seq_len + 1) * tokens.itemsize, seq_len * tokens.itemsize
        self.rows = np.ndarray(count, f"V{width}", buffer=tokens, strides=stride)
        self._first, self._last = (
            np.ndarray(count, np.uint8, buffer=tokens, offset=offset, strides=stride) for offset in (0, width - 1)
        )

    def gather(self, windows: np.ndarray) -> np.ndarray:
        """Copies of these windows: void [len(windows)].

        This makes a few C calls; a Python loop over rows would compete with other threads for the interpreter lock. The
        first and last bytes of all rows are read first: these accesses overlap, but copies would wait for memory one
        after another. This takes a third less time for rows of 2 KiB (docs/performance.md).
        """
        for touched in (self._first, self._last):
            _ = touched[windows]
        return self.rows[windows]


class PackedWindows(Windows):
    """The rows of a packing (packing.py): documents one after another, padded with the end-of-text token."""

    def __init__(self, files: TokenFiles, index: packing.Index, *, seed: int, split: str = "train"):
        super().__init__(files, index.rows, seq_len=index.seq_len, seed=seed, split=split)
        self.index = index
        self.eos_id = index.eos_id
        self.pieces, self.first_piece = index.load()
        self.first_token = np.cumsum([0, *map(len, files.shards)])

    def _gather(self, g: np.ndarray) -> np.ndarray:
        """One gather for each shard; all tokens of a row are always in one shard."""
        out = np.full((len(g), self.seq_len + 1), self.eos_id, self.dtype)
        self._fill(out, g, self.files.shards)
        return out

    def _fill(self, out: np.ndarray, g: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        """Writes into `out` what `arrays` (one for each shard) have for the tokens of the rows g, except padding."""
        column = np.arange(self.seq_len + 1)
        for here, shard, starts, lengths, used in self._places(g):
            filled = np.zeros(out.shape, bool)
            filled[here] = column < used[:, None]
            out[filled] = arrays[shard][packing.spans(starts, lengths)]

    def loss_mask(self, g: np.ndarray) -> np.ndarray:
        """Padding does not count as a target, nor does an end-of-text token whose text is in another row.

        If a text breaks off at the end of a shard, the first end-of-text token of its padding does count as a target.
        """
        mask = np.empty((len(g), self.seq_len), bool)
        target = np.arange(1, self.seq_len + 1)
        for here, number, starts, lengths, used in self._places(g):
            shard = self.files.shards[number]
            mask[here] = target[None] < used[:, None]
            row, place = _columns(lengths, used)
            lone = (lengths == 1) & (place > 0)
            mask[here[row[lone]], place[lone] - 1] = False
            cut = row[(starts + lengths == len(shard)) & (shard[-1] != self.eos_id)]
            cut = cut[used[cut] <= self.seq_len]
            mask[here[cut], used[cut] - 1] = True
        return mask

    def will_need(self, g: np.ndarray) -> None:
        for _, number, starts, lengths, _ in self._places(g):
            shard = self.files.shards[number]
            mmap_advice.will_need(shard, starts * shard.itemsize, lengths * shard.itemsize)

    def _places(self, g: np.ndarray) -> Iterator[tuple[np.ndarray, int, np.ndarray, np.ndarray, np.ndarray]]:
        """For each shard: the indices into g of the shard's rows, the shard's number, start and length of each piece of
        the rows (row by row), and the number of tokens in each row."""
        rows = self._rows(g)
        first = self.first_piece[rows]
        shards = np.searchsorted(self.first_token, self.pieces["start"][first], side="right") - 1
        for shard, here in _groups(shards):
            counts = self.first_piece[rows[here] + 1] - first[here]
            pieces = self.pieces[packing.spans(first[here], counts)]
            starts, lengths = pieces["start"].astype(np.int64), pieces["length"].astype(np.int64)
            used = np.add.reduceat(lengths, np.cumsum(counts) - counts)
            yield here, shard, starts - self.first_token[shard], lengths, used

    def _rows(self, g: np.ndarray) -> np.ndarray:
        """The numbers of the rows that are the sequences g."""
        rows = np.empty(len(g), np.int64)
        for _, here, windows in self._shuffled(g):
            rows[here] = windows
        return rows


class ChatWindows(PackedWindows):
    """The rows of packed chats: only supervised tokens are targets, and each piece of a row is a chat.

    Args:
      shuffled: false: sequence g is row g, in every epoch.
    """

    def __init__(
        self, files: TokenFiles, index: packing.Index, *, seed: int, split: str = "train", shuffled: bool = True
    ):
        super().__init__(files, index, seed=seed, split=split)
        assert files.loss_mask is not None
        self.masks = np.split(files.loss_mask, self.first_token[1:-1])
        self.shuffled = shuffled

    def loss_mask(self, g: np.ndarray) -> np.ndarray:
        """A supervised token is a target, except the first of a chat, which nothing precedes."""
        mask = np.zeros((len(g), self.seq_len + 1), bool)
        self._fill(mask, g, self.masks)
        return (mask & ~self.begins(g))[:, 1:]

    def begins(self, g: np.ndarray) -> np.ndarray:
        """Where chats begin; the padding of a row counts as one more."""
        begins = np.zeros((len(g), self.seq_len + 1), bool)
        for here, _, _, lengths, used in self._places(g):
            row, place = _columns(lengths, used)
            begins[here[row], place] = True
            padded = used <= self.seq_len
            begins[here[padded], used[padded]] = True
        return begins

    def reference(self, g: np.ndarray) -> np.ndarray | None:
        return None if self.files.reference is None else self.files.reference[self._rows(g)]

    def _windows(self, epoch: int, position: np.ndarray) -> np.ndarray:
        return super()._windows(epoch, position) if self.shuffled else position


def _columns(lengths: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of each piece, and the column at which it begins there.

    Args:
      lengths: of the pieces, row by row.
      used: the number of tokens in each row.
    """
    first = np.cumsum(lengths) - lengths  # of each piece, if these rows are concatenated
    row = np.searchsorted(np.cumsum(used), first, side="right")
    return row, first - (np.cumsum(used) - used)[row]


def _groups(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each distinct value and its indices. Usually there is only one value, which is found without a sort."""
    if not len(values):
        return
    if (first := int(values[0])) == values[-1] and (values == first).all():
        yield first, np.arange(len(values))
        return
    for value in np.unique(values):
        yield int(value), np.flatnonzero(values == value)


class MixedWindows:
    """Windows of several sources mixed by weights (mixture.py), or of one source.

    Args:
      packings: the packing of each source, if data.packed.

    Attributes:
      sources: the windows of each source.
    """

    def __init__(
        self,
        files: Mapping[str, TokenFiles],
        stages: Sequence[mixture.Stage],
        *,
        seq_len: int,
        seed: int,
        packings: Mapping[str, packing.Index] | None = None,
    ):
        self.names = list(files)
        self.sources: list[Windows] = [
            windows_of(of_source, packings[name] if packings else None, seq_len=seq_len, seed=seed)
            for name, of_source in files.items()
        ]
        self.mixture = mixture.Mixture(stages, seed)
        self.dtype = np.result_type(*(source.dtype for source in self.sources))
        self.seq_len = seq_len

    def rows(self, g: np.ndarray) -> np.ndarray:
        """Tokens of the sequences g: [len(g), seq_len + 1] in the widest dtype of the sources."""
        if len(self.sources) == 1:
            return self.sources[0].rows(g)
        out = np.empty((len(g), self.seq_len + 1), self.dtype)
        for source, here, index in self._parts(g):
            out[here] = self.sources[source].rows(index)
        return out

    def loss_mask(self, g: np.ndarray) -> np.ndarray | None:
        """Which targets of the sequences g count: bool [len(g), seq_len]; None: all, because no source is packed."""
        if not any(isinstance(source, PackedWindows) for source in self.sources):
            return None
        out = np.ones((len(g), self.seq_len), bool)
        for source, here, index in self._parts(g):
            mask = self.sources[source].loss_mask(index)
            if mask is not None:
                out[here] = mask
        return out

    def begins(self, g: np.ndarray) -> np.ndarray | None:
        """As Windows.begins. A source of chats is only mixed with other chats (sources.py)."""
        if not any(isinstance(source, ChatWindows) for source in self.sources):
            return None
        out = np.empty((len(g), self.seq_len + 1), bool)
        for source, here, index in self._parts(g):
            out[here] = self.sources[source].begins(index)
        return out

    def reference(self, g: np.ndarray) -> np.ndarray | None:
        """As Windows.reference."""
        if self.sources[0].files.reference is None:
            return None
        out = np.empty(len(g), np.float32)
        for source, here, index in self._parts(g):
            out[here] = self.sources[source].reference(index)
        return out

    def will_need(self, g: np.ndarray) -> None:
        for source, _, index in self._parts(g):
            self.sources[source].will_need(index)

    def _parts(self, g: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each source: its index, the indices into g that belong to it, and their numbers in that source."""
        source, index = self.mixture.locate(g)
        for met, here in _groups(source):
            yield met, here, index[here]

    def epochs(self, sequences_consumed: int) -> dict[str, float]:
        """The metrics train/epoch and, if there are several sources, train/epoch/NAME."""
        consumed = self.mixture.consumed(sequences_consumed)
        epochs = {"train/epoch": sequences_consumed / sum(s.num_windows for s in self.sources)}
        if len(self.sources) > 1:
            for name, source, count in zip(self.names, self.sources, consumed, strict=True):
                epochs[f"train/epoch/{name}"] = float(count / source.num_windows)
        return epochs


def windows_of(files: TokenFiles, index: packing.Index | None, *, seq_len: int, seed: int) -> Windows:
    """The training sequences of one source.

    Args:
      index: the rows into which it is packed, if it is.
    """
    if index is None:
        return TokenWindows(files, seq_len=seq_len, seed=seed)
    return (PackedWindows if files.loss_mask is None else ChatWindows)(files, index, seed=seed)


class Loader:
    """Global batches of jax.Arrays. Its only state is the number of sequences consumed, which the caller keeps.

    Every process computes the order of the rows that its own devices hold, and reads only these rows.

    Args:
      document_end: see batch.from_tokens.
    """

    def __init__(
        self,
        windows: Windows | MixedWindows,
        *,
        global_batch_size: int,
        sharding: jax.sharding.Sharding,
        document_end: int | None = None,
    ):
        self.windows = windows
        self.global_batch_size = global_batch_size
        self.sharding = sharding
        self.document_end = document_end
        self._held = np.concatenate([np.arange(*span) for span in held_rows(sharding, global_batch_size)])

    def batch(self, sequences_consumed: int) -> Batch:
        """The batch after `sequences_consumed` sequences: global_batch_size rows, tokens in the dtype of the files."""
        from data.batch import from_tokens

        def read(rows: np.ndarray) -> Batch:
            g = sequences_consumed + rows
            return from_tokens(
                self.windows.rows(g), loss_mask=self.windows.loss_mask(g), document_end=self.document_end,
                begins=self.windows.begins(g), reference=self.windows.reference(g),
            )  # fmt: skip

        return put(self.sharding, self.global_batch_size, read)

    def prefetched(self, sequences_consumed: int, ahead: int) -> Prefetch:
        """The batches after `sequences_consumed` sequences; a thread makes up to `ahead` of them in advance."""

        def make(i: int) -> Batch:
            following = sequences_consumed + (i + 1) * self.global_batch_size
            self.windows.will_need(following + self._held)
            return self.batch(following - self.global_batch_size)

        return Prefetch(make, ahead)


def held_rows(sharding: jax.sharding.Sharding, num_rows: int) -> list[tuple[int, int]]:
    """The ranges [start, stop) of rows that this process's devices hold, without repetition."""
    indices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return sorted({(index or (slice(None),))[0].indices(num_rows)[:2] for index in indices})


def put(sharding: jax.sharding.Sharding, num_rows: int, read: Callable[[np.ndarray], Any]) -> Any:
    """A tree of sharded arrays [num_rows, …]; `read(row indices)` supplies the rows that this process holds."""
    import jax

    trees = [(span, read(np.arange(*span, dtype=np.int64))) for span in held_rows(sharding, num_rows)]
    leaves, structure = jax.tree.flatten(trees[0][1])
    held = {span: jax.tree.leaves(tree) for span, tree in trees}

    def array(i: int) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            return held[(index or (slice(None),))[0].indices(num_rows)[:2]][i]

        shape = next(iter(held.values()))[i].shape
        return jax.make_array_from_callback((num_rows, *shape[1:]), sharding, shard)

    return jax.tree.unflatten(structure, [array(i) for i in range(len(leaves))])


class Prefetch:
    """Runs `make(0), make(1), …` in a thread; up to `ahead` results wait while it makes one more.

    An error in the thread is raised by the `next()` that would have returned the result, and ends the iteration.
    """

    def __init__(self, make: Callable[[int], Batch], ahead: int):
        self._queue: queue.Queue = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(make,), name="loader", daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], Batch]) -> None:
        i = 0
        while not self._stop.is_set():
            item: Batch | BaseException
            try:
                item = make(i)
            except BaseException as e:
                item = e
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            i += 1

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the thread and waits for it, so that no file is read afterwards."""
        self._stop.set()
        self._thread.join()


def evaluation_windows(files: TokenFiles, seq_len: int, limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Fixed windows over a validation split, in file order: each token except the first of a shard is a target once.

    Args:
      limit: the most windows to return, spread evenly over the split; 0: all.

    Returns:
      (shard, start) int64 [num_windows, 2], and the number of targets of each window, int64 [num_windows]; only the
      last window of a shard has fewer than seq_len.
    """
    where, lengths = [], []
    for shard, tokens in enumerate(files.shards):
        starts = np.arange(0, max(len(tokens) - 1, 0), seq_len, dtype=np.int64)
        where.append(np.stack([np.full_like(starts, shard), starts], axis=1))
        lengths.append(np.minimum(len(tokens) - 1 - starts, seq_len))
    lengths_all = np.concatenate(lengths)
    chosen = _evenly(len(lengths_all), limit)
    return np.concatenate(where)[chosen], lengths_all[chosen]


def _evenly(count: int, limit: int) -> np.ndarray:
    """At most `limit` of the numbers below `count`, spread evenly; 0: all."""
    if not 0 < limit < count:
        return np.arange(count)
    return np.linspace(0, count - 1, limit).round().astype(np.int64)


def evaluation_batches(
    files: TokenFiles,
    *,
    seq_len: int,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    limit: int = 0,
    document_end: int | None = None,
) -> Iterator[Batch]:
    """Batches of batch_size rows, with loss_weights. They are the same for any number of processes.

    The rows are those of evaluation_windows or, of chats, their packed rows in order. The last batch is padded with
    rows whose targets do not count.

    Args:
      limit: the most rows, spread evenly; 0: all.
      document_end: see batch.from_tokens.
    """
    from data.batch import from_tokens

    if files.loss_mask is not None:
        yield from _chat_batches(files, batch_size=batch_size, sharding=sharding, limit=limit)
        return
    where, lengths = evaluation_windows(files, seq_len, limit)
    if not len(lengths):
        raise DataError(f"{files.paths[0]} has {files.tokens} validation tokens; at least 2 are needed")
    padded = np.zeros(-(-len(lengths) // batch_size) * batch_size, np.int64)
    padded[: len(lengths)] = lengths

    def read(first: int, rows: np.ndarray) -> Batch:
        tokens = np.zeros((len(rows), seq_len + 1), files.shards[0].dtype)
        for row, i in zip(tokens, first + rows, strict=True):
            if i < len(lengths):
                shard, start = where[i]
                row[: lengths[i] + 1] = files.shards[shard][start : start + lengths[i] + 1]
        files.check_ids(tokens, "the validation split")
        mask = np.arange(seq_len)[None] < padded[first + rows, None]
        return from_tokens(tokens, loss_mask=mask, document_end=document_end)

    for first in range(0, len(padded), batch_size):
        yield put(sharding, batch_size, functools.partial(read, first))


def _chat_batches(
    files: TokenFiles, *, batch_size: int, sharding: jax.sharding.Sharding, limit: int = 0
) -> Iterator[Batch]:
    from data.batch import from_tokens

    assert files.index is not None, "Sources.files opens the rows of chats"
    windows = ChatWindows(files, files.index, seed=0, shuffled=False)
    chosen = _evenly(windows.num_windows, limit)
    padded = np.pad(chosen, (0, -len(chosen) % batch_size))

    def read(first: int, rows: np.ndarray) -> Batch:
        g = padded[first + rows]
        counts = first + rows < len(chosen)
        return from_tokens(
            windows.rows(g), loss_mask=windows.loss_mask(g) & counts[:, None], begins=windows.begins(g),
            reference=windows.reference(g),
        )  # fmt: skip

    for first in range(0, len(padded), batch_size):
        yield put(sharding, batch_size, functools.partial(read, first))
