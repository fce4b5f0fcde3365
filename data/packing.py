"""Packs documents into rows of seq_len + 1 tokens, offline: writes an index and does not change the token files.

Best-fit-decreasing (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830): from the longest to
the shortest, each document goes into the fullest row that still has room for it. A document longer than a row is first
cut into full rows, and its remainder is packed. Each shard is packed by itself, so a row is never in two files.

Chats are not continued in another row: what is past the end of a row is never read, and a chat that has no supervised
target in what remains is left out. So each row has a target, and each answer has its chat before it.

    DATASET/train.packed-1024.bin   header: JSON, padded with spaces to HEADER_BYTES; then
                                    the pieces, ordered by row: uint64 start in the split's tokens, uint32 length
                                    uint64 [rows + 1]: the first piece of each row
"""

import bisect
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from data.errors import DataError
from data.storage import files, mmap_advice
from data.token_files import formats, integrity

FORMAT = "meshlm-packing"
VERSION = 1  # raise it if the same documents give other rows; tests/packing_test.py fixes the rows
HEADER_BYTES = 1024
PIECE = np.dtype([("start", "<u8"), ("length", "<u4")])


@dataclasses.dataclass(frozen=True)
class Index:
    """The fields of the header."""

    path: pathlib.Path
    fingerprint: str  # the fingerprint of the dataset's manifest
    seq_len: int
    eos_id: int
    rows: int
    pieces: int
    tokens: int
    documents: int
    cut: int  # documents in more than one piece
    cut_by_windows: int  # for comparison: documents that are not inside one window of the first phase
    sha256: str  # the hash of everything after the header
    # Only of chats; None, and not in the header, if all tokens are read.
    left_out: int | None = None  # chats of which no supervised target would be in a row
    unread: int | None = None  # tokens in no row: those of these chats, and the ends of chats that are cut
    unread_targets: int | None = None  # supervised tokens among them

    @property
    def utilisation(self) -> float:
        """Share of the rows' tokens that are not padding."""
        return (self.tokens - (self.unread or 0)) / (self.rows * (self.seq_len + 1))

    @property
    def unread_chats(self) -> str:
        """In words, what of the chats is not trained on; '' if everything is."""
        if not self.unread:
            return ""
        return (
            f"{self.cut:,} of {self.documents:,} chats are longer than {self.seq_len + 1} tokens and are cut; "
            f"{self.left_out:,} are left out, because no supervised token remains; not trained on: {self.unread:,} "
            f"tokens, {self.unread_targets:,} of them supervised"
        )

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Pieces (PIECE [pieces]) and the first piece of each row (int64 [rows + 1]), memory-mapped and checked.

        Raises:
          DataError: the file is truncated or damaged.
        """
        expected = HEADER_BYTES + self.pieces * PIECE.itemsize + (self.rows + 1) * 8
        if (size := self.path.stat().st_size) != expected:
            raise DataError(
                f"{self.path} is {size} bytes, expected {expected} ({self.pieces} pieces in {self.rows} rows); "
                f"make it again with: {command(self.path.parent, self.seq_len)}"
            )
        with self.path.open("rb") as f:
            f.seek(HEADER_BYTES)
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != self.sha256:
            raise DataError(
                f"{self.path} has the right size but not the content its header names (sha256 {found[:12]}…, expected "
                f"{self.sha256[:12]}…); make it again with: {command(self.path.parent, self.seq_len)}"
            )
        body = np.memmap(self.path, np.uint8, mode="r", offset=HEADER_BYTES)
        pieces, firsts = np.split(body, [self.pieces * PIECE.itemsize])
        return pieces.view(PIECE), firsts.view("<i8")

    def header(self) -> bytes:
        fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        del fields["path"]
        fields = {name: value for name, value in fields.items() if value is not None}
        return json.dumps(fields).encode().ljust(HEADER_BYTES - 1) + b"\n"


def command(folder: pathlib.Path, seq_len: int) -> str:
    return f"python -m launch.pack {folder} --seq_len={seq_len}"


def index_path(folder: pathlib.Path, seq_len: int, split: str = "train") -> pathlib.Path:
    return folder / f"{split}.packed-{seq_len}.bin"


def read_index(folder: pathlib.Path, manifest: formats.Manifest, seq_len: int, split: str = "train") -> Index:
    """The index of a dataset for rows of seq_len + 1 tokens. Only its header is checked here; see Index.load.

    Raises:
      DataError: the index is missing, or belongs to another dataset, length or version; the message has the command
        that makes it.
    """
    path = index_path(folder, seq_len, split)
    try:
        index = _read_header(path)
    except FileNotFoundError:
        raise DataError(
            f"{folder} is not packed for data.seq_len {seq_len}; pack it with: {command(folder, seq_len)}"
        ) from None
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from None
    if index is None:
        raise DataError(f"{path} is not an index of this version; remove it and run: {command(folder, seq_len)}")
    spec = manifest.splits[split]
    wanted = (manifest.fingerprint(), seq_len, _filler(manifest), spec.tokens, spec.documents)
    if (index.fingerprint, index.seq_len, index.eos_id, index.tokens, index.documents) != wanted:
        raise DataError(
            f"{path} packs another dataset ({index.fingerprint}, seq_len {index.seq_len}) than this one ({wanted[0]}, "
            f"seq_len {seq_len}); replace it with: {command(folder, seq_len)}"
        )
    return index


def verify_packings(folder: pathlib.Path, manifest: formats.Manifest, split: str = "train") -> list[Index]:
    """All packings of a split. Checks every byte: the rows by their hash, and each number of the headers.

    Raises:
      DataError: an index is damaged, or belongs to another dataset; the message has the command that makes it again.
    """
    found = []
    for path in sorted(folder.glob(f"{split}.packed-*.bin")):
        length = path.stem.rpartition("-")[2]
        if not length.isdecimal():
            raise DataError(f"{path} is not an index of launch.pack; move it away")
        index = read_index(folder, manifest, int(length), split)
        index.load()
        cut = count_cut(folder, manifest, index.seq_len, split)
        unread = _count_unread(folder, manifest, index.seq_len, split) if manifest.loss_masks else (None,) * 3
        if (index.cut, index.cut_by_windows, index.left_out, index.unread, index.unread_targets) != (*cut, *unread):
            raise DataError(
                f"{path} has a header with numbers of another dataset; remove it and run: "
                f"{command(folder, index.seq_len)}"
            )
        found.append(index)
    return found


def count_cut(folder: pathlib.Path, manifest: formats.Manifest, seq_len: int, split: str) -> tuple[int, int]:
    """The number of documents in more than one piece, and of documents not inside one window of the first phase."""
    spec, first = manifest.splits[split], 0
    offsets = np.memmap(folder / f"{split}.documents.bin", "<i8", mode="r")
    whole = np.zeros(2, np.int64)
    for shard in spec.shards:
        whole += _whole(offsets, first, first + shard.tokens, spec.tokens, seq_len)
        first += shard.tokens
    cut, cut_by_windows = (spec.documents - whole).tolist()
    return cut, cut_by_windows


def _count_unread(folder: pathlib.Path, manifest: formats.Manifest, seq_len: int, split: str) -> tuple[int, ...]:
    """left_out, unread and unread_targets of the index of chats."""
    files, first, unread = formats.TokenFiles(folder, manifest, split), 0, np.zeros(3, np.int64)
    offsets = np.memmap(folder / f"{split}.documents.bin", "<i8", mode="r")
    assert files.loss_mask is not None
    for tokens in files.shards:
        stop = first + len(tokens)
        begins = _begins(offsets, first, stop)
        unread += pack_chats(begins, stop, files.loss_mask, seq_len + 1, pairs=manifest.pairs).unread
        first = stop
    return tuple(unread.tolist())


def _filler(manifest: formats.Manifest) -> int | None:
    """The token that fills rows up; None if the dataset cannot be packed."""
    return 0 if manifest.loss_masks else manifest.eos_id


def _read_header(path: pathlib.Path) -> Index | None:
    """The header of an index; None if the file is not an index of this version."""
    with path.open("rb") as f:
        raw = f.read(HEADER_BYTES)
    try:
        fields: dict[str, Any] = json.loads(raw)
        if (fields.pop("format"), fields.pop("version")) != (FORMAT, VERSION):
            return None
        index = Index(path, **fields)
        numbers = (index.seq_len, index.eos_id, index.rows, index.pieces, index.tokens, index.documents)
        unread = (index.left_out, index.unread, index.unread_targets)
        rest = (index.cut, index.cut_by_windows, *(unread if any(n is not None for n in unread) else ()))
        if not all(type(n) is int and n >= 0 for n in numbers + rest) or not (index.rows and index.seq_len):
            return None
        return index if index.header() == raw else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def pack_dataset(folder: pathlib.Path, seq_len: int, split: str = "train") -> tuple[Index, bool]:
    """Packs a split of a prepared dataset; returns the index, and whether it existed already.

    An index of other data is replaced; another kind of file with that name is never overwritten.

    Raises:
      DataError: the dataset does not exist, has no end-of-text token or no tokens, or is damaged.
    """
    try:
        manifest = formats.read_manifest(folder)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} is not a dataset of launch.prepare") from None
    check_packable(str(folder), manifest)
    path = index_path(folder, seq_len, split)
    try:
        if (index := _usable(path, folder, manifest, seq_len, split)) is not None:
            return index, True
        with files.locked(path, wait=True) as exclusive:  # each host of a job may pack the shared folder
            if exclusive:
                files.remove_half_written(path)
            if (index := _usable(path, folder, manifest, seq_len, split)) is not None:
                return index, True
            return _write(path, folder, manifest, seq_len, split), False
    except OSError as e:
        name = str(e.filename or path)
        written = name.startswith((str(path), str(files.lock_path(path))))
        what = f"write {path}" if written else f"read {name}"
        raise DataError(f"cannot {what}: {e.strerror}; fix that, then run the same command again") from None


def _usable(
    path: pathlib.Path, folder: pathlib.Path, manifest: formats.Manifest, seq_len: int, split: str
) -> Index | None:
    """The existing index, if it belongs to this dataset; None if there is no index, or it may be replaced.

    Raises:
      DataError: the file is not an index.
    """
    if not path.exists():
        return None
    try:
        index = read_index(folder, manifest, seq_len, split)
        index.load()
        return index
    except DataError:
        if not is_index(path):
            raise DataError(f"{path} is not an index of launch.pack; move it away, it would be overwritten") from None
        return None


def check_packable(path: str, manifest: formats.Manifest) -> None:
    """Raises DataError for a dataset whose documents are not separated."""
    if _filler(manifest) is None:
        raise DataError(
            f"{path} has no end-of-text token between documents, so it cannot be packed; prepare several "
            "documents, or leave config.data.packed false"
        )


def is_index(path: pathlib.Path) -> bool:
    with path.open("rb") as f:
        return f'"{FORMAT}"'.encode() in f.read(HEADER_BYTES)


def _write(path: pathlib.Path, folder: pathlib.Path, manifest: formats.Manifest, seq_len: int, split: str) -> Index:
    tokens_of, spec, filler = formats.TokenFiles(folder, manifest, split), manifest.splits[split], _filler(manifest)
    mask = tokens_of.loss_mask
    if not spec.tokens or not spec.documents:
        raise DataError(f"{folder} has no tokens in its {split} split; prepare a longer corpus")
    offsets_path = folder / f"{split}.documents.bin"
    integrity.check_documents(offsets_path, spec)
    offsets = np.memmap(offsets_path, "<i8", mode="r")
    assert filler is not None
    digest, first_pieces, pieces = hashlib.sha256(), [np.zeros(1, np.int64)], 0
    whole = np.zeros(2, np.int64)  # documents in one piece, and in one window of the first phase
    unread = np.zeros(3, np.int64)
    with files.atomic_write(path) as f:
        f.write(bytes(HEADER_BYTES))
        first = 0
        for tokens in tokens_of.shards:
            stop = first + len(tokens)
            begins = _begins(offsets, first, stop)
            if len(begins):
                if mask is None:
                    _check_ends(tokens, begins[1:] - first, filler, offsets_path)
                    own = pack_shard(begins, stop, seq_len + 1, closed=int(tokens[-1]) == filler)
                else:
                    own = pack_chats(begins, stop, mask, seq_len + 1, pairs=manifest.pairs)
                    unread += own.unread
                raw = own.pieces.tobytes()
                f.write(raw)
                digest.update(raw)
                first_pieces.append(pieces + own.row_ends)
                pieces += len(own.pieces)
                whole += _whole(offsets, first, stop, spec.tokens, seq_len)
                mmap_advice.release(tokens)
            first = stop
        last = np.concatenate(first_pieces).astype("<u8").tobytes()
        f.write(last)
        digest.update(last)
        cut, cut_by_windows = (spec.documents - whole).tolist()
        if not pieces:
            raise DataError(
                f"none of the {spec.documents:,} chats of {folder} has a supervised token among its first "
                f"{seq_len + 1} tokens; raise --seq_len"
            )
        index = Index(
            path, manifest.fingerprint(), seq_len, filler, sum(map(len, first_pieces)) - 1, pieces,
            spec.tokens, spec.documents, cut, cut_by_windows, digest.hexdigest(),
            *(unread.tolist() if mask is not None else ()),
        )  # fmt: skip
        f.seek(0)
        f.write(index.header())
    return index


def _begins(offsets: np.ndarray, first: int, stop: int) -> np.ndarray:
    """Where documents begin in [first, stop), int64; the rest of an earlier shard's document begins at `first`."""
    low, high = np.searchsorted(offsets, [first, stop])
    begins = np.unique(np.append(offsets[low:high], first))  # an empty document begins at the same token as the next
    return begins[begins < stop]


