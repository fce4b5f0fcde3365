"""What a run is made of: the training state, and the Program that creates and advances it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax import Array
from jax.sharding import Mesh

from data import batch
from data.batch import Batch
from model.partitioner import Partitioner
from model.transformer import Transformer
from trainer import optimizer, sharding, xla_options
from trainer.config import Config
from trainer.finetuning import trainable
from trainer.parallel.partitioner import MeshPartitioner
from trainer.reliability import divergence


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "guard"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    step: Any  # int32 array, finished steps
    params: dict  # float32, nested by module
    opt_state: Any
    guard: dict = dataclasses.field(
        default_factory=dict
    )  # scalars (trainer/reliability/divergence.py); {}: the device does not judge steps


class Program:
    """The static part of a run: graph definition, optimizer, shardings. It holds no arrays.

    Attributes:
      partitioner: splits the model's arrays over the mesh, and has the attention kernel.
      axes: the parameters' logical axes, a tree like params with tuples as leaves.
      moments: the sharding of the optimizer's arrays for each parameter, a tree like params.
      params, state: abstract trees (ShapeDtypeStruct with sharding) of the parameters and of the whole TrainState.
      trained: the dotted paths of the parameters that are trained; the others keep their values, and have neither
        gradients nor optimizer state.
      output_axes: logical axes of the table that makes logits.
      num_params: the number of parameters, without the rows that pad the vocabulary.
    """

    def __init__(self, config: Config, mesh: Mesh, partitioner: MeshPartitioner | None = None):
        self.config = config
        self.mesh = mesh
        xla_options.use_precision(config.model.dtype, mesh)
        self.partitioner = partitioner or MeshPartitioner(config, mesh)
        abstract, self.graph, variables = self._abstract(self.partitioner)
        self._whole_graph = self._abstract(Partitioner())[1]
        flat = nnx.to_flat_state(variables)
        self.axes = traverse_util.unflatten_dict({path: v.get_metadata("axes") for path, v in flat})
        self.output_axes = abstract.output_axes
        self.trained = trainable.chosen(config, trainable.paths(self.axes))
        self.schedule = optimizer.make_schedule(config.optimizer, config.num_train_steps)
        self.optimizer = optimizer.make_optimizer(config.optimizer, self.schedule, self.part(self.axes))

        self.replicated = sharding.named(mesh)

        def by(rules: dict) -> dict:
            axes = ((path, v.get_metadata("axes")) for path, v in flat)
            return traverse_util.unflatten_dict({path: sharding.named(mesh, *a, rules=rules) for path, a in axes})

        param_shardings = by(sharding.RULES)
        self.moments = by(sharding.ZERO1_RULES) if config.mesh.shard_optimizer else param_shardings
        shapes = jax.eval_shape(lambda: self._init(jax.random.key(0)))
        opt_shardings = sharding.of_optimizer_state(shapes.opt_state, shapes.params, self.moments, self.replicated)
        guard_shardings = dict.fromkeys(shapes.guard, self.replicated)
        shardings = TrainState(self.replicated, param_shardings, opt_shardings, guard_shardings)
        self.state: TrainState = jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings
        )
        self.params = self.state.params
        padding = config.model.padded_vocab_size - config.model.vocab_size
        tables = 1 if config.model.tie_embeddings else 2
        self.num_params = sum(p.size for p in jax.tree.leaves(self.params)) - padding * config.model.embed_dim * tables

    def _abstract(self, partitioner: Partitioner) -> tuple[Transformer, Any, Any]:
        """The model with shapes in place of arrays, its graph definition, and its parameters."""
        model = nnx.eval_shape(lambda: Transformer(self.config.model, nnx.Rngs(params=0), partitioner))
        return model, *nnx.split(model, nnx.Param)

    def _init(self, key: Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.state(Transformer(self.config.model, nnx.Rngs(params=key)), nnx.Param))
        return self._begin(params)

    def _begin(self, params: dict) -> TrainState:
        """The state before the first step, with these parameters."""
        guard = divergence.init_guard(self.config.divergence)
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(self.part(params)), guard)

    def part(self, params: dict) -> dict:
        """The parameters that are trained, of a tree like params."""
        return trainable.part(params, self.trained)

    def abstract_batch(self, dtype: Any, rows: int | None = None, *, masked: bool | None = None) -> Batch:
        """The shapes of a batch, to compile for.

        Args:
          dtype: the dtype of the token files.
          rows: the number of rows; None: global_batch_size.
          masked: whether the batch has loss_weights; None: as in the loader's training batches.
        """
        data = self.config.data
        return batch.abstract(
            self.config.global_batch_size if rows is None else rows,
            data.seq_len,
            dtype,
            masked=data.packed if masked is None else masked,
            documents=data.mask_documents,
            reference=self.config.stores_reference,
            sharding=sharding.named(self.mesh, "batch"),
        )

    def init(self) -> TrainState:
        """The state before the first step. Each device makes only its shards; the values are the same on any mesh."""
        shardings = jax.tree.map(lambda s: s.sharding, self.state)
        return jax.jit(self._init, out_shardings=shardings)(jax.random.key(self.config.seed))

    def init_with(self, params: dict) -> TrainState:
        """The state before the first step of a run that begins with these parameters, and with new adapters."""
        if new := set(trainable.paths(self.params)) - set(trainable.paths(params)):
            abstract = trainable.part(self.params, new)
            shardings = jax.tree.map(lambda s: s.sharding, abstract)
            make = jax.jit(lambda key: trainable.part(self._init(key).params, new), out_shardings=shardings)
            params = trainable.whole(params, make(jax.random.key(self.config.seed)))
        shardings = jax.tree.map(lambda s: s.sharding, dataclasses.replace(self.state, params={}))

        def rest(params: dict) -> TrainState:
            return dataclasses.replace(self._begin(params), params={})

        state = jax.jit(rest, out_shardings=shardings)(params)
        return dataclasses.replace(state, params=params)

    def init_guard(self) -> dict:
        """The guard of a run whose steps have not been judged before."""
        return jax.jit(lambda: divergence.init_guard(self.config.divergence), out_shardings=self.replicated)()

    def model(self, params: dict) -> Transformer:
        """The model of one replica, inside sharding.by_replica."""
        return nnx.merge(self.graph, params)

    def model_of_compiler(self, params: dict) -> Transformer:
        """The same model as plain array code, which the compiler lays out on the mesh: for generation."""
        return nnx.merge(self._whole_graph, params)
