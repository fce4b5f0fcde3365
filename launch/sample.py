"""Generate text with a trained model.

  python -m launch.sample --workdir=runs/tiny --prompt='def ' [--max_new_tokens=500 --temperature=0.8 --top_p=0.95]

Sample i depends only on --seed and i. --temperature=0 always takes the most likely token. With --json each sample is
one line {"step", "sample", "seed", "prompt", "text"}, where text does not include the prompt.
"""

import itertools
import json
import math

from absl import flags

from data.storage import malloc
from launch import cli, inference
from trainer.errors import ConfigError

PROMPT = flags.DEFINE_string("prompt", "\n", "Text to continue.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 500, "Number of tokens to generate.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "Below 1: more likely tokens; above 1: less likely ones; 0: greedy.", lower_bound=0.0
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k most likely tokens; 0: from all.", lower_bound=0)
TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "Sample from the most likely tokens that have this total probability.",
    lower_bound=0.0,
    upper_bound=1.0,
)
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Number of samples.", lower_bound=1)
CHAT = flags.DEFINE_bool("chat", False, "The prompt is a message, in the chat template that came with the model.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random choices.", lower_bound=0, upper_bound=2**32 - 1)


def main() -> int:
    with inference.memory_of_devices("lower --num_samples or --max_new_tokens, or use more or larger devices"):
        return write()


def write() -> int:
    if not math.isfinite(TEMPERATURE.value):
        raise ConfigError(
            f"--temperature={TEMPERATURE.value} is not a finite number; 1 samples from the predicted distribution"
        )
    if not PROMPT.value:
        raise ConfigError("--prompt is empty; give at least one character, for example --prompt=$'\\n'")
    malloc.tune_allocator()
    run = inference.open_run()
    from data import tokenizers
    from trainer import sampling

    if not (run.path / "tokenizer").exists():
        raise ConfigError(
            f"{run.path} has no tokenizer, because it began with weights or token files without one; a launch.train "
            "command with --config.data.tokenizer_path=PATH adds one, and launch.convert takes --tokenizer=PATH"
        )
    tokenizer = tokenizers.load(run.path / "tokenizer")
    stop_ids = frozenset() if tokenizer.eos_id is None else frozenset([tokenizer.eos_id])
    if CHAT.value:
        from trainer.interchange.chat import Chat
        from trainer.interchange.folder import KEPT

        chat = Chat(run.path / KEPT, tokenizer)
        prompt = chat.encode(chat.prompt([{"role": "user", "content": PROMPT.value}]))
        stop_ids |= chat.stop_ids
    else:
        prompt = sampling.encode_prompt(tokenizer, PROMPT.value, "--prompt")
    generator = sampling.make_generator(
        run.program, temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value,
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    rows = generator(run.params, prompt, rows=NUM_SAMPLES.value, max_new_tokens=MAX_NEW_TOKENS.value, seed=SEED.value)
    for i, ids in enumerate(rows):
        text = tokenizer.decode(_until(ids, stop_ids))
        if inference.JSON.value:
            row = {"step": run.meta["step"], "sample": i, "seed": SEED.value, "prompt": PROMPT.value, "text": text}
            print(json.dumps(row))
        else:
            print(("\n---\n" if i else "") + ("" if CHAT.value else PROMPT.value) + text)
    return 0


def _until(ids, stop_ids: frozenset[int]) -> list[int]:
    """The ids before the first stop id."""
    return list(itertools.takewhile(lambda id: id not in stop_ids, ids.tolist()))


if __name__ == "__main__":
    cli.run(main)
