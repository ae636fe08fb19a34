"""Trip counts of a compiled program's loops, and its computations as programs of their own.

XLA's cost analysis counts the body of a loop once. To count it as often as it runs takes two things
that jaxlib has no function for: the loop's trip count (XLA's CPU and GPU compilers write it into
the program, libtpu does not), and the body as a program of its own, which XLA can then cost.

Computations, instructions, opcodes and operands are those of jaxlib's ``HloModule``; attributes are
read from the text of an instruction. Text of another form is an error that quotes it.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

# Operations that leave a number unchanged, and those that are computed here.
_SAME = {"kBitcast", "kConvert", "kCopy", "kCopyDone", "kCopyStart", "kReshape"}
_SAME |= {"kOptimizationBarrier"}
_ARITHMETIC = {"kAdd": operator.add, "kSubtract": operator.sub, "kMultiply": operator.mul}
_COMPARE = {name: getattr(operator, name.lower()) for name in ("EQ", "NE", "LT", "LE", "GT", "GE")}
_MOST_ROUNDS = 100_000  # a round that is followed takes a tenth of a millisecond

# Returns the number that is a parameter of a computation, or an element of one.
_Lookup = Callable[[int, int | None], int]


# A field of a protobuf message: its number, its bytes, its payload.
_Field = tuple[int, memoryview, memoryview]


class _UnknownError(Exception):
    """A number cannot be told from the program; the message says why."""


class Program:
    """The computations of a compiled program.

    Args:
      module: jaxlib's ``HloModule``.

    Attributes:
      entry: the name of the computation that runs first.
      instructions: of each computation, by its name.
      unknown: loops whose trip counts could not be told, with the reasons.

    Raises:
      ValueError: jaxlib writes modules in another form than this reader knows.
    """

    def __init__(self, module: Any):
        self._module = module  # it owns the instructions
        self._proto = memoryview(module.as_serialized_hlo_module_proto())
        names = [
            bytes(name).decode() for n, _, name in _parse_fields(self._proto) if n == _ENTRY_NAME
        ]
        self.entry = names[0] if names else ""
        self.instructions = {c.name: c.instructions() for c in module.computations()}
        if self.entry not in self.instructions:
            raise ValueError(f"the HLO module has no computation {self.entry!r}, its entry")
        self.unknown: dict[str, str] = {}
        self._roots: dict[str, Any] = {}
        self._followed: dict[str, int] = {}
        self._loops: dict[str, list[tuple[str, Any]]] = {}
        for name, instructions in self.instructions.items():
            for loop in (i for i in instructions if i.opcode.name == "kWhile"):
                self._loops.setdefault(get_body(loop), []).append((name, loop))

    @property
    def has_loops(self) -> bool:
        """Whether any computation has a loop."""
        return bool(self._loops)

    def isolate(self, name: str) -> bytes:
        """Return a serialized ``HloModuleProto`` whose entry is this computation."""
        return _replace_entry(self._proto, name)

    def get_callees(self, instruction: Any) -> list[str]:
        """Return the computations that an instruction runs; ValueError if its text names none."""
        if instruction.opcode.name == "kAsyncStart":  # its text is that of what it starts
            root = instruction.async_wrapped_root().name
            return [n for n, own in self.instructions.items() if any(i.name == root for i in own)]
        one = r"(?:calls|to_apply|true_computation|false_computation)=(%[\w.\-]+)"
        several = r"(?:branch_computations|called_computations)=\{([^}]*)\}"
        found = re.findall(rf"\b(?:{one}|{several})", _get_text(instruction))
        names = re.findall(r"%([\w.\-]+)", " ".join(map("".join, found)))
        return names or [find_attribute(instruction, one)]

    def count_trips(self, computation: str, loop: Any) -> int:
        """Count how often a ``while`` in ``computation`` runs its body; 1 where that is not known.

        Raises:
          ValueError: an instruction is not written as expected.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.to_string())
        if known:
            return int(known[1])
        if loop.name not in self._followed:
            try:
                trips = self._follow_loop(loop, self._make_invariant_lookup(computation))
            except _UnknownError as error:
                place = re.search(r'op_name="([^"]*)"', loop.to_string())
                self.unknown[loop.name] = f"{place[1] if place else loop.name}: {error}"
                trips = 1
            self._followed[loop.name] = trips
        return self._followed[loop.name]

    def format_notes(self, counts: str) -> tuple[str, ...]:
        """Return a note on unknown trip counts, if any; ``counts`` is what such loops do once."""
        reasons = list(self.unknown.values())
        if not reasons:
            return ()
        loops = "a loop" if len(reasons) == 1 else f"{len(reasons)} loops, the first"
        return (f"{counts} once, as the trip count is not known here: {loops} at {reasons[0]}",)

    def _follow_loop(self, loop: Any, lookup: _Lookup) -> int:
        """Evaluate a loop's condition, round by round, and return the number of rounds."""
        test = self._get_root(find_attribute(loop, r"\bcondition=%([\w.\-]+)"))
        results = self._get_body_results(loop)

        def advance(before: _Lookup) -> _Lookup:
            return functools.cache(lambda _, n: self._evaluate(results[n], None, before))

        state: _Lookup = functools.cache(lambda _, n: self._evaluate(loop.operands()[0], n, lookup))
        for rounds in range(_MOST_ROUNDS):
            if not self._evaluate(test, None, state):
                return rounds
            state = advance(state)
        raise _UnknownError(f"it runs more than {_MOST_ROUNDS:,} times")

    def _make_invariant_lookup(self, computation: str) -> _Lookup:
        """Return a lookup of what the loop around a computation passes to it unchanged."""

        def look_up(_: int, n: int | None) -> int:
            loops = self._loops.get(computation, [])
            if len(loops) != 1 or n is None:
                raise _UnknownError(f"it depends on what {computation} is given")
            outer, loop = loops[0]
            if not self._is_invariant(loop, n):
                raise _UnknownError(f"it depends on what changes in {loop.name}, a loop around it")
            return self._evaluate(loop.operands()[0], n, self._make_invariant_lookup(outer))

        return look_up

    def _get_body_results(self, loop: Any) -> list[Any]:
        """Return the elements of the tuple that a loop's body returns."""
        root = self._get_root(get_body(loop))
        while root.opcode.name in _SAME:
            root = root.operands()[0]
        if root.opcode.name != "kTuple":
            raise _UnknownError(f"it depends on {root.name}, which is no tuple")
        return root.operands()

    def _is_invariant(self, loop: Any, n: int) -> bool:
        """Return whether a loop's body returns element ``n`` of its parameter unchanged."""
        value = self._get_body_results(loop)[n]
        while value.opcode.name in _SAME:
            value = value.operands()[0]
        if value.opcode.name != "kGetTupleElement" or _parse_index(value) != n:
            return False
        return value.operands()[0].opcode.name == "kParameter"

    def _get_root(self, computation: str) -> Any:
        """Return the instruction that is a computation's result, which jaxlib does not tell."""
        if computation not in self._roots:
            name = _find_root_name(self._proto, computation)
            own = (i for i in self.instructions[computation] if i.name == name)
            self._roots[computation] = next(own)
        return self._roots[computation]

    def _evaluate(self, value: Any, n: int | None, lookup: _Lookup) -> int:
        """Evaluate a value, or its element ``n``; ``lookup`` evaluates parameters."""
        kind, operands = value.opcode.name, value.operands()

        def look_up_operand(parameter: int, element: int | None) -> int:
            return self._evaluate(operands[parameter], element, lookup)

        if kind in _SAME:
            return self._evaluate(operands[0], n, lookup)
        if kind == "kGetTupleElement" and n is None:
            return self._evaluate(operands[0], _parse_index(value), lookup)
        if kind == "kTuple" and n is not None:
            return self._evaluate(operands[n], None, lookup)
        if kind == "kWhile" and n is not None and self._is_invariant(value, n):
            return self._evaluate(operands[0], n, lookup)
        if kind == "kParameter":
            return lookup(int(find_attribute(value, r" parameter\((\d+)\)")), n)
        if kind in ("kFusion", "kCall"):
            return self._evaluate(self._get_root(self.get_callees(value)[0]), n, look_up_operand)
        if kind == "kConstant":
            shape, number = find_attribute(value, r" = (\S+ constant\([^)]*)").split(" constant(")
            if re.match(r"(?:[su]\d+|pred)\[\]", shape):
                return int({"true": 1, "false": 0}.get(number, number))
        elif kind in _ARITHMETIC or kind == "kCompare":
            compare = kind == "kCompare" and _COMPARE[find_attribute(value, r"\bdirection=(\w+)")]
            return int((compare or _ARITHMETIC[kind])(*(look_up_operand(i, None) for i in (0, 1))))
        raise _UnknownError(f"it depends on {value.name}, a {kind[1:]}")


