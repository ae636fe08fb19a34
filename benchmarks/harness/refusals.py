"""Why a row has no figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.harness import rows


def guarded(body: Callable[[Any], Any], job: Any, of_case: Callable[..., Any]) -> Any:
    """What ``body`` makes of a job, or ``of_case(case, where, ...)`` with why there is nothing."""
    try:
        return body(job)
    except Exception as error:
        return of_case(job.case, job.where, **of_error(error))


def of_error(error: Exception) -> dict[str, Any]:
    """Status, reason and bytes of what a job raised."""
    import jax

    if isinstance(error, NotImplementedError):
        return {"status": rows.UNSUPPORTED, "reason": str(error) or repr(error)}
    if isinstance(error, jax.errors.JaxRuntimeError):
        from axattn import aot

        return of_refusal(aot.parse_refusal(str(error)))
    if isinstance(error, MemoryError):
        return {"status": rows.OUT_OF_MEMORY, "reason": repr(error)}
    return {"status": rows.FAILED, "reason": f"{type(error).__name__}: {error}"}


def of_refusal(refusal: Any) -> dict[str, Any]:
    """The same of a compiler's refusal (`axattn.aot.Refusal`)."""
    known = {"out_of_memory": rows.OUT_OF_MEMORY, "unsupported": rows.UNSUPPORTED}
    return {
        "status": known.get(refusal.kind, rows.FAILED),
        "reason": str(refusal),
        "requested_bytes": refusal.requested_bytes,
        "available_bytes": refusal.available_bytes,
    }
