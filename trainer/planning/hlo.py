"""Reads the text of a compiled program (HLO after partitioning and optimization): collectives, loops, shapes, kernels.

launch.plan and tests use it to find what a step sends and keeps. It does not need JAX. The text is that of
`jax.stages.Compiled.as_text()`, for TPU, GPU or CPU.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
BITS = {"pred": 8, "token": 0, "bf16": 16, "c64": 64, "c128": 128}  # other names end with the bits: f32, s4


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str  # 'bf16[4,8]{1,0}', or a tuple '(f32[2]{0}, f32[])'
    opcode: str
    operands: tuple[str, ...]  # names in the same computation
    number: int | None  # value of an integer constant, or number of a parameter
    attributes: str  # the rest of the instruction's text

    def attribute(self, name: str) -> str | None:
        """The value of an attribute, such as 'cond.1' if the text has condition=%cond.1; None if there is none."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found and found[1]

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop. `trips` is None if the text does not say; `depth` counts the loops around it."""

    name: str
    trips: int | None
    depth: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: one of KINDS.
      axes: mesh axes along which the devices of a group differ; () if not known.
      group_size: devices in a group; 2 for a permute.
      bytes: the size of the full buffer on one device (the larger of operand and result), in one execution; the sum
        over all arrays that were combined.
      sliced: of an all-reduce, the bytes of arrays of which every device uses only its own shard. XLA turns many
        reduce-scatters into such all-reduces, mostly on TPUs; they are sent like any other all-reduce.
      dtype: 'bf16'; 'bf16+f32' if arrays of several dtypes were combined.
      trips: how often each loop around it runs, outermost first; None if not known (counted as 1).
      crosses_slices: whether a group has devices of several slices.
      count: executions in one call of the program.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    bytes: int
    sliced: int
    dtype: str
    trips: tuple[int | None, ...]
    crosses_slices: bool
    op_name: str

    @property
    def depth(self) -> int:
        return len(self.trips)

    @property
    def count(self) -> int:
        return math.prod(t or 1 for t in self.trips)

    @property
    def sent(self) -> int:
        """Bytes that a device sends in one execution, by ring algorithms (Patarasuk and Yuan, 2009)."""
        if self.kind == "collective-permute":
            return self.bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return round(rounds * self.bytes * (self.group_size - 1) / self.group_size)


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of the program. It is not `materialized` inside a fusion or reducer, which gives it no buffer."""

    dtype: str
    dims: tuple[int, ...]
    materialized: bool


@dataclasses.dataclass(frozen=True)
class Row:
    """Collectives of one kind over the same axes, in the layers or outside of them."""

    kind: str
    axes: tuple[str, ...]
    in_layers: bool  # in a loop of num_layers trips, or one less if the compiler has peeled one off
    executions: int  # in a step
    bytes: int  # full buffers of all executions in a step, on one device
    sent: int  # by a device in a step
    sliced: int  # of all executions; see Collective
    crosses_slices: bool


def collectives(text: str, mesh_axes: dict[str, int], num_slices: int = 1) -> list[Collective]:
    """The collectives of a program in execution order; the parts of an asynchronous collective count as one.

    Device numbers in the text are positions in `mesh.devices.flat` (of the mesh that the program was jitted for), never
    `Device.id`, so the sizes of the axes are sufficient. Every branch of a conditional counts as taken.

    Args:
      mesh_axes: name to size, as in dict(mesh.shape).
      num_slices: number of slices of the mesh's devices, one after the other, as in trainer.sharding.mesh_of.

    Raises:
      ValueError: the text is not an HLO module.
    """
    program = _Program(text)
    found, seen = [], set()
    for computation, instruction, loops, fusion in program.walk():
        kind = _kind(instruction, fusion)
        if kind is None:
            continue
        path = tuple(loop.name for loop in loops)
        operands = program.operand_types(computation, instruction)
        channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
        if fusion is not None and channel:
            # The TPU compiler puts a copy into each fusion between start and end of an asynchronous collective.
            key = (channel[1], kind, path, tuple(operands))
            if key in seen:
                continue
            seen.add(key)
        groups = _groups(instruction, mesh_axes)
        size = len(groups[0]) if groups else math.prod(mesh_axes.values())
        arrays = [array for operand in operands for array in _arrays(operand)]
        total = sum(_num_bytes(*array) for array in arrays) * (size if kind == "all-gather" else 1)
        sliced = program.sliced_bytes(computation, instruction, size) if kind == "all-reduce" else 0
        axes, crosses = _span(groups, mesh_axes, num_slices)
        dtype = "+".join(sorted({dtype for dtype, _ in arrays if _num_bytes(dtype, ())}))
        op_name = instruction.op_name or (fusion.op_name if fusion else "")
        trips = tuple(loop.trips for loop in loops)
        found.append(Collective(kind, axes, size, total, sliced, dtype, trips, crosses, op_name))
    return found


