from __future__ import annotations

import dataclasses
import os
import time

import pytest

from benchmarks.harness import processes

pytestmark = pytest.mark.ci


@dataclasses.dataclass(frozen=True)
class Job:
    do: str

    def __call__(self):
        match self.do:
            case "return":
                return os.getpid()
            case "raise":
                raise ValueError("a reason")
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), 9)
            case "hang":
                time.sleep(60)


def test_every_job_has_its_own_process():
    pids = {processes.call(Job("return")) for _ in range(2)} | {os.getpid()}
    assert len(pids) == 3


@pytest.mark.parametrize(
    ("do", "error", "message"),
    [
        ("raise", RuntimeError, "ValueError: a reason"),
        ("exit", processes.ProcessError, "exit code 3"),
        ("kill", processes.ProcessError, "SIGKILL, as the system does when memory runs out"),
        ("hang", processes.ProcessError, "took longer than 0.2 s"),
    ],
)
def test_exceptions_and_crashes_are_told(do, error, message):
    with pytest.raises(error, match=message):
        processes.call(Job(do), timeout=0.2 if do == "hang" else None)


@dataclasses.dataclass(frozen=True)
class Talk:
    """Says its process and what it is told to, then does what the last one says."""

    say: tuple[str, ...] = ()
    end: str = "return"

    def __call__(self):
        yield os.getpid()
        yield from self.say
        yield Job(self.end)()


def test_a_worker_keeps_its_process(worker):
    first, *messages, last = worker.run(Talk(("a", "b")))
    assert messages == ["a", "b"] and first == last
    assert next(iter(worker.run(Talk()))) == first


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        ("raise", RuntimeError, "ValueError: a reason"),
        ("exit", processes.ProcessError, "exit code 3"),
        ("kill", processes.ProcessError, "SIGKILL"),
        ("hang", processes.ProcessError, "said nothing for 0.5 s"),
    ],
)
def test_what_was_said_before_a_crash_is_heard(worker, end, error, message):
    said = []
    list(worker.run(Talk()))  # started: what follows is no waiting for imports
    with pytest.raises(error, match=message):
        for one in worker.run(Talk(("a",), end), 0.5):
            said.append(one)
    assert said[1:] == ["a"]
    pid, _ = worker.run(Talk())
    assert pid != said[0]
