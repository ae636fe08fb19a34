from __future__ import annotations

import dataclasses
import os
import time

import pytest

from benchmarks.harness import processes


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


def test_exceptions_come_back():
    with pytest.raises(RuntimeError, match="ValueError: a reason"):
        processes.call(Job("raise"))


@pytest.mark.parametrize(
    ("do", "message"),
    [("exit", "exit code 3"), ("kill", "SIGKILL, as the system does when memory runs out")],
)
def test_crashes_are_told(do, message):
    with pytest.raises(processes.ProcessError, match=message):
        processes.call(Job(do))


def test_timeout():
    with pytest.raises(processes.ProcessError, match="took longer than 0.2 s"):
        processes.call(Job("hang"), timeout=0.2)
