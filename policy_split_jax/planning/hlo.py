"""What a compiled program moves: bytes of HBM and of every kind of collective, read from its HLO text.

Loops are counted as often as they run. XLA's own `cost_analysis` counts their bodies once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# They name values and move none; so do those that end with -done.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "conditional", "call", "async-start", "async-update", "domain", "opt-barrier", "iota",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "gather"}
# Their shapes name what they are given beside what they give.
_PAIRS = {"copy-start", "all-gather-start", "collective-permute-start"}
_ARRAY = re.compile(r"\b([a-z]+[0-9a-z]*)\[([0-9,]*)\](\{[^}]*\})?")
# A kernel's attributes may go on over further lines.
_INSTRUCTION = re.compile(r"\s+(ROOT )?%[\w.\-]+ = ")
_ASYNC = ("async-collective-start", "async-collective-done")
_ALIASES = re.compile(r"\{(\d+)\}: \((\d+),")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """Its attributes; of a parameter, its number."""

    def called(self) -> list[str]:
        """The computations that it runs."""
        branches = _BRANCHES.search(self.rest)
        return [*_CALLED.findall(self.rest), *(_NAME.findall(branches[1]) if branches else ())]


@dataclass(frozen=True)
class Computation:
    """Instructions in order; the last marked ROOT is the result."""

    instructions: list[Instruction] = field(default_factory=list)

    @cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        return {item.name: item for item in self.instructions}


@dataclass
class Traffic:
    """Bytes that one device moves."""

    memory: int = 0
    """Read from and written to HBM."""
    collectives: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Sent, by kind."""


def traffic(text: str, while_trips: int = 1) -> Traffic:
    """Reads a compiled module's text (`compiled.as_text()`).

    A loop whose count the module does not say is taken to run `while_trips` times.
    """
    computations, entry = parse(text)
    found = Traffic()
    _walk(computations, entry, 1, while_trips, found)
    return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the one that begins."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and "->" in line and not line.startswith(" "):
            name = line.split("(")[0].replace("ENTRY", "").strip().lstrip("%")
            current = computations[name] = Computation()
            entry = name if line.startswith("ENTRY") else entry
        elif line == "}":
            current = None
        elif current is not None and _INSTRUCTION.match(line):
            current.instructions.append(_instruction(line))
    return computations, entry


def _instruction(line: str) -> Instruction:
    name, _, value = line.strip().partition(" = ")
    end = _closing(value) + 1 if value.startswith("(") else value.index(" ")
    shape, call = value[:end], value[end:].strip()
    opcode, _, arguments = call.partition("(")
    close = _closing("(" + arguments) - 1
    inside, rest = arguments[:close], arguments[close + 1 :]
    operands = tuple(_NAME.findall(inside))
    # A parameter's number and a constant's value stand where others have operands.
    rest = inside if opcode in ("parameter", "constant") else rest
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), shape, opcode, operands, rest)


