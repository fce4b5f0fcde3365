"""The configuration of a run: typed sections, validated on construction. No heavy imports.

Recipes hold the same tree as an ml_collections.ConfigDict. `from_dict` turns that into these dataclasses once, and no
other code reads a ConfigDict. A field may be of any type of trainer/fields.py: optional, a tuple, a choice, a section.
"""

import dataclasses
import fnmatch
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from data.config import DataConfig, Task
from model.config import VOCAB_MULTIPLE, ModelConfig
from trainer import fields
from trainer.errors import ConfigError

# What a change of a field needs when a run is resumed; see `changes`. Each section says this in ON_RESUME, by the name
# of the field, or by "*" for all other fields. A field that no section names may not change: the saved state would mean
# something else.
HARMLESS, NEEDS_FLAG, REFUSED = "harmless", "flag", "refused"
DEFAULT_VOCAB_SIZE = 50_304  # that of GPT-2, padded; for commands that read no dataset


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _require_not_negative(section: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value >= 0, f"{prefix}{name} is {value}; it must not be negative")


def _require_at_least_1(section: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value >= 1, f"{prefix}{name} is {value}; it must be at least 1")


def _require_above_0(section: Any, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(value > 0, f"{prefix}{name} is {value}; it must be above 0")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer after clipping by global norm, with decoupled weight decay, a warm-up and a schedule."""

    # A key of OPTIMIZERS in trainer/optimizer.py, which checks it. adamw: Loshchilov and Hutter, 2019.
    name: str = "adamw"
    peak_lr: float = 1e-3
    end_lr: float = 1e-4  # the rate at the end of cosine, linear and wsd
    schedule: str = "cosine"  # after the warm-up: cosine, linear, constant, wsd (warm-up, stable, decay)
    warmup_steps: int = 100
    decay_steps: int = 0  # the step at which end_lr is reached; 0: num_train_steps of the run's first start
    wsd_decay_fraction: float = 0.2  # the last part of decay_steps, in which wsd falls linearly
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices and embeddings, not on norms and biases
    clip_norm: float = 1.0  # the largest norm of the whole gradient; 0: no clipping
    # The dtype in which devices sum gradients: float32, or bfloat16 (half the bytes, less exact).
    gradients_dtype: str = "float32"
    # The dtype of the optimizer state: float32, or bfloat16 (half the memory; b2 at most BFLOAT16_B2).
    moments_dtype: str = "float32"

    # A resumed run must keep the optimizer and its dtype, which decide the structure of the saved state.
    ON_RESUME: ClassVar[Mapping[str, str]] = {"*": NEEDS_FLAG, "name": REFUSED, "moments_dtype": REFUSED}
    SCHEDULES = ("cosine", "linear", "constant", "wsd")
    DTYPES = ("float32", "bfloat16")
    # A running mean moves by (1 - b2) of its distance to the new value. In bfloat16 it stops moving once this change
    # is below half a unit in the last place (2**-9 of the mean). With b2 = 0.95 it stops within 4 % of its target
    # (2 % of an update), with 0.99 within 20 %.
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
            f"{self.BFLOAT16_B2}, because a slower mean stops moving in so few bits; lower it, or keep float32",
        )
        _require_above_0(self, "optimizer.", "peak_lr", "eps")
        _require_not_negative(self, "optimizer.", "end_lr", "warmup_steps", "decay_steps", "weight_decay", "clip_norm")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optimizer.{name} is {value}; it must be at least 0 and below 1")
        _require(
            0 < self.wsd_decay_fraction <= 1,
            f"optimizer.wsd_decay_fraction is {self.wsd_decay_fraction}; it must be above 0 and at most 1",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis; one of them may be -1 and takes the remaining devices."""

    data: int = -1  # shards the batch; parameters are replicated; the one axis that may cross a slow network
    fsdp: int = 1  # shards batch, parameters, gradients and optimizer state (ZeRO-3, Rajbhandari et al., 2020)
    context: int = 1  # shards the sequence; also shards parameters and optimizer state, as fsdp does
    tensor: int = 1  # shards heads, mlp and vocabulary (Megatron, Shoeybi et al., 2019)
    shard_optimizer: bool = False  # also shards the optimizer state over data (ZeRO-1)
    num_slices: int = 0  # groups of devices with a fast network inside each; 0: as the devices report

    ON_RESUME: ClassVar[Mapping[str, str]] = {"*": HARMLESS}
    AXES = ("data", "fsdp", "context", "tensor")  # the axis that may cross a slow network comes first

    def __post_init__(self):
        for name, size in self.sizes().items():
            _require(
                size >= 1 or size == -1,
                f"mesh.{name} is {size}; it must be a number of devices, or -1 for the remaining devices",
            )
        _require(
            list(self.sizes().values()).count(-1) <= 1,
            f"mesh has several axes of -1 ({', '.join(k for k, v in self.sizes().items() if v == -1)}); one may be",
        )
        _require(self.num_slices >= 0, f"mesh.num_slices is {self.num_slices}; it must be a number, or 0 to detect it")

    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.AXES}


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 1000  # 0: only by time, at the end and when stopped
    every_minutes: float = 10.0  # also when this much time has passed since the last save; 0: never
    # The largest share of wall time that timed saves may stall training; above it, timed saves become rarer.
    max_share: float = 0.01
    keep_last: int = 2
    keep_every_steps: int = 0  # save at each multiple of this and keep it for good; 0: none
    keep_best: int = 1  # keep this many checkpoints with the lowest val/loss
    mirror: str = ""  # folder, gs://… or s3://… that receives a copy of each checkpoint; empty: none

    ON_RESUME: ClassVar[Mapping[str, str]] = {"*": HARMLESS}

    def __post_init__(self):
        _require_not_negative(self, "checkpoint.", "every_steps", "every_minutes", "keep_every_steps", "keep_best")
        _require_at_least_1(self, "checkpoint.", "keep_last")
        _require(0 < self.max_share <= 1, f"checkpoint.max_share is {self.max_share}; it must be above 0, at most 1")


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """What happens after a bad step (divergence.py). Parameters that are not finite are never saved."""

    not_finite: str = "stop"  # if the loss or gradient norm is NaN or infinite: stop (exit code 4), skip, rollback
    spike: str = "ignore"  # if the loss or gradient norm is far above its running mean: ignore, stop, skip, rollback
    spike_z: float = 8.0  # how many standard deviations above the mean count as a spike
    window: int = 100  # steps in the running statistics; no spike is detected before that many good steps
    rollback_steps: int = 0  # restore the newest checkpoint that is at least this many steps before the bad one
    max_in_a_row: int = 10  # skips without a good step between, or rollbacks without a new checkpoint; then stop

    ON_RESUME: ClassVar[Mapping[str, str]] = {"*": NEEDS_FLAG}
    POLICIES = ("stop", "skip", "rollback")

    def __post_init__(self):
        for name, policies in (("not_finite", self.POLICIES), ("spike", ("ignore", *self.POLICIES))):
            value = getattr(self, name)
            _require(value in policies, f"divergence.{name} is {value!r}; it must be one of {', '.join(policies)}")
        _require_above_0(self, "divergence.", "spike_z")
        _require_not_negative(self, "divergence.", "rollback_steps")
        _require_at_least_1(self, "divergence.", "window", "max_in_a_row")


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """When a process counts as stuck: it prints its stack traces and exits with 42, so that its peers notice."""

    min_s: float = 120.0  # a step stalls when it takes longer than this, and than `factor` running medians
    factor: float = 20.0
    # The limit of every phase that is not a step: start, compilation, restore, save, sampling. inf: no limit, also for
    # processes that wait for a peer in such a phase.
    slow_s: float = 1800.0
    stop_s: float = 300.0  # from a request to stop to the exit, saved or not
    straggler_every_steps: int = 1000  # how often to compare the speed of the processes; 0: never

    ON_RESUME: ClassVar[Mapping[str, str]] = {"*": HARMLESS}

    def __post_init__(self):
        _require_above_0(self, "watchdog.", "min_s", "factor", "slow_s", "stop_s")
        _require_not_negative(self, "watchdog.", "straggler_every_steps")


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    every_steps: int = 10
    tensorboard: bool = True

    ON_RESUME: ClassVar[Mapping[str, str]] = {"*": HARMLESS}

    def __post_init__(self):
        _require_at_least_1(self, "metrics.", "every_steps")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every_steps: int = 250  # 0: only at the end
    num_windows: int = 1024  # fixed windows, spread evenly over the validation split; 0: the whole split
    tasks: tuple[str, ...] = ()  # tasks of lm-evaluation-harness, and paths (docs/evaluation.md)
    tasks_every_steps: int = 0  # 0: only at the end
    tasks_path: str = ""  # folder with .yaml files of tasks; empty: the harness's own
    tasks_limit: int = 0  # the most examples of a task; 0: all

    ON_RESUME: ClassVar[Mapping[str, str]] = {"*": HARMLESS}

    def __post_init__(self):
        _require_not_negative(self, "eval.", "every_steps", "num_windows", "tasks_every_steps", "tasks_limit")


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text that the run generates."""

    every_steps: int = 0  # 0: only at the end
    prompt: str = "\n"
    max_new_tokens: int = 256  # 0: no text is generated
    temperature: float = 0.8
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0

    ON_RESUME: ClassVar[Mapping[str, str]] = {"*": HARMLESS}

    def __post_init__(self):
        _require_not_negative(self, "sample.", "every_steps", "max_new_tokens", "temperature", "top_k")
        _require(0 < self.top_p <= 1, f"sample.top_p is {self.top_p}; it must be above 0 and at most 1")
        _require(self.prompt != "", "sample.prompt is empty; give at least one character")


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimization (trainer/finetuning/preference.py)."""

    beta: float = 0.1  # how strongly the model is kept near the reference

    ON_RESUME: ClassVar[Mapping[str, str]] = {"*": NEEDS_FLAG}

    def __post_init__(self):
        _require_above_0(self, "dpo.", "beta")


