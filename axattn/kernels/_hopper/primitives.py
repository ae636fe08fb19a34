"""What the kernels ask of the device: launches, shared memory, products and register layouts.

Names in Mosaic GPU are unstable. Its interpreter has no WGMMA whose left operand is in registers,
and no accumulator that outlives one product: `multiply_add` hides both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn import _jax_compat
from axattn.kernels._problem import round_up

# Versions of JAX differ in what type checkers see of these: arguments, and what is abstract.
_load: Any = plgpu.load
_Tiling: Any = plgpu.TilingTransform
_Swizzle: Any = plgpu.SwizzleTransform

# A warpgroup multiplies 64 rows at a time.
ROWS = 64

# TMA copies rows in groups of 8 (the swizzled atom of shared memory): lengths in HBM are multiples.
ROW_GROUP = 8

REGISTER_TILE = plgpu.Layout.WGMMA

# How 8-bit numbers come from swizzled shared memory into registers, four at a time.
CODE_TILE = plgpu.Layout.WGMMA_8BIT

# Registers per thread by the number of consumer warpgroups: (theirs, the producer's). A program of
# 3 warpgroups is launched with 168 each, one of 4 with 128: the sums stay within that.
_REGISTERS = {2: (240, 24), 3: (160, 32)}

# The same where the producer looks up pages or finds its own splits.
_REGISTERS_TO_SEARCH = {2: (232, 40), 3: (160, 32)}

# Dynamic shared memory of one program on Hopper: 227 KiB.
SHARED_BYTES = 232_448

# Shared memory that Pallas reserves where rows are reduced across warps.
REDUCTION_BYTES = 2048

# Mosaic GPU starts every buffer at a multiple of this.
_ALIGNMENT = 1024
_BARRIER_BYTES = 8


def round_up_length(length: int) -> int:
    """Return the length that arrays of ``length`` slots have in HBM."""
    return round_up(length, ROW_GROUP)


# ---- programs -----------------------------------------------------------------------------------


def make_kernel(
    body,
    *,
    name: str,
    out: Any,
    scratch: Any,
    programs: int,
    warpgroups: int,
    cost: pl.CostEstimate,
    interpret: bool,
    reduction_bytes: int = 0,
):
    """Return a function that runs ``body(*inputs, *outputs, **scratch)`` in ``programs`` programs.

    In the body, ``lax.axis_index`` of "program" and of "warpgroup" say which one it is.
    ``reduction_bytes``: shared memory for reductions across warps.
    """
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        # Lane semantics take the layouts that are written here; the other ones infer them.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=reduction_bytes,
        ),
        interpret=_jax_compat.make_gpu_interpreter() if interpret else None,
        **_jax_compat.make_gpu_kernel_cost(cost),
    )


def claim_registers(warpgroups: int, *, producer: bool = False, searching: bool = False) -> None:
    """Move registers from the producer to the ``warpgroups`` consumers; all of them call this.

    ``searching``: the producer looks up pages or finds its own splits.
    """
    table = _REGISTERS_TO_SEARCH if searching else _REGISTERS
    if warpgroups not in table:
        return  # two warpgroups in all have as many as a thread can address
    consuming, producing = table[warpgroups]
    if producer:
        plgpu.set_max_registers(producing, action="decrease")
    else:
        plgpu.set_max_registers(consuming, action="increase")


def make_opaque(index: jax.Array) -> jax.Array:
    """Return the same index, about which the compiler knows nothing.

    In a loop, the compiler would keep the descriptors of a tile that stays the same in registers
    (32 of them for H = 256). With an opaque index it computes them again in every step.
    """
    return lax.optimization_barrier(index)


def sync_warpgroups(barrier) -> None:
    """Wait until every warpgroup that arrives at ``barrier`` has come to this line."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


class PingPong:
    """Two warpgroups alternate: one uses the tensor core while the other one exponentiates.

    The second one starts a turn late. With another number of warpgroups nobody waits. The barrier
    is an mbarrier, which orders memory and products, and not arithmetic in registers: ptxas moves
    an arrival up past it. (A named barrier would stay where it is; Pallas has none.)
    """

    def __init__(self, barrier, warpgroups: int, warpgroup: jax.Array):
        self.barrier = barrier if warpgroups == 2 else None
        self.warpgroup = warpgroup

    def arrive(self) -> None:
        """Let the other warpgroup use the tensor core."""
        if self.barrier is not None:
            plgpu.barrier_arrive(self.barrier)

    def wait(self) -> None:
        """Wait for the tensor core."""
        if self.barrier is not None:
            plgpu.barrier_wait(self.barrier)

    def sync(self) -> None:
        self.arrive()
        self.wait()

    def start(self) -> None:
        """Delay the second warpgroup by a turn."""
        if self.barrier is not None:
            pl.when(self.warpgroup == 1)(self.sync)

    def end(self) -> None:
        """Have the first warpgroup take the turn that the second one still waits for."""
        if self.barrier is not None:
            pl.when(self.warpgroup == 0)(self.sync)


# ---- shared memory ------------------------------------------------------------------------------


