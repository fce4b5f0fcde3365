"""The start-up page: what will be trained, on what data and devices, and which loss to expect."""

import logging
import math

import jax

from data.dataset import Dataset
from data.loader import MixedWindows
from data.sources import Sources
from data.token_files import external
from trainer import schedule, sharding, xla_options
from trainer.config import Config
from trainer.state import Program

log = logging.getLogger("meshlm")
# Of the parameters, or of the optimizer's state, replicated although the mesh could split them: more is a mistake.
REPLICATED_SHARE_ALLOWED = 0.02


def log_summary(config: Config, program: Program, windows: MixedWindows, data: Sources) -> None:
    """Logs the start-up page."""
    devices, mesh = jax.devices(), program.mesh
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    processes = jax.process_count()
    log.info("devices   %d %s in %d process(es); mesh %s", len(devices), devices[0].device_kind, processes, axes)
    model = config.model
    log.info(
        "model     %s parameters, %s compute%s, layers %s, remat %s",
        f"{program.num_params:,}", model.dtype, xla_options.precision_shown(),
        "scanned" if model.scan_layers else "unrolled", model.remat,
    )  # fmt: skip
    log.info("attention %s (%s)", program.partitioner.kernel, program.partitioner.reason)
    for line in parameter_table(program):
        log.info("          %s", line)
    for line in replicated(program):
        log.warning("WARNING   %s", line)
    batch, accum = config.global_batch_size, config.grad_accum_steps
    rows = sharding.batch_shards(mesh.shape)
    log.info(
        "batch     %d sequences x %d tokens = %s a step (%d part(s) of %d on each of %d batch shards)",
        batch, config.data.seq_len, f"{config.tokens_per_step:,}", accum, batch // accum // rows, rows,
    )  # fmt: skip
    samples = config.num_train_steps * batch
    total, seen = samples * config.data.seq_len, windows.mixture.consumed(samples)
    log.info("data      %d steps = %s tokens", config.num_train_steps, f"{total:,}")
    for i, dataset in enumerate(data.datasets.values()):
        log.info(
            "          %s: %s training tokens, %.1f %% of the samples = %.3g epochs%s",
            dataset.path, f"{dataset.manifest.splits['train'].tokens:,}", 100 * seen[i] / samples,
            seen[i] / windows.sources[i].num_windows, _in_place(dataset),
        )  # fmt: skip
        if left_out := str(windows.sources[i].unreached):
            log.info("          never read of it: %s", left_out)
    if not any(dataset.has("val") for dataset in data.datasets.values()):
        log.info("          nothing validates: no validation split holds a token to predict")
    for index in data.packings.values():
        log.info("          %s: %.2f %% of the rows are tokens", index.path, 100 * index.utilisation)
    if not data.tokenizer_path:
        log.info("          no tokenizer (config.data.tokenizer_path): no samples are written")
    if found := schedule.oddities(config):
        log.warning("WARNING   learning rate: %s", "; ".join(found))
    log.info("loss      untrained ln %d = %.4f", model.vocab_size, math.log(model.vocab_size))


def _in_place(dataset: Dataset) -> str:
    if not dataset.foreign_files:
        return ""
    files, held_out = (len(dataset.foreign_files.get(split, ())) for split in ("train", "val"))
    kind = f"{dataset.manifest.request['format']} {dataset.manifest.dtype}"
    others = len(external.others(dataset.path, dataset.foreign_files))
    left_out = f", {others} other entries of the folder left out" if others else ""
    return f"; {kind}, read in place: {files} file(s) to train on, {held_out} to validate on{left_out}"


def replicated(program: Program) -> list[str]:
    """A line for the parameters, and one for the optimizer's state, if every device holds too much of them.

    The optimizer's state counts as a share of the whole training state: a factored one is replicated, but small.
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
    """One line for each kind of module: name, shape of its largest array, parameters in all layers."""
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
