"""One session on one GPU: are the numerics right, how fast is the step, where does its time go. Prints Markdown tables.

  python -m benchmarks.gpu [--sections=numbers,batch,kernels,…] [--minutes=9] [--out=ROWS.jsonl] [--smoke]

`numbers` comes first, and nothing else runs if it fails: it compares attention kernels with the plain one in float32,
and losses of 20 steps with the CPU's. Each case is timed in its own process (launch.bench), so that running out of
memory ends only that case. No case starts after --minutes, so that results are printed before a session ends; --out
keeps every row. --smoke runs everything at small sizes, on any device. `peer` needs torch, here or in --torch_python.
"""

import bisect
import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags

ROOT = pathlib.Path(__file__).parent.parent
CASE_LIMIT_S = 300
GPT2, LLAMA = "configs/gpt2.py", "configs/llama.py"
# Flags for every case of a recipe, and flags that make the recipe small for --smoke.
FIELDS: dict[str, dict[str, Any]] = {
    GPT2: {"model.vocab_size": 50257, "grad_accum_steps": 1, "global_batch_size": 32},
    LLAMA: {"model.vocab_size": 32000, "grad_accum_steps": 1, "global_batch_size": 4, "data.seq_len": 4096},
}
SMOKE = {
    "model.vocab_size": 256, "data.seq_len": 64, "global_batch_size": 2, "model.num_layers": 2, "model.embed_dim": 64,
    "model.num_heads": 4,
}  # fmt: skip
SMOKE_OF = {GPT2: SMOKE, LLAMA: SMOKE | {"model.num_kv_heads": 2, "model.mlp_dim": 128}}


@dataclasses.dataclass(frozen=True)
class Case:
    section: str
    label: str
    recipe: str
    fields: dict[str, Any]
    arguments: tuple[str, ...] = ()


def cases() -> Iterator[Case]:
    for batch in (16, 32, 64):
        yield Case("batch", f"GPT-2 124M, {batch} x 1024", GPT2, {"global_batch_size": batch})
    for kernel in ("xla", "cudnn"):
        yield Case("kernels", f"GPT-2 124M, attention {kernel}", GPT2, {"model.attention": kernel})
    yield Case("kernels", "GPT-2 124M, layers scanned", GPT2, {"model.scan_layers": True})
    for chunk in (1024, 4096, 16384, 0):
        yield Case("loss", f"GPT-2 124M, loss_chunk_tokens {chunk}", GPT2, {"loss_chunk_tokens": chunk})
    for remat in ("none", "dots", "full"):
        yield Case(
            "remat", f"GPT-2 124M, 64 x 1024, remat {remat}", GPT2, {"model.remat": remat, "global_batch_size": 64}
        )
    yield Case("peer", "GPT-2 124M, beside PyTorch", GPT2, {}, ("--peer", "--rounds=5"))
    for remat, batch in (("full", 4), ("full", 8), ("dots", 4), ("none", 2)):
        fields = {"model.remat": remat, "global_batch_size": batch}
        yield Case("llama", f"Llama 1.1B, {batch} x 4096, remat {remat}", LLAMA, fields)
    fields = {"model.remat": "none", "global_batch_size": 4, "optimizer.moments_dtype": "bfloat16"}
    yield Case("llama", "Llama 1.1B, 4 x 4096, remat none, moments bfloat16", LLAMA, fields)


SECTIONS = ("numbers", *dict.fromkeys(case.section for case in cases()), "loop", "profile")
SELECTED = flags.DEFINE_list("sections", list(SECTIONS), f"Some of {', '.join(SECTIONS)}.")
MINUTES = flags.DEFINE_float("minutes", 9.0, "No case is begun after this.")
OUT = flags.DEFINE_string("out", None, "File to which every row is appended, as JSON.")
TORCH_PYTHON = flags.DEFINE_string("torch_python", sys.executable, "A Python that has torch.")
ON_SMOKE = flags.DEFINE_bool("smoke", False, "Everything in small, on any device.")
HERE = flags.DEFINE_bool("here", False, "Only check the numerics, in this process (which then holds the GPU).")


# Numbers