def get_body(loop: Any) -> str:
    """Return the computation that a ``while`` repeats; ValueError if its text names none."""
    return find_attribute(loop, r"\bbody=%([\w.\-]+)")


def _parse_index(value: Any) -> int:
    return int(find_attribute(value, r"\bindex=(\d+)"))


def find_attribute(instruction: Any, pattern: str) -> str:
    """Return what a pattern's group finds in an instruction's text; ValueError for nothing."""
    found = re.search(pattern, _get_text(instruction))
    if found is None:
        raise ValueError(f"no {pattern!r} in the HLO {_get_text(instruction)[:200]!r}")
    return found[1]


def _get_text(instruction: Any) -> str:
    """Return an instruction's text without its backend's part, which may be a whole kernel."""
    return instruction.to_string().partition(", backend_config=")[0]


# Field numbers of a module in xla/service/hlo.proto; protobuf never gives them to anything else.
_NAME, _ENTRY_NAME, _COMPUTATIONS, _SHAPE, _ID, _ENTRY_ID, _STACK_FRAMES = 1, 2, 3, 4, 5, 6, 17
# Field numbers of a computation's name, shape and id, and of its entry's in a module.
_AS_ENTRY = {1: _ENTRY_NAME, 4: _SHAPE, 5: _ENTRY_ID}
# Field numbers of a computation's instructions and of its root's id, and of an instruction's id.
_INSTRUCTIONS, _ROOT_ID, _INSTRUCTION_ID = 2, 6, 35


