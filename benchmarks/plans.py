"""Compiles every recipe for its machines; writes docs/plans.json, the recipes' headers and a table.

  python -m benchmarks.plans [--only=llama:1b]

`make plans` runs this. Each plan is made by its own process of launch.plan, in a minute or more on two CPU cores.
tests/configs_test.py compares headers and recipes with docs/plans.json, and tests/plan_test.py compares plans of small
machines with fresh compilations.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

from absl import app, flags

from trainer.config import Config, from_dict

ONLY = flags.DEFINE_string("only", "", "Only recipes whose name contains this; the others keep their plans.")

ROOT = pathlib.Path(__file__).parent.parent
FILE = ROOT / "docs" / "plans.json"
GIB = 2**30
# Recipe, machine, slices: the smallest of a family first.
PLANS = (
    ("gpt2:124m-one", "h100:1", 1),
    ("gpt2:124m", "h100:8", 1),
    ("gpt2:124m-tpu", "v6e:2x2", 1),
    ("llama:1b-one", "h100:1", 1),
    ("llama:1b-one", "h200:1", 1),
    ("llama:1b", "v5e:4x4", 1),
    ("llama:1b", "v6e:4x4", 1),
    ("llama:1b", "v5p:2x2x2", 1),
    ("llama:8b-gpus", "h100:8", 1),
    ("llama:8b", "v5p:4x4x4", 1),
    ("llama:8b-v6e", "v6e:16x16", 1),
    ("llama:70b", "v5p:8x8x8", 1),
    ("llama:70b-two", "v5p:8x8x8", 2),
    ("mistral:7b-gpus", "h100:8", 1),
    ("mistral:7b", "v5p:4x4x4", 1),
    ("qwen2:0.5b", "h100:8", 1),
    ("qwen2:0.5b", "v6e:4x4", 1),
    ("qwen3:0.6b", "h100:8", 1),
    ("qwen3:0.6b", "v6e:4x4", 1),
    ("gemma2:2b-gpus", "h100:8", 1),
    ("gemma2:2b", "v6e:4x4", 1),
    ("gemma3:1b", "h100:8", 1),
    ("gemma3:1b", "v6e:4x4", 1),
    ("olmo2:1b", "h100:8", 1),
    ("olmo2:1b", "v6e:4x4", 1),
)
# By family, or by size if a size has another one.
VOCAB_SIZES = {
    "gpt2": 50_257, "llama": 128_256, "llama:1b": 32_000, "mistral": 32_000, "qwen2": 151_936, "qwen3": 151_936,
    "gemma2": 256_000, "gemma3": 262_144, "olmo2": 100_352,
}  # fmt: skip
FAMILIES = tuple(dict.fromkeys(name.split(":")[0] for name, _, _ in PLANS))


def vocab_size(name: str) -> int:
    size = name.partition("-")[0]
    return VOCAB_SIZES.get(size) or VOCAB_SIZES[name.split(":")[0]]


def recipe(name: str) -> Config:
    """The configuration of 'NAME' or 'NAME:VARIANT'."""
    name, _, variant = name.partition(":")
    module = importlib.import_module(f"configs.{name}")
    return from_dict((module.get_config(variant) if variant else module.get_config()).to_dict())


# Sections that do not affect what is compiled.
NOT_COMPILED = ("checkpoint", "watchdog", "metrics")


def digest(name: str) -> str:
    """Digest of what a plan was made from: if it differs, the plan is out of date."""
    config = {k: v for k, v in dataclasses.asdict(recipe(name)).items() if k not in NOT_COMPILED}
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]


def command(name: str, machine: str, slices: int) -> list[str]:
    base, _, variant = name.partition(":")
    path = f"configs/{base}.py" + (f":{variant}" if variant else "")
    argv = ["launch.plan", f"--config={path}", f"--topology={machine}"]
    return [*argv, f"--config.model.vocab_size={vocab_size(name)}"] + ([f"--num_slices={slices}"] if slices > 1 else [])


def make(name: str, machine: str, slices: int) -> dict[str, Any]:
    """The plan as launch.plan's JSON, with the digest of what it was made from."""
    argv = [sys.executable, "-m", *command(name, machine, slices), "--json"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    plan = json.loads(done.stdout.splitlines()[-1])
    return {"recipe": name, "digest": digest(name), "jax": importlib.metadata.version("jax"), **plan}


def limit(plan: dict[str, Any]) -> str:
    return max(plan["seconds"], key=plan["seconds"].__getitem__)


def machine_of(plan: dict[str, Any]) -> str:
    return (f"{plan['num_slices']} x " if plan["num_slices"] > 1 else "") + plan["topology"]


def header(name: str, plans: list[dict[str, Any]]) -> str:
    """The lines of a recipe's docstring about its plans; '' if there are none."""
    of_recipe = [p for p in plans if p["recipe"].split(":")[0] == name]
    if not of_recipe:
        return ""
    lines = ["Plans (make plans; compiled without the machine; the step at best is a roofline, docs/scaling.md):"]
    for p in of_recipe:
        lines.append(
            f"  {p['recipe']:<15} on {machine_of(p):<13} {'fits' if p['fits'] else 'DOES NOT FIT'}: "
            f"{p['peak_bytes'] / GIB:5.1f} of {p['usable_bytes'] / GIB:4.1f} GiB, "
            f"at best {p['step_s_at_best']:6.2f} s a step ({limit(p)})"
        )
    return "\n".join(lines) + "\n"


def write_header(name: str, plans: list[dict[str, Any]]) -> None:
    path = ROOT / "configs" / f"{name}.py"
    start, docstring, code = path.read_text().split('"""', 2)
    text = re.sub(r"\n*Plans \(make plans.*", "\n", docstring, flags=re.DOTALL)
    block = header(name, plans)
    path.write_text(f'{start}"""{text}' + (f"\n{block}" if block else "") + f'"""{code}')


def table(plans: list[dict[str, Any]]) -> str:
    lines = [
        "| recipe | machine | mesh | remat, attention | peak GiB of usable | in evaluation, sampling GiB | "
        "parameters + optimizer + gradients / activations / temporary GiB | "
        "sent a step GiB, by network and axis | at best: step, MFU, limit | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in plans:
        memory = {part: size / GIB for part, size in p["memory"].items()}
        state = memory["parameters"] + memory["optimizer"] + memory["gradients"]
        sent: dict[str, float] = {}
        for row in p["collectives"]:
            key = ("slow " if row["crosses_slices"] else "fast ") + (" x ".join(row["axes"]) or "?")
            sent[key] = sent.get(key, 0) + row["sent"] / GIB
        mesh = " x ".join(f"{name} {size}" for name, size in p["mesh"].items() if size > 1) or "one device"
        lines.append(
            f"| {p['recipe']} | {machine_of(p)} | {mesh} | {p['remat']}, {p['attention']} | "
            f"{p['peak_bytes'] / GIB:.1f} of {p['usable_bytes'] / GIB:.1f}{'' if p['fits'] else ' (does not fit)'} | "
            f"{', '.join(f'{size / GIB:.1f}' for size in p['beside_bytes'].values())} | "
            f"{state:.1f} / {memory['activations']:.1f} / {memory['temporary']:.1f} | "
            f"{', '.join(f'{k} {v:.2f}' for k, v in sent.items() if v >= 0.005) or 'nothing'} | "
            f"{p['step_s_at_best']:.2f} s, {100 * p['mfu_at_best']:.0f} %, {limit(p)} | {p['compile_s']:.0f} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    made = json.loads(FILE.read_text()) if FILE.exists() else []
    known = {(p["recipe"], p["topology"], p["num_slices"]): p for p in made}
    for key in PLANS:
        if ONLY.value in key[0]:
            known[key] = make(*key)
            print(f"{key[0]} on {key[1]}: compiled in {known[key]['compile_s']:.0f} s", flush=True)
            plans = [known[k] for k in PLANS if k in known]
            FILE.write_text(json.dumps(plans, indent=1) + "\n")
    for name in FAMILIES:
        write_header(name, plans)
    print(table(plans))
    print(f"\njax {importlib.metadata.version('jax')}, {datetime.date.today()}")


if __name__ == "__main__":
    app.run(main)
