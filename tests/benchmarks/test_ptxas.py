from __future__ import annotations

import os

from benchmarks.harness import ptxas

CLEAN = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'axattn_forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for axattn_forward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
ptxas info    : Compile time = 56.954 ms
"""

SPILLED = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'axattn_key_grad_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient register resources for the wgmma pipeline in the function 'axattn_key_grad_mosaic_gpu_kernel'
warning : Registers are spilled to local memory in function 'axattn_key_grad_mosaic_gpu_kernel', 28 bytes spill stores, 64 bytes spill loads
ptxas info    : Function properties for axattn_key_grad_mosaic_gpu_kernel
    48 bytes stack frame, 28 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 240 registers, used 9 barriers, 48 bytes cumulative stack size
"""


def test_a_clean_kernel():
    (kernel,) = ptxas.parse(CLEAN)
    assert kernel == ptxas.Kernel("axattn_forward_mosaic_gpu_kernel", 168, 0, 0)
    assert kernel.clean and not kernel.serialized


def test_spills_and_serialized_products():
    clean, kernel = ptxas.parse(CLEAN + SPILLED)
    assert clean.clean
    assert (kernel.registers, kernel.spill_stores, kernel.spill_loads) == (240, 28, 64)
    assert kernel.serialized and not kernel.clean
    assert len(kernel.warnings) == 2


def test_a_spill_alone_is_no_serialization():
    lines = [line for line in SPILLED.splitlines() if "C7510" not in line]
    (kernel,) = ptxas.parse("\n".join(lines))
    assert not kernel.serialized and not kernel.clean


def test_a_warning_before_the_kernels_own_lines_is_its():
    head = "ptxas info : (C7509) Potential Performance Loss: wgmma.mma_async instructions are serialized due to the presence of Extern calls in the function 'f'\n"
    (kernel,) = ptxas.parse(head + CLEAN)
    assert kernel.serialized


def test_no_report():
    assert ptxas.parse("") == []
    assert ptxas.parse("ptxas info : Compiling entry function 'f' for 'sm_90a'\n") == []


def test_what_is_written_to_the_descriptors_is_caught(capfd):
    with ptxas.captured() as texts:
        os.write(1, b"from C++\n")
        os.write(2, b"and stderr\n")
    assert texts == ["from C++\nand stderr\n"]
    print("seen", flush=True)
    assert capfd.readouterr().out == "seen\n"
