"""Just enough reading of HLO to say how often each loop of a compiled program runs.

XLA's cost analysis counts the body of a `while` once, whatever its trip count. A scan over 64 key
blocks would be reported at a 64th of its FLOPs, so `axattn.aot.cost` multiplies loop bodies back
and needs two things from here: the trip count of a loop where the program shows it (`Module`, over
HLO text), and a body as a module of its own, which XLA can then cost (`with_entry`, over the
serialized module: XLA's text parser can crash on the text of a TPU program). What loops send,
`axattn.aot.collectives` counts over the same text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

_NAME = r"%?([\w.\-]+)"
_COMPUTATION = re.compile(rf"^(ENTRY )?{_NAME} \(.*\) -> .*\{{$")
_INSTRUCTION = re.compile(rf"^\s+(ROOT )?{_NAME} = ")
_CALLS = re.compile(
    rf"\b(?:calls|to_apply|body|condition|true_computation|false_computation)={_NAME}"
)
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+[a-z0-9]*)\[([\d,]*)\]")
# Operations that hand a scalar on unchanged.
_TRANSPARENT = frozenset({"copy", "copy-start", "copy-done", "bitcast", "convert", "reshape"})


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `attributes` is everything after the operands."""

    name: str
    opcode: str
    arguments: str
    attributes: str
    shape: str = ""

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([\w.\-]+)", self.arguments))

    @property
    def index(self) -> int:
        """The element that a `get-tuple-element` takes."""
        match = re.search(r"\bindex=(\d+)", self.attributes)
        return int(match.group(1)) if match else -1

    def called(self) -> tuple[str, ...]:
        """Names of the computations that this instruction runs."""
        names = _CALLS.findall(self.attributes)
        for group in _BRANCHES.findall(self.attributes):
            names += re.findall(_NAME, group)
        return tuple(names)

    def attribute(self, key: str) -> str | None:
        match = re.search(rf"\b{key}={_NAME}", self.attributes)
        return match.group(1) if match else None

    @functools.cached_property
    def nbytes(self) -> float:
        """Of the result's values, without what its layout pads; all elements of a tuple."""
        total = 0.0
        for dtype, sizes in _ARRAY.findall(self.shape):
            total += math.prod(map(int, filter(None, sizes.split(",")))) * _bits(dtype) / 8
        return total


def _bits(dtype: str) -> int:
    """Of one value: the first number in the name of its type, as in ``bf16`` and ``f8e4m3fn``."""
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 8 if dtype == "pred" else 0


@dataclasses.dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class _Linear:
    """`carried element + offset` of a loop, or a constant when `element` is None."""

    element: int | None
    offset: int


class Module:
    """A parsed HLO module.

    Args:
      text: what `compiled.as_text()` gives.

    Raises:
      ValueError: the text does not look like an HLO module.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation | None = None
        for line in text.splitlines():
            if current is None:
                match = _COMPUTATION.match(line)
                if match is None:
                    continue
                current = Computation(match.group(2), {}, "")
                if match.group(1):
                    self.entry = current.name
            elif line.startswith("}"):
                self.computations[current.name] = current
                current = None
            else:
                _read_instruction(line, current)
        if not self.entry:
            raise ValueError("no ENTRY computation in the HLO text")
        self._owners: dict[str, tuple[str, Instruction] | None] = {}
        for computation in self.computations.values():
            for loop in computation.instructions.values():
                if loop.opcode == "while":
                    for name in loop.called():
                        shared = name in self._owners
                        self._owners[name] = None if shared else (computation.name, loop)

    def trip_count(self, computation: str, loop: Instruction) -> int | None:
        """How often the `while` in `computation` runs its body; None if the text does not say."""
        match = _TRIP_COUNT.search(loop.attributes)
        if match:
            return int(match.group(1))
        condition, body = loop.attribute("condition"), loop.attribute("body")
        if condition is None or body is None:
            return None
        test = self._compare(condition)
        if test is None:
            return None
        counter, direction, bound = test
        start = self._carried(computation, loop.operands[0], counter.element)
        update = self._carried(body, self.computations[body].root, counter.element)
        if start is None or start.element is not None or update is None:
            return None
        if update.element != counter.element or update.offset == 0:
            return None
        return _count(start.offset + counter.offset, update.offset, direction, bound)

    def _compare(self, name: str) -> tuple[_Linear, str, int] | None:
        """A loop condition as (carried counter, direction, bound)."""
        frame: tuple | None = None
        root = self.computations[name].instructions[self.computations[name].root]
        while root.opcode in ("fusion", "call", "copy", "bitcast"):
            if root.opcode in ("copy", "bitcast"):
                root = self.computations[name].instructions[root.operands[0]]
                continue
            callee = root.called()[0]
            frame = (name, root, frame)
            name = callee
            root = self.computations[name].instructions[self.computations[name].root]
        direction = root.attribute("direction")
        if root.opcode != "compare" or direction is None:
            return None
        left = self._value(name, root.operands[0], frame)
        right = self._value(name, root.operands[1], frame)
        if left is None or right is None:
            return None
        if left.element is None:
            left, right = right, left
            direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        if left.element is None or right.element is not None:
            return None
        return left, direction, right.offset

    def _carried(self, computation: str, name: str, element: int | None) -> _Linear | None:
        """Element `element` of the tuple `name`."""
        instruction = self.computations[computation].instructions[name]
        if element is None or instruction.opcode != "tuple" or element >= len(instruction.operands):
            return None
        return self._value(computation, instruction.operands[element], None)

    def _value(self, computation: str, name: str, frame: tuple | None) -> _Linear | None:
        """A scalar as a constant or as a loop's carried element plus a constant."""
        instruction = self.computations[computation].instructions[name]
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            number = re.fullmatch(r"-?\d+", instruction.arguments.strip())
            return _Linear(None, int(number.group())) if number else None
        if opcode in _TRANSPARENT:
            return self._value(computation, operands[0], frame)
        if opcode in ("add", "subtract"):
            left, right = (self._value(computation, o, frame) for o in operands)
            if left is None or right is None:
                return None
            if opcode == "add" and left.element is None:
                left, right = right, left
            if right.element is not None:
                return None
            sign = 1 if opcode == "add" else -1
            return _Linear(left.element, left.offset + sign * right.offset)
        if opcode == "parameter" and frame is not None:
            caller, call, outer = frame
            return self._value(caller, call.operands[int(instruction.arguments)], outer)
        if opcode in ("fusion", "call"):
            callee = instruction.called()[0]
            inner = self.computations[callee].root
            return self._value(callee, inner, (computation, instruction, frame))
        if opcode == "get-tuple-element":
            return self._element(computation, operands[0], instruction.index)
        return None

    def _element(self, computation: str, name: str, index: int) -> _Linear | None:
        source = self.computations[computation].instructions[name]
        if source.opcode == "tuple":
            return self._value(computation, source.operands[index], None)
        if source.opcode == "while" and self._unchanged(source, index):
            return self._carried(computation, source.operands[0], index)
        if source.opcode == "parameter":
            owner = self._owners.get(computation)
            if owner is None:
                return None
            outer, loop = owner
            if self._unchanged(loop, index):
                return self._element(outer, loop.operands[0], index)
            return _Linear(index, 0)
        return None

    def _unchanged(self, loop: Instruction, index: int) -> bool:
        """Whether the loop hands its carried element `index` on as it came."""
        body = self.computations[loop.attribute("body") or ""]
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return False
        value = body.instructions[root.operands[index]]
        while value.opcode in _TRANSPARENT:
            value = body.instructions[value.operands[0]]
        if value.opcode != "get-tuple-element" or value.index != index:
            return False
        return body.instructions[value.operands[0]].opcode == "parameter"