def check_numbers() -> bool:
    """Prints each comparison; returns False if a difference is too large."""
    import jax

    lengths = (64, 128) if ON_SMOKE.value else (1000, 1024, 4096)
    shapes = [(2, t, h, kv, d) for t, h, kv, d in zip(lengths, (12, 12, 32), (4, 12, 4), (64, 64, 128), strict=False)]
    found = [attention_agrees(kernel, shape) for shape in shapes for kernel in kernels_here()]
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    exact = losses(cpu, "float32")
    # Products are true float32 on both ("highest"), so only the order of sums differs; in bfloat16 rounding does, too.
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2)):
        there = losses(device, dtype)
        worst = max(abs(a - b) / b for a, b in zip(there, exact, strict=True))
        print(f"losses of 20 steps in {dtype} on {device.device_kind}, {there[0]:.4f} to {there[-1]:.4f}: "
              f"{worst:.2e} from float32 on the CPU at most (allowed {tolerance:.0e})")  # fmt: skip
        found.append(worst <= tolerance)
    return all(found)


def kernels_here() -> tuple[str, ...]:
    import jax

    return ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",)


def attention_agrees(name: str, shape: tuple[int, int, int, int, int]) -> bool:
    """Whether a bfloat16 kernel and its gradients are within 1 % of float32, or twice the plain kernel's error.

    Args:
      shape: (b, t, h, k, d).
    """
    import jax
    import jax.numpy as jnp

    from model import kernels

    b, t, h, kv, d = shape
    heads = (h, kv, kv, h)
    q, k, v, g = (jax.random.normal(jax.random.key(i), (b, t, n, d)) for i, n in enumerate(heads))

    def all_of(kernel: Callable, dtype: str) -> list[Any]:
        def run(q, k, v, g):
            y, backward = jax.vjp(kernel, *(x.astype(dtype) for x in (q, k, v)))
            return [y, *backward(g.astype(dtype))]

        return jax.jit(run)(q, k, v, g)

    spec = kernels.AttentionSpec(scale=d**-0.5)

    def plain(q, k, v):
        return kernels.xla(q, k, v, kernels.Mask(jnp.arange(t)), spec)

    with jax.default_matmul_precision("highest"):
        exact = all_of(plain, "float32")

    def errors(kernel: Callable) -> list[float]:
        pairs = zip(all_of(kernel, "bfloat16"), exact, strict=True)
        return [float(jnp.linalg.norm(x.astype("float32") - y) / jnp.linalg.norm(y)) for x, y in pairs]

    of_plain = errors(plain)
    of_kernel = errors({"xla": plain, "cudnn": functools.partial(kernels.cudnn, spec=spec)}[name])
    shown = ", ".join(f"{what} {e:.1e}" for what, e in zip(("y", "dq", "dk", "dv"), of_kernel, strict=True))
    allowed = [max(0.01, 2 * e) for e in of_plain]
    ok = all(e <= a for e, a in zip(of_kernel, allowed, strict=True)) and max(of_plain) < 0.02
    print(f"attention {name}, b t h k d {shape}: {shown} from float32 ({'ok' if ok else 'OFF'})")
    return ok


def losses(device: Any, dtype: str) -> list[float]:
    """The losses of 20 steps of a small model on one device; each row of tokens counts up by a constant, modulo 512."""
    import jax
    import numpy as np

    from data.batch import from_tokens
    from trainer import sharding
    from trainer.config import from_dict
    from trainer.state import Program
    from trainer.step import make_train_step

    model = {"num_layers": 2, "embed_dim": 128, "num_heads": 2, "vocab_size": 512, "max_seq_len": 128, "dtype": dtype}
    optimizer = {"warmup_steps": 5, "peak_lr": 3e-3}
    config = from_dict({"global_batch_size": 8, "data": {"seq_len": 128}, "model": model, "optimizer": optimizer})
    mesh = sharding.mesh_of(dict.fromkeys(sharding.MESH_AXES, 1), [device])
    rng = np.random.default_rng(0)
    first, stride = rng.integers(512, size=(20, 8, 1)), rng.integers(1, 4, size=(20, 8, 1))
    tokens = ((first + stride * np.arange(129)) % 512).astype(np.uint16)
    with jax.default_device(device), jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        program = Program(config, mesh)
        step, state, found = make_train_step(program), program.init(), []
        for rows in tokens:
            batch = jax.device_put(from_tokens(rows), sharding.named(mesh, "batch"))
            state, metrics = step(state, batch, np.uint32(0))
            found.append(float(metrics["train/loss"]))
    return found


# Times


def fields_of(recipe: str, fields: dict[str, Any]) -> list[str]:
    """Flags of a case. With --smoke small sizes replace the recipe's, and the available kernel replaces a GPU's."""
    values = FIELDS[recipe] | fields
    if ON_SMOKE.value:
        values |= SMOKE_OF[recipe] | {"model.attention": "auto"}
    return [f"--config={recipe}", *(f"--config.{name}={value}" for name, value in values.items())]


