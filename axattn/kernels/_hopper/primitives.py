"""What the kernels ask of the device: layouts of shared memory, and products with registers.

Mosaic GPU's names are unstable, and its interpreter has no WGMMA whose left operand is in registers
and no accumulator that outlives one product: both are here, behind :func:`add_product`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from axattn import _jax_compat

# Versions of JAX differ in what type checkers see of these: arguments, and what is abstract.
_load: Any = plgpu.load
_Tiling: Any = plgpu.TilingTransform
_Swizzle: Any = plgpu.SwizzleTransform

REGISTER_TILE = plgpu.Layout.WGMMA

# How 8-bit numbers of a tile come from swizzled shared memory, four at a time.
CODE_TILE = plgpu.Layout.WGMMA_8BIT

# Registers per thread by the number of warpgroups that compute: (theirs, the producer's). A block
# of 3 warpgroups is launched with 168 each, one of 4 with 128: the sums stay within that.
_REGISTERS = {2: (240, 24), 3: (160, 32)}

# For producers that look up pages and find their own share of the work.
_REGISTERS_TO_SEARCH = {2: (232, 40), 3: (160, 32)}


def claim_registers(warpgroups: int, *, producer: bool = False, searching: bool = False) -> None:
    """Hands registers of the producer to the ``warpgroups`` that compute."""
    table = _REGISTERS_TO_SEARCH if searching else _REGISTERS
    if warpgroups not in table:
        return  # two warpgroups in all have as many as a thread can address
    computing, producing = table[warpgroups]
    if producer:
        plgpu.set_max_registers(producing, action="decrease")
    else:
        plgpu.set_max_registers(computing, action="increase")


def kernel(
    body,
    *,
    name: str,
    out: Any,
    scratch: Any,
    work: int,
    warpgroups: int,
    cost: pl.CostEstimate,
    interpret: bool,
    reduction_bytes: int = 2048,
):
    """``body(*inputs, *outputs, *scratch)`` on ``work`` blocks of ``warpgroups`` warpgroups.

    The block's index is ``lax.axis_index("work")``, the warpgroup's ``"warpgroup"``.
    ``reduction_bytes``: shared memory for reductions across warps.
    """
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=(work,),
        grid_names=("work",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        # Lane semantics take the layouts that are written here; the other ones infer them.
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=reduction_bytes,
        ),
        interpret=_jax_compat.gpu_interpreter() if interpret else None,
        **_jax_compat.gpu_kernel_cost(cost),
    )


def swizzled(shape: tuple[int, ...], dtype: Any, block: int):
    """Shared memory ``[..., rows, size]`` as WGMMA and TMA want it; rows of 32 bytes at least.

    A block of ``block`` rows that is summed over (values under weights, keys under gradients) must
    be a multiple of the columns that are swizzled together: small blocks have smaller ones.
    """
    dtype = jnp.dtype(dtype)
    # 64 codes, so that they can be read by as many columns as 16-bit numbers are written.
    widths = (n // dtype.itemsize for n in ((64, 32) if dtype.itemsize == 1 else (128, 64, 32)))
    summed = dtype.itemsize == 2
    columns = next(n for n in widths if shape[-1] % n == 0 and (block % n == 0 or not summed))
    atom = _Tiling((8, columns)), _Swizzle(columns * dtype.itemsize)
    return plgpu.SMEM(shape, dtype, transforms=atom)


def flat(shape: tuple[int, ...], dtype: Any):
    """Shared memory in row-major order."""
    return plgpu.SMEM(shape, dtype)


def product(a_ref, b_ref, then: Callable[[], None] | None = None) -> jax.Array:
    """``a @ b`` of two tiles in shared memory, as a float32 register tile.

    ``then`` is called while the tensor core works.
    """

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a_ref, b_ref)
        if then is not None:
            then()
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[1]), jnp.float32))


def products(first: tuple, second: tuple) -> tuple[jax.Array, jax.Array]:
    """Two products of tiles in shared memory, one behind the other in the tensor core."""

    def multiply(one, two):
        plgpu.wgmma(one, *first)
        plgpu.wgmma(two, *second)
        return one[...], two[...]

    shapes = ((a.shape[0], b.shape[1]) for a, b in (first, second))
    return pl.run_scoped(multiply, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def add_product(total: jax.Array, a: Any, b_ref, *, interpret: bool) -> jax.Array:
    """``total + a @ b``: ``total`` in registers, ``b`` in shared memory, ``a`` in either."""
    if interpret:
        b = b_ref[...]
        a = a if isinstance(a, jax.Array) else a[...]
        # On the device this read is the tensor core's; a thread's own read must be fenced.
        plgpu.commit_smem()
        return total + jnp.dot(a, b, preferred_element_type=jnp.float32)

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b_ref)

    return pl.run_state(multiply)(plgpu.ACC.init(total))


def add_product_and_product(
    total: jax.Array, a: jax.Array, b_ref, other: tuple, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """``total + a @ b`` as in `add_product`, and behind it the product of ``other``'s two tiles."""
    if interpret:
        return add_product(total, a, b_ref, interpret=True), product(*other)

    def multiply(accumulators):
        plgpu.wgmma(accumulators[0], a, b_ref)
        plgpu.wgmma(accumulators[1], *other)

    fresh = zeros((other[0].shape[0], other[1].shape[1]))
    return pl.run_state(multiply)((plgpu.ACC.init(total), plgpu.ACC.init(fresh)))