def loops(text: str) -> list[Loop]:
    """The while loops that the program runs, each before those inside it."""
    found = {}
    for _, _, around, _ in _Program(text).walk():
        found.update({tuple(loop.name for loop in around[: i + 1]): loop for i, loop in enumerate(around)})
    return list(found.values())


def shapes(text: str) -> set[Shape]:
    """The arrays that instructions return; elements of tuples are listed separately."""
    program = _Program(text)
    real = {name for name, *_ in program.walk(into_fusions=False)}
    return {
        Shape(dtype, dims, name in real)
        for name, instructions in program.computations.items()
        for instruction in instructions.values()
        for dtype, dims in _arrays(instruction.type)
    }


def custom_calls(text: str) -> collections.Counter[str]:
    """How many instructions call each custom-call target; 'tpu_custom_call:NAME' for the Pallas kernel NAME."""
    found: collections.Counter[str] = collections.Counter()
    for instructions in _Program(text).computations.values():
        for instruction in instructions.values():
            target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
            if target and target[1] == "tpu_custom_call":
                found["tpu_custom_call:" + re.sub(r"\.[\d.]+$", "", instruction.name)] += 1
            elif target:
                found[target[1]] += 1
    return found


def summary(found: list[Collective], num_layers: int) -> list[Row]:
    """Sums of the collectives by kind, axes and place (in the layers or not); the sum that sends most comes first."""
    rows: dict[tuple, list[Collective]] = {}
    for c in found:
        in_layers = num_layers > 1 and any(trips in (num_layers, num_layers - 1) for trips in c.trips)
        rows.setdefault((c.kind, c.axes, in_layers, c.crosses_slices), []).append(c)
    added = [
        Row(
            kind, axes, in_layers,
            executions=sum(c.count for c in group),
            bytes=sum(c.count * c.bytes for c in group),
            sent=sum(c.count * c.sent for c in group),
            sliced=sum(c.count * c.sliced for c in group),
            crosses_slices=crosses,
        )
        for (kind, axes, in_layers, crosses), group in rows.items()
    ]  # fmt: skip
    return sorted(added, key=lambda row: -row.sent)


Site = tuple[str, Instruction, tuple[Loop, ...], Instruction | None]


