from __future__ import annotations

import pytest

from axattn.cache._pool import PagePool
from benchmarks.harness import cache_trace
from benchmarks.harness.cache_trace import Request

MAX = 4096


def replay(trace, rows=16, max_length=MAX, page_sizes=(16,)):
    return cache_trace.replay(
        trace, rows=rows, max_length=max_length, page_sizes=page_sizes, slot_bytes=2
    )


def test_mixed_lengths():
    trace = cache_trace.make_trace(100, 16, MAX)
    lengths = sorted(request.prompt + request.generated for request in trace)
    assert lengths[-1] <= MAX and lengths[-1] > 20 * lengths[0]  # mixed
    dense, *paged = replay(trace, page_sizes=(8, 16, 32, 128))
    assert dense.slots_per_token > 2
    by_size = {found.page_size: found.slots_per_token for found in paged}
    assert 1 <= by_size[8] < by_size[16] < by_size[32] < by_size[128]
    # At most 1.05 slots per token for pages of 16; pages of 128 would not do.
    assert by_size[16] <= 1.05 < by_size[128]
    assert dense.peak_slots == 16 * MAX and dense.of_dense == 1
    assert all(found.peak_tokens <= found.peak_slots < dense.peak_slots for found in paged)


def test_by_hand():
    # 17 tokens, then 18: measured at the first step.
    dense, paged = replay([Request(0, 16, 2)], max_length=64)
    assert (dense.slots_per_token, dense.peak_slots, dense.page_size) == (64 / 17, 64, None)
    assert (paged.slots_per_token, paged.peak_slots, paged.page_size) == (32 / 17, 32, 16)
    assert (paged.peak_tokens, paged.peak_bytes, paged.of_dense) == (17, 64, 0.5)
    assert paged.unused == pytest.approx(15 / 32)


def test_requests_wait_for_a_row():
    _, one = replay([Request(0, 16, 40)] * 2, rows=1, max_length=64)
    _, two = replay([Request(0, 16, 40)] * 2, rows=2, max_length=64)
    assert one.peak_tokens <= 56 < two.peak_tokens <= 112


def test_gaps_between_requests():
    found = replay([Request(5, 3, 1), Request(1000, 3, 1)], max_length=64)
    assert [o.peak_tokens for o in found] == [4, 4]


def test_the_same_again():
    assert cache_trace.make_trace(20, 4, 64) == cache_trace.make_trace(20, 4, 64)
    assert cache_trace.make_trace(20, 4, 64) != cache_trace.make_trace(20, 4, 64, seed=1)


@pytest.mark.parametrize("max_length", [2, 3, 16])
def test_short_rows(max_length):
    trace = cache_trace.make_trace(30, 2, max_length)
    assert all(r.prompt >= 1 and r.generated >= 1 for r in trace)
    assert all(r.prompt + r.generated <= max_length for r in trace)
    assert replay(trace, rows=2, max_length=max_length)[1].slots_per_token >= 1


def test_no_room_for_an_answer():
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        cache_trace.make_trace(1, 1, 1)


@pytest.mark.parametrize("lost", ["free", "append"])
def test_a_pool_that_miscounts_is_noticed(monkeypatch, lost):
    monkeypatch.setattr(PagePool, lost, lambda *_: None)
    with pytest.raises(RuntimeError, match="and the requests have"):
        replay([Request(0, 4, 2)], max_length=64)
