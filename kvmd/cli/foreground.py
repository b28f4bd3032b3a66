"""One machine in the foreground: its console, its log, its conversions and the operator's signals around it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import structlog
import trio

from kvmd.console_pump import OutputPump
from kvmd.conversion_log import ConversionFileWriter, ConversionSampler
from kvmd.log_buffer import LogBuffer
from kvmd.machine_end import log_end
from kvmd.nonblocking import NonBlockingWriter, write_within
from kvmd.runnable import SHUTDOWN_SECONDS, Runnable, Stoppable
from kvmd.stop import NOT_SHUT_DOWN, STOPPED, ExitStatus, Stop

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Foreground:
    """Runs one machine and everything that the operator sees of it.

    Args:
        machine: opened, not yet run.
        stdout: for the guest's console.
        stderr: for the log.
        conversions: for every conversion, or None.
        log_buffer: what the log was configured to write to.
        samples: whether the log shows conversions as they happen.
        log: for the command's own events.
    """

    def __init__(
        self,
        machine: Runnable,
        *,
        stdout: NonBlockingWriter,
        stderr: NonBlockingWriter,
        conversions: NonBlockingWriter | None,
        log_buffer: LogBuffer,
        samples: bool,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._machine = machine
        self._log = log
        self._log_pump = OutputPump(log_buffer, stderr, _nobody_to_tell)
        self._console_pump = OutputPump(machine.console, stdout, self._console_failed)
        name = machine.spec.name
        self._followers: list[ConversionFileWriter | ConversionSampler] = []
        if conversions is not None:
            reader = machine.records.reader(from_oldest=True)
            self._followers.append(ConversionFileWriter(reader, conversions, machine=name, log=log))
        if samples:
            reader = machine.records.reader(from_oldest=True)
            self._followers.append(ConversionSampler(reader, machine=name, log=log))

    async def run(self) -> Stop:
        """Run the machine to its end, write out what there is, and log the end."""
        async with trio.open_nursery() as outer:
            outer.start_soon(self._log_pump.run)
            async with trio.open_nursery() as inner:
                await inner.start(watch_signals, self._machine, self._log)
                end = await self._run_machine()
                inner.cancel_scope.cancel()
            if isinstance(end, Stop):
                log_end(self._machine, end, self._log)
            self._log_pump.end()
        if isinstance(end, Stop):
            return end
        raise end

    async def _run_machine(self) -> Stop | Exception:
        """Run the machine; a bug in it must not cost what it printed and logged, so it is returned."""
        end: Stop | Exception
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._console_pump.run)
            for follower in self._followers:
                nursery.start_soon(follower.run)
            try:
                end = await self._machine.run()
            except Exception as error:  # noqa: BLE001 - raised again by run
                end = error
            self._console_pump.end()
            for follower in self._followers:
                follower.end()
        if self._console_pump.cut_short:
            self._log.warning("console-output-unread", consequence="the last of it is lost")
        return end

    def _console_failed(self, error: OSError) -> None:
        self._log.warning("console-output-lost", problem=error.strerror, consequence="the guest goes on")


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Make of the operator's signals what Ctrl-C is: one exception, on whose way out what was made is undone.

    For what is around ``watch_signals``, which takes them in order while a machine runs.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    # One that was ignored when kvmd started stays ignored.
    taken = [number for number, handler in before.items() if handler is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _interrupt(_number: int, frame: FrameType | None) -> None:
    # By Ctrl-C's own handler, which is trio's where trio runs: it knows what must not be interrupted.
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):
        handler(signal.SIGINT, frame)
    else:
        raise KeyboardInterrupt


async def watch_signals(
    machine: Stoppable,
    log: structlog.typing.FilteringBoundLogger,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Stop ``machine`` at the first signal of the operator's, and end this process at once at the second.

    Where it has a power button, the first signal presses that; the second stops the machine, and so does the end of
    ``SHUTDOWN_SECONDS``; the third ends this process.
    """
    # One that was ignored when kvmd started (nohup) stays ignored.
    signals = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def stop(message: str) -> None:
        # A plain handler from now on: it runs even where the event loop itself hangs.
        for again in signals:
            signal.signal(again, end_at_once)
        machine.stop(message)

    async def stop_later() -> None:
        await trio.sleep(SHUTDOWN_SECONDS)
        log.warning("not-shut-down", seconds=SHUTDOWN_SECONDS, consequence="it is stopped")
        stop(NOT_SHUT_DOWN)

    with trio.open_signal_receiver(*signals) as received:
        task_status.started()
        async with trio.open_nursery() as nursery:
            pressed = False
            async for number in received:
                name = signal.Signals(number).name
                if machine.power_button is None or pressed:
                    log.warning("stopping", signal=name, hint="once more to end at once")
                    stop(NOT_SHUT_DOWN if pressed else STOPPED)
                    continue
                pressed = True
                log.warning("shutting-down", signal=name, seconds=SHUTDOWN_SECONDS, hint="once more to stop it at once")
                machine.power_button()
                nursery.start_soon(stop_later)


def end_at_once(number: int, _frame: object) -> None:
    """End this process without cleaning up: the kernel frees the guest with it."""
    # The cursor, which a progress display may have hidden, comes back with the line.
    last_words = f"kvmd: ended at once by another {signal.Signals(number).name}\n".encode()
    if os.isatty(2):
        last_words = b"\r\x1b[?25h" + last_words
    write_within(2, last_words, 0.1)
    os._exit(ExitStatus.KILLED)


def _nobody_to_tell(_error: OSError) -> None:
    """Bear it: a log that cannot be written has no place to say so."""
