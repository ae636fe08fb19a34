"""Reading compilers' refusals, and the report as text and as data."""

from __future__ import annotations

import json

import pytest

from axattn import aot

GIB = 2**30

# Real messages, recorded from the compilers named.
LIBTPU_HBM = (  # libtpu 0.0.51, v5p, attention with full logits
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (97.44G) exceeds available HBM (95.73G). HLO module: jit_f.\n"
    "See https://openxla.org/xla/errors/error_1000 for more details."
)
LIBTPU_HBM_OLD = (  # libtpu of 2024-2025
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 98.31G of 95.74G hbm. Exceeded hbm capacity by 2.57G."
)
LIBTPU_VMEM = (  # libtpu 0.0.51, v5p, a Pallas kernel with one block of 256 MiB
    "RESOURCE_EXHAUSTED: Allocation (size=268435456) would exceed memory (size=67108864) :: "
    "#allocation3 [shape = 'u8[268435456]{0}', space=vmem, size = 0x10000000, scoped, tag = "
    "'input window allocation for operator input 0.']"
)
LIBTPU_SCOPED_VMEM = (  # libtpu, a Pallas kernel somewhat too large
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack for "
    "%custom-call. Scoped allocation with size 20.25M and limit 16.00M exceeded scoped vmem limit "
    "by 4.25M."
)
MOSAIC_GPU_SMEM = (  # jax 0.12.0, h200
    "Mosaic GPU kernel exceeds available shared memory: smem_bytes=2097152 > max_smem_bytes=232448"
)
PTXAS_SMEM = (  # ptxas 13
    "ptxas error   : Entry function 'k' uses too much shared data (0x40000 bytes, 0x38c00 max)"
)


@pytest.mark.parametrize(
    "message, memory, requested, available",
    [
        (LIBTPU_HBM, "hbm", 97.44 * GIB, 95.73 * GIB),
        (LIBTPU_HBM_OLD, "hbm", 98.31 * GIB, 95.74 * GIB),
        (LIBTPU_VMEM, "vmem", 268435456, 67108864),
        (LIBTPU_SCOPED_VMEM, "vmem", 20.25 * 2**20, 16 * 2**20),
        (MOSAIC_GPU_SMEM, "smem", 2097152, 232448),
        (PTXAS_SMEM, "smem", 0x40000, 0x38C00),
    ],
    ids=["hbm", "hbm-old", "vmem", "vmem-scoped", "smem", "ptxas"],
)
def test_out_of_memory_is_read(message, memory, requested, available):
    refusal = aot.parse_refusal(message)
    assert refusal.kind == "out_of_memory"
    assert refusal.memory == memory
    assert refusal.requested_bytes == int(requested)
    assert refusal.available_bytes == int(available)
    assert refusal.message == message


@pytest.mark.parametrize(
    "message, kind",
    [
        ("RESOURCE_EXHAUSTED: something else", "out_of_memory"),
        ("UNIMPLEMENTED: dynamic shapes", "unsupported"),
        ("INTERNAL: Mosaic failed to compile TPU kernel", "compiler_error"),
    ],
)
def test_other_refusals(message, kind):
    refusal = aot.parse_refusal(message)
    assert (refusal.kind, refusal.requested_bytes, refusal.available_bytes) == (kind, None, None)
    assert message in str(refusal)


def report(**changes):
    fields = dict(
        target="v5p",
        device_kind="TPU v5",
        function="f",
        argument_bytes=8 * 2**20,
        output_bytes=4 * 2**20,
        temp_bytes=3 * 2**30,
        alias_bytes=1 * 2**20,
        generated_code_bytes=5,
        flops=2e12,
        bytes_accessed=3e9,
        compile_seconds=1.5,
        versions={"jax": "0.12.0"},
        compiled=object(),
    )
    return aot.Report(**fields | changes)


def test_total_is_arguments_outputs_and_temporaries_without_what_is_aliased():
    r = report()
    assert r.total_bytes == r.hbm_bytes == 3 * 2**30 + 11 * 2**20
    assert r.ok


def test_table():
    text = str(report())
    assert "f on v5p (TPU v5)" in text
    assert "HBM in all      3.01 GiB  (3.1 % of 96.00 GiB)" in text
    assert "FLOPs           2 T" in text
    assert "jax 0.12.0" in text


def test_cpu_bytes_are_never_called_hbm():
    r = report(target="cpu", device_kind="cpu")
    assert r.hbm_bytes is None
    assert r.total_bytes == 3 * 2**30 + 11 * 2**20
    assert "host memory in all" in str(r)
    assert "the bytes are host memory, not HBM" in str(r)
    assert r.to_dict()["memory"] == "host memory"


def test_a_refused_report_says_what_was_asked():
    refused = aot.Report("v5p", "TPU v5", "f", refusal=aot.parse_refusal(LIBTPU_HBM))
    assert not refused.ok
    assert refused.hbm_bytes is None
    assert "out of memory (hbm): 97.44 GiB requested, 95.73 GiB available" in str(refused)
    assert "temporaries" not in str(refused)
    with pytest.raises(ValueError, match="no compiled program for v5p: out of memory"):
        refused.hlo_text()


@pytest.mark.parametrize("refusal", [None, aot.parse_refusal(LIBTPU_VMEM)])
def test_to_dict_is_json(refusal):
    data = report(refusal=refusal, notes=("a loop counts once",), cost_is_lower_bound=True)
    back = json.loads(json.dumps(data.to_dict()))
    assert back["hbm_bytes"] == data.hbm_bytes
    assert back["notes"] == ["a loop counts once"]
    assert "compiled" not in back
    assert (back["refusal"] or {}).get("memory") == (refusal.memory if refusal else None)


def test_a_lower_bound_is_shown_as_one():
    text = str(report(cost_is_lower_bound=True, notes=("1 loop(s) count once",)))
    assert ">= 2 T" in text
    assert "1 loop(s) count once" in text
