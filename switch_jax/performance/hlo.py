"""What a compiled program moves: collectives by mesh axis, and bytes to and from memory.

Read from the text of the optimised HLO of one device, as `Compiled.as_text()` gives it. What is in
a loop counts as often as the loop runs.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    root: bool
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute such as `body` names."""
        match = re.search(rf"\b{attribute}=(?:\{{([^}}]*)\}}|(%?[\w.\-]+))", self.attributes)
        names = (match[1] or match[2]).split(",") if match else []
        return [name.strip().removeprefix("%") for name in names]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program: `times` a step, each among `devices` along these mesh axes."""

    kind: str
    axes: tuple[str, ...]
    devices: int
    size: int  # bytes of its result, and for reduce-scatter of its operand
    times: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by the usual ring algorithms."""
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
                instruction = _parse(*match.groups())
                current[instruction.name] = instruction

    def collectives(self, mesh: Mesh) -> list[Collective]:
        """The collectives of the program, which was partitioned over `mesh`."""
        found = []
        seen = set()
        for instruction, times, _ in self._scopes(inside_fusions=True):
            kind = instruction.opcode.removesuffix("-start")
            if across := re.search(r'megascale_transfer_type="(\w+)"', instruction.attributes):
                # Between TPU slices the hosts send what their devices have reduced or gathered.
                if kind == "send" and mesh.shape["slice"] > 1:
                    kind = across[1].lower().replace("_", "-")
                    size = _bytes(_parts(instruction.type)[0])
                    found.append(Collective(kind, ("slice",), mesh.shape["slice"], size, times))
                continue
            if kind not in KINDS:
                continue
            # The parts of a collective that overlaps with computation share its channel.
            if "chain_id" in instruction.attributes:
                key = kind, _number(instruction, "channel_id"), instruction.type.split("{")[0]
                if key in seen:
                    continue
                seen.add(key)
            axes, devices = _axes(_groups(instruction.attributes, mesh.devices.size), mesh)
            if not axes:
                continue
            size = _bytes(instruction.type)
            if instruction.opcode.endswith("-start"):  # its type holds operands and results
                size = max(_bytes(part[0]) for part in _ARRAY.finditer(instruction.type))
            if kind == "reduce-scatter":
                size *= devices
            found.append(Collective(kind, axes, devices, size, times))
        return found

    def memory_bytes(self) -> float:
        """Bytes read from and written to the device's main memory in a step.

        Of arrays that are sliced or updated in place only the slices count.
        """
        return sum(self._traffic(i, scope) * n for i, n, scope in self._scopes())

    def _scopes(
        self, name: str | None = None, times: int = 1, *, inside_fusions: bool = False
    ) -> Iterator[tuple[Instruction, int, dict[str, Instruction]]]:
        """Every instruction, how often it runs, and its computation."""
        scope = self._computations[name or self._entry]
        for instruction in scope.values():
            yield instruction, times, scope
            inner = times
            if instruction.opcode == "while":
                inner *= self._trips(instruction)
                names = instruction.called("body")
            elif instruction.opcode == "conditional":
                names = instruction.called("branch_computations")
                names += instruction.called("true_computation")
                names += instruction.called("false_computation")
            elif instruction.opcode in ("call", "async-start"):
                names = instruction.called("to_apply") + instruction.called("calls")
            elif instruction.opcode == "fusion" and inside_fusions:
                names = instruction.called("calls")
            else:
                names = []
            for callee in names:
                yield from self._scopes(callee, inner, inside_fusions=inside_fusions)

    def _trips(self, loop: Instruction) -> int:
        """How often a loop runs, from what its condition compares with; 1 where it varies."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self._computations[loop.called("condition")[0]]
        root = next(i for i in condition.values() if i.root)
        bounds = [condition[name] for name in root.operands if name in condition]
        constants = [i.operands[0] for i in bounds if i.opcode == "constant"]
        return int(constants[0]) if constants and constants[0].isdigit() else 1

    def _traffic(self, instruction: Instruction, scope: dict[str, Instruction]) -> float:
        if instruction.opcode in _FREE or instruction.opcode.endswith(("-done", "-update")):
            return 0
        inputs = [scope[name].type for name in instruction.operands]
        result = _in_memory(instruction.type)
        if instruction.opcode == "fusion":
            return self._fusion_traffic(instruction, inputs)
        if instruction.opcode.endswith("-start"):
            return result  # its type holds operands and results
        if instruction.opcode in _SLICING:
            return 2 * result
        if instruction.opcode in _UPDATING:
            return 2 * _in_memory(inputs[-1 if instruction.opcode == "scatter" else 1])
        return result + sum(map(_in_memory, inputs))

    def _fusion_traffic(self, fusion: Instruction, inputs: list[str]) -> float:
        total = sum(min(self._read(fusion, i), _in_memory(x)) for i, x in enumerate(inputs))
        written = self._written(fusion)
        return total + sum(
            size for size, part in zip(written, _parts(fusion.type)) if _in_memory(part)
        )

    def _read(self, fusion: Instruction, index: int) -> float:
        """Bytes of a fusion's input that are read: slices where it is sliced, nothing where it
        is the array that is updated in place.
        """
        body = self._computations[fusion.called("calls")[0]]
        parameter = next(
            i for i in body.values() if i.opcode == "parameter" and i.operands == (str(index),)
        )
        return self._read_as(parameter.name, body)

    def _read_as(self, name: str, body: dict[str, Instruction]) -> float:
        total = 0.0
        for user in body.values():
            for position, operand in enumerate(user.operands):
                if operand != name or user.opcode == "parameter":
                    continue
                if user.opcode == "bitcast":
                    total += self._read_as(user.name, body)
                elif user.opcode == "fusion":
                    total += self._read(user, position)
                elif user.opcode in _SLICING and position == 0:
                    total += _bytes(user.type)
                elif user.opcode != "dynamic-update-slice" or position != 0:
                    return math.inf
        return total

    def _written(self, fusion: Instruction) -> list[int]:
        """Bytes of each of a fusion's results that are written."""
        body = self._computations[fusion.called("calls")[0]]
        root = next(i for i in body.values() if i.root)
        names = root.operands if root.opcode == "tuple" else (root.name,)
        sizes = []
        for name in names:
            result = body[name]
            while result.opcode == "bitcast":
                result = body[result.operands[0]]
            if result.opcode == "dynamic-update-slice":
                sizes.append(_bytes(body[result.operands[1]].type))
            elif result.opcode == "fusion" and not result.type.startswith("("):
                sizes += self._written(result)
            else:
                sizes.append(_bytes(body[name].type))
        return sizes


