"""``kvmd bench``: measure kvmd beside what the hardware, the kernel and its peers need for the same."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from kvmd.benchmark import catalogue
from kvmd.benchmark.measure import CannotMeasure, Options, Report
from kvmd.benchmark.tables import as_json, render
from kvmd.errors import ConfigError, HostError
from kvmd.lazy_group import LazyGroup
from kvmd.options import parse_size_option
from kvmd.stop import ExitStatus

_F = TypeVar("_F", bound=Callable[..., Any])

_EPILOG = f"""\b
Exit status: 0, or
  {ExitStatus.CONFIG:d}  the command line is wrong
  {ExitStatus.HOST:d}  a benchmark cannot run here: a line on stderr says why; `all` measures the others all the same
  {ExitStatus.STOPPED:d}  stopped by SIGINT (Ctrl-C) or SIGTERM

Where only what stands beside kvmd is missing (a C compiler, QEMU), kvmd's own figures are there, `missing` and a line
on stderr say what is not, and the status is 0.
"""


def _common_options(command: _F) -> _F:
    for option in reversed(
        (
            click.option("--quick", is_flag=True, help="Few and short rounds, to see that it works."),
            click.option("--large", is_flag=True, help="What takes gigabytes and minutes too."),
            click.option("--json", "as_json_", is_flag=True, help="Print JSON, with each round's values, not tables."),
            click.option(
                "--output",
                type=click.Path(dir_okay=False, path_type=Path),
                metavar="FILE",
                help="Write the JSON there, too.",
            ),
        )
    ):
        command = option(command)
    return command


class _Benchmarks(LazyGroup):
    """One command for each benchmark, and one for all."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_listed())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        return self.find(cmd_name) if cmd_name in _listed() else None

    def find(self, name: str) -> click.Command:
        if name == "conversions":
            return conversions
        if name == "all":
            return _all
        return _command(name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _listed() and not args[0].startswith("-"):
            ctx.fail(f"there is no benchmark {args[0]!r}: there are {', '.join(_listed())}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Benchmarks"):
            formatter.write_dl(list(_listed().items()))


def _listed() -> dict[str, str]:
    return catalogue.summaries() | {"all": "every one of them that is not said to be apart"}


@click.group(cls=_Benchmarks, epilog=_EPILOG)
def bench() -> None:
    """Measure kvmd, as ratios of two things that take turns in one run.

    `kvmd bench NAME --help` lists a benchmark's options. How to read the tables: docs/performance.md.
    """


def _command(name: str) -> click.Command:
    """Return the command of a benchmark that has no options of its own."""

    @click.command(name, help=f"Measure {catalogue.summaries()[name]}.", epilog=_EPILOG)
    @_common_options
    def command(*, quick: bool, large: bool, as_json_: bool, output: Path | None) -> int:
        options = Options(quick=quick, large=large)
        return _measure({name: lambda: catalogue.run(name, options)}, as_json_=as_json_, output=output, single=True)

    return command


@click.command("all", epilog=_EPILOG)
@_common_options
def _all(*, quick: bool, large: bool, as_json_: bool, output: Path | None) -> int:
    """Run every benchmark, one after the other."""
    options = Options(quick=quick, large=large)
    every = {name: partial(catalogue.run, name, options) for name in catalogue.SUMMARIES}
    return _measure(every, as_json_=as_json_, output=output, single=False)


@click.command("conversions", epilog=_EPILOG)
@click.option("--pages", type=click.IntRange(1, 1 << 20), metavar="P", help="Pages of each vCPU.  [default: 16]")
@click.option("--rounds", type=click.IntRange(2, 1 << 20), metavar="R", help="Walks over them.  [default: 17]")
@click.option("--vcpus", type=click.IntRange(1, 64), metavar="N", help="Virtual CPUs.  [default: 1]")
@click.option(
    "--memory",
    callback=parse_size_option,
    metavar="SIZE",
    help="Guest memory, such as 4G.  [default: 64M, or what the pages need]",
)
@click.option("--protection", metavar="KIND", help="As of `kvmd run`.  [default: emulated]")
@click.option("--tripwire", type=click.Choice(["auto", "attribute", "guest_memfd", "hole"]), help="As of `kvmd run`.")
@click.option("--turns", type=click.IntRange(1, 10_000), metavar="T", help="Runs of each.  [default: 40]")
@_common_options
def conversions(
    *, turns: int | None, quick: bool, large: bool, as_json_: bool, output: Path | None, **load: int | str | None
) -> int:
    """Measure a conversion, end to end, beside the same KVM calls in C.

    The guest `pingpong` walks its pages R times, and touches each in its shared and then its private view: each touch
    is one conversion. The first walk, which cuts memory into pages, is told apart. Without any option of its load (all
    but --turns), 1 and 4 vCPUs are measured, and the keys are those of 1.

    Keys of the JSON, of kvmd's own run, medians over the runs: `conversions` (after the first walk),
    `us_per_conversion` (wall time), `us_in_kvm`, `per_second`, `first_round_conversions`,
    `first_round_us_per_conversion`; the same under `floor_service`, `floor_early` and `floor_thread`; and
    `ratio_service`, `ratio_early`, `ratio_thread` and `ratio_in_kvm` with `median`, `quartiles`, `min`, `max` and
    `rounds`.
    """
    options = Options(quick=quick, large=large)
    given = {key: value for key, value in load.items() if value is not None}

    def measure() -> Report:
        from kvmd.benchmark import conversions as module  # noqa: PLC0415 - so that --help does not wait for a machine
        from kvmd.benchmark.runs import Load  # noqa: PLC0415 - as above

        if not given:
            return module.measure(options, turns)
        return module.measure_load(Load(**given), options, turns)  # type: ignore[arg-type]  # click checked them

    return _measure(
        {"conversions": lambda: catalogue.under_conditions(measure)}, as_json_=as_json_, output=output, single=True
    )


def _measure(measures: Mapping[str, Callable[[], Report]], *, as_json_: bool, output: Path | None, single: bool) -> int:
    """Measure, print, and return the exit status.

    Raises:
        ConfigError: the output cannot be written.
        HostError: it could not any more.
    """
    file = None if output is None else _Output(output)
    # As Ctrl-C, which trio takes in order: what was started is ended, machines that would outlive this process too.
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    results = _Results(file, single=single)
    try:
        _run(measures, results, as_json_=as_json_)
    finally:
        signal.signal(signal.SIGTERM, before)
    if as_json_ and (results.reports or not single):
        print(results.document(), end="")
    return ExitStatus.HOST if results.failed else 0


class _Output:
    """The file that results go to as they come: at any time it is whole, or as it was before.

    Args:
        path: of it. What is no regular file, such as /dev/stdout, is written as it is.

    Raises:
        ConfigError: it cannot be written. Now: nobody wants to learn that at the end of a quarter of an hour.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Through symbolic links: what is renamed takes the place of a link, not of what that leads to.
        self._whole = Path(os.path.realpath(path))
        self._aside = self._whole.with_name(f".{self._whole.name}.{os.getpid()}")
        try:
            self._in_place = path.exists() and not path.is_file()
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not self._in_place:
                self._whole.parent.mkdir(parents=True, exist_ok=True)
                self._aside.touch()
                self._aside.unlink()
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}: choose another --output") from error

    def write(self, text: str) -> None:
        """Make it hold just this. Raises HostError."""
        try:
            if self._in_place:
                self._path.write_text(text, encoding="utf-8")
                return
            try:
                self._aside.write_text(text, encoding="utf-8")
                self._aside.replace(self._whole)
            finally:
                self._aside.unlink(missing_ok=True)
        except OSError as error:
            raise HostError(f"{self._path} cannot be written any more: {error.strerror}") from error


class _Results:
    """What was found so far; in the output too, so that an interrupted run has what it measured.

    Attributes:
        reports: of what was measured, as JSON has it.
        failed: why others were not.
    """

    def __init__(self, output: _Output | None, *, single: bool) -> None:
        self._output = output
        self._single = single
        self.reports: list[dict[str, object]] = []
        self.failed: dict[str, str] = {}

    def document(self) -> str:
        """Return all of it: of a single benchmark its report alone."""
        document: object = {"benchmarks": self.reports, "not_measured": self.failed}
        if self._single and self.reports:
            document = self.reports[0]
        return json.dumps(document, indent=1) + "\n"

    def write(self) -> None:
        """Write it to the output, where there is one."""
        if self._output is not None:
            self._output.write(self.document())


def _run(measures: Mapping[str, Callable[[], Report]], results: _Results, *, as_json_: bool) -> None:
    """Measure one after the other."""
    for place, (name, measure) in enumerate(measures.items(), 1):
        try:
            with _progress(f"{place}/{len(measures)} {name}"):
                report = measure()
                results.reports.append(as_json(report))
        except CannotMeasure as error:
            results.failed[name] = str(error)
            _say(f"{name}: not measured: {error}")
            results.write()
            continue
        results.write()
        for what in report.missing:
            _say(f"{name}: not measured: {what}")
        if not as_json_:
            print(render(report), flush=True)


class _progress:  # noqa: N801 - reads as a statement
    """Says on a terminal what is being measured, and how long it took: one line on stderr, rewritten."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> None:
        self._began = time.monotonic()
        if self._shown:
            print(f"measuring {self._what} ...", end="", flush=True, file=sys.stderr)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._shown:
            done = f"measured {self._what} in {time.monotonic() - self._began:.0f} s\n" if failed is None else ""
            print(f"\r\x1b[K{done}", end="", flush=True, file=sys.stderr)


def _say(message: str) -> None:
    print(f"kvmd: bench: {' '.join(message.split())}", file=sys.stderr)
