"""Trip counts of loops, and computations as programs of their own."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from axattn import _jax_compat
from axattn.aot import _hlo as hlo
from axattn.aot._cost import compute_program_cost

# The shape of a TPU program: no known_trip_count, the counter's start copied in from outside, the
# bound in a fusion, an invariant carried through an outer loop.
TEXT = """HloModule jit_f, is_scheduled=true

%bound (p.0: s32[], p.1: s32[]) -> pred[] {
  %p.0 = s32[]{:T(128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%p.0, %p.1), direction=DIRECTION
}

%inner_cond (a.0: (s32[], f32[8,128], /*index=2*/s32[])) -> pred[] {
  %a.0 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i.0 = s32[]{:T(128)} get-tuple-element(%a.0), index=0
  %n = s32[]{:T(128)} constant(BOUND)
  ROOT %cmp = pred[]{:T(512)} fusion(%i.0, %n), kind=kLoop, calls=%bound
}

%inner_body (a.1: (s32[], f32[8,128], /*index=2*/s32[])) -> (s32[], f32[8,128], /*index=2*/s32[]) {
  %a.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%a.1), index=0
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%a.1), index=1
  %s.1 = s32[]{:T(128)} get-tuple-element(%a.1), index=2
  %next = s32[]{:T(128)} add(%i.1, %s.1)
  ROOT %t.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next, %x.1, %s.1)
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0), metadata={op_name="x (y"}
  %start = s32[]{:T(128)} constant(START)
  %copied = s32[]{:T(128)} copy(%start)
  %step = s32[]{:T(128)} constant(STEP)
  %t = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%copied, %x, %step)
  %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, s32[]{:T(128)}) while(%t), \
condition=%inner_cond, body=%inner_body
  ROOT %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def hlo_module(text):
    from jaxlib import _hlo

    return _hlo.hlo_module_from_text(text)


def program(text):
    return hlo.Program(hlo_module(text))


def loops(found):
    """Trip counts by the loops' names."""
    return {
        loop.name: found.count_trips(name, loop)
        for name, instructions in found.instructions.items()
        for loop in instructions
        if loop.opcode.name == "kWhile"
    }


def trips(start=0, step=1, direction="LT", bound=10, text=TEXT):
    """The trip count, or why it is not known."""
    for name, value in dict(START=start, STEP=step, DIRECTION=direction, BOUND=bound).items():
        text = text.replace(name, str(value))
    found = program(text)
    counts = loops(found)
    return found.unknown.get("loop") or counts["loop"]


@pytest.mark.parametrize(
    "start, step, direction, bound",
    [
        (0, 1, "LT", 10),
        (2, 1, "LT", 8),
        (0, 3, "LT", 10),
        (0, 2, "LE", 10),
        (10, -1, "GT", 0),
        (9, -2, "GE", 0),
        (0, 1, "LT", 0),
        (5, 1, "LT", 2),
        (0, 5, "NE", 20),
    ],
)
def test_trip_count(start, step, direction, bound):
    test = {
        "LT": lambda i: i < bound,
        "LE": lambda i: i <= bound,
        "GT": lambda i: i > bound,
        "GE": lambda i: i >= bound,
        "NE": lambda i: i != bound,
    }[direction]
    count, i = 0, start
    while test(i):
        count, i = count + 1, i + step
    assert trips(start, step, direction, bound) == count
    backwards = TEXT.replace("add(%i.1, %s.1)", "subtract(%i.1, %s.1)")
    assert trips(start, -step, direction, bound, backwards) == count
    bound_first = TEXT.replace("compare(%p.0, %p.1)", "compare(%p.1, %p.0)")
    turned = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}[direction]
    assert trips(start, step, turned, bound, bound_first) == count


@pytest.mark.parametrize("step, direction, bound", [(0, "LT", 10), (-1, "LT", 10), (3, "NE", 10)])
def test_loops_without_an_end(monkeypatch, step, direction, bound):
    monkeypatch.setattr(hlo, "_MOST_ROUNDS", 100)
    assert trips(0, step, direction, bound) == "loop: it runs more than 100 times"


def test_a_value_that_nothing_uses_is_no_result():
    """Operations with an effect have no user, as a computation's result."""
    called = '%own = f32[8,128] custom-call(%x.1), custom_call_target="f"'
    called = f"  {called}, custom_call_has_side_effect=true\n  %next = "
    assert trips(text=TEXT.replace("  %next = ", called)) == 10