def _closing(text: str) -> int:
    """Where the parenthesis that begins `text` is closed."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at
    raise ValueError(f"not HLO: {text[:60]!r}")


def arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """Bytes of every array of a shape, and whether it lies in HBM rather than nearer to the chip's cores."""
    for kind, dims, layout in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0]) if re.search(r"\d", kind) else 0
        size = math.prod(int(dim) for dim in dims.split(",") if dim)
        yield -(-bits * size // 8), "S(" not in layout


def _in_memory(shape: str) -> int:
    return sum(size for size, in_memory in arrays(shape) if in_memory)


def _walk(computations: Mapping[str, Computation], name: str, times: int, while_trips: int, found: Traffic) -> None:
    computation = computations[name]
    for item in computation.instructions:
        kind = item.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            found.collectives[kind] += times * _sent(kind, item, computation)
        if item.opcode == "fusion":
            for kind, size in _fused(item, computations):
                found.collectives[kind] += times * size
        if item.opcode in ("while", "call", "conditional", "async-start"):
            trips = _trips(computations, item, while_trips) if item.opcode == "while" else 1
            for called in item.called():
                _walk(computations, called, times * trips, while_trips, found)
        elif item.opcode not in _FREE and not item.opcode.endswith("-done"):
            found.memory += times * _moved(item, computation, computations)


def _fused(item: Instruction, computations: Mapping[str, Computation]) -> Iterator[tuple[str, int]]:
    """Kind and bytes of what a TPU's fusion sends.

    A collective that goes on beside other work appears in the fusion that starts it, in each that it goes on beside,
    and in the one that ends it: the first counts. A sum of which every device takes its part is a fusion too.
    """
    name = item.called()[0]
    inside = computations[name]
    scattered = name.startswith("all-reduce-scatter")
    if scattered or item.name.startswith("async-collective-start"):
        for part in inside.instructions:
            if part.opcode in COLLECTIVES:
                kind = "reduce-scatter" if scattered else part.opcode
                yield kind, _sent(kind, part, inside)


def _trips(computations: Mapping[str, Computation], item: Instruction, while_trips: int) -> int:
    """How often a loop runs: as XLA found out, or as its condition's constant says."""
    known = _TRIPS.search(item.rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%([\w.\-]+)", item.rest)
    body = computations[condition[1]].instructions if condition else []
    constants = [int(one.rest) for one in body if one.opcode == "constant" and one.rest.strip().isdigit()]
    plain = {one.opcode for one in body} <= {"parameter", "get-tuple-element", "constant", "compare"}
    return constants[0] if plain and len(constants) == 1 else while_trips


def _sent(kind: str, item: Instruction, computation: Computation) -> int:
    """Bytes that a device sends for a collective, on a ring of many."""
    result = max((size for size, _ in arrays(item.shape)), default=0)
    given = sum(size for name in item.operands for size, _ in arrays(computation.by_name[name].shape))
    return {"all-reduce": 2 * given, "reduce-scatter": given}.get(kind, result)


def _moved(item: Instruction, computation: Computation, computations: Mapping[str, Computation]) -> int:
    """Bytes of HBM that an instruction reads and writes."""
    operands = [computation.by_name[name].shape for name in item.operands if name in computation.by_name]
    if item.opcode.removesuffix("-start") in _SLICES:
        # One that only starts names its operand before its result.
        size, in_memory = [*arrays(item.shape)][item.opcode.endswith("-start")]
        return size * (_in_memory(operands[0]) > 0) + size * in_memory
    if item.opcode in _PAIRS:
        return _in_memory(item.shape)
    if item.opcode == "dynamic-update-slice":
        return 2 * _in_memory(operands[1])
    if item.opcode != "fusion":
        return _in_memory(item.shape) + sum(map(_in_memory, operands))
    return _fusion_moved(item, operands, computations)


def _fusion_moved(item: Instruction, operands: Sequence[str], computations: Mapping[str, Computation]) -> int:
    """The same of a fusion, given its operands' shapes."""
    inside = computations[item.called()[0]]
    if item.name.startswith(_ASYNC):
        return 0
    if item.called()[0].startswith("async_collective_fusion"):
        # What stays where it is belongs to a collective that goes on meanwhile.
        passed = _ALIASES.findall(item.rest.partition("output_to_operand_aliasing=")[2].partition("calls=")[0])
        outputs, given = ({int(pair[side]) for pair in passed} for side in (0, 1))
        read = sum(_read(inside, number, shape) for number, shape in enumerate(operands) if number not in given)
        sizes = [size * in_memory for size, in_memory in arrays(item.shape)]
        return read + sum(size for at, size in enumerate(sizes) if at not in outputs)
    read = sum(_read(inside, number, shape) for number, shape in enumerate(operands))
    return read + _written(inside, item.shape)


def _read(inside: Computation, number: int, shape: str) -> int:
    """Bytes that a fusion reads of one operand: a slice of it, where it only slices or updates it in place."""
    whole = _in_memory(shape)
    same = _same(inside, number)
    users = [item for item in inside.instructions if same.intersection(item.operands) and item.opcode != "bitcast"]
    if not whole or not users:
        return whole
    parts = 0
    for user in users:
        if user.opcode in _SLICES:
            parts += sum(size for size, _ in arrays(user.shape))
        elif user.opcode != "dynamic-update-slice" or user.operands[0] not in same:
            return whole
    return min(whole, parts)


def _same(inside: Computation, number: int) -> set[str]:
    """The parameter of this number, and what is it in another shape."""
    same: set[str] = set()
    for item in inside.instructions:
        parameter = item.opcode == "parameter" and item.rest == str(number)
        if parameter or (item.opcode == "bitcast" and same.intersection(item.operands)):
            same.add(item.name)
    return same


def _written(inside: Computation, shape: str) -> int:
    """Bytes that a fusion writes: of an array that it updates in place only the new part."""
    whole = _in_memory(shape)
    updates = [item for item in inside.instructions if item.opcode == "dynamic-update-slice"]
    saved = sum(
        sum(size for size, _ in arrays(item.shape))
        - sum(size for size, _ in arrays(inside.by_name[item.operands[1]].shape))
        for item in updates
    )
    return max(whole - saved, 0)