def _find_root_name(module: memoryview, computation: str) -> str:
    """Return the name of a computation's root."""
    own = _find_computation(module, computation)
    root = next((bytes(value) for n, _, value in own if n == _ROOT_ID), None)
    for instruction in (value for n, _, value in own if n == _INSTRUCTIONS):
        fields = {n: bytes(value) for n, _, value in _parse_fields(instruction)}
        if fields.get(_INSTRUCTION_ID) == root:  # 0 is not written
            return fields[_NAME].decode()
    raise ValueError(f"no root of {computation!r} in the HLO module")


def _replace_entry(module: memoryview, name: str) -> bytes:
    """Return the module with another entry, without the old one's schedule and aliasing."""
    made = bytearray()
    for number, field, _ in _parse_fields(module):
        if number in (_NAME, _COMPUTATIONS, _ID, _STACK_FRAMES):
            made += field
    for number, field, _ in _find_computation(module, name):
        if number in _AS_ENTRY:  # number and wire type are one byte
            made += bytes([_AS_ENTRY[number] << 3 | field[0] & 7]) + field[1:]
    return bytes(made)


def _find_computation(module: memoryview, name: str) -> list[_Field]:
    """Return the fields of a computation."""
    for number, _, message in _parse_fields(module):
        own = list(_parse_fields(message)) if number == _COMPUTATIONS else []
        if any(n == _NAME and bytes(value) == name.encode() for n, _, value in own):
            return own
    raise ValueError(f"no computation {name!r} in the HLO module")


def _parse_fields(message: memoryview) -> Iterator[_Field]:
    """Yield the fields of a protobuf message."""
    at = 0
    while at < len(message):
        start = at
        key, begin = _parse_varint(message, at)
        value, at = _parse_varint(message, begin)
        if key & 7 == 2:
            begin, at = at, at + value
        elif key & 7 != 0:
            raise ValueError(f"wire type {key & 7} in an HLO module")
        yield key >> 3, message[start:at], message[begin:at]


def _parse_varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place after it."""
    value = shift = 0
    while message[at] >= 0x80:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1