def _count(start: int, step: int, direction: str, bound: int) -> int | None:
    """Trips of `for (i = start; i <direction> bound; i += step)`."""
    if direction in ("LE", "GE"):
        bound += 1 if direction == "LE" else -1
    elif direction == "NE":
        if (bound - start) % step:
            return None
    elif direction not in ("LT", "GT"):
        return None
    if (direction in ("LT", "LE")) != (step > 0) and direction != "NE":
        return None
    return max(0, -((start - bound) // step))


def _read_instruction(line: str, computation: Computation) -> None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return
    rest = line[match.end() :]
    # A tuple's shape is parenthesised, any other has no spaces in it.
    after = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:after], rest[after:]
    opcode, _, tail = rest.strip().partition("(")
    end = _closing("(" + tail) - 1
    name = match.group(2)
    computation.instructions[name] = Instruction(name, opcode, tail[:end], tail[end + 1 :], shape)
    if match.group(1):
        computation.root = name


def _closing(text: str) -> int:
    """The position of the parenthesis that closes the one `text` starts with."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in HLO text: {text[:80]!r}")


# Field numbers of xla/service/hlo.proto.
_MODULE_NAME, _MODULE_ENTRY_NAME, _MODULE_COMPUTATIONS = 1, 2, 3
_MODULE_SHAPE, _MODULE_ID, _MODULE_ENTRY_ID, _MODULE_STACK_FRAMES = 4, 5, 6, 17
_COMPUTATION_NAME, _COMPUTATION_SHAPE, _COMPUTATION_ID = 1, 4, 5


def with_entry(module: bytes, name: str) -> bytes:
    """Makes the computation `name` the entry of a module.

    Schedule, aliasing and whatever else describes the old entry is dropped.

    Args:
      module: a serialized `HloModuleProto`.
      name: one of its computations.

    Raises:
      ValueError: there is no such computation, or the bytes are not a message.
    """
    out, found = bytearray(), False
    for number, raw, payload in _fields(memoryview(module)):
        if number in (_MODULE_NAME, _MODULE_COMPUTATIONS, _MODULE_ID, _MODULE_STACK_FRAMES):
            out += raw
        if number != _MODULE_COMPUTATIONS:
            continue
        fields = {n: p for n, _, p in _fields(payload)}
        if bytes(fields[_COMPUTATION_NAME]) == name.encode():
            shape = bytes(fields[_COMPUTATION_SHAPE])
            entry = _bytes_field(_MODULE_ENTRY_NAME, name.encode())
            entry += _bytes_field(_MODULE_SHAPE, shape)
            entry += _varint(_MODULE_ENTRY_ID << 3) + bytes(fields[_COMPUTATION_ID])
            out += entry
            found = True
    if not found:
        raise ValueError(f"no computation {name!r} in the HLO module")
    return bytes(out)


def _fields(message: memoryview):
    """Yields (field number, the field as it stands, its payload) of a protobuf message."""
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        begin = at
        kind = key & 7
        if kind == 0:
            _, at = _read_varint(message, at)
        elif kind == 1:
            at += 8
        elif kind == 2:
            length, begin = _read_varint(message, at)
            at = begin + length
        elif kind == 5:
            at += 4
        else:
            raise ValueError(f"wire type {kind} in a protobuf message")
        yield key >> 3, message[start:at], message[begin:at]


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bytes_field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload
