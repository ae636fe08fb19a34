"""Jobs in processes of their own, so that one that crashes or eats all memory costs one row.

`call` has a new process for each job. A `Worker` keeps its process from job to job, where starting
one is dear (a GPU's), and needs a new one only after a crash or a job that hangs.
"""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
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


class Worker:
    """A process that does one job after the other.

    A job is a function without arguments that yields messages; jobs and messages must pickle. What
    a message says is between the job and whoever reads `run`.
    """

    def __init__(self):
        self._process = self._pipe = None

    def run(self, job: Callable[[], Iterator[Any]], silence: float | None = None) -> Iterator[Any]:
        """The job's messages as they come.

        Raises:
          ProcessError: the process died, or said nothing for ``silence`` seconds and was ended.
          RuntimeError: the job raised; the message is its traceback. The process is another one
            after that, too: what a job leaves behind when it fails, nobody knows.
        """
        if self._process is None:
            self._start()
        done = False
        try:
            self._pipe.send(job)
            while True:
                if not self._pipe.poll(silence):
                    raise ProcessError(f"said nothing for {silence:g} s and was ended")
                kind, message = self._pipe.recv()
                if kind == "message":
                    yield message
                    continue
                if kind == "raised":
                    raise RuntimeError(message)
                done = True
                return
        except (EOFError, ConnectionError):
            self._process.join()
            raise ProcessError(_cause_of_death(self._process.exitcode)) from None
        finally:
            if not done:  # also where the user pressed Ctrl-C
                self.close()

    def close(self) -> None:
        """Ends the process; the next job has a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = self._pipe = None

    def _start(self) -> None:
        context = _context()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()


def probe() -> None:
    """Raises where the device takes nothing any more, as after an illegal access on a GPU.

    For a `Worker`'s job that lives through its own errors: these need another process.
    """
    import jax
    import jax.numpy as jnp

    jax.block_until_ready(jnp.ones(8) + 1)


def _serve(pipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            job = pipe.recv()
        except EOFError:  # nobody is there any more
            return
        try:
            for message in job():
                pipe.send(("message", message))
            pipe.send(("done", None))
        except BaseException:
            pipe.send(("raised", traceback.format_exc()))
            return


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
