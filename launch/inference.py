"""What sampling and evaluation share: opening a finished or running run, only to read it."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from absl import flags

from data import tokenizers
from data.tokenizers import Tokenizer
from launch import cli, environment, runtime
from model.config import LoraConfig
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.interchange import initial
from trainer.interchange.folder import CHECKSUMS, KEPT
from trainer.reliability import run_directory

if TYPE_CHECKING:  # these import JAX; a mistyped flag is reported before that
    import numpy as np
    from jax.sharding import Mesh

    from model.generate import Generator
    from trainer.interchange.source import Source
    from trainer.reliability.coordination import Processes
    from trainer.state import Program

WORKDIR = cli.define_run_path("workdir", None, "Run directory of launch.train.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; default: the newest.", lower_bound=0)
JSON = flags.DEFINE_bool("json", False, "Print JSON, one object a line, and nothing else on stdout.")


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A checkpoint of a run, with its configuration, and its program for this machine's devices.

    Attributes:
      processes: all that opened the run together.
      meta: of the checkpoint: step, samples, data_fingerprint, …
      load: reads the parameters of these dotted paths (None: all) onto the devices. Adapters are added to their
        projections, so that config and program are those of a plain model.
      int8: whether generation uses int8 weights.
      lora, adapters: what the adapters are, and a function that reads them by themselves.
      source: the weights, if launch.convert made the run, and these are them.
    """

    path: pathlib.Path
    config: Config
    program: "Program"
    processes: "Processes"
    meta: dict
    load: Callable[[Iterable[str] | None], dict]
    source: "Source | None" = None
    int8: bool = False
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    adapters: Callable[[], "dict[str, np.ndarray]"] = dict

    @functools.cached_property
    def params(self) -> dict:
        return self.load(None)

    @functools.cached_property
    def fast_params(self) -> dict:
        """The parameters in the form from which text is generated fastest, loaded one by one, because the loaded form
        of one and its fast form are in memory together."""
        from flax import traverse_util

        from model.transformer import parameter_shapes
        from trainer.sampling import fast_params

        flat: dict = {}
        for path in parameter_shapes(self.config.model):
            flat |= traverse_util.flatten_dict(fast_params(self.load([path]), self.config.model, int8=self.int8))
        return traverse_util.unflatten_dict(flat)

    @property
    def context(self) -> int:
        """The length of the rows that the model was trained on, in tokens."""
        return self.config.data.seq_len

    def generator(self, tokenizer: Tokenizer, **options) -> "Generator":
        """The generator of this run's model; options: of Generator."""
        from trainer.sampling import make_generator

        return make_generator(self.program, vocab_size=tokenizer.vocab_size, **options)

    @property
    def tokens(self) -> int:
        """The number of tokens that the parameters were trained on."""
        return self.meta["samples"] * self.config.data.seq_len


@contextlib.contextmanager
def memory_of_devices(advice: str) -> Iterator[None]:
    """Turns an out-of-memory error of the devices into a ConfigError: one line that ends with `advice`."""
    try:
        yield
    except RuntimeError as e:  # the base class of JAX's errors
        from trainer import xla_options

        if not xla_options.is_out_of_memory(e):
            raise
        raise ConfigError(xla_options.out_of_memory(e) + advice) from e


def open_run(
    dtype: str | None = None,
    join: Callable[[], object] = lambda: None,
    *,
    int8: bool = False,
    for_loss: bool = False,
) -> LoadedRun:
    """Opens --workdir at --step. Raises ConfigError or CheckpointError.

    Args:
      dtype: in which the model computes; None: that of the run.
      int8: whether generation uses int8 weights.
      for_loss: whether the run's loss is wanted. That of task dpo compares with the model without adapters, so they are
        then not added to their projections.
      join: is called after JAX is loaded and before it uses a device: it joins the other processes, if there are any.
    """
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing; name a run directory of launch.train")
    path = pathlib.Path(WORKDIR.value)
    recorded = run_directory.read_config(path)
    # The attention kernel that the training used may not exist on this machine.
    model = dataclasses.replace(recorded.model, attention="auto", dtype=dtype or recorded.model.dtype)
    config = dataclasses.replace(recorded, model=model, frozen=())

    environment.load_jax()
    import jax

    join()
    environment.find_devices()
    runtime.use_compilation_cache(path)
    if (int8 or dtype == "bfloat16") and jax.default_backend() == "cpu":
        cli.log.warning(
            "on CPUs bfloat16 and int8 are slower than float32, and need more memory: see docs/generation.md"
        )
    from trainer.interchange import adapters
    from trainer.reliability import identity
    from trainer.reliability.checkpoint import Checkpoints, choose_step
    from trainer.reliability.coordination import Processes
    from trainer.state import Program

    processes = Processes()
    if is_step_0(path):
        from trainer.interchange.source import Source

        source = Source.open(path / KEPT)
        config = initial.with_model(config, source.model)  # training may have added tokens
        config = dataclasses.replace(config, model=adapters.plain(config.model))
        program = Program(config, _mesh(config))
        sums = (path / KEPT / CHECKSUMS).read_text()
        meta = {"step": 0, "samples": 0, "data_fingerprint": None, "arrays": sums}
        return LoadedRun(
            path, config, program, processes, meta, lambda only: initial.read(source, program, only), source, int8
        )
    checkpoints = Checkpoints(path, processes=processes)
    step = choose_step(checkpoints, STEP.value)
    reader = adapters.Reader(config, _mesh(config), checkpoints, step, apart=for_loss and config.task == "dpo")
    meta = checkpoints.meta(step)
    if differs := identity.refused_changes(meta, recorded):
        raise ConfigError(
            f"{path / 'config.json'} is not what step {step} was trained with; {'; '.join(differs)}; restore it, or "
            "remove it: the checkpoint has a copy"
        )
    if (path / "tokenizer").exists():
        identity.check_tokenizer(meta, tokenizers.load(path / "tokenizer"), path)
    program = reader.program
    return LoadedRun(
        path, program.config, program, processes, meta, lambda only: reader.read(only, meta),
        int8=int8, lora=model.lora, adapters=lambda: reader.adapters(meta),
    )  # fmt: skip


def _mesh(config: Config) -> "Mesh":
    import jax

    from trainer import sharding

    mesh = sharding.inference_mesh(config)
    jax.set_mesh(mesh)
    return mesh


def is_step_0(path: pathlib.Path) -> bool:
    """Whether --step is what launch.convert has written: it is named, or nothing else was ever saved."""
    own = initial.own_weights(path) is not None
    return own and (STEP.value == 0 or (STEP.value is None and initial.is_untrained(path)))