def _whole(offsets: np.ndarray, first: int, stop: int, tokens: int, seq_len: int) -> np.ndarray:
    """How many documents of the shard [first, stop) fit into a row, and into a window of the first phase."""
    low, high = np.searchsorted(offsets, [first, stop])
    begins, ends = offsets[low:high], offsets[low + 1 : high + 1]
    if high == len(offsets):
        ends = np.append(ends, tokens)
    window = first + (begins - first) // seq_len * seq_len
    inside = ends <= stop
    return np.array([np.count_nonzero(inside & (ends - start <= seq_len + 1)) for start in (begins, window)])


def _check_ends(tokens: np.ndarray, ends: np.ndarray, eos_id: int, path: pathlib.Path) -> None:
    if (wrong := np.flatnonzero(tokens[ends - 1] != eos_id)).size:
        raise DataError(
            f"{path} has a document that ends with token {tokens[ends[wrong[0]] - 1]} and not with the end-of-text "
            f"token {eos_id}; it does not belong to these tokens: copy it again or prepare again with --overwrite"
        )


@dataclasses.dataclass(frozen=True)
class Packed:
    pieces: np.ndarray  # PIECE [pieces], ordered by row, and within a row as in the file
    row_ends: np.ndarray  # int64 [rows]: how many pieces there are up to the end of each row
    unread: tuple[int, int, int] = (0, 0, 0)  # Index.left_out, .unread and .unread_targets