def declare_swizzled(shape: tuple[int, ...], dtype: Any, block: int):
    """Return shared memory ``[..., rows, size]`` as WGMMA and TMA want it.

    A block of ``block`` rows that is summed over (values under weights, keys under gradients) must
    be a multiple of the columns that are swizzled together: small blocks have fewer of these.
    """
    dtype = jnp.dtype(dtype)
    # 64 codes, so that as many columns can be read at once as are written of 16-bit numbers.
    widths = (n // dtype.itemsize for n in ((64, 32) if dtype.itemsize == 1 else (128, 64, 32)))
    summed = dtype.itemsize == 2
    columns = next(n for n in widths if shape[-1] % n == 0 and (block % n == 0 or not summed))
    atom = _Tiling((8, columns)), _Swizzle(columns * dtype.itemsize)
    return plgpu.SMEM(shape, dtype, transforms=atom)


def declare_row_major(shape: tuple[int, ...], dtype: Any):
    """Return shared memory in row-major order."""
    return plgpu.SMEM(shape, dtype)


def count_shared_bytes(scratch: Any, *, reduction_bytes: int = 0) -> int:
    """Return the shared memory that a kernel takes, from what it declares."""
    buffers = barriers = 0
    for leaf in jax.tree.leaves(scratch):
        if isinstance(leaf, plgpu.Barrier):
            shape: Any = leaf.num_barriers
            barriers += math.prod(shape)
        else:
            buffers += round_up(math.prod(leaf.shape) * leaf.dtype.itemsize, _ALIGNMENT)
    return buffers + _BARRIER_BYTES * barriers + reduction_bytes


# ---- products -----------------------------------------------------------------------------------


def multiply(a_ref, b_ref, then: Callable[[], None] | None = None) -> jax.Array:
    """Return ``a @ b`` of two tiles in shared memory, as a float32 register tile.

    ``then`` is called while the tensor core works.
    """

    def run(accumulator):
        plgpu.wgmma(accumulator, a_ref, b_ref)
        if then is not None:
            then()
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((a_ref.shape[0], b_ref.shape[1]), jnp.float32))


def multiply_both(first: tuple, second: tuple) -> tuple[jax.Array, jax.Array]:
    """Return two products of tiles in shared memory; the tensor core does them back to back."""

    def run(one, two):
        plgpu.wgmma(one, *first)
        plgpu.wgmma(two, *second)
        return one[...], two[...]

    shapes = ((a.shape[0], b.shape[1]) for a, b in (first, second))
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def multiply_add(total: jax.Array, a: Any, b_ref, *, interpret: bool) -> jax.Array:
    """Return ``total + a @ b``: ``total`` in registers, ``b`` in shared memory, ``a`` in either."""
    if interpret:
        b = b_ref[...]
        a = a if isinstance(a, jax.Array) else a[...]
        # On the device this read is the tensor core's; a thread's own read must be fenced.
        plgpu.commit_smem()
        return total + jnp.dot(a, b, preferred_element_type=jnp.float32)

    def run(accumulator):
        plgpu.wgmma(accumulator, a, b_ref)

    return pl.run_state(run)(plgpu.ACC.init(total))


def multiply_add_then_multiply(
    total: jax.Array, a: jax.Array, b_ref, other: tuple, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Return ``total + a @ b`` as `multiply_add` does, and the product of ``other``'s two tiles."""
    if interpret:
        return multiply_add(total, a, b_ref, interpret=True), multiply(*other)

    def run(accumulators):
        plgpu.wgmma(accumulators[0], a, b_ref)
        plgpu.wgmma(accumulators[1], *other)

    fresh = make_zeros((other[0].shape[0], other[1].shape[1]))
    return pl.run_state(run)((plgpu.ACC.init(total), plgpu.ACC.init(fresh)))


def transpose(ref):
    return ref.transpose((1, 0))


# ---- registers ----------------------------------------------------------------------------------


def make_zeros(shape: tuple[int, ...]) -> jax.Array:
    """Return a float32 register tile ``[64, n]`` of zeros."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), REGISTER_TILE)


def fill_vector(value: float, length: int = ROWS) -> jax.Array:
    """Return a float32 vector over the rows of a register tile, with one value everywhere."""
    return plgpu.layout_cast(jnp.full((length,), value, jnp.float32), get_vector_layout(0))


def get_vector_layout(axis: int):
    """Return the layout of a vector that runs along ``axis`` of a register tile."""
    return REGISTER_TILE.reduce(1 - axis)


def load_vector(ref, axis: int) -> jax.Array:
    """Load a vector from HBM or shared memory, to run along ``axis`` of a register tile."""
    return load_in_layout(ref, get_vector_layout(axis))


def load_in_layout(ref, layout: Any) -> jax.Array:
    return _load(ref, layout=layout, optimized=False)


def load_row_major(ref) -> jax.Array:
    """Load a row-major tile of shared memory as a register tile."""
    return _load(ref, layout=REGISTER_TILE, optimized=False)


def load_swizzled(ref) -> jax.Array:
    """Load a tile of 16-bit numbers from swizzled shared memory as a register tile."""
    return _load(ref, layout=REGISTER_TILE)


def load_codes(ref) -> jax.Array:
    """Load a tile of 8-bit numbers from swizzled shared memory, as bfloat16 in registers."""
    codes = _load(ref, layout=CODE_TILE)
    if codes.dtype != jnp.int8:
        # Exact, and the only way from float8 that Hopper's compiler has.
        codes = codes.astype(jnp.float32)
    return codes.astype(jnp.bfloat16)


def broadcast_vector(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """Return a register tile of ``shape`` from a vector along its ``axis``."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def broadcast_over_codes(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return a tile in the layout of codes from a vector over its rows."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [0]), CODE_TILE)


def make_index_tile(shape: tuple[int, int], axis: int) -> jax.Array:
    """Return the int32 index along ``axis`` for each place of a register tile."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=REGISTER_TILE)


def make_index_vector(length: int, layout: Any) -> jax.Array:
    """Return int32 0, 1, 2..."""
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout)


def div(a: jax.Array, b: int) -> jax.Array:
    return lax.div(a, jnp.int32(b))


def rem(a: jax.Array, b: int) -> jax.Array:
    return lax.rem(a, jnp.int32(b))
