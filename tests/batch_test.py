"""A batch: its documents are compared with a loop in plain Python, and arrays that a run does not need are absent."""

import dataclasses

import jax
import jax.numpy as jnp
import make_dataset
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from data import batch, loader, packing
from data.batch import Batch
from data.token_files import formats

END = 9


def documents_by_loop(rows: list[list[int]], end: int) -> tuple[list[list[int]], list[list[int]]]:
    """Positions and document numbers, one token at a time; a document includes its end."""
    positions, segment_ids = [], []
    for row in rows:
        position, document = 0, 0
        of_row, ids = [], []
        for token in row:
            of_row.append(position)
            ids.append(document)
            position += 1
            if token == end:
                position = 0
                document += 1
        positions.append(of_row)
        segment_ids.append(ids)
    return positions, segment_ids


def test_documents_of_rows_worked_out_by_hand():
    """The end token belongs to its document; a row may begin inside a document; ends may follow each other."""
    inputs = np.array([[5, 9, 3, 3, 9, 1], [9, 9, 1, 2, 3, 9], [1, 2, 3, 4, 5, 6]], np.uint16)
    positions, segment_ids = batch.documents(inputs, END)
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert segment_ids.tolist() == [[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2], [0] * 6]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("vocab", [[END], [END, 3], range(10), range(200)], ids=len)
def test_documents_are_those_of_a_loop(dtype, vocab):
    """The rows have one token or many; some have only document ends, and in others ends are rare."""
    draw = np.random.default_rng(len(vocab))
    for length in (1, 2, 7, 300):
        inputs = draw.choice(vocab, (20, length)).astype(dtype)
        inputs[0] = 3
        positions, segment_ids = batch.documents(inputs, END)
        assert positions.dtype == segment_ids.dtype == np.int32
        assert (positions.tolist(), segment_ids.tolist()) == documents_by_loop(inputs.tolist(), END)


def test_a_batch_of_tokens():
    tokens = np.array([[1, 9, 2, 3], [4, 5, 9, 9]], np.uint16)
    plain = batch.from_tokens(tokens)
    assert plain.inputs.tolist() == [[1, 9, 2], [4, 5, 9]] and plain.targets.tolist() == [[9, 2, 3], [5, 9, 9]]
    assert plain.inputs.dtype == plain.targets.dtype == np.uint16
    assert plain.loss_weights is plain.positions is plain.segment_ids is None
    mask = np.array([[True, False, True], [True, True, False]])
    masked = batch.from_tokens(tokens, loss_mask=mask, document_end=9)
    assert masked.loss_weights is mask
    assert masked.positions.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert masked.segment_ids.tolist() == [[0, 0, 1], [0, 0, 0]]  # of the inputs; the last token is only a target
    assert batch.from_tokens(tokens, document_end=3).segment_ids.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_what_a_run_does_not_need_is_not_a_leaf():
    """An array that a run does not need is not transferred or sharded, and the program is not compiled for it."""
    tokens = np.arange(8).reshape(2, 4)
    assert len(jax.tree.leaves(batch.from_tokens(tokens))) == 2
    assert len(jax.tree.leaves(batch.from_tokens(tokens, loss_mask=np.ones((2, 3), bool)))) == 3
    assert len(jax.tree.leaves(batch.from_tokens(tokens, document_end=1))) == 4
    doubled = jax.tree.map(lambda x: 2 * x, batch.from_tokens(tokens))
    assert isinstance(doubled, Batch) and doubled.targets[0].tolist() == [2, 4, 6] and doubled.positions is None
    assert jax.tree.structure(batch.from_tokens(tokens)) != jax.tree.structure(
        batch.from_tokens(tokens, document_end=1)
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_widened_has_the_types_that_the_step_computes_with(dtype):
    tokens = np.array([[1, 250, 2], [255, 0, 7]], dtype)
    mask = np.array([[True, False], [False, True]])
    for made in (np.asarray, jnp.asarray):
        of = jax.tree.map(made, batch.from_tokens(tokens, loss_mask=mask, document_end=2))
        wide = of.widened()
        assert wide.inputs.dtype == wide.targets.dtype == np.int32 and wide.loss_weights.dtype == np.float32
        assert wide.inputs.tolist() == tokens[:, :-1].tolist() and wide.targets.tolist() == tokens[:, 1:].tolist()
        assert wide.loss_weights.tolist() == [[1, 0], [0, 1]]
        assert wide.positions is of.positions and wide.segment_ids is of.segment_ids
        assert of.inputs.dtype == dtype
    assert batch.from_tokens(tokens).widened().loss_weights is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("documents", "reference"), [(False, False), (True, False), (True, True)])
def test_the_shapes_to_compile_for_are_those_of_a_batch(masked, documents, reference):
    """Structure, shapes and types are the same, so a program that was compiled for the shapes accepts the batch."""
    sharding = SingleDeviceSharding(jax.devices()[0])
    tokens = np.random.default_rng(0).integers(0, 12, (3, 6)).astype(np.uint16)
    made = batch.from_tokens(
        tokens, loss_mask=np.ones((3, 5), bool) if masked else None, document_end=9 if documents else None,
        begins=tokens == 3 if reference else None, reference=np.ones(3, np.float32) if reference else None,
    )  # fmt: skip
    shapes = batch.abstract(3, 5, np.uint16, masked=masked, documents=documents, reference=reference, sharding=sharding)
    assert jax.tree.structure(shapes) == jax.tree.structure(made)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(made), strict=True):
        assert (shape.shape, shape.dtype, shape.sharding) == (array.shape, array.dtype, sharding)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ends", [True, False])
def test_the_loss_mask_of_packed_rows_leaves_out_an_end_after_an_end(tmp_path, seed, ends):
    """An end of text after an end of text is padding, or it ends a document whose text is in another row.

    Documents are about as long as a row, and a shard may end anywhere in a document.
    """
    draw = np.random.default_rng(seed)
    lengths = draw.permutation([*draw.geometric(0.06, 300), *[1, 1, 16, 17, 18, 35] * 4])
    tokens = np.full(lengths.sum(), 5)
    borders = np.cumsum([0, *lengths])
    tokens[borders[1 : None if ends else -1] - 1] = END
    manifest = make_dataset.write(tmp_path, np.split(tokens, np.sort(draw.integers(1, len(tokens), 4))))
    split = dataclasses.replace(manifest.splits["train"], documents=len(lengths))
    manifest = dataclasses.replace(manifest, eos_id=END, splits={"train": split})
    (tmp_path / formats.MANIFEST).write_text(manifest.to_json())
    (tmp_path / "train.documents.bin").write_bytes(borders[:-1].astype("<u8").tobytes())
    index, _ = packing.pack_dataset(tmp_path, 16)
    windows = loader.PackedWindows(formats.TokenFiles(tmp_path, manifest, "train"), index, seed=seed)
    g = draw.permutation(2 * windows.num_windows)  # the samples of two epochs, across shards
    rows = windows.rows(g)
    mask = windows.loss_mask(g)
    assert mask.dtype == bool and mask.shape == (len(g), 16)
    by_rule = (rows[:, :-1] != END) | (rows[:, 1:] != END)
    np.testing.assert_array_equal(mask, by_rule)
    assert 0 < (~mask).sum() < mask.size / 2
