"""Speed of generating text, next to other systems on the same weights: greedy, float32, on the CPU, in turns.

  python -m benchmarks.generate --hf=DIR --workdir=RUN [--rows=1,8] [--prompt_tokens=32] [--new_tokens=64] [--rounds=5]
    [--gguf=FILE]

RUN is what launch.convert made of DIR. Each system has its own process. It is checked that transformers generates the
same tokens. FILE is what llama.cpp's converter made of DIR with --outtype=f32; it needs the package xllamacpp.
Results: docs/performance.md.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
from absl import app, flags

from launch import inference

HF = flags.DEFINE_string("hf", None, "Folder of Hugging Face.", required=True)
ROWS = flags.DEFINE_list("rows", ["1", "8"], "Texts in a batch.")
PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 32, "Tokens of each prompt.")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Tokens after each prompt.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each system.")
GGUF = flags.DEFINE_string("gguf", None, "The weights for llama.cpp; none: without it.")
SYSTEMS = ["meshlm", "transformers", "transformers static", "llama.cpp"]
CHILD = flags.DEFINE_enum("child", None, SYSTEMS, "Internal.")


def meshlm():
    """A function (prompts [b, p], new tokens) -> tokens [b, n]."""
    from model.generate import GREEDY
    from trainer.sampling import make_generator

    run = inference.open_run()
    generator = make_generator(run.program)
    params = run.fast_params

    def generate(prompts: np.ndarray, new: int) -> np.ndarray:
        return np.stack(generator.continue_all(params, list(prompts), max_new_tokens=new, sampling=GREEDY))

    return generate


def transformers_(static: bool):
    """The same with transformers, with its default cache or the static one."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(HF.value, dtype=torch.float32).eval()
    options = {"cache_implementation": "static"} if static else {}

    def generate(prompts: np.ndarray, new: int) -> np.ndarray:
        ids = torch.as_tensor(prompts.astype(np.int64))
        with torch.no_grad():
            text = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0, eos_token_id=None, **options,
            )  # fmt: skip
        return text[:, prompts.shape[1] :].numpy()

    return generate


def llama_cpp():
    """The same with llama.cpp, without the tokens: its completions are texts."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = GGUF.value
    params.n_parallel = max(map(int, ROWS.value))
    params.n_ctx = params.n_parallel * 2 * (PROMPT_TOKENS.value + NEW_TOKENS.value)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)

    def generate(prompts: np.ndarray, new: int) -> None:
        asked = {"max_tokens": new, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        answer = server.handle_completions({"prompt": prompts.tolist(), **asked})
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * len(prompts), answer

    return generate


def serve(name: str) -> None:
    """Answers lines {"rows", "new"} with {"seconds", "tokens"}; tokens are null if they are not known."""
    own = {"meshlm": meshlm, "llama.cpp": llama_cpp}
    generate = own[name]() if name in own else transformers_("static" in name)
    draw = np.random.default_rng(0)
    prompts = draw.integers(100, 1000, (64, PROMPT_TOKENS.value)).astype(np.int32)
    print("{}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        tokens = generate(prompts[: asked["rows"]], asked["new"])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": None if tokens is None else tokens.tolist()}), flush=True)


class Child:
    """A system in its own process."""

    def __init__(self, name: str):
        self.name = name
        words = [sys.executable, "-m", "benchmarks.generate", f"--child={name}", *sys.argv[1:]]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with {self._process.wait()}")

    def generate(self, rows: int, new: int) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"rows": rows, "new": new}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(children: list[Child], rows: int) -> None:
    """Prints tokens/s of reading the prompts and of generating after the first token, and our ratios to the others."""
    rates: dict[str, list[tuple[float, float]]] = {child.name: [] for child in children}
    for child in children:  # compiles
        for new in (1, NEW_TOKENS.value):
            child.generate(rows, new)
    for turn in range(ROUNDS.value):
        texts = []
        for child in children if turn % 2 else children[::-1]:
            first, whole = child.generate(rows, 1), child.generate(rows, NEW_TOKENS.value)
            texts += [] if whole["tokens"] is None else [whole["tokens"]]
            decoding = rows * (NEW_TOKENS.value - 1) / (whole["seconds"] - first["seconds"])
            rates[child.name].append((rows * PROMPT_TOKENS.value / first["seconds"], decoding))
        assert all(text == texts[0] for text in texts), "the systems generated different tokens"
    for name, of_child in rates.items():
        reading, decoding = (statistics.median(values) for values in zip(*of_child, strict=True))
        ratios = [
            statistics.median(a[i] / b[i] for a, b in zip(rates["meshlm"], of_child, strict=True)) for i in (0, 1)
        ]
        print(
            f"{rows:3} rows, {name:20} reading {reading:7.0f} tokens/s, generating {decoding:6.1f} tokens/s; meshlm is "
            f"{ratios[0]:.2f} and {ratios[1]:.2f} times as fast",
            flush=True,
        )


def main(argv: list[str]) -> None:
    if CHILD.value:
        serve(CHILD.value)
        return
    children = [Child(name) for name in SYSTEMS if name != "llama.cpp" or GGUF.value]
    try:
        for rows in map(int, ROWS.value):
            compare(children, rows)
    finally:
        for child in children:
            child.close()


if __name__ == "__main__":
    app.run(main)