@pytest.mark.parametrize(
    "line, other, reason",
    [
        ("copy(%start)", "negate(%start)", "it depends on copied, a Negate"),
        ("%step = s32[]{:T(128)} constant(STEP)", "%step = s32[]{:T(128)} parameter(1)", "main"),
    ],
)
def test_numbers_that_are_data_are_named(line, other, reason):
    text = TEXT.replace(line, other).replace("(x: f32[8,128]) ->", "(x: f32[8,128], p: s32[]) ->")
    if "parameter" not in other:
        text = text.replace(", p: s32[])", ")")
    assert reason in trips(text=text)


def test_a_counter_need_not_count():
    text = TEXT.replace("add(%i.1, %s.1)", "multiply(%i.1, %i.1)")
    assert trips(2, 1, "LT", 300, text) == 4  # 2, 4, 16, 256


def test_known_trip_count_is_believed():
    text = TEXT.replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert trips(text=text) == 7


# A loop in a loop, whose bound is what the outer one carries: unchanged, or counted up.
NESTED = """HloModule jit_f

%less (a.0: STATE) -> pred[] {
  %a.0 = STATE parameter(0)
  %i.0 = s32[] get-tuple-element(%a.0), index=0
  %n.0 = s32[] get-tuple-element(%a.0), index=1
  ROOT %lt = pred[] compare(%i.0, %n.0), direction=LT
}

%count (a.1: STATE) -> STATE {
  %a.1 = STATE parameter(0)
  %i.1 = s32[] get-tuple-element(%a.1), index=0
  %n.1 = s32[] get-tuple-element(%a.1), index=1
  %one.1 = s32[] constant(1)
  %next.1 = s32[] add(%i.1, %one.1)
  ROOT %t.1 = STATE tuple(%next.1, %n.1, %i.1)
}

%around (a.2: STATE) -> STATE {
  %a.2 = STATE parameter(0)
  %i.2 = s32[] get-tuple-element(%a.2), index=0
  %n.2 = s32[] get-tuple-element(%a.2), index=1
  %zero.2 = s32[] constant(0)
  %t.2 = STATE tuple(%zero.2, %BOUND, %zero.2)
  %inner = STATE while(%t.2), condition=%less, body=%count
  %last.2 = s32[] get-tuple-element(%inner), index=0
  %one.2 = s32[] constant(1)
  %next.2 = s32[] add(%i.2, %one.2)
  ROOT %t.3 = STATE tuple(%next.2, %n.2, %last.2)
}

ENTRY %main () -> STATE {
  %zero = s32[] constant(0)
  %five = s32[] constant(5)
  %start = STATE tuple(%zero, %five, %zero)
  ROOT %outer = STATE while(%start), condition=%less, body=%around
}
"""


def test_a_bound_from_the_loop_around():
    text = NESTED.replace("STATE", "(s32[], s32[], s32[])")
    found = program(text.replace("BOUND", "n.2"))
    assert (loops(found), found.unknown) == ({"inner": 5, "outer": 5}, {})
    found = program(text.replace("BOUND", "i.2"))
    assert loops(found) == {"inner": 1, "outer": 5}
    reason = "it depends on what changes in outer, a loop around it"
    assert found.unknown == {"inner": f"inner: {reason}"}


def nested(x):
    def step(x, _):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, 7)[0], None

    x = jax.lax.scan(step, x, None, 5)[0]
    return jax.lax.fori_loop(3, 14, lambda _, x: x @ x, x)


def compiled(fn):
    return jax.jit(fn).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()


def test_loops_in_loops_are_the_same_without_what_xla_says():
    found = compiled(nested)
    said = loops(hlo.Program(_jax_compat.read_optimized_hlo(found)))
    assert sorted(said.values()) == [5, 7, 11]
    text, count = re.subn(r'"known_trip_count":\{"n":"\d+"\},?', "", found.as_text())
    assert count == 3
    without = program(text)
    assert (loops(without), without.unknown) == (said, {})


