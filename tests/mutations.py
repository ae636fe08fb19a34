"""Whether a test notices when one token of the library is wrong. The table is `mutations.toml`.

    python tests/mutations.py                                  # each against the tests it names
    python tests/mutations.py --only '^masks|tail' -m ""       # some, with tests of every tier
    python tests/mutations.py --everything --json found.json   # each against all that the tier has

Works on a copy of the tree, one mutation at a time. The tests have to pass there without any of
them first, or a failure would say nothing. This file is also the plugin of its own pytests.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# Processes that start with what takes seconds to import.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "jax", "flax.linen", "flax.nnx", "hypothesis"])


def pytest_runtest_setup(item: Any) -> None:
    declared = {line.partition(":")[0] for line in item.config.getini("markers")}
    tier = sorted({mark.name for mark in item.iter_markers()} & declared) or ["everyday"]
    item.user_properties.append(("tier", " ".join(tier)))


def pytest_runtest_logreport(report: Any) -> None:
    log = os.environ.get("MUTATIONS_LOG")
    if log and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        line = {"by": report.nodeid, **dict(report.user_properties)}
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")


def table() -> list[dict[str, Any]]:
    """The mutations. ValueError where what one replaces is not there, or twice."""
    areas, found = tomllib.loads(Path(__file__).with_suffix(".toml").read_text()), []
    for area, file in [(area, file) for area, files in areas.items() for file in files]:
        text = (ROOT / "axattn" / file).read_text()
        for name, (line, *tests) in areas[area][file].items():
            before, old, new, after = re.split("{{(.*) -> (.*)}}", line)
            old, new = before + old + after, before + new + after
            if text.count(old) != 1 or "\n" in old:
                raise ValueError(f"{area}: {name}: {file} has {text.count(old)} times {old!r}")
            one = {"name": f"{area}: {name}", "file": f"axattn/{file}", "old": old, "new": new}
            found.append({**one, "tests": [f"tests/{test}" for test in tests]})
    return found


def child(copy: Path, options: list[str]) -> None:
    """A pytest in the copy, in a process of its own group."""
    os.setsid()
    os.chdir(copy)
    own = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ.update(own, MUTATIONS_LOG=str(copy.parent / "failed"))
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path) != ROOT / "tests")]
    said = os.open(copy.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    import pytest

    sys.exit(pytest.main(["-p", "tests.mutations", "-p", "no:cacheprovider", "-q", *options]))


def run(copy: Path, options: list[str], timeout: float | None = None) -> dict[str, Any]:
    """One pytest in the copy: the first test that failed, if any, and the end of what it says."""
    log, start = copy.parent / "failed", time.monotonic()
    log.unlink(missing_ok=True)
    pytest = FORKS.Process(target=child, args=(copy, options))
    pytest.start()
    try:
        pytest.join(timeout)
        code = pytest.exitcode
    finally:  # its workers, too, and when this is interrupted
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pytest.pid, signal.SIGKILL)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - start, 1)}
    if code in (0, 5):
        return {**found, "outcome": "no test" if code else "survived"}
    found |= {"outcome": "killed", "by": "timeout" if code is None else "import or crash"}
    return {**found, **json.loads(log.read_text().splitlines()[0])} if log.exists() else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression for `area: name`")
    parser.add_argument("-m", dest="markers", help="as for pytest, which has a default of its own")
    parser.add_argument("--everything", action="store_true", help="all tests, not those named")
    parser.add_argument("--timeout", type=float, help="seconds for one mutation, 180 or 1800")
    parser.add_argument("--json", type=Path, help="where to write what was found")
    arguments = parser.parse_args()
    timeout = arguments.timeout or (1800.0 if arguments.everything else 180.0)
    options = [] if arguments.markers is None else ["-m", arguments.markers]
    options += ["-n", "2"] if arguments.everything else []

    mutations = [one for one in table() if re.search(arguments.only, one["name"])]
    named = {one["name"]: [] if arguments.everything else one["tests"] for one in mutations}
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    with tempfile.TemporaryDirectory(prefix="mutations") as folder:
        copy, results = Path(folder) / "tree", []
        for name in filter(lambda name: name and (ROOT / name).is_file(), files):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        plain = run(
            copy, [*options, *dict.fromkeys(test for tests in named.values() for test in tests)]
        )
        print(f"{plain['outcome']:8} {plain['seconds']:6.1f} s  without a mutation", flush=True)
        if plain["outcome"] != "survived":
            sys.exit((copy.parent / "said").read_text())
        for one in mutations:
            target, name = copy / one["file"], one["name"]
            text = target.read_text()
            target.write_text(text.replace(one["old"], one["new"]))
            found = run(copy, ["-x", *options, *named[name]], timeout)
            target.write_text(text)
            results.append({**one, **found})
            how = f"{found['by']} [{found.get('tier', '')}]" if "by" in found else ""
            print(f"{found['outcome']:8} {found['seconds']:6.1f} s  {name:60} {how}", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1))
    print(dict(collections.Counter(result["outcome"] for result in results)))


if __name__ == "__main__":
    main()
