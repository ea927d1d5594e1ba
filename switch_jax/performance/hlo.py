"""HLO parser: collectives by mesh axis, memory traffic and estimated cycles of a compiled program.

The input is the text of the optimised HLO of one device, from `Compiled.as_text()`. Instructions
inside a loop count once per iteration; `unknown_loops` says of how many loops the iterations are
not known, whose instructions count once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

COLLECTIVE_KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An HLO instruction: one line of the text. `type` is its result's, such as `f32[8,4]{1,0}`."""

    name: str
    root: bool
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called_computations(self, attribute: str) -> list[str]:
        """Returns the names of the computations in an attribute such as `body`."""
        match = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.attributes)
        names = (match[1] or match[2]).split(",") if match else []
        return [name.strip().removeprefix("%") for name in names]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program, among groups of `devices` devices along mesh axes `axes`."""

    kind: str
    axes: tuple[str, ...]
    devices: int
    size: int  # bytes of the result; of reduce-scatter, bytes of the operand
    times: int  # per step

    @property
    def bytes_sent(self) -> float:
        """Bytes that a device sends in a step, with ring algorithms."""
        share = (self.devices - 1) / self.devices
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return factor * self.size * self.times


class HloProgram:
    """The computations of a program's HLO text."""

    def __init__(self, text: str):
        self._computations: dict[str, dict[str, Instruction]] = {}
        current: dict[str, Instruction] = {}
        for line in re.sub(r"/\*.*?\*/", "", text).splitlines():  # such as /*index=5*/
            if not line.startswith(" "):
                header = _HEADER.match(line)
                if header:
                    current = self._computations[header[1]] = {}
                    if line.startswith("ENTRY"):
                        self._entry = header[1]
            elif match := _INSTRUCTION.match(line):
                instruction = _parse_instruction(*match.groups())
                current[instruction.name] = instruction

    def collectives(self, mesh: Mesh) -> list[Collective]:
        """Returns the collectives of the program, which was partitioned over `mesh`."""
        collectives = []
        seen = set()
        for instruction, times, _ in self._executed_instructions(inside_fusions=True):
            kind = instruction.opcode.removesuffix("-start")
            if transfer := re.search(r'megascale_transfer_type="(\w+)"', instruction.attributes):
                # Between TPU slices, hosts send the arrays that their devices reduced or gathered.
                if kind == "send" and mesh.shape["slice"] > 1:
                    kind = transfer[1].lower().replace("_", "-")
                    size = _type_bytes(_tuple_elements(instruction.type)[0])
                    slices = mesh.shape["slice"]
                    collectives.append(Collective(kind, ("slice",), slices, size, times))
                continue
            if kind not in COLLECTIVE_KINDS:
                continue
            # A collective that overlaps with computation has several parts, with one channel.
            if "chain_id" in instruction.attributes:
                key = kind, _channel_id(instruction), instruction.type.split("{")[0]
                if key in seen:
                    continue
                seen.add(key)
            groups = _replica_groups(instruction.attributes, mesh.devices.size)
            axes, devices = _mesh_axes(groups, mesh)
            if not axes:
                continue
            size = _collective_bytes(instruction, kind, devices)
            collectives.append(Collective(kind, axes, devices, size, times))
        return collectives

    def memory_bytes(self) -> float:
        """Returns the bytes read from and written to the device's main memory in a step.

        Of an array that is sliced or updated in place, only the slices count.
        """
        return sum(
            self._traffic(instruction, computation) * times
            for instruction, times, computation in self._executed_instructions()
        )

    def estimated_cycles(self) -> int | None:
        """Returns the cycles of a step by XLA's cost model; None where the compiler has none.

        Kernels, other custom calls and asynchronous copies have no estimate and count 0.
        """
        cycles = [
            int(match[1]) * times
            for instruction, times, _ in self._executed_instructions()
            if (match := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes))
        ]
        return sum(cycles) if cycles else None

    def unknown_loops(self) -> int:
        """Returns the number of loops whose iterations depend on data."""
        return sum(
            instruction.opcode == "while" and self._trip_count(instruction) is None
            for instruction, _, _ in self._executed_instructions()
        )

    def _executed_instructions(
        self, name: str | None = None, times: int = 1, *, inside_fusions: bool = False
    ) -> Iterator[tuple[Instruction, int, dict[str, Instruction]]]:
        """Yields every instruction, its executions per step, and its computation."""
        computation = self._computations[name or self._entry]
        for instruction in computation.values():
            yield instruction, times, computation
            is_loop = instruction.opcode == "while"
            inner_times = times * (self._trip_count(instruction) or 1) if is_loop else times
            attributes = _CALL_ATTRIBUTES.get(instruction.opcode, ())
            if instruction.opcode == "fusion" and inside_fusions:
                attributes = ("calls",)
            for attribute in attributes:
                for callee in instruction.called_computations(attribute):
                    yield from self._executed_instructions(
                        callee, inner_times, inside_fusions=inside_fusions
                    )

    def _trip_count(self, loop: Instruction) -> int | None:
        """Returns the iterations of a loop, from the bound in its condition; None if it varies."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self._computations[loop.called_computations("condition")[0]]
        root = next(i for i in condition.values() if i.root)
        bounds = [condition[name] for name in root.operands if name in condition]
        constants = [i.operands[0] for i in bounds if i.opcode == "constant"]
        return int(constants[0]) if constants and constants[0].isdigit() else None

    def _traffic(self, instruction: Instruction, computation: dict[str, Instruction]) -> float:
        """Returns the bytes that one execution reads from and writes to memory."""
        if instruction.opcode in _NO_TRAFFIC or instruction.opcode.endswith(("-done", "-update")):
            return 0
        if 'custom_call_target="AllocateBuffer"' in instruction.attributes:  # not initialised
            return 0
        inputs = [computation[name].type for name in instruction.operands]
        result = _memory_bytes(instruction.type)
        if instruction.opcode == "fusion":
            return self._fusion_traffic(instruction, inputs)
        if 'custom_call_target="__cublas' in instruction.attributes:
            result = _memory_bytes(_tuple_elements(instruction.type)[0])  # without the workspace
        if instruction.opcode == "slice-start":  # its type: ((operands), result, context)
            operands, sliced = _tuple_elements(instruction.type)[:2]
            sides = bool(_memory_bytes(operands)) + bool(_memory_bytes(sliced))
            return sides * _type_bytes(sliced)
        if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
            return result  # its type holds operands and results
        if instruction.opcode in _SLICING:
            return 2 * result
        if instruction.opcode in _UPDATING:
            return 2 * _memory_bytes(inputs[-1 if instruction.opcode == "scatter" else 1])
        return result + sum(map(_memory_bytes, inputs))

    def _fusion_traffic(self, fusion: Instruction, inputs: list[str]) -> float:
        read = sum(
            min(self._bytes_read(fusion, index), _memory_bytes(operand_type))
            for index, operand_type in enumerate(inputs)
        )
        written = zip(self._bytes_written(fusion), _tuple_elements(fusion.type))
        return read + sum(size for size, element in written if _memory_bytes(element))

    def _bytes_read(self, fusion: Instruction, index: int) -> float:
        """Returns the bytes that a fusion reads of its input number `index`.

        Only the slices of an input that is sliced; 0 for an array that is updated in place;
        infinity for an input that is read as a whole.
        """
        body = self._computations[fusion.called_computations("calls")[0]]
        parameter = next(
            i for i in body.values() if i.opcode == "parameter" and i.operands == (str(index),)
        )
        return self._bytes_read_by_users(parameter.name, body)

    def _bytes_read_by_users(self, name: str, body: dict[str, Instruction]) -> float:
        total = 0.0
        for user in body.values():
            for position, operand in enumerate(user.operands):
                if operand != name or user.opcode == "parameter":
                    continue
                if user.opcode == "bitcast" or "output_to_operand_aliasing" in user.attributes:
                    # The same array, or its tiles in another layout.
                    total += self._bytes_read_by_users(user.name, body)
                elif user.opcode == "fusion":
                    total += self._bytes_read(user, position)
                elif user.opcode in _SLICING and position == 0:
                    total += _type_bytes(user.type)
                elif user.opcode != "dynamic-update-slice" or position != 0:
                    return math.inf
        return total

    def _bytes_written(self, fusion: Instruction) -> list[int]:
        """Returns the bytes that a fusion writes of each of its results."""
        body = self._computations[fusion.called_computations("calls")[0]]
        root = next(i for i in body.values() if i.root)
        names = root.operands if root.opcode == "tuple" else (root.name,)
        sizes = []
        for name in names:
            result = body[name]
            while result.opcode == "bitcast":
                result = body[result.operands[0]]
            if result.opcode == "dynamic-update-slice":
                sizes.append(_type_bytes(body[result.operands[1]].type))
            elif result.opcode == "fusion" and not result.type.startswith("("):
                sizes += self._bytes_written(result)
            else:
                sizes.append(_type_bytes(body[name].type))
        return sizes


# Instructions that move no bytes, or whose bytes are counted in the computations they call.
_NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "domain",
}
# Attributes that name the computations which an instruction executes.
_CALL_ATTRIBUTES = {
    "while": ("body",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "call": ("to_apply", "calls"),
    "async-start": ("to_apply", "calls"),
}
_SLICING = {"dynamic-slice", "slice", "gather"}
_UPDATING = {"dynamic-update-slice", "scatter"}


def _parse_instruction(root: str | None, name: str, rest: str) -> Instruction:
    """Parses `rest`, the part of a line after `name =`."""
    type_, rest = _split_parentheses(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.lstrip().partition("(")
    inside, attributes = _split_parentheses("(" + rest)
    operands = tuple(
        operand.strip().split(" ")[-1].removeprefix("%") for operand in _split_commas(inside[1:-1])
    )
    return Instruction(name, root is not None, type_, opcode, operands, attributes)


def _split_parentheses(text: str) -> tuple[str, str]:
    """Splits a text that begins with a parenthesis, after the closing one that matches it."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    raise ValueError(f"unbalanced HLO: {text[:80]}")


