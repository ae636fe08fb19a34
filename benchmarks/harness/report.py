"""Running jobs one after the other, and printing their rows as they finish."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.harness import jobs, noise, output, processes, published, rows, tables
from benchmarks.harness.environment import Environment
from benchmarks.harness.rows import Row


def ask_environment(command: str) -> Environment:
    """Describes the place that jobs will run in, from a process like theirs."""
    return dataclasses.replace(processes.call(jobs.Describe()), command=command)


class Session:
    """Rows of one invocation.

    Attributes:
      rows: those that are finished, with their ratios.
    """

    def __init__(self, environment: Environment, console: Console | None = None):
        self.environment = environment
        self.console = console or Console()
        self.rows: list[Row] = []
        self._stream: tables.Stream | None = None
        self._where: str | None = None
        self._print(environment.header())

    @property
    def failed(self) -> bool:
        """Whether a row has a status that it should not have."""
        return any(row.status == rows.FAILED for row in self.rows)

    def run(self, todo: Sequence[jobs.Job], timeout: float | None) -> bool:
        """Runs the jobs; False after Ctrl-C, with the rows until then in `rows`."""
        with progress(len(todo)) as bar:
            try:
                for job in todo:
                    bar.show(f"{job.case.name} {job.case.implementation} {job.case.direction}")
                    row = rows.with_ratios(finish(job, timeout), self.rows)
                    if row.implementation == rows.BASELINE:
                        row = rows.with_ratios(row, [row])
                    self.rows.append(row)
                    with bar.paused():
                        self._show(row)
                    bar.advance()
            except KeyboardInterrupt:
                with bar.paused():
                    self._print(f"\ninterrupted: {len(self.rows)} of {len(todo)} rows finished")
                return False
        return True

    def close(self, *, with_published: bool) -> None:
        """Prints what is to be said of the rows together."""
        chosen = {row.implementation for row in self.rows if row.is_default}
        if chosen:
            self._print(f"\n* what axattn takes by itself. {_conditions(self.rows)}")
        if any(row.speedup_is_noise for row in self.rows):
            self._print(noise.LEGEND)
        for note in dict.fromkeys(
            f"{row.where}, {row.direction}: {row.notes}" for row in self.rows if row.notes
        ):
            self._print(f"note: {note}")
        if with_published:
            self._print(
                "\nBeside the figures published for repeated -> shared K/V (TPU v5p; batch, dtype "
                f"and direction unknown; {published.SOURCE})"
            )
            table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
            for header in published.HEADERS:
                table.add_column(header, no_wrap=True)
            for line in published.beside_ours(self.rows):
                table.add_row(*line)
            wide = Console(file=self.console.file, width=1000, no_color=True)
            wide.print(table, soft_wrap=True)

    def _show(self, row: Row) -> None:
        if row.where != self._where:
            self._where = row.where
            self._print(f"\n{output.heading(row.where, [row], self.environment)}")
            columns = output.columns(row.where, self.environment)
            self._stream = tables.Stream(self.console, columns)
            self._stream.header()
        if row.status == rows.OK:
            self._stream.row(row)
        else:
            self._stream.row(row, "dim")
            self._print(f"    {tables.reason(row)}")

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def finish(job: jobs.Job, timeout: float | None) -> Row:
    """The job's row, whatever becomes of its process."""
    try:
        return processes.call(job, timeout)
    except processes.ProcessError as error:
        return rows.of_case(job.case, job.where, status=rows.FAILED, reason=str(error))
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        return rows.of_case(job.case, job.where, status=rows.FAILED, reason=last)


def _conditions(results: Sequence[Row]) -> str:
    text = "Linen layer, causal, parameters and activations in the dtype stated."
    if any(row.memory_kind == "host" for row in results):
        text += " Host memory is the compiler's plan on a CPU, not HBM."
    return text


class _Bar:
    """Progress on stderr, if that is a terminal."""

    def __init__(self, total: int):
        console = Console(file=sys.stderr)
        self.bar = Progress(
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.task = self.bar.add_task("", total=total)

    def show(self, text: str) -> None:
        self.bar.update(self.task, description=text)

    def advance(self) -> None:
        self.bar.advance(self.task)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Takes the bar away while rows go to stdout, perhaps the same terminal."""
        self.bar.stop()
        yield
        self.bar.start()


@contextlib.contextmanager
def progress(total: int) -> Iterator[_Bar]:
    """A progress bar of so many steps."""
    bar = _Bar(total)
    bar.bar.start()
    try:
        yield bar
    finally:
        bar.bar.stop()
