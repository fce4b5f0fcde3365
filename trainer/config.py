"""The configuration of a run: typed sections, validated on construction. No heavy imports.

Recipes hold the same tree as an ml_collections.ConfigDict; `from_dict` turns that into these dataclasses once, at the
border, and nothing reads a ConfigDict after that.
"""

import dataclasses
import json
import math
from typing import Any

from data.config import DataConfig
from model.config import VOCAB_MULTIPLE, ModelConfig
from trainer.errors import ConfigError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer after clipping by global norm, with decoupled weight decay, a warm-up and a schedule."""

    # In the table of trainer/optimizer.py, which checks it. adamw: Loshchilov and Hutter, 2019. A run keeps its own.
    name: str = "adamw"
    peak_lr: float = 1e-3
    end_lr: float = 1e-4  # at the end of cosine, linear and wsd
    schedule: str = "cosine"  # after the warm-up: cosine, linear, constant, wsd (warm-up, stable, decay)
    warmup_steps: int = 100
    decay_steps: int = 0  # step at which end_lr is reached; 0: num_train_steps when the run begins
    wsd_decay_fraction: float = 0.2  # last part of decay_steps in which wsd falls, linearly
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices and embeddings, not on norms and biases
    clip_norm: float = 1.0  # of the whole gradient; 0: no clipping
    gradients_dtype: str = (
        "float32"  # in which devices sum gradients: float32, or bfloat16 (half the bytes, less exact)
    )
    moments_dtype: str = "float32"  # of the state: float32, or bfloat16 (half the memory; b2 at most BFLOAT16_B2)

    SCHEDULES = ("cosine", "linear", "constant", "wsd")
    DTYPES = ("float32", "bfloat16")
    # A mean that moves by (1 - b2) of its distance stands still in bfloat16 once that is below half of a unit in the
    # last place, 2**-9 of it: at 0.95 it stops within 4 % of where it should be (2 % of an update), at 0.99 within 20.
    BFLOAT16_B2 = 0.95

    def __post_init__(self):
        _require(
            self.schedule in self.SCHEDULES,
            f"optimizer.schedule is {self.schedule!r}; it must be one of {', '.join(self.SCHEDULES)}",
        )
        for name in ("gradients_dtype", "moments_dtype"):
            value = getattr(self, name)
            _require(value in self.DTYPES, f"optimizer.{name} is {value!r}; it must be one of {', '.join(self.DTYPES)}")
        _require(
            self.moments_dtype == "float32" or self.b2 <= self.BFLOAT16_B2,
            f"optimizer.b2 is {self.b2}; with optimizer.moments_dtype = bfloat16 it must be at most "
            f"{self.BFLOAT16_B2}, for a slower mean stands still in so few bits; lower it, or keep float32",
        )
        for name in ("peak_lr", "eps"):
            value = getattr(self, name)
            _require(value > 0, f"optimizer.{name} is {value}; it must be above 0")
        for name in ("end_lr", "warmup_steps", "decay_steps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            _require(value >= 0, f"optimizer.{name} is {value}; it must not be negative")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}; it must be at least 0 and below 1")
        _require(
            0 < self.wsd_decay_fraction <= 1,
            f"optimizer.wsd_decay_fraction is {self.wsd_decay_fraction}; it must be above 0 and at most 1",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one may be -1 and takes what is left."""

    data: int = -1  # the batch is split, the parameters are whole; the one axis that may cross a slow network
    fsdp: int = 1  # batch, parameters, gradients and optimizer state are split (ZeRO-3, Rajbhandari et al., 2020)
    context: int = 1  # the sequence is split, and with it what fsdp splits but for the batch
    tensor: int = 1  # heads, mlp and vocabulary are split (Megatron, Shoeybi et al., 2019)
    shard_optimizer: bool = False  # optimizer state is split over data, too (ZeRO-1)
    num_slices: int = 0  # groups of devices with a fast network inside each; 0: what the devices say

    AXES = ("data", "fsdp", "context", "tensor")  # those that may cross a slow network first

    def __post_init__(self):
        for name, size in self.sizes().items():
            _require(
                size >= 1 or size == -1,
                f"mesh.{name} is {size}; it must be a number of devices, or -1 for what is left",
            )
        _require(
            list(self.sizes().values()).count(-1) <= 1,
            f"mesh has several axes of -1 ({', '.join(k for k, v in self.sizes().items() if v == -1)}); one may be",
        )
        _require(self.num_slices >= 0, f"mesh.num_slices is {self.num_slices}; it must be a number, or 0 to look")

    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.AXES}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000  # 0: only by time, at the end and when stopped
    every_minutes: float = 10.0  # also when this much time has passed since the last; 0: never
    max_share: float = 0.01  # of the time that saves by time may hold the loop up; they become rarer where it is more
    keep_last: int = 2
    keep_every_steps: int = 0  # save at each multiple of this, and keep it for good; 0: none
    keep_best: int = 1  # keep the checkpoints of lowest val/loss
    mirror: str = ""  # folder, gs://… or s3://… that receives a copy of each checkpoint; empty: none

    def __post_init__(self):
        for name in ("every_steps", "every_minutes", "keep_every_steps", "keep_best"):
            value = getattr(self, name)
            _require(value >= 0, f"checkpoint.{name} is {value}; it must not be negative")
        _require(self.keep_last >= 1, f"checkpoint.keep_last is {self.keep_last}; it must be at least 1")
        _require(0 < self.max_share <= 1, f"checkpoint.max_share is {self.max_share}; it must be above 0, at most 1")


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """What happens when a step goes wrong (divergence.py). A bad state is never saved, whatever is chosen."""

    not_finite: str = "stop"  # loss or gradient norm is NaN or infinite: stop (exit code 4), skip, rollback
    spike: str = "ignore"  # one of them stands out above its running mean: ignore, stop, skip, rollback
    spike_z: float = 8.0  # by this many standard deviations
    window: int = 100  # steps that the running mean and variance remember; none is a spike before as many were seen
    rollback_steps: int = 0  # go back to the newest checkpoint at least this many steps before the bad one
    max_in_a_row: int = 10  # skips without a good step between, or rollbacks without a new checkpoint; then stop

    POLICIES = ("stop", "skip", "rollback")

    def __post_init__(self):
        for name, policies in (("not_finite", self.POLICIES), ("spike", ("ignore", *self.POLICIES))):
            value = getattr(self, name)
            _require(value in policies, f"divergence.{name} is {value!r}; it must be one of {', '.join(policies)}")
        _require(self.spike_z > 0, f"divergence.spike_z is {self.spike_z}; it must be above 0")
        _require(
            self.rollback_steps >= 0, f"divergence.rollback_steps is {self.rollback_steps}; it must not be negative"
        )
        for name in ("window", "max_in_a_row"):
            value = getattr(self, name)
            _require(value >= 1, f"divergence.{name} is {value}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """When a process counts as stuck: it prints where it is and leaves with 42, so that its peers notice."""

    min_s: float = 120.0  # a step stalls when it takes longer than this, and than `factor` running medians
    factor: float = 20.0
    # Limit for what is no step: start, compilation, restoring, saving, sampling. inf: none, nor for who waits for it.
    slow_s: float = 1800.0
    stop_s: float = 300.0  # from a request to stop to leaving, saved or not
    straggler_every_steps: int = 1000  # compare the processes' speed; 0: never

    def __post_init__(self):
        for name in ("min_s", "factor", "slow_s", "stop_s"):
            value = getattr(self, name)
            _require(value > 0, f"watchdog.{name} is {value}; it must be above 0")
        value = self.straggler_every_steps
        _require(value >= 0, f"watchdog.straggler_every_steps is {value}; it must not be negative")


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    every_steps: int = 10
    tensorboard: bool = True

    def __post_init__(self):
        _require(self.every_steps >= 1, f"metrics.every_steps is {self.every_steps}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every_steps: int = 250  # 0: only at the end
    num_windows: int = 1024  # fixed windows, spread evenly over the validation split; 0: all of it

    def __post_init__(self):
        for name in ("every_steps", "num_windows"):
            value = getattr(self, name)
            _require(value >= 0, f"eval.{name} is {value}; it must not be negative")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    every_steps: int = 0  # 0: only at the end
    prompt: str = "\n"
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0

    def __post_init__(self):
        for name in ("every_steps", "temperature", "top_k"):
            value = getattr(self, name)
            _require(value >= 0, f"sample.{name} is {value}; it must not be negative")
        _require(self.max_new_tokens >= 1, f"sample.max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        _require(0 < self.top_p <= 1, f"sample.top_p is {self.top_p}; it must be above 0 and at most 1")
        _require(self.prompt != "", "sample.prompt is empty; give at least one character")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0  # of the initial parameters, the order of samples and dropout
    num_train_steps: int = 1000
    global_batch_size: int = 16  # sequences a step, over all devices and accumulation steps
    grad_accum_steps: int = 1  # parts the batch is worked through in; the result is that of the whole batch
    loss_chunk_tokens: int = 4096  # most tokens of a device whose logits exist at one time; 0: all
    z_loss: float = 0.0  # weight of mean(log Z ** 2), which keeps logits small (PaLM); not part of train/loss
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    divergence: DivergenceConfig = dataclasses.field(default_factory=DivergenceConfig)
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)
    metrics: MetricsConfig = dataclasses.field(default_factory=MetricsConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    def __post_init__(self):
        for name in ("num_train_steps", "global_batch_size", "grad_accum_steps"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} is {value}; it must be at least 1")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be at least 0 and below 2**32")
        for name in ("z_loss", "loss_chunk_tokens"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}; it must not be negative")
        _require(
            self.global_batch_size % self.grad_accum_steps == 0,
            f"grad_accum_steps = {self.grad_accum_steps} does not divide global_batch_size = {self.global_batch_size}",
        )
        # What the axes given as numbers already rule out, before any device is looked at.
        check_divisible(self, {k: max(v, 1) for k, v in self.mesh.sizes().items()})

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.data.seq_len


def check_divisible(config: Config, axes: dict[str, int]) -> None:
    """Raises ValueError, with both numbers, where an axis of the mesh does not divide what is split along it."""
    model, accum, context = config.model, config.grad_accum_steps, axes["context"]
    parts = f" / grad_accum_steps = {config.global_batch_size} / {accum}" if accum > 1 else ""
    split = ["fsdp", "context"] if context > 1 else ["fsdp"]  # what the parameters' embed axis is split over
    of_state = ["data", *split]
    vocabulary = f"the vocabulary, padded to a multiple of {VOCAB_MULTIPLE},"
    rules = [
        (f"global_batch_size{parts}", config.global_batch_size // accum, ["data", "fsdp"], 1),
        ("model.embed_dim", model.embed_dim, split, 1),
        ("model.num_heads", model.num_heads, ["tensor"], 1),
        ("model.num_kv_heads", model.kv_heads, ["tensor"], 1),
        ("model.mlp_dim", model.mlp_size, ["tensor"], 1),
        (vocabulary, VOCAB_MULTIPLE, ["tensor"], 1),
    ]
    if context > 1:  # two pieces for each device: an early one and a late one
        rules.append(("data.seq_len", config.data.seq_len, ["context"], 2))
    if config.mesh.shard_optimizer:
        rules.append(("model.embed_dim (its optimizer state)", model.embed_dim, of_state, 1))
    for name, value, names, factor in rules:
        product = factor * math.prod(axes[a] for a in names)
        if value % product:
            shown = " x ".join([f"{factor}"] * (factor > 1) + [f"mesh.{a}" for a in names])
            raise ValueError(f"{name} = {value} is not divisible by {shown} = {product}; change one of them")


MAY_BE_INFINITE = (CheckpointConfig, DivergenceConfig, WatchdogConfig)  # limits that are never reached


def from_dict(tree: dict[str, Any], recorded: bool = False) -> Config:
    """A Config from nested plain values; a missing field takes its default.

    Args:
      recorded: by a run, perhaps of an earlier version, which may have taken numbers that are refused now.

    Raises ConfigError.
    """
    try:
        return _build(Config, tree, "", recorded)
    except (ValueError, OverflowError) as e:  # a whole number too large for a float
        raise ConfigError(f"config.{e}") from None


def _build(cls: type, tree: dict[str, Any], prefix: str, recorded: bool) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.')} is {tree!r}; it must have fields: {', '.join(fields)}")
    for name, value in tree.items():
        if name not in fields:
            raise ValueError(f"{prefix}{name} is no field of {cls.__name__}; its fields: {', '.join(fields)}")
        kind: Any = fields[name].type
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            values[name] = _build(kind, value, f"{prefix}{name}.", recorded)
            continue
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{prefix}{name} is {value!r}; it must be of type {kind.__name__}")
        if not recorded:
            _check_range(cls, name, value, prefix)
        values[name] = value
    return cls(**values)


def _check_range(cls: type, name: str, value: Any, prefix: str) -> None:
    if type(value) is int and name != "seed":  # beside an int32 array a larger one is an OverflowError
        _require(abs(value) < 2**31, f"{prefix}{name} is {value}; it must be below 2**31 = {2**31}")
    if type(value) is float and cls not in MAY_BE_INFINITE:
        _require(math.isfinite(value), f"{prefix}{name} is {value}; it must be a finite number")


DEFAULT_VOCAB_SIZE = 50_304  # GPT-2's, padded; for commands that read no dataset


def complete(config: Config, *, vocab_size: int, eos_id: int | None) -> Config:
    """`config` with what a dataset decides: the vocabulary, the longest context and the token that ends documents.

    Args:
      vocab_size: of the dataset's tokenizer.
      eos_id: the dataset's end-of-text token, if it has one and the run needs it.

    Raises ConfigError.
    """
    model, data = config.model, config.data
    if model.max_seq_len and model.max_seq_len < data.seq_len:
        raise ConfigError(
            f"config.model.max_seq_len = {model.max_seq_len} is below config.data.seq_len = {data.seq_len}"
        )
    model = dataclasses.replace(model, vocab_size=vocab_size, max_seq_len=model.max_seq_len or data.seq_len)
    if (data.mask_documents or data.packed) and data.eos_id == -1 and eos_id is not None:
        data = dataclasses.replace(data, eos_id=eos_id)
    return dataclasses.replace(config, model=model, data=data)


def complete_without_dataset(config: Config) -> Config:
    """The same for commands that compile or time a recipe's step and read no text. Raises ConfigError."""
    config = complete(config, vocab_size=config.model.vocab_size or DEFAULT_VOCAB_SIZE, eos_id=0)
    if config.data.eos_id >= config.model.vocab_size:
        raise ConfigError(
            f"config.data.eos_id is {config.data.eos_id}; it must be below the vocabulary of {config.model.vocab_size}"
        )
    return config


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def flatten(config: Config) -> dict[str, Any]:
    """{'model.num_layers': 4, …}"""
    flat = {}
    for name, value in dataclasses.asdict(config).items():
        flat.update({f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return flat


# What may change when a run goes on. Anything not named changes what the saved state means, and is refused. Weights may
# change from a sample on that was not trained on (mixture.check_change).
#
# Which numbers the harmless ones move: num_train_steps moves the end, and the rate of no step, as the schedule's length
# is fixed (trainer/schedule.py); data.path and the fields beside it move none, as the fingerprint is compared;
# grad_accum_steps, model.remat, .scan_layers, .attention, loss_chunk_tokens and mesh move the rounding of sums, and
# grad_accum_steps moves which elements dropout takes; eval moves what val/loss is measured on; the rest move nothing.
HARMLESS = (
    "num_train_steps", "grad_accum_steps", "data.path", "data.weights", "data.prefetch", "data.source",
    "data.tokenizer", "data.format", "data.dtype", "data.val_path", "data.tokenizer_path", "model.remat",
    "model.scan_layers", "model.attention", "loss_chunk_tokens", "mesh", "checkpoint", "metrics", "eval", "sample",
    "watchdog",
)  # fmt: skip
NEEDS_FLAG = (
    "optimizer", "divergence", "global_batch_size", "z_loss", "model.dropout", "model.dropout_end",
    "model.dropout_scale", "model.dtype",
)  # fmt: skip

# The structure of what is saved, although the rest of the section may change.
STRUCTURE = ("optimizer.name", "optimizer.moments_dtype")


def changes(old: Config, new: Config) -> dict[str, list[str]]:
    """Differences as lines 'name: old -> new', by what they need: 'harmless', 'flag' or 'refused'."""
    found: dict[str, list[str]] = {"harmless": [], "flag": [], "refused": []}
    before, after = flatten(old), flatten(new)
    for name in after:
        if before[name] == after[name]:
            continue
        keys = {name, name.split(".")[0]}
        kind = "harmless" if keys & set(HARMLESS) else "flag" if keys & set(NEEDS_FLAG) else "refused"
        if name in STRUCTURE:
            kind = "refused"
        found[kind].append(f"config.{name}: {before[name]!r} -> {after[name]!r}")
    return found