def test_a_body_alone_costs_what_it_does():
    module = _jax_compat.read_optimized_hlo(compiled(nested))
    found = hlo.Program(module)
    costs = []
    for instructions in found.instructions.values():
        for loop in instructions:
            if loop.opcode.name == "kWhile":
                alone = _jax_compat.make_hlo_module(found.isolate(hlo.get_body(loop)))
                costs.append(_jax_compat.analyze_hlo_cost(alone)["flops"])
    assert all(2 * 64**3 <= cost < 2.1 * 64**3 for cost in costs), costs
    with pytest.raises(ValueError, match="no computation 'x'"):
        found.isolate("x")


KERNELS = r"""HloModule jit_f

%more (a.0: (s32[], f32[8])) -> pred[] {
  %a.0 = (s32[], f32[8]) parameter(0)
  %i.0 = s32[] get-tuple-element(%a.0), index=0
  %five = s32[] constant(5)
  ROOT %lt = pred[] compare(%i.0, %five), direction=LT
}

%body (a.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a.1 = (s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%a.1), index=0
  %x.1 = f32[8] get-tuple-element(%a.1), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %gpu = f32[8] custom-call(%x.1), custom_call_target="mosaic_gpu_v2", \
api_version=API_VERSION_TYPED_FFI, \
backend_config={cost_estimate_json = "{\22flops\22: 600000, \22bytes_accessed\22: 80000}", x = 1}
  ROOT %t.1 = (s32[], f32[8]) tuple(%next, %gpu)
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %other = f32[8] custom-call(%x), custom_call_target="Sharding"
  %tpu = f32[8] custom-call(%other), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"cost_estimate":{"flops":"7000000","bytes_accessed":"9000"}}}
  %start = (s32[], f32[8]) tuple(%zero, %tpu)
  ROOT %loop = (s32[], f32[8]) while(%start), condition=%more, body=%body
}
""".replace("\\\n", "")


def test_what_kernels_say(monkeypatch):
    monkeypatch.setattr(_jax_compat, "read_compiler_cost", lambda compiled: None)
    monkeypatch.setattr(_jax_compat, "read_optimized_hlo", hlo_module)
    found = compute_program_cost(KERNELS)
    assert found.flops == pytest.approx(7e6 + 5 * 6e5, abs=100)
    assert found.bytes_accessed == pytest.approx(9e3 + 5 * 8e4, abs=1000)
    assert (found.is_lower_bound, found.notes) == (False, ())

    found = compute_program_cost(KERNELS.replace("cost_estimate_json", "nothing"))
    assert found.flops == pytest.approx(7e6, abs=100)
    assert found.is_lower_bound
    (note,) = found.notes
    assert note.startswith("kernels without a cost estimate are left out of the FLOPs")
    assert "(mosaic_gpu_v2 x1)" in note


def test_text_that_is_not_understood_is_no_lower_bound(monkeypatch):
    """Another way of printing attributes: nothing is known, and the reason has the text."""
    text = hlo._get_text
    monkeypatch.setattr(hlo, "_get_text", lambda i: text(i).replace("body=", "loop_body="))
    cost = compute_program_cost(compiled(nested))
    assert (cost.flops, cost.bytes_accessed, cost.is_lower_bound) == (None, None, True)
    assert len(cost.notes) == 1
    assert re.match(
        r"FLOPs and bytes are not known: this jaxlib's HLO is not understood "
        r"\(no '.*body=.*' in the HLO '%while.*loop_body=",
        cost.notes[0],
    )


def test_without_a_cpu_backend_loops_are_not_guessed(monkeypatch):
    straight, looped = compiled(lambda x: x @ x), compiled(nested)
    monkeypatch.setattr(_jax_compat, "analyze_hlo_cost", lambda module: None)
    cost = compute_program_cost(straight)
    assert (cost.flops, cost.is_lower_bound) == (pytest.approx(2 * 64**3, rel=0.1), False)
    cost = compute_program_cost(looped)
    assert (cost.flops, cost.bytes_accessed) == (None, None)
    assert cost.notes == ("FLOPs and bytes are not known: counting them needs JAX's CPU backend",)


def test_bytes_that_are_no_module():
    class Other:
        def as_serialized_hlo_module_proto(self):
            return b"\x0b\x00"

        def computations(self):
            return []

    with pytest.raises(ValueError, match="wire type 3 in an HLO module"):
        hlo.Program(Other())