@dataclasses.dataclass(frozen=True)
class Config:
    # pretrain: every token is a target; sft: the assistant's tokens are; dpo: pairs of answers are compared. none: what
    # the dataset is for.
    task: Task | None = None
    seed: int = 0  # of the initial parameters, the order of sequences and dropout
    num_train_steps: int = 1000
    global_batch_size: int = 16  # sequences in a step, over all devices and microbatches
    grad_accum_steps: int = 1  # microbatches in a step; the gradient equals that of the full batch
    loss_chunk_tokens: int = 4096  # the most tokens of a device whose logits exist at one time; 0: all
    init_from: str = ""  # RUN, RUN:STEP, or a folder of Hugging Face: the model and weights that the run begins with
    frozen: tuple[str, ...] = ()  # patterns, such as layers.mlp.*, of parameters that are not trained
    init_adapters: str = ""  # a folder of PEFT: the adapters that the run begins with, and their model.lora
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
    dpo: DpoConfig = dataclasses.field(default_factory=DpoConfig)

    # num_train_steps changes the end of the run, but not its learning rates: the length of the schedule is fixed
    # (trainer/schedule.py). grad_accum_steps and loss_chunk_tokens change the rounding of sums, and grad_accum_steps
    # changes which elements dropout drops.
    ON_RESUME: ClassVar[Mapping[str, str]] = {
        "task": HARMLESS,  # the dataset decides it, and may not change; earlier versions did not record it
        "init_from": HARMLESS,  # trainer/interchange/initial.py refuses another one, if the run has a checkpoint
        "init_adapters": HARMLESS,  # likewise
        "num_train_steps": HARMLESS,
        "grad_accum_steps": HARMLESS,
        "loss_chunk_tokens": HARMLESS,
        "global_batch_size": NEEDS_FLAG,
        "z_loss": NEEDS_FLAG,
    }

    def __post_init__(self):
        _require_at_least_1(self, "", "num_train_steps", "global_batch_size", "grad_accum_steps")
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be at least 0 and below 2**32")
        _require_not_negative(self, "", "z_loss", "loss_chunk_tokens")
        _require(
            self.global_batch_size % self.grad_accum_steps == 0,
            f"grad_accum_steps = {self.grad_accum_steps} does not divide global_batch_size = {self.global_batch_size}",
        )
        # Checks the axes with a given size, before any device is known.
        check_divisible(self, {k: max(v, 1) for k, v in self.mesh.sizes().items()})

    def trains(self, path: str) -> bool:
        """Whether the parameter of this dotted path is trained: if there are adapters, only they are."""
        if self.model.lora.rank and ".lora." not in path:
            return False
        return not any(fnmatch.fnmatchcase(path, pattern) for pattern in self.frozen)

    @property
    def stores_reference(self) -> bool:
        """Whether a run on pairs of chats keeps what its first weights say about them (finetuning/reference.py)."""
        return self.task == "dpo" and not self.model.lora.rank

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.data.seq_len