def _split_commas(text: str) -> list[str]:
    """Splits a text at the commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for match in re.finditer(r"[()\[\]{},]", text):
        if match[0] == ",":
            if depth == 0:
                parts.append(text[begin : match.start()])
                begin = match.end()
        else:
            depth += 1 if match[0] in "([{" else -1
    return [*parts, text[begin:]] if text else []


@functools.cache
def _type_bytes(type_: str) -> int:
    """Returns the bytes of an array or tuple type."""
    return sum(_array_bytes(match) for match in _ARRAY.finditer(type_))


@functools.cache
def _memory_bytes(type_: str) -> int:
    """Returns the bytes of a type in main memory.

    Arrays in other memory spaces, such as a TPU's vector memory, do not count.
    """
    arrays = _ARRAY.finditer(type_)
    return sum(_array_bytes(m) for m in arrays if not re.search(r"S\([1-9]", m[3] or ""))


def _array_bytes(match: re.Match) -> int:
    bits = _ITEM_BITS.get(match[1]) or int((re.search(r"\d+", match[1]) or [0])[0])
    return math.prod(int(n) for n in match[2].split(",") if n) * bits // 8


def _tuple_elements(type_: str) -> list[str]:
    """Returns the element types of a tuple type, or the type itself."""
    return _split_commas(type_[1:-1]) if type_.startswith("(") else [type_]


def _collective_bytes(instruction: Instruction, kind: str, devices: int) -> int:
    """Returns the bytes of a collective's results, of a reduce-scatter those of its operands.

    A collective of several arrays has tuples of them. The type of a start is that of the results
    only for an all-reduce; for others it is a tuple of operands, results and what else it needs.
    """
    size = _type_bytes(instruction.type)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        operands, results = map(_type_bytes, _tuple_elements(instruction.type)[:2])
        return operands if kind == "reduce-scatter" else results
    return size * devices if kind == "reduce-scatter" else size


def _channel_id(instruction: Instruction) -> str:
    """Returns the channel of a collective, or its name if it has none."""
    match = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return match[1] if match else instruction.name


def _replica_groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, devices of a group] device numbers, from any of HLO's notations for groups."""
    if pairs := re.search(r"source_target_pairs=\{([\d,{}]*)\}", attributes):
        return np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", attributes):
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(devices).reshape(dims)
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        return ids.reshape(shape)
    if by_axes := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        return _mesh_groups(*by_axes.groups())
    explicit = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if not explicit:
        return np.arange(devices)[None]
    groups = [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", explicit[1])]
    return np.array(groups)


def _mesh_groups(mesh: str, axes: str) -> np.ndarray:
    """[groups, devices of a group] along `axes` of a mesh, both in HLO's notation.

    `mesh` is, for example, `'a'=4,'b'=2` and `axes` is `'a':(2)2,'b'`: `:(N)M` reshapes an axis to
    N × M × rest, and the group is along M.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    shape: list[int] = []
    group_dims: list[int] = []
    parts = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        if name in parts:
            group_dims.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    ids = np.arange(math.prod(shape)).reshape(shape)
    other_dims = [i for i in range(len(shape)) if i not in group_dims]
    group_size = math.prod(shape[i] for i in group_dims)
    return ids.transpose(other_dims + group_dims).reshape(-1, group_size)


def _mesh_axes(groups: np.ndarray, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes along which devices of a group differ, and the size of a group."""
    coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape))
    differ = (coordinates != coordinates[..., :1]).any((1, 2))
    axes = tuple(name for name, differs in zip(mesh.axis_names, differ) if differs)
    return axes, groups.shape[1]
