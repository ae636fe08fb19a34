"""Several processes on this machine that stand for hosts: for trying out and testing."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run_together(commands: Sequence[Sequence[str]]) -> int:
    """Runs commands at once and waits for all; 0, or the exit status of the first that failed.

    One that fails ends the others, which would wait for it; so do Ctrl-C and SIGTERM.
    """
    running = []
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        running += [subprocess.Popen(command) for command in commands]
        while True:
            statuses = [process.poll() for process in running]
            failed = [status for status in statuses if status]
            if failed or None not in statuses:
                return failed[0] if failed else 0
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()
        signal.signal(signal.SIGTERM, before)
