"""The implementations, which of them take a call, and which one ``None`` takes.

A new implementation adds one entry to :data:`IMPLEMENTATIONS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax

from axattn._call import AttentionCall
from axattn._implementations import cudnn, flash, mosaic_gpu, mosaic_tpu, preference, xla
from axattn._implementations.flash import PLATFORMS
from axattn._jax_compat import find_varying_axes, vary_over
from axattn._typing import present


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One implementation: how it attends, and what it refuses.

    ``attend(call) -> (out, lse)``; None for those that `flash` joins into one function.
    ``find_refusal(call)`` says why the call cannot be lowered for any device of its platforms, or
    None; ``find_missing()`` says what else it needs to run here, or None.
    """

    name: str
    attend: Callable[[AttentionCall], tuple[jax.Array, jax.Array | None]] | None
    find_refusal: Callable[[AttentionCall], str | None]
    platforms: tuple[str, ...]
    find_missing: Callable[[], str | None] = lambda: None


def _refuse_nothing(_: AttentionCall) -> None:
    return None


def _refuse_empty(call: AttentionCall) -> str | None:
    if call.is_empty or not call.may_be_empty:
        return None
    return (
        f"needs sizes of at least 1, got {call.batch}, {call.q_len}, {call.kv_len}: constrain them "
        '(constraints=["t >= 2"] of jax.export.symbolic_shape for t - 1), or ask for "xla"'
    )


IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        Implementation("xla", xla.attend, _refuse_nothing, PLATFORMS),
        Implementation("xla_chunked", None, _refuse_empty, PLATFORMS),
        Implementation(
            "mosaic_gpu", None, mosaic_gpu.find_refusal, ("cuda",), mosaic_gpu.find_missing_device
        ),
        Implementation(
            "mosaic_tpu", None, mosaic_tpu.find_refusal, ("tpu",), mosaic_tpu.find_missing_device
        ),
        Implementation("cudnn", cudnn.attend, cudnn.find_refusal, ("cuda",)),
    )
}

# "mosaic" is whichever kernel family fits the platform that the call is lowered for.
MOSAIC = {"cuda": "mosaic_gpu", "tpu": "mosaic_tpu"}

NAMES = (*IMPLEMENTATIONS, "mosaic")


@dataclasses.dataclass(frozen=True)
class ImplementationPlan:
    """Which implementation each platform takes; hashable.

    ``names`` has pairs of a platform and names. The first name that the device takes is used; the
    device may be known only when the program is lowered for it. ``refusal`` says why other
    platforms are left out.
    """

    names: tuple[tuple[str, tuple[str, ...]], ...]
    refusal: str = ""


def find_refusals(call: AttentionCall) -> dict[str, str | None]:
    """Return for every name None where it takes the call here, else the reason why not."""
    return _add_mosaic(_add_missing_devices(_find_refusals_anywhere(call, tuple(IMPLEMENTATIONS))))


def _find_refusals_anywhere(call: AttentionCall, names: Sequence[str]) -> dict[str, str | None]:
    """Return reasons where the program may be lowered for devices that are not here."""
    return {name: IMPLEMENTATIONS[name].find_refusal(call) for name in names}


def _add_missing_devices(reasons: dict[str, str | None]) -> dict[str, str | None]:
    return {
        name: reason or IMPLEMENTATIONS[name].find_missing() for name, reason in reasons.items()
    }


def _add_mosaic(reasons: dict[str, str | None]) -> dict[str, str | None]:
    fitting = {name: reasons[name] for name in MOSAIC.values()}
    taken = any(reason is None for reason in fitting.values())
    reasons["mosaic"] = None if taken else "; ".join(f"{n} {r}" for n, r in fitting.items())
    return reasons


