"""Deliberate faults, one at a time, and whether the tests notice them. Prints a Markdown table.

  python -m benchmarks.mutations [--only=dropout,loader] [--minutes=10] [--list]

Each fault replaces one piece of text in a copy of the repository, which lies in a temporary folder; this checkout is
never changed. Then those fast tests run there that should notice the fault, up to the first failure. Before that the
same tests run without the fault, because a test that fails anyway proves nothing. A fault is killed if a test fails; if
all pass, it survived, and a test is missing.

Exit codes: 0 all faults were killed, 1 a fault was not killed, or could not be tried, 2 no fault has such a name.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
KILLED, SURVIVED = "killed", "SURVIVED"
TESTS_FAILED, NO_TESTS = 1, 5  # exit codes of pytest


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake that someone could make.

    Attributes:
      name: what is wrong.
      file: the path in the repository.
      old: text that occurs exactly once in the file.
      new: what replaces it.
      tests: arguments for pytest: files, or single tests if a file takes long.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def fault(name: str, file: str, old: str, new: str, *tests: str) -> Fault:
    return Fault(name, file, old, new, tuple(f"tests/{test}" for test in tests))


DROPOUT = "step_test.py::test_no_two_rows_are_dropped_alike"
PACKED_LOSS = "packing_test.py::test_the_loss_of_packed_documents_is_that_of_each_alone"
MICROBATCHES = "packing_test.py::test_microbatches_and_meshes_give_the_step_of_the_whole_batch"
BFLOAT16_SUMS = "gradients_test.py::test_a_bfloat16_gradient_of_eight_devices_is_that_of_one[{'data': 8}]"
BAD_STEPS = "divergence_test.py::test_a_bad_step_is_skipped_and_nothing_but_the_count_of_steps_changes"

FAULTS = [
    # Randomness
    fault("dropout repeats in every step", "trainer/step.py",
          "jax.random.fold_in(jax.random.key(seed), state.step) if", "jax.random.key(seed) if", DROPOUT),
    fault("dropout ignores the seed", "trainer/step.py",
          "jax.random.fold_in(jax.random.key(seed), state.step) if",
          "jax.random.fold_in(jax.random.key(0), state.step) if", DROPOUT),
    fault("dropout repeats in every microbatch", "trainer/step.py",
          "None if key is None else jax.random.fold_in(key, i)", "key", DROPOUT),
    fault("dropout repeats in every layer", "model/transformer.py",
          "jax.random.split(key, config.num_layers)", "jnp.broadcast_to(key, (config.num_layers,))", DROPOUT),
    fault("dropout repeats within a layer", "model/dropout.py",
          "[self._replace(key=key) for key in keys]", "[self._replace(key=keys[0]) for _ in keys]", DROPOUT),
    fault("dropout repeats in every replica", "trainer/parallel/partitioner.py",
          'jax.lax.axis_index("data") * shape[0]', "0", DROPOUT),
    fault("rows of random bits overlap", "trainer/parallel/random_bits.py",
          "jnp.arange(shape[0], dtype=jnp.uint32), size)", "jnp.arange(shape[0], dtype=jnp.uint32), size - 1)",
          "random_bits_test.py"),
    fault("all sampled rows are the same", "model/generate.py",
          "jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), position)",
          "jax.random.fold_in(jax.random.key(seed), position)", "generate_test.py"),
    fault("a full context keeps its old beginning", "model/generate.py",
          "context = text.tokens[text.start :]", "context = text.tokens[: len(text.tokens) - text.start]",
          "generate_test.py"),
    fault("the next token is that after the padding of a prompt", "model/generate.py",
          "logits_at=lengths - 1", "logits_at=jnp.full_like(lengths, tokens.shape[1] - 1)", "generate_test.py"),
    fault("a text continues after its stop token", "model/generate.py",
          "return ~ended & (", "return (", "generate_test.py"),
    fault("a random number depends on the step of the loop", "model/generate.py",
          "self._choose(logits[:, 0], texts, at + 1,", "self._choose(logits[:, 0], texts, i,",
          "generate_test.py"),
    fault("a short cache keeps the beginning of a long prompt", "model/generate.py",
          "last - (last - jnp.arange(s)[None]) % s", "jnp.arange(s)[None] + 0 * last", "generate_test.py"),
    fault("the next text in a slot is penalised for the tokens of the last", "model/generate.py",
          '"seen": state["seen"].at[slots].set(known, mode="drop")',
          '"seen": state["seen"].at[slots].max(known, mode="drop")', "generate_test.py"),
    fault("only the tokens in the context are penalised", "model/generate.py",
          "known[j, text.tokens] = True", "known[j, context] = True", "generate_test.py"),
    fault("log-probabilities are those after the filters", "model/sampling.py",
          "jax.nn.logsumexp(logits, axis=-1)", "jax.nn.logsumexp(penalised, axis=-1)", "generate_test.py"),
    # Model
    fault("dropout does not scale what it keeps", "model/dropout.py",
          "x.astype(jnp.float32) / jnp.asarray(1 - self.rate, jnp.float32)", "x.astype(jnp.float32)",
          "layers_test.py"),
    fault("the dropout schedule starts elsewhere", "model/dropout.py",
          "(step / config.dropout_scale + 1)", "(step / config.dropout_scale + 2)", "layers_test.py"),
    fault("a query sees the key after its own", "model/kernels.py",
          "seen = key <= query", "seen = key <= query + 1", "attention_test.py"),
    fault("a window has one key more", "model/kernels.py",
          "key > query - window", "key >= query - window", "attention_test.py"),
    fault("a block of a window sees what is before the first", "model/kernels.py",
          "(jnp.arange(blocks)[:, None] > 0) | (", "(jnp.arange(blocks)[:, None] >= 0) | (", "attention_test.py"),
    fault("documents see each other", "model/kernels.py",
          "seen & (self.segment_ids[:, :, None] == self.key_segment_ids[:, None])", "seen", "attention_test.py"),
    fault("scores are not scaled", "model/kernels.py",
          "(q_bthd * spec.scale).reshape", "q_bthd.reshape", "attention_test.py"),
    fault("rotation mirrors instead", "model/rope.py",
          "second * cos + first * sin", "second * cos - first * sin", "attention_test.py"),
    fault("rotation by the place in the row", "model/attention.py",
          "rope(y, ctx.positions)", "rope(y, ctx.index[None])", "attention_test.py"),
    fault("local layers turn like global ones", "model/rope.py",
          "if local and config.local_rope_theta:", "if False:", "transformer_test.py::"
          "test_logits_and_loss_are_those_of_the_reference"),
    fault("the gradient of the loss ignores the cap of logits", "model/layers.py",
          "1 - jnp.square(jnp.maximum(logits, -cap) / cap)", "1.0", "loss_test.py"),
    fault("all rows write to the cache at the first row's index", "model/attention.py",
          "(cache, new, index % cache.shape[1])", "(cache, new, 0 * index + index[:1] % cache.shape[1])",
          "transformer_test.py"),
    fault("residual projections start too large", "model/layers.py",
          "self.std * (2 * self.config.num_layers) ** -0.5", "self.std * self.config.num_layers**-0.5",
          "transformer_test.py::test_initial_parameters"),
    fault("the norm has no epsilon", "model/layers.py",
          "keepdims=True) + self.eps)", "keepdims=True))", "layers_test.py"),
    fault("gate and up are exchanged", "model/layers.py",
          "activation(gate) * up", "activation(up) * gate", "layers_test.py"),
    fault("the first padding token can be predicted", "model/layers.py",
          "jnp.where(token < config.vocab_size, logits", "jnp.where(token <= config.vocab_size, logits",
          "layers_test.py"),
    fault("losses of layers are averaged", "model/transformer.py",
          "losses = {name: values.sum()", "losses = {name: values.mean()", "context_test.py"),
    fault("top-p takes one token more at its border", "model/sampling.py",
          ", 0).sum(-1, keepdims=True) >= needed", ", 0).sum(-1, keepdims=True) > needed", "sampling_border_test.py"),
    fault("top-k leaves its last token out", "model/sampling.py",
          "keepdims=True) >= top_k", "keepdims=True) > top_k", "sampling_border_test.py"),
    # Step and loss
    fault("each microbatch has its own mean", "trainer/step.py",
          "microbatch, i = of_microbatch",
          "microbatch, i = of_microbatch\n"
          "            mean = microbatch.loss_weights / microbatch.loss_weights.sum() / accum\n"
          "            microbatch = microbatch.replace(loss_weights=mean)", MICROBATCHES),
    fault("padding is part of the mean", "trainer/step.py",
          "    total = batch.loss_weights.sum()", "    total = jnp.float32(batch.loss_weights.size)", PACKED_LOSS),
    fault("microbatches take rows of other replicas", "trainer/step.py",
          "x.reshape(-1, accum, x.shape[1]).swapaxes(0, 1)", "x.reshape(accum, -1, x.shape[1])",
          "step_test.py::test_dropout_is_the_same_on_every_mesh"),
    fault("steps are not counted", "trainer/step.py",
          "TrainState(state.step + 1,", "TrainState(state.step,", BAD_STEPS),
    fault("a bad step is applied", "trainer/step.py",
          "jnp.where(bad, before, after)", "after", BAD_STEPS),
    fault("replicas keep their own gradients", "trainer/step.py",
          "partitioner.sum_of_replicas(grads)", "grads", BFLOAT16_SUMS),
    fault("an evaluation counts padding", "trainer/step.py",
          "by_replica(params, batch), weights.sum()",
          "by_replica(params, batch), jnp.float32(weights.size)",
          "step_test.py::test_eval_step_counts_what_it_is_told"),
    fault("the order of a split sequence moves only the inputs", "trainer/step.py",
          "batch = jax.tree.map(lambda x: x[:, partitioner.order], batch)",
          "batch = batch.replace(inputs=batch.inputs[:, partitioner.order])",
          "step_test.py::test_masked_documents_are_trained_and_evaluated_as_if_each_were_alone[context]"),
    fault("the z-loss has half of its gradient", "trainer/loss.py",
          "(1 + 2 * self.z_loss * log_z_c1)", "(1 + self.z_loss * log_z_c1)", "loss_test.py"),
    fault("every vocabulary shard believes to be the first", "trainer/loss.py",
          'first = self.collectives.index("tensor") * self.columns', "first = 0", "loss_test.py"),
    fault("the loss of a split sequence is not summed", "trainer/loss.py",
          "self.collectives.psum(s, *sharding.TOKEN_AXES)", 'self.collectives.psum(s, "fsdp")', "loss_test.py"),
    fault("the last tokens of a batch have no gradient", "trainer/loss.py",
          "a.reshape(-1, *a.shape[2:])[:n]", "a.reshape(-1, *a.shape[2:])[:n] * (jnp.arange(n) < n - 1)[:, None]",
          "loss_test.py"),
    fault("sources count alike in an evaluation", "trainer/evaluation.py",
          "loss = sum(totals.values()) / sum(counts.values())",
          "loss = sum(totals[name] / counts[name] for name in sources) / len(sources)",
          "evaluation_test.py::test_losses_are_the_means_over_targets"),
    fault("rows of an evaluation are rounded down", "trainer/evaluation.py",
          "-(-rows // shards) * shards", "max(rows // shards, 1) * shards",
          "evaluation_test.py::test_rows_of_a_microbatch_are_rounded_up_to_the_devices"),
    fault("the most likely token is that of each vocabulary shard", "trainer/loss.py",
          'own = self.collectives.index("tensor") * self.columns + jnp.argmax', "own = jnp.argmax", "scorer_test.py"),
    fault("a score leaves out the last token", "trainer/tasks/scorer.py",
          "- 1 - scored : len(row) - 1] = True", "- 1 - scored : len(row) - 2] = True", "scorer_test.py"),
    fault("a long context loses its end", "trainer/tasks/scorer.py",
          "tokens[-(self.context + 1) :].astype", "tokens[: self.context + 1].astype", "scorer_test.py"),
    fault("int8 products are not scaled", "model/quantized.py",
          "return self.scaled(x @ self.values)", "return x @ self.values", "quantized_test.py"),
    fault("weights are not rounded to int8", "launch/inference.py",
          "self.config.model, int8=self.int8)", "self.config.model)", "system/train_test.py::test_sample"),
    fault("a few-shot prompt shows the answer", "trainer/tasks/core.py",
          "items[k + (k >= i)]", "items[k]", "core_test.py"),
    # Devices
    fault("gradients are summed in bfloat16", "trainer/parallel/partitioner.py",
          "jnp.promote_types(self.config.optimizer.gradients_dtype, computed)", "jnp.dtype(computed)",
          "gradients_test.py::test_a_bfloat16_gradient_of_512_devices_is_that_of_one"),
    fault("late shards of a sequence have more work", "trainer/parallel/partitioner.py",
          "blocks[[i, 2 * shards - 1 - i]]", "blocks[[2 * i, 2 * i + 1]]", "partitioner_test.py"),
    fault("keys of a split sequence stay in the order of the devices", "trainer/parallel/partitioner.py",
          "return blocks[:, order].reshape(gathered.shape)", "return gathered", "partitioner_test.py"),
    fault("the gradient of a bias is a mean", "trainer/parallel/partitioner.py",
          "db = tokens.sum(", "db = tokens.mean(", "partitioner_test.py"),
    fault("an embedding adds up in the type of the activations", "trainer/parallel/embedding.py",
          "jnp.zeros((rows, g.shape[-1]), jnp.float32).at[at].add(jnp.where(inside, g.astype(jnp.float32), 0))",
          "jnp.zeros((rows, g.shape[-1]), g.dtype).at[at].add(jnp.where(inside, g, 0)).astype(jnp.float32)",
          "gradients_test.py"),
    fault("the vocabulary is on every device", "trainer/sharding.py",
          '"vocab": "tensor"', '"vocab": None', "sharding_test.py"),
    # Optimizer
    fault("the update goes uphill", "trainer/optimizer.py", "-rate * u", "rate * u", "optimizer_test.py"),
    fault("norms decay, too", "trainer/optimizer.py",
          'if n != "layers"]) >= 2', 'if n != "layers"]) >= 1', "optimizer_test.py"),
    fault("the first warm-up step does nothing", "trainer/schedule.py",
          "peak * (step + 1) / max(warmup, 1)", "peak * step / max(warmup, 1)", "optimizer_test.py"),
    fault("the wsd rate falls too early", "trainer/schedule.py",
          "(step - (last - falling)) / falling", "(step - warmup) / falling", "optimizer_test.py"),
    fault("a loss that is not finite is not a bad step", "trainer/reliability/divergence.py",
          "bad = ~finite", "bad = jnp.zeros_like(finite)", "divergence_test.py"),
    fault("the variance of losses is too small", "trainer/reliability/divergence.py",
          "(1 - gain) * (var + gain * (x - mean) ** 2)", "(1 - gain) * var + (gain * (x - mean)) ** 2",
          "divergence_test.py"),
    # Weights of other systems
    fault("parts of a joined tensor are all read from its beginning", "model/families/layout.py",
          "begin += part.shape[-1]", "begin += 0", "gpt2_files_test.py"),
    fault("bands of a transposed tensor leave columns out", "model/families/layout.py",
          "range(0, len(array), 16)", "range(0, len(array) - 15, 16)", "families_test.py"),
    fault("the epsilon of norms is not the model's", "model/families/base.py",
          '"norm_eps": keys.number("rms_norm_eps")', '"norm_eps": 1e-6', "families_test.py"),
    fault("queries and keys of a GGUF keep Meta's order", "trainer/interchange/gguf_file.py",
          "rows = self._in_pairs(rows)", "rows = rows + 0", "gguf_file_test.py"),
    fault("llm.c's padding of the vocabulary is read", "trainer/interchange/llmc_file.py",
          "(self._vocab, self._width)}", "(self._rows, self._width)}", "gpt2_files_test.py"),
    fault("biases that a model does not have go out as ones", "trainer/interchange/exporting.py",
          "np.zeros(layout.shape(path, layer)", "np.ones(layout.shape(path, layer)", "gpt2_files_test.py"),
    fault("copied weights are not read back", "trainer/interchange/importing.py",
          "    writer.verify()", "    pass", "safetensors_writer_test.py"),
    fault("a slice of a stored tensor begins a row late", "trainer/interchange/stored.py",
          "self.offset + start * width", "self.offset + (start + 1) * width", "safetensors_writer_test.py"),
    fault("the weights of a converted run are not checked", "trainer/interchange/checksums.py",
          'if recorded["parameters"].get(name) != now]', "if False]",
          "convert_test.py::test_a_converted_run_keeps_its_first_weights"),
    # Reliability and reports
    fault("checksums are not compared", "trainer/reliability/checkpoint.py",
          'if now != meta["arrays"][name][leaf][1]:', "if False:",
          "checkpoint_test.py::test_a_flipped_bit_is_found_and_the_step_before_is_used"),
    fault("the worst checkpoints are kept", "trainer/reliability/retention.py",
          "sorted(losses)[: config.keep_best]", "sorted(losses)[-config.keep_best :]", "retention_test.py"),
    fault("timed saves come late", "trainer/reliability/retention.py",
          "now - self.last >= self.interval_s", "now - self.last > 2 * self.interval_s", "retention_test.py"),
    fault("the row of the restored step is cut", "trainer/reporting/metrics.py",
          "_step_of(line) <= step", "_step_of(line) < step", "metrics_test.py"),
    fault("attention has half of its FLOPs", "trainer/reporting/flops.py",
          "6 * attention_flops_per_token(config, causal=causal)",
          "3 * attention_flops_per_token(config, causal=causal)", "flops_test.py"),
    fault("samples start over after a resume", "trainer/loop.py",
          'Cursor(meta["step"], meta["samples"])', 'Cursor(meta["step"], 0)',
          "system/train_test.py::test_killed_three_times_the_losses_are_the_same_bit_for_bit"),
    # Data
    fault("targets are the inputs", "data/batch.py",
          "inputs, targets = tokens[:, :-1], tokens[:, 1:]", "inputs, targets = tokens[:, :-1], tokens[:, :-1]",
          "batch_test.py"),
    fault("the end of a document begins the next one", "data/batch.py",
          "begins[:, 1:] = inputs[:, :-1] == document_end", "begins[:, :] = inputs == document_end", "batch_test.py"),
    fault("every epoch has the same order", "data/loader.py",
          "self.num_windows, self.seed, self.split, epoch)", "self.num_windows, self.seed, self.split, 0)",
          "loader_test.py"),
    fault("windows begin at the same tokens in every epoch", "data/loader.py",
          '"phase", epoch, shard)', '"phase", 0, shard)', "loader_test.py"),
    fault("the last window reads past its shard", "data/loader.py",
          "max(len(shard) // seq_len - 1, 1)", "max(len(shard) // seq_len, 1)", "loader_test.py"),
    fault("every batch is the first one", "data/loader.py",
          "g = sequences_consumed + rows", "g = rows", "loader_test.py"),
    fault("read-ahead repeats the first batch", "data/loader.py",
          "following - self.global_batch_size", "max(following - 2 * self.global_batch_size, 0)", "loader_test.py"),
    fault("an evaluation counts one target too many", "data/loader.py",
          "< padded[first + rows, None]", "<= padded[first + rows, None]", "loader_test.py"),
    fault("a lone end of text counts", "data/loader.py",
          "lone = (lengths == 1) & (place > 0)", "lone = (lengths == 1) & (place > 1)", "batch_test.py"),
    fault("the epochs of a mixture are those of its first source", "data/loader.py",
          "sum(s.num_windows for s in self.sources)", "self.sources[0].num_windows", "loader_test.py"),
    fault("pieces of a document overlap", "data/packing.py",
          "np.minimum(width, np.repeat(begins + lengths, counts) - starts)",
          "np.repeat(begins + lengths, counts) - starts", "packing_test.py::"
          "test_pieces_hold_every_token_once_and_cut_only_what_is_too_long"),
    fault("a chat is trained to predict the next one", "data/loader.py",
          "return (mask & ~self.begins(g))[:, 1:]", "return mask[:, 1:]", "chats_test.py::"
          "test_the_first_token_of_a_chat_is_not_a_target_of_the_chat_before_it"),
    fault("the inputs and not the targets are supervised", "data/loader.py",
          "return (mask & ~self.begins(g))[:, 1:]", "return (mask & ~self.begins(g))[:, :-1]", "chats_test.py::"
          "test_rows_have_whole_chats_their_masks_and_borders"),
    fault("a chat without a target has a row", "data/packing.py",
          "kept = targets_read > 0", "kept = targets_read >= 0", "chats_test.py::"
          "test_what_is_not_in_the_rows_is_counted"),
    fault("the token that ends an answer is not supervised", "trainer/interchange/supervision.py",
          "return len(stripped) if names", "return len(stripped) - len(names[-1]) if names", "supervision_test.py"),
    fault("the smallest remainders of a mixture are rounded up", "data/mixture.py",
          "np.argsort(counts - wanted,", "np.argsort(wanted - counts,", "mixture_test.py"),
    fault("a stage of a mixture starts its sources over", "data/mixture.py",
          "self._before.append(self._before[-1] + self._within(", "self._before.append(self._within(",
          "mixture_test.py"),
    fault("the order has one round less", "data/order.py", "ROUNDS = 8", "ROUNDS = 7", "order_test.py"),
    fault("a shard that grew is read", "data/token_files/formats.py",
          "if size != expected:", "if size < expected:", "formats_test.py"),
    fault("the first id outside the vocabulary is read", "data/token_files/formats.py",
          "(largest := int(tokens.max())) >= self.vocab_size", "(largest := int(tokens.max())) > self.vocab_size",
          "formats_test.py"),
    fault("the fingerprint ignores the end of text", "data/token_files/formats.py",
          'NOT_IN_FINGERPRINT = ("request",', 'NOT_IN_FINGERPRINT = ("request", "eos_id",', "formats_test.py"),
    fault("special tokens have the ids of characters", "data/tokenizers/characters.py",
          "dict(enumerate(self.special_tokens, start=256))", "dict(enumerate(self.special_tokens, start=255))",
          "tokenizers_test.py"),
    # Serving
    fault("frozen parameters are trained", "trainer/config.py",
          "return not any(fnmatch.fnmatchcase(path, pattern) for pattern in self.frozen)", "return True",
          "lora_test.py"),
    fault("adapters leave the base trained", "trainer/config.py",
          'if self.model.lora.rank and ".lora." not in path:', "if False:", "lora_test.py"),
    fault("the factor of adapters is alpha", "model/layers.py",
          "self.scale = config.alpha / config.rank", "self.scale = config.alpha", "lora_test.py"),
    fault("adapters drop their inputs in evaluation", "model/dropout.py",
          "if self.key is None or rate == 0:", "if rate == 0:", "lora_test.py"),
    fault("all adapters of a layer drop the same inputs", "model/dropout.py",
          "jax.random.fold_in(self.key, ADAPTERS + number)", "jax.random.fold_in(self.key, ADAPTERS)", "lora_test.py"),
    fault("adapters of joined projections overlap", "trainer/interchange/peft.py",
          "column = adapted.index(path) * rank", "column = 0", "peft_test.py"),
    fault("factors of modules are taken as equal", "trainer/interchange/peft.py",
          "np.pad(b * np.float32(factor), ", "np.pad(b, ", "peft_test.py"),
    fault("the rejected answer is preferred, too", "trainer/finetuning/preference.py",
          "jnp.where(batch.segment_ids == CHOSEN, 1.0, -1.0)", "1.0", "dpo_test.py"),
    fault("the reference has the adapters", "trainer/finetuning/preference.py",
          'if path.endswith(".lora.b")', "if False", "dpo_test.py"),
    fault("rows that fill up a batch count as pairs", "trainer/finetuning/preference.py",
          "pairs = shares(batch).sum()", "pairs = jnp.float32(len(batch.inputs))", "dpo_test.py"),
    fault("a pair is compared with the reference of another", "data/loader.py",
          "self.files.reference[self._rows(g)]", "self.files.reference[g % self.num_windows]", "dpo_test.py"),
    fault("a damaged reference is used", "trainer/finetuning/reference.py",
          " or _sha256(found) != own", "", "dpo_test.py"),
    fault("tasks that a stop left are never done", "trainer/loop.py",
          "TASKS: metrics.has_tasks(self.run_dir, step)", "TASKS: True", "tasks_test.py"),
    fault("the common beginning of a pair is supervised", "data/preparation/chats.py",
          "chat.mask & (np.arange(len(chat.mask)) >= common)", "chat.mask", "dpo_test.py"),
    fault("a pair that is too long is cut", "data/packing.py",
          "fits = np.repeat(of_pair <= width, 2)", "fits = np.repeat(of_pair <= 2 * width, 2)", "dpo_test.py"),
    fault("a client that leaves keeps its slot", "launch/serving/engine.py",
          "self._orders.put(functools.partial(self._batch.remove, job.text))", "pass", "serving_test.py"),
    fault("the queue has no end", "launch/serving/engine.py",
          "if self.count >= self._most:", "if self.count > 10 * self._most:", "serving_test.py"),
    fault("what is not implemented is ignored", "launch/serving/requests.py",
          "if name in NEUTRAL and value is not None and", "if name not in NEUTRAL and value is not None and",
          "serving_test.py"),
    fault("tokens after a stop string count", "launch/serving/answers.py",
          "used = len(self._stream.ids) - before if self._stream.stopped else", "used =",
          "system/serve_test.py::test_a_stop_string_ends_an_answer_at_the_same_token_streamed_or_not"),
]  # fmt: skip


def apply(root: pathlib.Path, one: Fault) -> str:
    """Puts the fault into its file below `root`; returns the text that the file had.

    Raises:
      ValueError: the old text does not occur exactly once.
    """
    path = root / one.file
    text = path.read_text()
    if (count := text.count(one.old)) != 1:
        raise ValueError(f"its old text occurs {count} times in {one.file}")
    path.write_text(text.replace(one.old, one.new))
    return text


@contextlib.contextmanager
def copy_of(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary copy of a checkout, with its changes, without what git ignores."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="meshlm-mutations-") as folder:
        copy = pathlib.Path(folder)
        for name in filter(None, names):
            if (root / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, copy / name, follow_symlinks=False)
        yield copy


def run_tests(root: pathlib.Path, tests: tuple[str, ...], limit_s: float) -> tuple[str, str]:
    """('passed', ''), ('failed', the first test that failed and its error), or (why neither is known, '')."""
    # No .pyc is written: Python would reuse it for a file that changed within a second and kept its size.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "250"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    try:
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"not done within {limit_s:.0f} s", ""
    lines = (result.stdout + result.stderr).strip().splitlines() or ["no output"]
    if result.returncode == NO_TESTS:
        return "no test ran", ""
    if result.returncode == TESTS_FAILED:
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))] or lines[-1:]
        return "failed", failed[0][:150].replace("|", "¦")
    return ("passed" if result.returncode == 0 else f"pytest ended with {result.returncode}: {lines[-1][:100]}"), ""


def verdict(root: pathlib.Path, one: Fault, limit_s: float) -> tuple[str, str]:
    """(KILLED, by which test), (SURVIVED, ''), or (why neither is known, ''); restores `root` at the end."""
    try:
        before = apply(root, one)
    except (ValueError, OSError) as e:
        return str(e), ""
    try:
        found, by = run_tests(root, one.tests, limit_s)
    finally:
        (root / one.file).write_text(before)
    return {"failed": KILLED, "passed": SURVIVED}.get(found, found), by


def chosen(parts: list[str]) -> list[Fault]:
    return [one for one in FAULTS if not parts or any(part in one.name or part in one.file for part in parts)]


def options(argv: list[str]) -> argparse.Namespace:
    # Not absl's flags: a test imports this module beside others that have an --only.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Faults to try, by a part of their name or file; all when empty.")
    parser.add_argument("--minutes", type=float, default=10.0, help="Time limit for the tests of one fault.")
    parser.add_argument("--list", action="store_true", help="Print the faults and their tests, and try none.")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    given = options(argv)
    faults = chosen([part.strip() for part in given.only.split(",") if part.strip()])
    if not faults:
        print(f"no fault has {given.only!r} in its name or file; --list prints them", file=sys.stderr)
        return 2
    if given.list:
        for one in faults:
            print(f"{one.file}: {one.name}: {' '.join(one.tests)}")
        return 0
    print("| fault | file | | first failure | s |\n|---|---|---|---|---|")
    counts: collections.Counter[str] = collections.Counter()
    limit_s = 60 * given.minutes
    sound: dict[tuple[str, ...], tuple[str, str]] = {}  # maps tests to how they end without a fault
    with copy_of(ROOT) as copy:
        for one in faults:
            if one.tests not in sound:
                sound[one.tests] = run_tests(copy, one.tests, limit_s)
            start = time.monotonic()
            before, by = sound[one.tests]
            result = f"without the fault: {before}"
            if before == "passed":
                result, by = verdict(copy, one, limit_s)
            counts[result] += 1
            print(f"| {one.name} | {one.file} | {result} | {by} | {time.monotonic() - start:.0f} |", flush=True)
    print(f"\n{counts[KILLED]} of {len(faults)} faults were killed, {counts[SURVIVED]} survived")
    return int(counts[KILLED] != len(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