def check_divisible(config: Config, axes: dict[str, int]) -> None:
    """Raises ValueError, with both numbers, if a mesh axis does not divide an array that it shards."""
    model, accum, context = config.model, config.grad_accum_steps, axes["context"]
    microbatch = f" / grad_accum_steps = {config.global_batch_size} / {accum}" if accum > 1 else ""
    parameter_axes = ["fsdp", "context"] if context > 1 else ["fsdp"]  # the axes that shard the parameters' embed axis
    vocabulary = f"the vocabulary, padded to a multiple of {VOCAB_MULTIPLE},"
    rules = [
        (f"global_batch_size{microbatch}", config.global_batch_size // accum, ["data", "fsdp"], 1),
        ("model.embed_dim", model.embed_dim, parameter_axes, 1),
        ("model.num_heads", model.num_heads, ["tensor"], 1),
        ("model.num_kv_heads", model.kv_heads, ["tensor"], 1),
        ("model.mlp_dim", model.mlp_size, ["tensor"], 1),
        (vocabulary, VOCAB_MULTIPLE, ["tensor"], 1),
    ]
    if context > 1:  # each device has an early and a late block of the sequence
        rules.append(("data.seq_len", config.data.seq_len, ["context"], 2))
    if config.mesh.shard_optimizer:
        rules.append(("model.embed_dim (its optimizer state)", model.embed_dim, ["data", *parameter_axes], 1))
    for name, value, names, factor in rules:
        product = factor * math.prod(axes[a] for a in names)
        if value % product:
            shown = " x ".join([f"{factor}"] * (factor > 1) + [f"mesh.{a}" for a in names])
            raise ValueError(f"{name} = {value} is not divisible by {shown} = {product}; change one of them")


def complete(config: Config, *, vocab_size: int, eos_id: int | None) -> Config:
    """`config` with the values that a dataset decides: the vocabulary, the longest context, the end-of-text token.

    Args:
      vocab_size: the number of tokens of the dataset's tokenizer.
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
    """`complete` for commands that compile or time a recipe's step and read no text. Raises ConfigError."""
    config = complete(config, vocab_size=config.model.vocab_size or DEFAULT_VOCAB_SIZE, eos_id=0)
    if config.data.eos_id >= config.model.vocab_size:
        raise ConfigError(
            f"config.data.eos_id is {config.data.eos_id}; it must be below the vocabulary of {config.model.vocab_size}"
        )
    return config


MAY_BE_INFINITE = (CheckpointConfig, DivergenceConfig, WatchdogConfig)  # inf: a limit that is never reached


def from_dict(tree: dict[str, Any], recorded: bool = False) -> Config:
    """A Config from nested plain values; a missing field takes its default.

    Args:
      recorded: whether the tree is a run's own record. Its numbers are then not checked, because an earlier version may
        have accepted some that are refused now.

    Raises ConfigError.
    """
    try:
        return fields.build(Config, tree) if recorded else fields.build(Config, tree, check=_check_range)
    except (ValueError, OverflowError) as e:  # a whole number that is too large for a float
        raise ConfigError(f"config.{e}") from None


def _check_range(section: type, name: str, value: Any) -> None:
    if type(value) is int and name != "seed":  # a larger number overflows in arithmetic with an int32 array
        _require(abs(value) < 2**31, f"{name} is {value}; it must be below 2**31 = {2**31}")
    if type(value) is float and section not in MAY_BE_INFINITE:
        _require(math.isfinite(value), f"{name} is {value}; it must be a finite number")


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def changes(old: Config, new: Config) -> dict[str, list[str]]:
    """Lines 'config.NAME: old -> new', by what each change needs on resume: HARMLESS, NEEDS_FLAG or REFUSED."""
    found: dict[str, list[str]] = {HARMLESS: [], NEEDS_FLAG: [], REFUSED: []}
    before, after = fields.flatten(old), fields.flatten(new)
    for name in after:
        if before[name] != after[name]:
            found[on_resume(name, type(new))].append(f"config.{name}: {before[name]!r} -> {after[name]!r}")
    return found


def on_resume(name: str, section: type = Config, inherited: str = REFUSED) -> str:
    """What a change of the field with this dotted name needs, by ON_RESUME of its section.

    Args:
      inherited: what `section` says for the fields that it does not name.
    """
    field, _, inner = name.partition(".")
    rules: Mapping[str, str] = getattr(section, "ON_RESUME", {})
    own = rules.get(field, rules.get("*", inherited))
    return on_resume(inner, fields.types_of(section)[field], own) if inner else own