def check_names(implementation: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the preference as a tuple of known names, or None."""
    if implementation is None:
        return None
    takes = f"implementation takes None, one of {', '.join(NAMES)}, or a sequence of them"
    if not isinstance(implementation, (str, Sequence)):
        raise TypeError(f"{takes}, got {implementation!r}")
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or any(name not in NAMES for name in names):
        raise ValueError(f"{takes}, got {implementation!r}")
    return names


def make_plan(
    call: AttentionCall, implementation: str | Sequence[str] | None
) -> ImplementationPlan:
    """Choose the implementations for every platform that the call may be lowered for.

    Raises:
      NotImplementedError: the name, or every name of a sequence, refuses the call.
    """
    names = check_names(implementation)
    if call.is_empty:
        # Nothing to compute: zeros, and an LSE of -inf. No kernel takes part.
        return ImplementationPlan(tuple((platform, ("xla",)) for platform in PLATFORMS))
    if names is None:
        anywhere = _find_refusals_anywhere(call, preference.ASKED)
        here = _add_missing_devices(anywhere)
        return ImplementationPlan(
            tuple((p, _choose_default(call, p, here, anywhere)) for p in PLATFORMS)
        )
    asked = [n for name in names for n in (MOSAIC.values() if name == "mosaic" else (name,))]
    anywhere, chosen = _find_refusals_anywhere(call, asked), {}
    for platform in PLATFORMS:
        own = [MOSAIC.get(platform) if name == "mosaic" else name for name in names]
        there = [name for name in own if name and platform in IMPLEMENTATIONS[name].platforms]
        if found := _take_until_sure([name for name in there if anywhere[name] is None]):
            chosen[platform] = found
    reasons = _add_missing_devices(anywhere)
    if "mosaic" in names:
        reasons = _add_mosaic(reasons)
    refusal = "; ".join(
        f'implementation "{name}" {reasons[name] or "is for other platforms"}' for name in names
    )
    if not chosen:
        raise NotImplementedError(refusal)
    return ImplementationPlan(tuple(chosen.items()), refusal)


def _choose_default(
    call: AttentionCall, platform: str, reasons: dict, anywhere: dict
) -> tuple[str, ...]:
    """Choose what ``None`` means: kernels may be for a device that is not here."""
    kernels = MOSAIC.get(platform)
    here = preference.choose_implementation(call, platform, reasons)
    if kernels is None or anywhere[kernels] is not None or reasons[kernels] is None:
        return (here,)
    there = preference.choose_implementation(call, platform, {**reasons, kernels: None})
    return tuple(dict.fromkeys((there, here)))


def _take_until_sure(names: list[str]) -> tuple[str, ...]:
    """Take names up to the first that any device of the platform takes."""
    for i, name in enumerate(names):
        if name not in MOSAIC.values() or name == names[-1]:
            return tuple(names[: i + 1])
    return ()


def choose_per_platform(plan: ImplementationPlan) -> dict[str, str]:
    """Return the name that each platform takes, as far as its device is known."""
    # An unknown NVIDIA GPU need not be a Hopper; all TPUs take the kernels.
    return {
        platform: names[-1] if platform == "cuda" else names[0] for platform, names in plan.names
    }


def run_plan(call: AttentionCall, plan: ImplementationPlan) -> tuple[jax.Array, jax.Array | None]:
    """Run the plan: one implementation everywhere, or one per platform, resolved when lowered.

    Lowering for a platform that the plan leaves out raises NotImplementedError: a named
    implementation never becomes another one.
    """
    own = {platform: names[0] for platform, names in plan.names if names[0] not in flash.NAMES}
    if not own:
        return _attend_flash(call, plan)
    if len(set(own.values())) == 1 and len(own) == len(PLATFORMS):
        return _attend_with(own["cpu"], call)
    # Both sets of residuals are saved: those of XLA's own derivative and those of the kernels.
    attends = {name: functools.partial(_attend_with, name) for name in own.values()}
    kernels = functools.partial(_attend_flash, plan=plan)
    return jax.lax.platform_dependent(
        call, **{platform: attends[name] for platform, name in own.items()}, default=kernels
    )


def _attend_flash(
    call: AttentionCall, plan: ImplementationPlan
) -> tuple[jax.Array, jax.Array | None]:
    return _select_results(
        call, *flash.attend(call, flash.make_backends(call, plan.names, plan.refusal))
    )


def _attend_with(name: str, call: AttentionCall) -> tuple[jax.Array, jax.Array | None]:
    axes = find_varying_axes(*jax.tree.leaves(call))
    return vary_over(_select_results(call, *present(IMPLEMENTATIONS[name].attend)(call)), axes)


def _select_results(call: AttentionCall, out: jax.Array, lse) -> tuple[jax.Array, jax.Array | None]:
    # Not every implementation has an LSE, and all branches must return the same.
    return out, lse if call.return_residual else None
