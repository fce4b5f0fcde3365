"""Batches are a pure function of (seed, dataset, samples consumed), the same on every mesh, and repeat no sample in an
epoch."""

import dataclasses
import hashlib
import itertools
import threading

import jax
import make_dataset
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from data import loader, mixture, order, packing
from data.batch import Batch
from data.errors import DataError
from data.loader import Loader, MixedWindows, Prefetch, TokenWindows
from data.token_files import formats
from tests.batches import tokens_of

T = 8
LENGTHS = (50, 7, 41, 9, 16, 8)  # lengths 7 and 8 hold no window of T + 1 tokens, 9 holds one
WINDOWS = 5 + 4 + 1 + 1
ROWS = PartitionSpec(("data", "fsdp"))


def one_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


def sharding_on(*shape: int, spec: PartitionSpec = ROWS) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()).reshape(shape), ("data", "fsdp", "tensor")), spec)


def open_split(folder, split: str = "train") -> formats.TokenFiles:
    return formats.TokenFiles(folder, formats.read_manifest(folder), split)


@pytest.fixture
def dataset(tmp_path):
    """Train and val have the same counting shards: each token is its own offset."""
    shards = make_dataset.counting_shards(*LENGTHS)
    make_dataset.write(tmp_path, shards, shards)
    return tmp_path


def windows_of(folder, seed: int = 1, split: str = "train", seq_len: int = T) -> TokenWindows:
    return TokenWindows(open_split(folder, split), seq_len=seq_len, seed=seed, split=split)


