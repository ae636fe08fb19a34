"""Trip counts from HLO text."""

from __future__ import annotations

import pytest

from axattn.aot import hlo

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


def trips(start=0, step=1, direction="LT", bound=10, text=TEXT):
    for name, value in dict(START=start, STEP=step, DIRECTION=direction, BOUND=bound).items():
        text = text.replace(name, str(value))
    module = hlo.Module(text)
    return module.trip_count(module.entry, module.computations["main"].instructions["loop"])


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


@pytest.mark.parametrize(
    "start, step, direction, bound",
    [(0, 0, "LT", 10), (0, 0, "NE", 10), (0, -1, "LT", 10), (0, 3, "NE", 10), (0, 1, "EQ", 10)],
)
def test_loops_that_are_not_counted(start, step, direction, bound):
    assert trips(start, step, direction, bound) is None


@pytest.mark.parametrize(
    "line, other", [("copy(%start)", "negate(%start)"), ("add(%i.1, %s.1)", "add(%s.1, %s.1)")]
)
def test_a_start_that_is_data_and_a_counter_set_anew_are_not_guessed(line, other):
    assert trips(text=TEXT.replace(line, other)) is None


def test_known_trip_count_is_believed():
    text = TEXT.replace(
        "body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    assert trips(text=text) == 7


def test_text_that_is_not_hlo():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Module("hello")


def test_with_entry_needs_the_computation():
    with pytest.raises(ValueError, match="no computation 'x'"):
        hlo.with_entry(b"", "x")