def bench(case: Case, *arguments: str, **environment: str) -> dict[str, Any]:
    """launch.bench's row with section and label; if it fails, only these two and `error`, the reason."""
    length = ("--rounds=2", "--steps=2", "--warmup=1") if ON_SMOKE.value else ("--rounds=3", "--steps=10", "--warmup=5")
    torch = ("--torch_python=" + TORCH_PYTHON.value,)
    argv = [*fields_of(case.recipe, case.fields), *length, *torch, *case.arguments, *arguments]
    row = {"section": case.section, "label": case.label}
    try:
        result = subprocess.run(
            [sys.executable, "-m", "launch.bench", *argv], cwd=ROOT, text=True, capture_output=True,
            env=os.environ | environment, timeout=CASE_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return row | {"error": f"no row within {CASE_LIMIT_S} s"}
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        return row | {"error": f"exit {result.returncode}: {lines[-1][:300]}"}
    return row | json.loads(result.stdout.splitlines()[-1])


COLUMNS = ("tokens/s", "MFU", "TFLOP/s", "step ms (least, most)", "peak GiB", "compile s")


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {row['label']} | {row['error']} |" + " |" * (len(COLUMNS) - 1)
    step, least, most = (row[f"step_time_s{end}"] * 1e3 for end in ("", "_min", "_max"))
    mfu = f"{100 * row['mfu']:.1f} %" if "mfu" in row else "unknown peak"
    return (
        f"| {row['label']} | {row['tokens_per_s']:,.0f} | {mfu} | {row['tflops_per_device']:.1f} | "
        f"{step:.1f} ({least:.1f}, {most:.1f}) | {row['peak_memory_gib']:.1f} | {row['compile_s']:.0f} |"
    )


def table(section: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n### {section}\n| | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for row in rows:
        print(line(row))
        if "ratio" in row:
            print(
                f"| {row['peer']}, PyTorch {row['peer_torch']}{', compiled' if row['peer_compiled'] else ''} | "
                f"{row['peer_tokens_per_s']:,.0f} (ours is {row['ratio']:.2f} x) | | | "
                f"{row['peer_step_time_s'] * 1e3:.1f} ({row['peer_step_time_s_min'] * 1e3:.1f}, "
                f"{row['peer_step_time_s_max'] * 1e3:.1f}) | | |"
            )


# The loop around the step


def loop() -> dict[str, Any]:
    """launch.train on random tokens beside the bare step: what Python, metrics, data and saves cost, in s per step."""
    import numpy as np

    steps, save = (12, 6) if ON_SMOKE.value else (120, 40)
    bare = bench(Case("loop", "the bare step", GPT2, {}))
    if "error" in bare:
        return bare
    with tempfile.TemporaryDirectory() as temporary:
        folder, run = pathlib.Path(temporary), pathlib.Path(temporary, "run")
        tokens = bare["tokens_per_step"] * (steps + 1)
        for name, number in (("train", tokens), ("val", 2 * bare["tokens_per_step"])):
            ids = np.random.default_rng(0).integers(bare["vocab_size"], size=number, dtype=np.uint16)
            ids.tofile(folder / f"{name}.bin")
        fields = {
            "data.path": folder / "*.bin", "data.format": "nanogpt", "num_train_steps": steps, "metrics.every_steps": 2,
            "metrics.tensorboard": False, "eval.every_steps": 0, "eval.num_windows": 8, "checkpoint.every_steps": save,
            "checkpoint.every_minutes": 0.0,
        }  # fmt: skip
        argv = [sys.executable, "-m", "launch.train", *fields_of(GPT2, fields), f"--workdir={run}"]
        result = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            return {"section": "loop", "label": "launch.train", "error": f"exit {result.returncode}: {lines[-1][:300]}"}
        rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in rows if "train/loss" in row][2:]
    step = statistics.median(row["perf/step_time_s"] for row in training)
    stalls = [row["perf/checkpoint_stall_s"] for row in training if row["perf/checkpoint_stall_s"]]
    return {
        "section": "loop",
        "label": "launch.train",
        "bare_step_s": bare["step_time_s"],
        "step_s": step,
        "data_wait_s": statistics.median(row["perf/data_wait_s"] / 2 for row in training),
        "save_stalls_s": stalls,
    }


def print_loop(row: dict[str, Any]) -> None:
    print("\n### loop\n| | |\n|---|---|")
    if "error" in row:
        print(f"| {row['label']} | {row['error']} |")
        return
    bare, step = row["bare_step_s"], row["step_s"]
    print(f"| step of launch.bench | {bare * 1e3:.2f} ms |")
    print(f"| launch.train: with loader, metrics, Python | {step * 1e3:.2f} ms, {100 * (step / bare - 1):+.1f} % |")
    print(f"| of that waiting for data | {row['data_wait_s'] * 1e3:.3f} ms, {100 * row['data_wait_s'] / step:.2f} % |")
    shown = ", ".join(f"{stall:.2f}" for stall in row["save_stalls_s"])
    median = statistics.median(row["save_stalls_s"])
    print(f"| stall of an async save | {shown} s; the median is {median / step:.1f} steps |")


# Where the time goes


def profile() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        # In a trace, kernels inside a CUDA graph do not name their operation.
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
        case = Case("profile", "GPT-2 124M, no CUDA graphs", GPT2, {})
        row = bench(case, f"--trace={folder}", XLA_FLAGS=xla_flags)
        return row if "error" in row else row | {"shares": shares(pathlib.Path(folder))}


def shares(folder: pathlib.Path) -> dict[str, float]:
    """Fractions of the traced time by category; with `gaps`, when the device did nothing, they add up to 1.

    Args:
      folder: the one that launch.bench --trace wrote.
    """
    category = categories((folder / "step.hlo.txt").read_text())
    seconds: dict[str, float] = collections.defaultdict(float)
    spans: list[tuple[float, float]] = []
    for events in device_lines(next(folder.glob("plugins/profile/*/*.xplane.pb"))):
        for (start, end, operation, kernel), own in own_times(events):
            seconds[category.get(operation) or category_of_kernel(kernel)] += own
            spans.append((start, end))
    if not spans:
        return {"no operation of the device is in the trace": 1.0}
    busy, until = 0.0, min(start for start, _ in spans)
    length = max(end for _, end in spans) - until
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    total = sum(seconds.values())
    return {name: s / total * busy / length for name, s in sorted(seconds.items(), key=lambda item: -item[1])} | {
        "gaps": 1 - busy / length
    }


Event = tuple[float, float, str, str]  # start, end, operation of the program, name of the kernel


def device_lines(path: pathlib.Path) -> Iterator[list[Event]]:
    """Events of a program's operations, for each stream of each GPU or each thread of a CPU."""
    import jax

    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        on_gpu = plane.name.startswith("/device:GPU")
        for stream in plane.lines:
            if not (stream.name.startswith("Stream") if on_gpu else plane.name == "/host:CPU"):
                continue
            events = []
            for event in stream.events:
                operation = str(dict(event.stats).get("hlo_op", ""))
                if (operation or on_gpu) and not event.name.startswith("end: "):
                    events.append((event.start_ns, event.start_ns + event.duration_ns, operation, event.name))
            if events:
                yield events


def own_times(events: list[Event]) -> Iterator[tuple[Event, float]]:
    """Each event with its self time, without the events inside it: a loop contains the operations of its body."""
    events = sorted(events, key=lambda e: (e[0], -e[1]))
    starts = [e[0] for e in events]
    for i, event in enumerate(events):
        inside, until = 0.0, event[0]
        for start, end, *_ in events[i + 1 : bisect.bisect_left(starts, event[1])]:
            inside += max(0.0, min(end, event[1]) - max(start, until))
            until = max(until, end)
        yield event, max(0.0, event[1] - event[0] - inside)


PRODUCT = re.compile(r"gemm|matmul|cublas|cutlass|nvjet|xmma|\bdot|_dot|convolution", re.IGNORECASE)
FUSED_ATTENTION = re.compile(r"fmha|flash|sdpa", re.IGNORECASE)


def category_of_kernel(name: str) -> str:
    """The category of a kernel that does not name its operation."""
    if FUSED_ATTENTION.search(name):
        return "attention"
    return "weight products" if PRODUCT.search(name) else "not attributed"


def categories(hlo: str) -> dict[str, str]:
    """Maps each operation of a compiled program to a category, by the files of this project in which it was traced."""
    files_of = stack_files(hlo)
    found = {}
    for name, rest in re.findall(r"^\s*(?:ROOT )?%(\S+) = (.*)$", hlo, re.MULTILINE):
        frame = re.search(r"stack_frame_id=(\d+)", rest)
        source = re.search(r'source_file="([^"]*)"', rest)
        files = files_of(int(frame[1])) if frame else [pathlib.Path(source[1]).name] if source else []
        op_name = re.search(r'op_name="([^"]*)"', rest)
        opcode = re.search(r"(?:^|\s)([a-z][\w-]*)\(", rest)
        called = re.findall(r'(?:custom_call_target="|calls=%)([^",]*)', rest)
        what = " ".join([name, opcode[1] if opcode else "", *called])  # not the operands, whose names are irrelevant
        if FUSED_ATTENTION.search(what) or "kernels.py" in files:
            found[name] = "attention"
        elif "loss.py" in files:
            found[name] = "loss"
        elif op_name and "jvp" not in op_name[1] and "step.py" in files:
            found[name] = "optimizer and metrics"
        elif PRODUCT.search(what):
            found[name] = "weight products"
        elif files:
            found[name] = "norms, activations, rotations, residuals"
        else:
            found[name] = "copies and the like, without a source"
    return found


def stack_files(hlo: str) -> Callable[[int], list[str]]:
    """From a stack_frame_id to the names of the files of its frames, by the tables at the head of the text."""

    def table(name: str) -> dict[int, str]:
        _, _, rest = hlo.partition(f"\n{name}\n")
        return {int(i): text for i, text in re.findall(r"^(\d+) (.*)$", rest.partition("\n\n")[0], re.MULTILINE)}

    def number(text: str, field: str) -> int:
        match = re.search(rf"{field}=(\d+)", text)
        return int(match[1]) if match else 0

    names, locations, frames = table("FileNames"), table("FileLocations"), table("StackFrames")

    def files(frame: int) -> list[str]:
        found = []
        while frame in frames:
            location = locations.get(number(frames[frame], "file_location_id"), "")
            found.append(pathlib.Path(names.get(number(location, "file_name_id"), "").strip('"')).name)
            frame = number(frames[frame], "parent_frame_id") - 1  # the field is the parent's id + 1, or 1 for none
        return found

    return files


def print_profile(row: dict[str, Any]) -> None:
    table("profile", [row])
    if "error" not in row:
        print("\n| share of the step | |\n|---|---|")
        for name, share in row["shares"].items():
            print(f"| {name} | {100 * share:.1f} % |")


def main(argv: list[str]) -> None:
    unknown = set(SELECTED.value) - set(SECTIONS)
    if unknown:
        sys.exit(f"error: --sections has {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if HERE.value:
        sys.exit(not check_numbers())
    start = time.monotonic()
    if "numbers" in SELECTED.value:
        small = ["--smoke"] if ON_SMOKE.value else []
        if subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--here", *small], cwd=ROOT).returncode:
            sys.exit("error: the numerics are off, so nothing is timed")
    rows: list[dict[str, Any]] = []

    def take(measure: Callable[[], dict[str, Any]]) -> None:
        row = measure()
        rows.append(row)
        print(row["label"], row.get("error", "done"), file=sys.stderr, flush=True)
        if OUT.value:
            with open(OUT.value, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")

    selected = [case for case in cases() if case.section in SELECTED.value]
    if ON_SMOKE.value:  # one case of a section: each takes a compilation
        selected = list({case.section: case for case in selected}.values())
    measures: list[Callable[[], dict[str, Any]]] = [functools.partial(bench, case) for case in selected]
    measures += [{"loop": loop, "profile": profile}[name] for name in ("loop", "profile") if name in SELECTED.value]
    left_out = 0
    for measure in measures:
        if time.monotonic() - start > 60 * MINUTES.value:
            left_out += 1
        else:
            take(measure)
    report(rows)
    if left_out:
        print(f"\n{left_out} case(s) did not start within {MINUTES.value} minutes.")
    # A case that does not fit a device is a finding; a wrong loss is a failure.
    sys.exit(any("exit 4" in row.get("error", "") for row in rows))


def report(rows: list[dict[str, Any]]) -> None:
    about = next((row for row in rows if "device" in row), None)
    if about:
        small = "SMOKE TEST, sizes are not those of the labels, times mean nothing: " if ON_SMOKE.value else ""
        print(f"\n{small}{about['device']}, jax {about['jax']}, {about['dtype']}, MFU by {about['flops_formula']}")
    by_section: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_section.setdefault(row["section"], []).append(row)
    for section, of_section in by_section.items():
        if section == "loop":
            print_loop(of_section[0])
        elif section == "profile":
            print_profile(of_section[0])
        else:
            table(section, of_section)


if __name__ == "__main__":
    app.run(main)