def slow_row(shards: list[list[int]], seq_len: int, seed: int, g: int, split: str = "train") -> list[int]:
    """Sample g by the definition in the docs, with lists and slices."""
    counts = [0 if len(s) < seq_len + 1 else max(1, len(s) // seq_len - 1) for s in shards]
    epoch, position = divmod(g, sum(counts))
    window = int(order.permute(np.array([position]), sum(counts), seed, split, epoch)[0])
    for i, (shard, count) in enumerate(zip(shards, counts, strict=True)):
        if window < count:
            phases = min(seq_len, len(shard) - count * seq_len)
            phase = int.from_bytes(order.derive(seed, split, "phase", epoch, i)[:8], "little") % phases
            start = phase + window * seq_len
            return list(shard[start : start + seq_len + 1])
        window -= count
    raise AssertionError


def slow_batch(folder, size: int, consumed: int, seed: int = 1, seq_len: int = T) -> list[list[int]]:
    manifest = formats.read_manifest(folder)
    dtype = {"uint16": "<u2", "uint32": "<u4"}[manifest.dtype]
    shards = [np.fromfile(folder / s.file, dtype).tolist() for s in manifest.splits["train"].shards]
    return [slow_row(shards, seq_len, seed, consumed + row) for row in range(size)]


def digest(array: jax.Array | np.ndarray) -> str:
    host = np.asarray(array)
    return hashlib.sha256(f"{host.dtype}{host.shape}".encode() + host.tobytes()).hexdigest()


# Windows


@pytest.mark.parametrize("epoch", [0, 1, 2, 57])
def test_an_epoch_holds_every_window_exactly_once(epoch, dataset):
    """The windows of a shard are contiguous: the first starts at the phase, the next seq_len later; few tokens are
    unused."""
    windows = windows_of(dataset)
    assert windows.num_windows == WINDOWS
    rows = windows.rows(np.arange(epoch * WINDOWS, (epoch + 1) * WINDOWS)).astype(int)
    assert np.array_equal(np.diff(rows, axis=1), np.ones((WINDOWS, T)))  # each row has consecutive tokens of one shard
    starts = np.sort(rows[:, 0])
    assert len(np.unique(starts)) == WINDOWS
    bounds = np.cumsum([0, *LENGTHS])
    for first, last, length in zip(bounds[:-1], bounds[1:], LENGTHS, strict=True):
        mine = starts[(starts >= first) & (starts < last)]
        if length <= T:
            assert len(mine) == 0  # a shard that is shorter than a window is not used
            continue
        assert 0 <= mine[0] - first < T and np.all(np.diff(mine) == T)
        assert mine[-1] + T < last and last - mine[-1] <= 3 * T  # in the shard, and less than two windows unused


@pytest.mark.parametrize("seq_len", [1, 2, 5])
def test_no_length_of_a_shard_reads_past_its_end(seq_len, tmp_path):
    """The windows are a strided view, which checks no bounds: a wrong count would read beyond the file."""
    for length in range(seq_len + 1, 6 * seq_len + 2):
        folder = tmp_path / str(length)
        make_dataset.write(folder, make_dataset.counting_shards(length))
        windows = windows_of(folder, seq_len=seq_len)
        n = windows.num_windows
        rows = windows.rows(np.arange(20 * n)).astype(int)
        assert np.array_equal(rows, rows[:, :1] + np.arange(seq_len + 1))
        assert rows.min() >= 0 and rows.max() < length
        for epoch in np.split(rows, 20):
            assert len(np.unique(epoch[:, 0])) == n


def test_every_token_becomes_a_target_in_some_epoch(dataset):
    """The phase changes, so another epoch reads the tokens that one epoch leaves out. Never a target are the first
    token of a shard and, if its length is not a multiple of seq_len, fewer than seq_len tokens at its end."""
    seen = set(windows_of(dataset).rows(np.arange(300 * WINDOWS))[:, 1:].flat)
    for first, length in zip(np.cumsum([0, *LENGTHS]), LENGTHS, strict=False):
        if length > T:
            assert set(range(first + 1, first + length - length % T)) <= seen


def phases(windows: TokenWindows, epochs: int) -> np.ndarray:
    """The start of the first window in shards 0 and 2: [epochs, 2]."""
    rows = windows.rows(np.arange(epochs * WINDOWS))[:, 0].astype(int).reshape(epochs, WINDOWS)
    third = LENGTHS[0] + LENGTHS[1]
    return np.stack([rows.min(axis=1), np.where(rows >= third, rows, 10**6).min(axis=1) - third], axis=1)


def test_phases_differ_between_epochs_shards_and_seeds(dataset):
    found = phases(windows_of(dataset), 100)
    for shard in (0, 1):
        counts = np.bincount(found[:, shard], minlength=T)
        assert len(counts) == T and counts.min() > 0  # all T phases occur in 100 epochs
    assert np.count_nonzero(found[:, 0] == found[:, 1]) < 40  # 12.5 is expected: the phases of shards are independent
    other = phases(windows_of(dataset, seed=2), 100)
    assert np.count_nonzero(found == other) < 60  # 25 of 200 are expected


def test_rows_are_those_of_the_slow_reference(dataset):
    windows = windows_of(dataset)
    for consumed in (0, 3, 5 * WINDOWS - 2, 10**6):
        assert windows.rows(consumed + np.arange(30)).tolist() == slow_batch(dataset, 30, consumed)


def test_rows_of_any_samples_in_any_order(dataset):
    g = np.array([40, 3, 3, 0, 200])
    windows = windows_of(dataset)
    assert windows.rows(g).tolist() == [slow_batch(dataset, 1, int(i))[0] for i in g]


def test_rows_keep_the_type_of_the_files(tmp_path):
    """uint16 halves the bytes that are sent to the device, and token ids above 65535 arrive intact."""
    make_dataset.write(tmp_path / "16", [np.arange(100)])
    assert windows_of(tmp_path / "16").rows(np.arange(4)).dtype == np.uint16
    make_dataset.write(tmp_path / "32", [np.arange(70_000, 70_100)], vocab_size=80_000, dtype="uint32")
    rows = windows_of(tmp_path / "32").rows(np.arange(4))
    assert rows.dtype == np.uint32 and rows.min() >= 70_000


def test_seed_and_split_change_the_order(dataset):
    """If a validation split is read through windows, its order must differ from that of the training split."""
    g = np.arange(3 * WINDOWS)
    base = windows_of(dataset).rows(g)
    assert not np.array_equal(base, windows_of(dataset, seed=2).rows(g))
    assert not np.array_equal(base, windows_of(dataset, split="val").rows(g))
    assert not np.array_equal(base, windows_of(dataset, seed=0).rows(g + WINDOWS))


def test_epoch_counts_passes_over_the_windows(dataset):
    windows = mixed([open_split(dataset)])
    assert [windows.epochs(s) for s in (0, WINDOWS, 5 * WINDOWS // 2)] == [
        {"train/epoch": epochs} for epochs in (0, 1, 27 / WINDOWS)
    ]


def mixed(files: list[formats.TokenFiles], weights: str = "") -> MixedWindows:
    names = dict(zip("abcd", files, strict=False))
    return MixedWindows(names, mixture.parse_stages(weights, len(files)), seq_len=T, seed=1)


def test_one_source_is_read_as_if_there_were_no_mixture(dataset):
    g = np.arange(3 * WINDOWS)
    windows = mixed([open_split(dataset)])
    assert np.array_equal(windows.rows(g), windows_of(dataset).rows(g))


def test_a_mixture_takes_each_source_in_its_own_order(tmp_path):
    """Tests the rows, the epochs of each source, the wider of two dtypes, and reading any samples in any order."""
    make_dataset.write(tmp_path / "a", [np.arange(90)])
    make_dataset.write(tmp_path / "b", [np.arange(70_000, 70_500)], vocab_size=80_000, dtype="uint32")
    files = [open_split(tmp_path / "a"), open_split(tmp_path / "b")]
    windows = mixed(files, "0:0.7,0.3; 300:0.1,0.9")
    g = np.arange(600)
    rows = windows.rows(g)
    assert rows.dtype == np.uint32
    of_b = rows[:, 0] >= 70_000
    assert of_b[:300].mean() == pytest.approx(0.3, abs=0.07) and of_b[300:].mean() == pytest.approx(0.9, abs=0.05)
    for here, name in ((~of_b, "a"), (of_b, "b")):
        assert np.array_equal(rows[here], windows_of(tmp_path / name).rows(np.arange(here.sum())))
    shuffled = np.random.default_rng(0).permutation(g)
    assert np.array_equal(mixed(files, "0:0.7,0.3; 300:0.1,0.9").rows(shuffled), rows[shuffled])
    epochs = windows.epochs(600)
    counts = [source.num_windows for source in windows.sources]
    assert epochs == {
        "train/epoch": 600 / sum(counts),
        "train/epoch/a": (~of_b).sum() / counts[0],
        "train/epoch/b": of_b.sum() / counts[1],
    }
    windows.will_need(g)  # this is only a hint


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_batches_of_a_mixture_are_the_same_on_every_mesh(shape, tmp_path):
    for name, start in (("a", 0), ("b", 1000)):
        make_dataset.write(tmp_path / name, [np.arange(start, start + 400)])
    windows = mixed([open_split(tmp_path / "a"), open_split(tmp_path / "b")], "3,1")
    on_one = Loader(windows, global_batch_size=16, sharding=one_device())
    on_many = Loader(windows, global_batch_size=16, sharding=sharding_on(*shape))
    for samples in (0, 16, 4000):
        assert np.array_equal(tokens_of(on_one.batch(samples)), tokens_of(on_many.batch(samples)))


@pytest.mark.parametrize("lengths", [(T,), (0,), (5, T, 3), (1,)])
def test_a_corpus_without_one_window_is_an_error_that_says_what_it_needs(lengths, tmp_path):
    make_dataset.write(tmp_path, make_dataset.counting_shards(*lengths))
    with pytest.raises(DataError) as e:
        windows_of(tmp_path)
    for part in (str(tmp_path), f"{sum(lengths)} tokens", f"needs {T + 1}", "seq_len"):
        assert part in str(e.value)


def test_a_token_outside_the_vocabulary_is_an_error_when_its_window_is_read(tmp_path):
    tokens = np.arange(100) % 50
    tokens[60] = 50
    make_dataset.write(tmp_path, [tokens], vocab_size=50)
    windows = windows_of(tmp_path)
    with pytest.raises(DataError, match="token id 50 in the train split is outside the vocabulary of 50"):
        windows.rows(np.arange(windows.num_windows))


# Batches


@pytest.mark.parametrize(("size", "spans"), [(4, 2), (16, 3), (40, 5)])
def test_a_batch_may_span_epochs(size, spans, dataset):
    consumed = WINDOWS - 2
    assert (consumed + size - 1) // WINDOWS + 1 == spans
    batch = Loader(windows_of(dataset), global_batch_size=size, sharding=one_device()).batch(consumed)
    assert tokens_of(batch).tolist() == slow_batch(dataset, size, consumed)
    assert batch.inputs.dtype == np.uint16 and batch.inputs.shape == batch.targets.shape == (size, T)
    assert batch.loss_weights is batch.positions is batch.segment_ids is None, "it costs nothing"


def test_samples_do_not_depend_on_how_they_are_batched(dataset):
    """The batch size may change during a run: the position in the data is the number of samples consumed, not of
    steps."""

    def read(size: int, consumed: int) -> np.ndarray:
        batches = Loader(windows_of(dataset), global_batch_size=size, sharding=sharding_on(2, 2, 2))
        return tokens_of(batches.batch(consumed))

    whole = read(48, 8)
    assert np.array_equal(np.concatenate([read(16, 8), read(8, 24), read(4, 32), read(12, 36), read(8, 48)]), whole)


def test_a_fresh_loader_started_midway_goes_on_with_the_same_batches(dataset):
    """A resumed run relies only on the number of samples consumed."""

    def make() -> Loader:
        return Loader(windows_of(dataset), global_batch_size=8, sharding=sharding_on(8, 1, 1))

    uninterrupted = make().prefetched(0, 2)
    first = [digest(tokens_of(next(uninterrupted))) for _ in range(12)]
    uninterrupted.close()
    resumed = make().prefetched(5 * 8, 3)
    assert [digest(tokens_of(next(resumed))) for _ in range(7)] == first[5:]
    resumed.close()
    one = make()
    again = [digest(tokens_of(one.batch(8 * step))) for step in reversed(range(12))]
    assert again == first[::-1]  # earlier batches have no effect
    assert len(set(first)) == 12


MESHES = {
    "one device": one_device,
    "data": lambda: sharding_on(8, 1, 1),
    "fsdp": lambda: sharding_on(1, 8, 1),
    "tensor": lambda: sharding_on(1, 1, 8),
    "all": lambda: sharding_on(2, 2, 2),
    "replicated": lambda: sharding_on(2, 2, 2, spec=PartitionSpec()),
}


@pytest.mark.parametrize("name", MESHES)
def test_the_global_batch_is_the_same_on_every_mesh(name, dataset):
    sharding = MESHES[name]()
    batches = Loader(windows_of(dataset), global_batch_size=16, sharding=sharding)
    for step in (0, 1, 100):
        batch = batches.batch(step * 16)
        assert digest(tokens_of(batch)) == digest(np.array(slow_batch(dataset, 16, step * 16), np.uint16))
        for array in (batch.inputs, batch.targets):
            assert array.sharding.is_equivalent_to(sharding, 2)
            for shard in array.addressable_shards:  # holds also if the array is assembled from one copy of each part
                assert np.array_equal(shard.data, np.asarray(array)[shard.index])


def test_golden_batches(dataset):
    """The digests at steps 0, 1 and 100 depend on the order, the phases and the windows."""
    batches = Loader(windows_of(dataset, seed=1337), global_batch_size=16, sharding=sharding_on(2, 2, 2))
    expected = ["8e605e1ce9ed7162", "13a73ef7d9ef57c6", "aa4767e9943306e4"]
    assert [digest(tokens_of(batches.batch(step * 16)))[:16] for step in (0, 1, 100)] == expected, (
        "the data of every user's run has changed: resumed runs would repeat and skip samples. If that is meant, give "
        "order.VERSION a new value and freeze these again"
    )


EOS = 3
DOCUMENTS = (3, 20, 5, 1, 8, 2, 13, 7, 4, 9, 6, 17, 2, 5)  # documents of 20 and 17 exceed a row


@pytest.fixture
def documents(tmp_path):
    """A dataset of DOCUMENTS in two shards, packed for rows of T. EOS occurs only at the end of each document."""
    borders = np.cumsum([0, *DOCUMENTS])
    tokens = 4 + np.arange(borders[-1])
    tokens[borders[1:] - 1] = EOS
    manifest = make_dataset.write(tmp_path, np.split(tokens, [50]), [np.arange(4, 40)])
    train = dataclasses.replace(manifest.splits["train"], documents=len(DOCUMENTS))
    manifest = dataclasses.replace(manifest, eos_id=EOS, splits=manifest.splits | {"train": train})
    (tmp_path / formats.MANIFEST).write_text(manifest.to_json())
    (tmp_path / "train.documents.bin").write_bytes(borders[:-1].astype("<u8").tobytes())
    packing.pack_dataset(tmp_path, T)
    return tmp_path


def slow_documents(row: list[int]) -> list[tuple[int, int]]:
    """(position, segment) of each input of a row, as the docs define them: after an EOS, a new segment starts at
    position 0."""
    found = [(0, 0)]
    for token in row[: T - 1]:
        position, segment = found[-1]
        found.append((0, segment + 1) if token == EOS else (position + 1, segment))
    return found


@pytest.mark.parametrize("document_end", [None, EOS])
@pytest.mark.parametrize("packed", [False, True])
def test_every_part_of_a_batch_is_the_same_on_every_mesh(packed, document_end, documents):
    """Compares inputs, targets, loss weights, positions and segment_ids, with their types; each device has its rows of
    every array."""
    windows = windows_of(documents)
    if packed:
        index = packing.read_index(documents, formats.read_manifest(documents), T)
        windows = loader.PackedWindows(open_split(documents), index, seed=1)
    g = 24 + np.arange(16)
    rows = windows.rows(g)
    seen = {}
    for name, make in MESHES.items():
        batch = Loader(windows, global_batch_size=16, sharding=make(), document_end=document_end).batch(24)
        for array in jax.tree.leaves(batch):
            assert array.shape == (16, T) and array.sharding.is_equivalent_to(make(), 2)
            for shard in array.addressable_shards:
                assert np.array_equal(shard.data, np.asarray(array)[shard.index])
        seen[name] = jax.device_get(batch)
    one = seen["one device"]
    assert np.array_equal(tokens_of(one), rows) and one.inputs.dtype == np.uint16
    if packed:
        assert one.loss_weights.dtype == bool and np.array_equal(one.loss_weights, windows.loss_mask(g))
        assert 0 < (~one.loss_weights).sum() < 64
    else:
        assert one.loss_weights is None
    if document_end is None:
        assert one.positions is one.segment_ids is None
    else:
        expected = np.array([slow_documents(row) for row in rows.tolist()])
        assert np.array_equal(np.stack([one.positions, one.segment_ids], axis=2), expected)
        assert one.positions.dtype == one.segment_ids.dtype == np.int32 and expected.max() > 1
    for name, batch in seen.items():
        assert jax.tree.structure(batch) == jax.tree.structure(one), name
        assert [digest(array) for array in jax.tree.leaves(batch)] == [digest(x) for x in jax.tree.leaves(one)], name


@pytest.mark.parametrize(("shape", "parts"), [((4, 1, 2), 4), ((1, 1, 8), 1), ((2, 4, 1), 8)])
def test_put_reads_each_row_once_however_many_devices_hold_it(shape, parts):
    asked = []

    def read(rows: np.ndarray) -> dict[str, np.ndarray | None]:
        asked.append(rows.tolist())
        return {"index": rows.astype(np.int16), "nothing": None, "powers": np.stack([rows, rows * rows], axis=1)}

    tree = jax.device_get(loader.put(sharding_on(*shape), 16, read))
    assert tree["powers"].tolist() == [[i, i * i] for i in range(16)] and tree["nothing"] is None
    assert tree["index"].tolist() == list(range(16)) and tree["index"].dtype == np.int16
    assert len(asked) == parts and sorted(itertools.chain(*asked)) == list(range(16))


# Prefetch


def within(seconds: float, call):
    """Returns what `call` returns; if it hangs, the test fails instead of never ending."""
    result = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "still waiting"
    return result[0]


def next_or_error(prefetch: Prefetch):
    try:
        return next(prefetch)
    except Exception as e:
        return e


@pytest.fixture
def loader_threads():
    """A function that returns the loader threads that this test has started and that still run."""
    before = threading.enumerate()
    return lambda: [t for t in threading.enumerate() if t.name == "loader" and t not in before]


def test_prefetch_keeps_the_order():
    prefetch = Prefetch(lambda i: i, ahead=3)
    assert [within(60, lambda: next(prefetch)) for _ in range(200)] == list(range(200))
    within(60, prefetch.close)


def test_prefetch_reads_ahead_but_not_without_end():
    """The thread holds one more result than the queue while it waits for room."""
    made = threading.Semaphore(0)
    count = []

    def make(i: int) -> int:
        count.append(i)
        made.release()
        return i

    prefetch = Prefetch(make, ahead=2)
    assert all(made.acquire(timeout=60) for _ in range(3))  # before any was requested
    assert not made.acquire(timeout=0.3)
    assert within(60, lambda: next(prefetch)) == 0
    assert made.acquire(timeout=60)  # a result that was taken is replaced
    within(60, prefetch.close)
    assert count == [0, 1, 2, 3]


def test_prefetch_hands_an_error_to_the_consumer_in_its_place(loader_threads):
    def make(i: int) -> int:
        if i == 2:
            raise DataError("row 2 is bad")
        return i

    prefetch = Prefetch(make, ahead=4)
    found = [within(60, lambda: next_or_error(prefetch)) for _ in range(3)]
    assert found[:2] == [0, 1] and isinstance(found[2], DataError) and str(found[2]) == "row 2 is bad"
    for thread in loader_threads():
        thread.join(60)
    assert not loader_threads()  # nothing is read after the error
    within(60, prefetch.close)


def test_a_bad_token_reaches_the_training_loop_as_a_data_error(tmp_path):
    tokens = np.arange(200) % 50
    tokens[100:150] = 77
    make_dataset.write(tmp_path, [tokens], vocab_size=50)
    batches = Loader(windows_of(tmp_path), global_batch_size=8, sharding=sharding_on(8, 1, 1)).prefetched(0, 2)
    for _ in range(4):  # an epoch has 24 samples
        found = within(60, lambda: next_or_error(batches))
        if isinstance(found, Exception):
            break
    assert isinstance(found, DataError) and "token id 77" in str(found)
    within(60, batches.close)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_ends_the_thread_although_the_queue_is_full(taken, loader_threads):
    full = threading.Semaphore(0)

    def make(i: int) -> int:
        full.release()
        return i

    prefetch = Prefetch(make, ahead=2)
    for _ in range(taken):
        within(60, lambda: next(prefetch))
    assert all(full.acquire(timeout=60) for _ in range(taken + 3))  # two are in the queue, and a third waits for room
    assert loader_threads()
    within(60, prefetch.close)
    assert not loader_threads()
    within(60, prefetch.close)  # a second close does nothing


def test_close_waits_for_the_read_in_progress(loader_threads):
    """After close has returned, no file is read, and nothing is sent to a device."""
    reading, go_on, done = threading.Event(), threading.Event(), []

    def make(i: int) -> int:
        reading.set()
        go_on.wait(60)
        done.append(i)
        return i

    prefetch = Prefetch(make, ahead=1)
    assert reading.wait(60)
    closing = threading.Thread(target=prefetch.close, daemon=True)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive() and not done
    go_on.set()
    closing.join(60)
    assert not closing.is_alive() and done == [0] and not loader_threads()


# Evaluation


def val_files(folder, *lengths: int, vocab_size: int = 60_000) -> formats.TokenFiles:
    make_dataset.write(folder, [np.arange(9)], make_dataset.counting_shards(*lengths), vocab_size=vocab_size)
    return open_split(folder, "val")


@pytest.mark.parametrize("lengths", [(50,), (9,), (8,), (2,), (50, 0, 1, 2, 9, 8, 17, 3)])
def test_evaluation_windows_take_each_target_exactly_once_in_file_order(lengths, tmp_path):
    files = val_files(tmp_path, *lengths)
    where, counts = loader.evaluation_windows(files, T)
    windows = zip(where.tolist(), counts.tolist(), strict=True)
    targets = [(shard, start + 1 + i) for (shard, start), n in windows for i in range(n)]
    assert targets == [(shard, i) for shard, length in enumerate(lengths) for i in range(1, length)]
    last = [i + 1 == len(where) or where[i + 1, 0] != where[i, 0] for i in range(len(where))]
    assert all(n == T or end for n, end in zip(counts.tolist(), last, strict=True))


def test_a_limit_on_evaluation_spreads_evenly_and_is_fixed(tmp_path):
    files = val_files(tmp_path, 400, 300)
    every, counts = loader.evaluation_windows(files, T)
    for limit in (2, 3, 7, 40, len(every) - 1):
        where, n = loader.evaluation_windows(files, T, limit)
        again, _ = loader.evaluation_windows(files, T, limit)
        assert np.array_equal(where, again) and len(where) == len(n) == limit
        chosen = [every.tolist().index(w) for w in where.tolist()]
        assert np.array_equal(counts[chosen], n)
        gaps = np.diff(chosen)
        assert chosen[0] == 0 and chosen[-1] == len(every) - 1
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    assert len(loader.evaluation_windows(files, T, 1)[0]) == 1
    for limit in (0, len(every), 10**6):
        assert np.array_equal(loader.evaluation_windows(files, T, limit)[0], every)


def targets_that_count(batch: Batch) -> np.ndarray:
    """How many targets of each row count: int64 [rows]. They must be the first targets of the row."""
    mask = np.asarray(batch.loss_weights)
    counts = mask.sum(axis=1)
    assert mask.dtype == bool and np.array_equal(mask, np.arange(T) < counts[:, None])
    return counts


@pytest.mark.parametrize("limit", [0, 5])
def test_evaluation_batches_are_the_same_set_on_every_mesh(limit, tmp_path):
    """The set is padded to full batches. On any devices, each window is in one row, with its tokens."""
    lengths = (50, 9, 1, 30)
    files = val_files(tmp_path, *lengths)
    offsets = np.cumsum([0, *lengths])
    where, counts = loader.evaluation_windows(files, T, limit)
    windows = [list(range(offsets[s] + a, offsets[s] + a + n + 1)) for (s, a), n in zip(where, counts, strict=True)]
    assert len(windows) == (limit or 12)
    digests = []
    for name, make in MESHES.items():
        sharding = make()
        found, batches = [], []
        for batch in loader.evaluation_batches(files, seq_len=T, batch_size=8, sharding=sharding, limit=limit):
            assert batch.inputs.shape == (8, T) and batch.inputs.dtype == np.uint16
            assert all(array.sharding.is_equivalent_to(sharding, 2) for array in jax.tree.leaves(batch))
            tokens, n = tokens_of(batch), targets_that_count(batch)
            batches.append(digest(tokens) + digest(n))
            found += zip(tokens.tolist(), n.tolist(), strict=True)
        assert len(found) == -(-len(windows) // 8) * 8
        assert [row[: n + 1] for row, n in found[: len(windows)]] == windows, name
        assert all(n == 0 for _, n in found[len(windows) :])  # these rows are padding
        assert not any(any(row[n + 1 :]) for row, n in found)  # tokens that do not count are 0, a valid id
        digests.append(batches)
    assert all(batches == digests[0] for batches in digests)


def test_the_batch_size_does_not_change_what_is_evaluated(tmp_path):
    files = val_files(tmp_path, 50, 9, 30)
    sets = []
    for batch_size in (1, 5, 16):
        sharding = one_device()
        batches = loader.evaluation_batches(files, seq_len=T, batch_size=batch_size, sharding=sharding)
        rows = [row for b in batches for row in zip(tokens_of(b).tolist(), targets_that_count(b).tolist(), strict=True)]
        sets.append([row for row in rows if row[1]])
    assert sets[0] == sets[1] == sets[2]


@pytest.mark.parametrize("name", ["one device", "all"])
def test_documents_are_masked_in_an_evaluation_too(name, tmp_path):
    tokens = 4 + np.arange(60)
    tokens[[5, 6, 20, 33, 47]] = EOS
    make_dataset.write(tmp_path, [np.arange(9)], [tokens])
    sharding, files = MESHES[name](), open_split(tmp_path, "val")
    (batch,) = loader.evaluation_batches(files, seq_len=T, batch_size=8, sharding=sharding, document_end=EOS)
    expected = np.array([slow_documents(row) for row in tokens_of(batch).tolist()])
    assert np.array_equal(np.stack([batch.positions, batch.segment_ids], axis=2), expected)
    assert expected[0].tolist() == [[i, 0] for i in range(6)] + [[0, 1], [0, 2]]


@pytest.mark.parametrize("lengths", [(0,), (1,), (1, 1)])
def test_a_validation_split_without_a_target_is_an_error(lengths, tmp_path):
    files = val_files(tmp_path, *lengths)
    with pytest.raises(DataError, match="at least 2"):
        next(loader.evaluation_batches(files, seq_len=T, batch_size=8, sharding=one_device()))


def test_a_validation_token_outside_the_vocabulary_is_an_error(tmp_path):
    files = val_files(tmp_path, 50, vocab_size=49)  # the last token is 49
    with pytest.raises(DataError, match="token id 49 in the validation split"):
        list(loader.evaluation_batches(files, seq_len=T, batch_size=8, sharding=one_device()))


# Tokens that no window reaches


@pytest.mark.parametrize("seq_len", [1, 3, 8])
def test_unreached_counts_what_no_epoch_reads(seq_len, tmp_path):
    """Compares `unreached` with the rows of so many epochs that all phases occur; there is a shard of each length up to
    four windows."""
    lengths = list(range(4 * seq_len + 3))
    make_dataset.write(tmp_path, make_dataset.counting_shards(*lengths))
    windows = windows_of(tmp_path, seq_len=seq_len)
    read = set(windows.rows(np.arange(100 * windows.num_windows)).flat)
    short = [length for length in lengths if length <= seq_len]
    told = windows.unreached
    assert (told.files, told.tokens) == (sum(length > 0 for length in short), sum(short))
    assert sum(lengths) - len(read) == told.tokens + told.tails
    assert ("shorter than a window" in str(told)) == (told.files > 0) and ("at the ends" in str(told)) == (
        told.tails > 0
    )
