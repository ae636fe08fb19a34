"""One process per job, so that one that crashes or eats all memory costs one row."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from typing import Any

# Imported once, in the server that the jobs' processes are forked from: JAX takes seconds to
# import, and has not started a backend or a thread by then.
_PRELOADED = (
    "jax",
    "axattn.aot",
    "axattn.linen",
    "axattn.nnx",
    "google_benchmark",
    "benchmarks.harness.jobs",
    "benchmarks.harness.layers",
)


class ProcessError(RuntimeError):
    """The job did not come to an end; the message says how."""


def call(job: Callable[[], Any], timeout: float | None = None) -> Any:
    """Runs ``job`` in a new process and returns its result; both must pickle.

    Raises:
      ProcessError: the process died, or ran longer than ``timeout`` seconds and was ended.
      RuntimeError: the job raised; the message is its traceback.
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, job), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise ProcessError(f"took longer than {timeout:g} s and was ended")
        try:
            result, error = receiver.recv()
        except EOFError:
            process.join()
            raise ProcessError(_cause_of_death(process.exitcode)) from None
        if error is not None:
            raise RuntimeError(error)
        return result
    finally:
        # Also where the user pressed Ctrl-C.
        process.kill()
        process.join()
        receiver.close()


def _context():
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload([*_PRELOADED])
    return context


def _work(sender, job) -> None:
    # Ctrl-C reaches all processes of the terminal; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        answer = job(), None
    except BaseException:
        answer = None, traceback.format_exc()
    sender.send(answer)
    sender.close()


def _cause_of_death(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"