class _Program:
    """The computations of a module by name, each a dict of instructions by name."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        for lines in _statements(text):
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(", lines)
            if header:
                self.computations[header[2]] = current = {}
                if header[1]:
                    self.entry = header[2]
            else:
                instruction = _parse(lines)
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("the text has no ENTRY computation, so it is not the HLO of a program")

    def walk(self, into_fusions: bool = True) -> Iterator[Site]:
        """(computation, instruction, loops around it, fusion that contains it) in execution order."""
        yield from self._walk(self.entry, (), None, into_fusions)

    def _walk(
        self, name: str, around: tuple[Loop, ...], fusion: Instruction | None, into_fusions: bool
    ) -> Iterator[Site]:
        for instruction in self.computations.get(name, {}).values():
            yield name, instruction, around, fusion
            if instruction.opcode == "while":
                body, trips = instruction.attribute("body"), self._trips(name, instruction)
                loop = Loop(instruction.name, trips, len(around), instruction.op_name)
                yield from self._walk(body or "", (*around, loop), fusion, into_fusions)
                continue
            inside = instruction if instruction.opcode == "fusion" else fusion
            if inside is None or into_fusions:
                for called in _called(instruction):
                    yield from self._walk(called, around, inside, into_fusions)

    def operand_types(self, computation: str, instruction: Instruction) -> list[str]:
        known = self.computations[computation]
        operands = instruction.operands[:1] if instruction.opcode == "send" else instruction.operands
        return [known[name].type for name in operands if name in known]

    def _trips(self, computation: str, loop: Instruction) -> int | None:
        """How often a loop runs, by the compiler's note or by the counter that its condition compares; else None."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = loop.attribute("condition") or ""
        comparisons = [i for i in self.computations.get(condition, {}).values() if i.opcode == "compare"]
        if len(comparisons) != 1 or len(comparisons[0].operands) != 2:
            return None
        start, limit = (self._start(computation, loop, condition, name) for name in comparisons[0].operands)
        if start is None or limit is None:
            return None
        distance = {"LT": limit - start, "LE": limit - start + 1, "GT": start - limit, "GE": start - limit + 1}
        direction = re.search(r"direction=(\w\w)", comparisons[0].attributes)
        trips = distance.get(direction[1] if direction else "")
        return None if trips is None else max(trips, 0)

    def _start(self, computation: str, loop: Instruction, condition: str, name: str) -> int | None:
        """The integer `name` of a loop's condition, as it is at the first trip; None if it is not known."""
        instruction = self.computations[condition].get(name)
        while instruction and instruction.opcode in ("copy", "bitcast", "convert"):
            instruction = self.computations[condition].get(instruction.operands[0])
        if instruction is None or instruction.opcode != "get-tuple-element":
            return _constant(instruction)
        known = self.computations[computation]
        element = known.get(loop.operands[0])
        for _ in range(100):  # back to the instruction that made this element of the loop's initial state
            if element is None or element.opcode == "constant":
                return _constant(element)
            if element.opcode == "tuple":
                element = known.get(element.operands[_index(instruction)])
            elif element.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape"):
                element = known.get(element.operands[0])
            else:
                return None
        return None

    def sliced_bytes(self, computation: str, instruction: Instruction, devices: int) -> int:
        """Bytes of the results of which only slices are used; the number of slices per result divides `devices`."""
        users = self._users(computation)
        if instruction.opcode.endswith("-start"):
            instruction = self.computations[computation][users[instruction.name][0]]  # -done has the final type
        if not instruction.type.startswith("("):
            results = {instruction.name: instruction.type}
        else:
            elements = [self.computations[computation][user] for user in users[instruction.name]]
            results = {e.name: e.type for e in elements if e.opcode == "get-tuple-element"}
        sliced = [kind for name, kind in results.items() if self._only_sliced(computation, name, devices)]
        return sum(_num_bytes(*array) for kind in sliced for array in _arrays(kind))

    def _only_sliced(self, computation: str, name: str, devices: int) -> bool:
        known, users = self.computations[computation], self._users(computation)[name]
        return bool(users) and all(self._slices(computation, known[user], name, devices) for user in users)

    def _slices(self, computation: str, user: Instruction, name: str, devices: int) -> bool:
        if user.opcode == "dynamic-slice" and user.operands[0] == name:
            whole = _arrays(self.computations[computation][name].type)[0][1]
            kept = _arrays(user.type)[0][1]
            differ = [(k, w) for k, w in zip(kept, whole, strict=True) if k != w]
            return len(differ) == 1 and (devices * differ[0][0]) % differ[0][1] == 0
        if user.opcode in ("bitcast", "copy", "convert", "copy-start", "copy-done", "reshape"):
            return self._only_sliced(computation, user.name, devices)
        if user.opcode == "fusion":
            inside = user.attribute("calls") or ""
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            parameters = [i for i in self.computations[inside].values() if i.opcode == "parameter"]
            return all(self._only_sliced(inside, p.name, devices) for p in parameters if p.number in places)
        return False

    @functools.cache  # noqa: B019
    def _users(self, computation: str) -> dict[str, list[str]]:
        users: dict[str, list[str]] = collections.defaultdict(list)
        for instruction in self.computations[computation].values():
            for operand in set(instruction.operands):
                users[operand].append(instruction.name)
        return users


def _constant(instruction: Instruction | None) -> int | None:
    return instruction.number if instruction and instruction.opcode == "constant" else None


def _index(element: Instruction) -> int:
    found = re.search(r"\bindex=(\d+)", element.attributes)
    return int(found[1]) if found else 0


def _called(instruction: Instruction) -> list[str]:
    """The computations that the instruction runs, except those of a loop and reducers."""
    if instruction.opcode.endswith(("-done", "-update")):
        return []  # the -start instruction has the computations
    names = [instruction.attribute(a) for a in ("calls", "true_computation", "false_computation")]
    if instruction.opcode == "call":
        names.append(instruction.attribute("to_apply"))
    for many in re.findall(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}", instruction.attributes):
        names += re.findall(r"[\w.\-]+", many)
    return [name for name in names if name]


def _kind(instruction: Instruction, fusion: Instruction | None) -> str | None:
    kind = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
    if kind == "send":
        # Hosts send between TPU slices. Only the send of each pair is counted, not the recv.
        done = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
        name = done[1].lower().replace("_", "-") if done else ""
        return name if name in KINDS else "collective-permute"
    if kind == "all-reduce" and fusion is not None and "all-reduce-scatter" in (fusion.attribute("calls") or ""):
        return "reduce-scatter"  # the TPU compiler fuses a reduce-scatter's all-reduce and slice under this name
    return kind if kind in KINDS else None