def transposed(ref):
    return ref.transpose((1, 0))


def zeros(shape: tuple[int, ...]) -> jax.Array:
    """A float32 register tile ``[64, n]`` of zeros."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), REGISTER_TILE)


def per_row(value: float, rows: int = 64) -> jax.Array:
    """A float32 vector over the rows of a register tile."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), vector_layout(0))


def vector_layout(axis: int):
    """The layout of a vector that runs along ``axis`` of a register tile."""
    return REGISTER_TILE.reduce(1 - axis)


def load_vector(ref, axis: int) -> jax.Array:
    """A vector in HBM or shared memory, as it lies along ``axis`` of a register tile."""
    return load_as(ref, vector_layout(axis))


def load_as(ref, layout: Any) -> jax.Array:
    return _load(ref, layout=layout, optimized=False)


def load_tile(ref) -> jax.Array:
    """A row-major tile of shared memory as a register tile."""
    return _load(ref, layout=REGISTER_TILE, optimized=False)


def load_codes(ref) -> jax.Array:
    """A tile of 8-bit numbers in swizzled shared memory, as bfloat16 in registers."""
    codes = _load(ref, layout=CODE_TILE)
    if codes.dtype != jnp.int8:
        # Exact, and the only way from float8 that Hopper's compiler has.
        codes = codes.astype(jnp.float32)
    return codes.astype(jnp.bfloat16)


def load_operand(ref) -> jax.Array:
    """A tile of 16-bit numbers in swizzled shared memory as a register tile."""
    return _load(ref, layout=REGISTER_TILE)


def spread(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along ``axis`` as a register tile of ``shape``."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def spread_over_codes(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A vector over the rows of a tile of codes, as that tile."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, [0]), CODE_TILE)


def index_tile(shape: tuple[int, int], axis: int) -> jax.Array:
    """int32 index along ``axis`` for each place of a register tile."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=REGISTER_TILE)


def index_vector(length: int, layout: Any) -> jax.Array:
    """int32 0, 1, 2..."""
    return plgpu.broadcasted_iota(jnp.int32, (length,), 0, layout=layout)


def meet(barrier) -> None:
    """Waits until every warpgroup that arrives at ``barrier`` is here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def unknown(index: jax.Array) -> jax.Array:
    """The same index, about which the compiler knows nothing.

    In a loop: descriptors of a tile of H = 256 take 32 registers, and those of tiles that stay the
    same would be kept in them around the whole loop. So they are made again.
    """
    return lax.optimization_barrier(index)


class Turns:
    """Two warpgroups taking turns at the tensor core: one multiplies while the other exponentiates.

    The second one starts a turn late. With another number of warpgroups nobody waits. The turns are
    an mbarrier, which orders memory and products and not arithmetic in registers: ptxas moves an
    arrival up past it. (A named barrier would stay where it is; Pallas has none.)
    """

    def __init__(self, barrier, warpgroups: int, warpgroup: jax.Array):
        self.barrier = barrier if warpgroups == 2 else None
        self.warpgroup = warpgroup

    def leave(self) -> None:
        if self.barrier is not None:
            plgpu.barrier_arrive(self.barrier)

    def enter(self) -> None:
        if self.barrier is not None:
            plgpu.barrier_wait(self.barrier)

    def take(self) -> None:
        self.leave()
        self.enter()

    def start(self) -> None:
        if self.barrier is not None:
            pl.when(self.warpgroup == 1)(self.take)

    def end(self) -> None:
        if self.barrier is not None:
            pl.when(self.warpgroup == 0)(self.take)


def div(a: jax.Array, b: int) -> jax.Array:
    return lax.div(a, jnp.int32(b))


def rem(a: jax.Array, b: int) -> jax.Array:
    return lax.rem(a, jnp.int32(b))