_FREE = {
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
_SLICING = {"dynamic-slice", "slice", "gather"}
_UPDATING = {"dynamic-update-slice", "scatter"}


def _parse(root: str | None, name: str, rest: str) -> Instruction:
    kind, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.lstrip().partition("(")
    inside, attributes = _balanced("(" + rest)
    operands = tuple(part.strip().split(" ")[-1].removeprefix("%") for part in _split(inside[1:-1]))
    return Instruction(name, root is not None, kind, opcode, operands, attributes)


def _balanced(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis: up to its end, and what follows."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return text[: match.end()], text[match.end() :]
    raise ValueError(f"unbalanced HLO: {text[:80]}")


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
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
def _bytes(kind: str) -> int:
    return sum(_array_bytes(match) for match in _ARRAY.finditer(kind))


@functools.cache
def _in_memory(kind: str) -> int:
    """Bytes of a type without arrays in other memory spaces, such as a TPU's vector memory."""
    arrays = _ARRAY.finditer(kind)
    return sum(_array_bytes(m) for m in arrays if not re.search(r"S\([1-9]", m[3] or ""))


def _array_bytes(match: re.Match) -> int:
    bits = _ITEM_BITS.get(match[1]) or int((re.search(r"\d+", match[1]) or [0])[0])
    return math.prod(int(n) for n in match[2].split(",") if n) * bits // 8


def _parts(kind: str) -> list[str]:
    return _split(kind[1:-1]) if kind.startswith("(") else [kind]


def _number(instruction: Instruction, attribute: str) -> str:
    match = re.search(rf"\b{attribute}=(\d+)", instruction.attributes)
    return match[1] if match else instruction.name


def _groups(attributes: str, devices: int) -> np.ndarray:
    """[groups, devices of a group], from any of the ways HLO writes them."""
    if pairs := re.search(r"source_target_pairs=\{([\d,{}]*)\}", attributes):
        return np.array(re.findall(r"\d+", pairs[1]), int).reshape(-1, 2)
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", attributes):
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(devices).reshape(dims)
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        return ids.reshape(shape)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        return _mesh_groups(*named.groups())
    explicit = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if not explicit:
        return np.arange(devices)[None]
    groups = [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", explicit[1])]
    return np.array(groups)


def _mesh_groups(mesh: str, axes: str) -> np.ndarray:
    """Groups along some axes of a mesh in HLO's own terms: `'a'=4,'b'=2` and `'a':(2)2,'b'`."""
    names = re.findall(r"'(\w+)'=(\d+)", mesh)
    sizes = dict((name, int(size)) for name, size in names)
    shape: list[int] = []
    along: list[int] = []
    wanted = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in sizes.items():
        before, taken = wanted.get(name, (size, 1))
        if name in wanted:
            along.append(len(shape) + 1)
        shape += [before, taken, size // (before * taken)]
    ids = np.arange(math.prod(shape)).reshape(shape)
    others = [i for i in range(len(shape)) if i not in along]
    return ids.transpose(others + along).reshape(-1, math.prod(shape[i] for i in along))


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """Mesh axes along which the devices of a group differ, and how many devices it has."""
    coordinates = np.stack(np.unravel_index(groups, mesh.devices.shape))
    differ = (coordinates != coordinates[..., :1]).any((1, 2))
    axes = tuple(name for name, differs in zip(mesh.axis_names, differ) if differs)
    return axes, groups.shape[1]