def pack_shard(begins: np.ndarray, stop: int, width: int, *, closed: bool = True) -> Packed:
    """Packs the documents that begin at `begins` (int64, ascending; the last one ends at `stop`) into rows of `width`.

    Args:
      closed: whether the last document ends with an end-of-text token. If not, its last piece gets its own row, so that
        no other document looks like its continuation.
    """
    lengths = np.diff(np.append(begins, stop))
    counts = -(-lengths // width)
    starts = np.repeat(begins, counts) + width * spans(np.zeros_like(counts), counts)
    lengths = np.minimum(width, np.repeat(begins + lengths, counts) - starts)
    packed = slice(None) if closed else slice(-1)
    rows = np.empty(len(starts), np.int64)
    rows[packed] = best_fit_decreasing(lengths[packed], width)
    if not closed:
        rows[-1] = rows[:-1].max(initial=-1) + 1
    return _in_rows(starts, lengths, rows)


def pack_chats(begins: np.ndarray, stop: int, mask: np.ndarray, width: int, *, pairs: bool = False) -> Packed:
    """Packs the beginnings, of at most `width` tokens, of the chats that begin at `begins` (as in pack_shard).

    Args:
      mask: uint8, 1 for each supervised token of the split.
      pairs: whether the chats are pairs. A row is then one pair; a pair longer than a row is left out.
    """
    lengths = np.diff(np.append(begins, stop))
    if pairs:
        of_pair = lengths.reshape(-1, 2).sum(1)
        fits = np.repeat(of_pair <= width, 2)
        targets = _sums(mask, begins + 1, begins + lengths)
        packed = _in_rows(begins[fits], lengths[fits], np.arange(np.count_nonzero(fits)) // 2)
        unread = int(np.count_nonzero(~fits)), int(lengths[~fits].sum()), int(targets[~fits].sum())
        return dataclasses.replace(packed, unread=unread)
    read = np.minimum(lengths, width)
    # The first token of a chat has nothing before it to be predicted from.
    targets, targets_read = (_sums(mask, begins + 1, begins + n) for n in (lengths, read))
    kept = targets_read > 0
    left_out, tokens, supervised = np.count_nonzero(~kept), lengths - read * kept, targets - targets_read
    packed = _in_rows(begins[kept], read[kept], best_fit_decreasing(read[kept], width))
    return dataclasses.replace(packed, unread=(int(left_out), int(tokens.sum()), int(supervised.sum())))


def _sums(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The sum of values[start:stop] for each pair; the pairs ascend and do not overlap: int64 [pairs]."""
    if not len(starts):
        return np.zeros(0, np.int64)
    first = int(starts[0])
    before = np.concatenate([[0], np.cumsum(values[first : int(stops[-1])], dtype=np.int64)])
    return before[stops - first] - before[starts - first]


def _in_rows(starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> Packed:
    """The pieces, int64, in the order of their rows."""
    order = np.lexsort((starts, rows))
    pieces = np.empty(len(starts), PIECE)
    pieces["start"], pieces["length"] = starts[order], lengths[order]
    return Packed(pieces, np.cumsum(np.bincount(rows)))


def best_fit_decreasing(lengths: np.ndarray, width: int) -> np.ndarray:
    """The number of each piece's row, int64; rows have `width` tokens. All lengths must be in [1, width].

    Pieces of one length are interchangeable, and so are rows with the same free capacity, so both are handled in
    groups: the row that fits one piece best also fits the next piece of that length best, until it is too full. Each
    group of rows that is used up has less than half of its capacity left, so there are O(width log width) array
    operations.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    rows = np.empty(len(lengths), np.int64)
    free_rows: dict[int, np.ndarray] = {}  # from the free capacity to the rows that have it
    capacities: list[int] = []  # the keys of `free_rows`, ascending
    opened = first = 0

    def return_rows(capacity: int, returned: np.ndarray) -> None:
        if not capacity or not len(returned):
            return
        if capacity not in free_rows:
            bisect.insort(capacities, capacity)
            free_rows[capacity] = np.empty(0, np.int64)
        free_rows[capacity] = np.concatenate([free_rows[capacity], returned])

    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = first + count
        while first < end:
            best = bisect.bisect_left(capacities, size)
            if best == len(capacities):
                new = -(-(end - first) // (width // size))
                return_rows(width, np.arange(opened, opened + new))
                opened += new
                best = len(capacities) - 1
            capacity = capacities.pop(best)
            group, per_row = free_rows.pop(capacity), capacity // size
            placed = min(end - first, len(group) * per_row)
            full, rest = divmod(placed, per_row)  # rows that get `per_row` pieces, and the pieces in one more row
            used = full + bool(rest)
            rows[order[first : first + placed]] = np.repeat(group[:used], min(per_row, placed))[:placed]
            first += placed
            return_rows(capacity - per_row * size, group[:full])
            return_rows(capacity - rest * size, group[full:used])
            return_rows(capacity, group[used:])
    return rows


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, …, start + length - 1 for each pair, concatenated: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
