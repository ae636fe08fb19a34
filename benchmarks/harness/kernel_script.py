"""The flags and the course that ``kernel_bench.py`` and ``decode_bench.py`` share."""

from __future__ import annotations

import abc
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags

from benchmarks.harness import cell_job, command, environment, jobs, output, processes, sections
from benchmarks.harness.environment import Environment


class Flags:
    """The flags; to be made once, where the script begins."""

    def __init__(
        self,
        presets: Mapping[str, Callable[[], Sequence[Any]]],
        implementations: Sequence[str],
        *,
        not_on_gpu: Sequence[str] = (),
        example: str = "",
    ):
        """Defines them.

        Args:
          presets: cases, each with a ``name``, by the preset's name.
          implementations: all names, in the order of the table.
          not_on_gpu: names that a GPU's table leaves out unless they are asked for.
          example: of parts of cases' names.
        """
        self.presets, self.known, self.not_on_gpu = presets, tuple(implementations), not_on_gpu
        left_out = f"all but {', '.join(not_on_gpu)}, which smoke has too" if not_on_gpu else "all"
        self._preset = flags.DEFINE_enum(
            "preset", None, sorted(presets), "issue on a GPU, else smoke"
        )
        self._cases = flags.DEFINE_list("cases", [], f"parts of the cases' names, e.g. {example}")
        self._implementations = flags.DEFINE_list(
            "implementations", None, f"of {', '.join(implementations)}; {left_out}"
        )
        self._seconds = flags.DEFINE_float("seconds", 0.3, "to time a cell for", lower_bound=0)
        self._budget = flags.DEFINE_float(
            "budget_minutes", 60.0, "begin no cell after this", lower_bound=0
        )
        self._silence = flags.DEFINE_float(
            "silence", 120.0, "seconds after which a cell hangs", lower_bound=1
        )
        self._markdown = flags.DEFINE_string("markdown", None, "file to write: .md")
        self._json = flags.DEFINE_string("json", None, "file to write: .json")

    @property
    def seconds(self) -> float:
        return self._seconds.value

    @property
    def budget(self) -> float:
        """Seconds."""
        return 60 * self._budget.value

    @property
    def silence(self) -> float:
        return self._silence.value

    def cases(self, platform: str) -> list[Any]:
        """Those of the preset that are asked for; ValueError where there is none."""
        preset = self._preset.value or ("issue" if platform == "cuda" else "smoke")
        found, parts = self.presets[preset](), self._cases.value
        wanted = [c for c in found if not parts or any(part in c.name for part in parts)]
        if not wanted:
            known = ", ".join(case.name for case in found)
            raise ValueError(f"--cases: {','.join(parts)!r} is in none of {known}")
        return wanted

    def implementations(self, platform: str) -> tuple[str, ...]:
        if self._implementations.value is not None:
            return tuple(command.names(self._implementations, self.known))
        return tuple(n for n in self.known if n not in self.not_on_gpu or platform != "cuda")

    def files(self) -> list[pathlib.Path]:
        """The files to write; ValueError for flags that cannot be."""
        if self._implementations.value is not None:
            command.names(self._implementations, self.known)
        files = []
        for flag, suffix in ((self._markdown, ".md"), (self._json, ".json")):
            if flag.value is not None:
                files.append(output.check_path(flag.value, flag.name))
                if files[-1].suffix != suffix:
                    raise ValueError(f"--{flag.name}: {flag.value!r} does not end in {suffix}")
        return files


class Table(abc.ABC):
    """What a script puts into the course: the table of its cells.

    Attributes:
      platform: the one that programs are for; None is that of this machine.
    """

    platform: str | None = None
    notes: tuple[str, ...] = ()

    def check(self) -> None:  # noqa: B027  (no flags of its own: nothing to check)
        """ValueError for flags of its own that cannot be."""

    @abc.abstractmethod
    def begin(self, out: sections.Sections, worker: processes.Worker, silence: float) -> None:
        """Measures what cells are compared with, and begins the table."""

    @abc.abstractmethod
    def job(
        self, case: Any, implementations: tuple[str, ...], seconds: float, stop: float
    ) -> cell_job.Measure: ...

    def rated(self, cell: Any, case: Any) -> Any:
        """The cell with what follows from its time."""
        return cell


def run(argv: Sequence[str], given: Flags, table: Table) -> int:
    """Measures and prints all cells; the exit status. Files are written after every case."""
    started = time.time()
    try:
        files = given.files()
        table.check()
        # In a process of its own: asking starts JAX, which takes a GPU's memory.
        where: Environment = processes.call(jobs.Describe())
        platform = table.platform or where.platform
        asked, names = given.cases(platform), given.implementations(platform)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    out = sections.Sections(dataclasses.replace(where, command=environment.command_line(sys.argv)))
    worker, code = processes.Worker(), 0
    try:
        table.begin(out, worker, given.silence)
        for case in asked:
            job = table.job(case, names, given.seconds, started + given.budget)
            for cell in cell_job.cells(worker, job, given.silence):
                cell = table.rated(cell, case)
                out.row(cell, cell.failure)
            # Whoever ends this from outside keeps the cases that are done.
            write(out, files)
    except KeyboardInterrupt:
        out.print("\ninterrupted")
        code = 130
    finally:
        worker.close()
    for note in table.notes:
        out.note(note)
    out.note_noise("ratio_is_noise")
    out.close()
    write(out, files)
    return code or (1 if out.failures else 0)


def write(out: sections.Sections, files: Sequence[pathlib.Path]) -> None:
    for path in files:
        out.write(path)
