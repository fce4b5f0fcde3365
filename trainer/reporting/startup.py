"""The start-up page: what will be trained, on what data and devices, and which loss to expect."""

import itertools
import logging
import math
from collections.abc import Iterator
from logging import INFO, WARNING

import jax
from jax.sharding import Mesh

from data.dataset import Dataset
from data.loader import MixedWindows
from data.sources import Sources
from data.token_files import external
from trainer import schedule, sharding, xla_options
from trainer.config import Config
from trainer.state import Program

log = logging.getLogger("meshlm")
# The largest share of the parameters, or of the training state, that may be replicated although the mesh could split
# it; a larger share is a mistake.
REPLICATED_SHARE_ALLOWED = 0.02

Lines = Iterator[tuple[int, str]]  # log level and text


def log_summary(config: Config, program: Program, windows: MixedWindows, data: Sources) -> None:
    """Logs the start-up page."""
    lines = itertools.chain(
        _of_model(config, program),
        _of_batch(config, program.mesh),
        _of_data(config, windows, data),
        _of_schedule(config),
    )
    for level, line in lines:
        log.log(level, "%s", line)


def _of_model(config: Config, program: Program) -> Lines:
    devices, model = jax.devices(), config.model
    axes = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    processes = jax.process_count()
    yield INFO, f"devices   {len(devices)} {devices[0].device_kind} in {processes} process(es); mesh {axes}"
    compute = f"{model.dtype} compute{xla_options.precision_shown()}"
    layers = "scanned" if model.scan_layers else "unrolled"
    trained = sum(leaf.size for leaf in jax.tree.leaves(program.part(program.params)))
    shown = f"{program.num_params:,} parameters"
    if len(program.trained) < len(jax.tree.leaves(program.params)):
        shown += f", of which {trained:,} are trained"
    yield INFO, f"model     {shown}, {compute}, layers {layers}, remat {model.remat}"
    yield INFO, f"attention {program.partitioner.kernel} ({program.partitioner.reason})"
    for line in parameter_table(program):
        yield INFO, f"          {line}"
    for line in replicated(program):
        yield WARNING, f"WARNING   {line}"


def _of_batch(config: Config, mesh: Mesh) -> Lines:
    accum, shards = config.grad_accum_steps, sharding.batch_shards(mesh.shape)
    rows = config.global_batch_size // accum // shards
    yield (
        INFO,
        f"batch     {config.global_batch_size} sequences x {config.data.seq_len} tokens = {config.tokens_per_step:,} "
        f"a step ({accum} microbatch(es) of {rows} on each of {shards} batch shards)",
    )


def _of_data(config: Config, windows: MixedWindows, data: Sources) -> Lines:
    samples = config.num_train_steps * config.global_batch_size
    seen = windows.mixture.consumed(samples)  # by source
    yield INFO, f"data      {config.num_train_steps} steps = {samples * config.data.seq_len:,} tokens"
    for i, dataset in enumerate(data.datasets.values()):
        tokens, epochs = dataset.manifest.splits["train"].tokens, seen[i] / windows.sources[i].num_windows
        share = f"{100 * seen[i] / samples:.1f} % of the samples = {epochs:.3g} epochs"
        yield INFO, f"          {dataset.path}: {tokens:,} training tokens, {share}{_in_place(dataset)}"
        if left_out := str(windows.sources[i].unreached):
            yield INFO, f"          never read: {left_out}"
    if not any(dataset.has("val") for dataset in data.datasets.values()):
        yield INFO, "          no validation: no validation split has a token to predict"
    for index in data.packings.values():
        yield INFO, f"          {index.path}: {100 * index.utilisation:.2f} % of the rows are tokens"
        if cut := index.unread_chats:
            yield INFO, f"          {cut}"
    if not data.tokenizer_path:
        yield INFO, "          no tokenizer (config.data.tokenizer_path): no samples are written"
    elif not config.sample.max_new_tokens:
        yield INFO, "          config.sample.max_new_tokens is 0: no samples are written"


def _of_schedule(config: Config) -> Lines:
    if found := schedule.oddities(config):
        yield WARNING, f"WARNING   learning rate: {'; '.join(found)}"
    yield INFO, f"loss      untrained ln {config.model.vocab_size} = {math.log(config.model.vocab_size):.4f}"


def _in_place(dataset: Dataset) -> str:
    if not dataset.external_files:
        return ""
    files, held_out = (len(dataset.external_files.get(split, ())) for split in ("train", "val"))
    kind = f"{dataset.manifest.request['format']} {dataset.manifest.dtype}"
    others = len(external.unread_files(dataset.path, dataset.external_files))
    left_out = f", {others} other entries of the folder are skipped" if others else ""
    return f"; {kind}, read in place: {files} file(s) to train on, {held_out} to validate on{left_out}"


def replicated(program: Program) -> list[str]:
    """A line for the parameters, and one for the optimizer's state, if every device holds too large a part of them.

    The optimizer's state counts as a share of the whole training state, because a factored state is replicated, but
    small.
    """
    mesh, params, opt_state = program.mesh, program.params, program.state.opt_state
    axes = sharding.MESH_AXES if program.config.mesh.shard_optimizer else sharding.PARAMETER_AXES
    parameters = sharding.replicated_share(params, mesh)
    optimizer = sharding.replicated_share(opt_state, mesh, of=(params, opt_state), axes=axes)
    shares = (
        (parameters, "the parameters are whole on every device"),
        (optimizer, "the training state is optimizer state, whole on every device"),
    )
    return [f"{100 * share:.0f} % of {what}" for share, what in shares if share > REPLICATED_SHARE_ALLOWED]


def parameter_table(program: Program) -> list[str]:
    """A line for each kind of module: name, shape of its largest array, number of parameters in all layers."""
    groups: dict[str, list[jax.ShapeDtypeStruct]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.params):
        keys = [str(k.key) for k in path if k.key != "layers"]
        groups.setdefault(keys[0], []).append(leaf)
    lines = []
    for name, leaves in groups.items():
        largest = max(leaves, key=lambda leaf: leaf.size)
        shape = " x ".join(map(str, largest.shape))
        lines.append(f"{name:<16}{shape:<20}{sum(leaf.size for leaf in leaves):>15,}")
    return lines