def _groups(instruction: Instruction, mesh_axes: dict[str, int]) -> list[list[int]]:
    """The groups of devices that communicate, in any notation of HLO; [] if all do, or if the text does not say.

    In a program for several TPU slices the text may have only the groups of the first slice, because all slices have
    the same groups.
    """
    text = instruction.attributes
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", text)
    lists = re.search(r"replica_groups=\{(\{.*?\})\}", text)
    if pairs or lists:
        found = pairs or lists
        assert found
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _iota(*iota.groups()).tolist()
    axes = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(([^{]*)\))? \{(.*?)\}", text)
    if axes:
        return _axis_groups(*axes.groups())
    slices = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}"', text)
    if slices:
        across, within = (_numbers(part) for part in slices.groups())
        per_slice = math.prod(mesh_axes.values()) // len(across)
        return [[i * per_slice + device for i in range(len(across))] for device in within]
    return []


def _numbers(text: str) -> list[int]:
    """'0:2,5' -> [0, 1, 2, 5]"""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        found += range(int(first), int(last or first) + 1)
    return found


def _iota(shape: str, source: str, order: str | None) -> np.ndarray:
    """0, 1, 2, … reshaped to `source`, transposed by `order`, reshaped to `shape`; e.g. '4,2', '2,4', '1,0'."""
    dims = _numbers(source)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(_numbers(order)) if order else ids).reshape(_numbers(shape))


def _axis_groups(mesh: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """The groups along "'y'", or along a part of this axis, "'y':(1)2", of a mesh "'x'=2,'y'=4".

    The mesh's devices are given as "[4,2]T(1,0)" or "3,1,2,0". The axes may be XLA's own ('axis_0'); only the
    device numbers matter.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    iota = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids or "")
    if iota:
        ids = _iota(str(ids.size), *iota.groups())
    elif device_ids:
        ids = np.array(_numbers(device_ids.rpartition("]")[2]))
    dims: list[int] = []
    spanned: list[int] = []
    parts = {name: (int(before or 1), int(size or 0)) for name, before, size in _axis_parts(axes)}
    for name, whole in sizes.items():
        before, size = parts.get(name, (whole, 1))
        spanned.append(len(dims) + 1)
        dims += [before, size or whole, whole // before // (size or whole)]
    ids = np.moveaxis(ids.reshape(dims), spanned, range(-len(spanned), 0))
    return ids.reshape(-1, math.prod(dims[i] for i in spanned)).tolist()


def _axis_parts(axes: str) -> list[tuple[str, str, str]]:
    return re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?(?:,|$)", axes)


def _span(groups: list[list[int]], mesh_axes: dict[str, int], num_slices: int) -> tuple[tuple[str, ...], bool]:
    """The mesh axes along which members of a group differ, and whether a group has devices of several slices."""
    total = math.prod(mesh_axes.values())
    groups = groups or [list(range(total))]
    if any(not 0 <= i < total for group in groups for i in group):
        return (), False
    varies, crosses = np.zeros(len(mesh_axes), bool), False
    for group in groups:
        places = np.array(np.unravel_index(group, tuple(mesh_axes.values())))  # [axes, devices]
        varies |= (places != places[:, :1]).any(1)
        crosses |= len({i // (total // num_slices) for i in group}) > 1
    return tuple(itertools.compress(mesh_axes, varies)), crosses


def _arrays(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """'bf16[4,8]{1,0}' -> [('bf16', (4, 8))]; for a tuple type, all its elements."""
    found = re.findall(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]", kind)
    return [(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)) for dtype, dims in found]


def _num_bytes(dtype: str, dims: tuple[int, ...]) -> int:
    bits = BITS.get(dtype)
    if bits is None:
        number = re.match(r"[a-z]+(\d+)", dtype)
        bits = int(number[1]) if number else 0
    return math.prod(dims) * bits // 8 if bits >= 8 else -(-math.prod(dims) * bits // 8)


def _statements(text: str) -> Iterator[str]:
    """Headers of computations, and instructions, which may contain line feeds (kernel_metadata of Pallas)."""
    lines: list[str] = []
    for line in text.splitlines():
        if re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line) or re.match(r"(ENTRY )?%?[\w.\-]+ \(.*\{$", line):
            if lines:
                yield "\n".join(lines)
            lines = [line.strip()]
        elif lines and line != "}":
            lines.append(line)
    if lines:
        yield "\n".join(lines)


def _parse(text: str) -> Instruction:
    name, rest = text.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, rest = rest.split("(", 1)
    end = _closing("(" + rest) - 2
    arguments, attributes = rest[:end], rest[end + 1 :]
    number = re.fullmatch(r"-?\d+", arguments) if opcode in ("constant", "parameter") else None
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name.lstrip("%"), kind, opcode, operands, int(arguments) if number else None, attributes)


def _closing(text: str) -> int:
    """The index after the parenthesis that closes the first opening one."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"a parenthesis of an instruction is not closed: {text[:80]}")
