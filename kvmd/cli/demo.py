"""``kvmd demo``: the built-in guests, one after the other, and what they converted."""

from __future__ import annotations

import sys
import time

import click
import structlog
import trio
from rich.console import Console

from kvmd import log
from kvmd.cli.display import PROGRESS_SECONDS, Display, LiveDisplay, PlainDisplay
from kvmd.cli.foreground import watch_signals
from kvmd.cli.summary import GuestResult, is_unicode, summary
from kvmd.guests import GUESTS
from kvmd.log_buffer import LogBuffer
from kvmd.machine import Machine
from kvmd.ranges import GpaRange, PageState
from kvmd.runnable import Runnable
from kvmd.spec.machine import MachineSpec
from kvmd.stop import StopReason

DEFAULT_GUESTS = ("hello", "pingpong", "contend", "explicit")
"""The well-behaved ones; ``hostile`` shows something only with arguments."""

_NARROWEST = 80
_STOPPED = {StopReason.OPERATOR, StopReason.KILLED}


@click.command()
@click.option("--vcpus", type=int, default=4, show_default=True, metavar="N", help="Virtual CPUs of each guest.")
@click.option(
    "--guest",
    "names",
    multiple=True,
    type=click.Choice([name for name in GUESTS if name != "echo"]),
    metavar="NAME",
    help=f"Only this guest; repeat it for more.  [default: {', '.join(DEFAULT_GUESTS)}]",
)
def demo(vcpus: int, names: tuple[str, ...]) -> int:
    """Run the built-in guests one after the other, and show what they converted.

    Exit status: 0 where all guests passed, else that of the first that did not.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        # A file has no width; what CI shows should be what a terminal shows.
        console = Console(highlight=False, width=max(_NARROWEST, console.width))
    display: Display = LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
    buffer = LogBuffer(is_terminal=False)
    log.configure(log_format="console", stream=buffer, level="warning")
    with display:
        results = trio.run(_run_guests, names or DEFAULT_GUESTS, vcpus, display, buffer)
    _print_summary(console, results)
    failed = [result for result in results if not result.passed]
    if failed:
        print(f"kvmd: demo: not passed: {', '.join(result.name for result in failed)}", file=sys.stderr)
        return failed[0].stop.status or 1
    console.print(f"{len(results)} of {len(results)} guests passed.", style="green")
    return 0


def _print_summary(console: Console, results: list[GuestResult]) -> None:
    with console.capture() as capture:
        console.print(summary(results, unicode=is_unicode(console)))
    if console.is_terminal:
        console.print()
        console.out(capture.get(), highlight=False, end="")
    else:
        # rich fills lines up with blanks, which a file has no use for.
        print("\n".join(line.rstrip() for line in capture.get().split("\n")), end="")


async def _run_guests(names: tuple[str, ...], vcpus: int, display: Display, buffer: LogBuffer) -> list[GuestResult]:
    results = []
    for name in names:
        guest = GUESTS[name]
        spec = MachineSpec(image=guest.path, vcpus=vcpus)
        display.begin(name, guest.description)
        with Machine.open(spec) as machine:
            result = await _run_guest(name, machine, display, buffer)
        display.end(result)
        results.append(result)
        if result.stop.reason in _STOPPED:
            break
    return results


async def _run_guest(name: str, machine: Runnable, display: Display, buffer: LogBuffer) -> GuestResult:
    watcher = _Watcher(machine, display, buffer)
    async with trio.open_nursery() as nursery:
        await nursery.start(watch_signals, machine, structlog.get_logger("kvmd"))
        nursery.start_soon(watcher.run)
        stop = await machine.run()
        nursery.cancel_scope.cancel()
    seconds = watcher.seconds
    watcher.finish()
    mapped_at, memory_map = watcher.most_shared
    return GuestResult(
        name=name,
        stop=stop,
        seconds=seconds,
        stats=machine.stats.snapshot(),
        memory_map=tuple(memory_map),
        mapped_at=mapped_at,
        memory_bytes=machine.spec.memory,
        pinned=machine.pinned,
    )


class _Watcher:
    """Tells the display of one guest: what it prints, what the log says, and how far it is."""

    def __init__(self, machine: Runnable, display: Display, buffer: LogBuffer) -> None:
        self._machine = machine
        self._display = display
        self._buffer = buffer
        self._printed = bytearray()
        self._started = time.monotonic()
        self._most_shared_bytes = -1
        self.most_shared: tuple[float, list[tuple[GpaRange, PageState]]] = (0.0, [])

    @property
    def seconds(self) -> float:
        """Seconds since the guest started."""
        return time.monotonic() - self._started

    async def run(self) -> None:
        """Look now and then until cancelled; the console's bound holds back a guest that floods it."""
        while True:
            self._show()
            self._look_at_memory()
            self._display.progress(self._machine, self.seconds)
            await trio.sleep(PROGRESS_SECONDS)

    def _look_at_memory(self) -> None:
        memory_map = self._machine.memory_map()
        shared = sum(range_.size_bytes for range_, state in memory_map if state is PageState.SHARED)
        if shared > self._most_shared_bytes:
            self._most_shared_bytes = shared
            self.most_shared = (self.seconds, memory_map)

    def finish(self) -> None:
        """Show what is left, an unfinished line too."""
        self._look_at_memory()
        self._show()
        if self._printed:
            self._display.note(_printable(bytes(self._printed)))

    def _show(self) -> None:
        self._printed += self._machine.console.take()
        *lines, rest = bytes(self._printed).split(b"\n")
        self._printed = bytearray(rest)
        for line in lines:
            self._display.note(_printable(line))
        for text in self._buffer.take().decode().splitlines():
            self._display.note(text)


def _printable(line: bytes) -> str:
    """Return a guest's line without what would move the cursor or change colours: it is not to be trusted."""
    text = line.decode(errors="replace").rstrip("\r")
    return "".join(character if character.isprintable() else "?" for character in text)
