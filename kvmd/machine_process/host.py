"""One machine in a process of its own, from its opening to its end: its outputs, its steps, what others ask of it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Awaitable, Callable

import structlog
import trio

from kvmd.console_pump import OutputPump
from kvmd.conversion.ring import RecordReader
from kvmd.conversion_log import ConversionSampler
from kvmd.errors import MachineStateError, NoSuchDevice
from kvmd.log_buffer import LogBuffer
from kvmd.machine_end import log_end
from kvmd.machine_process.counting import counter_values
from kvmd.machine_process.folder import (
    CONSOLE,
    END,
    LAST_CONVERSIONS,
    LAST_RECORDS,
    LOG,
    EndFile,
    LastConversions,
    MachineFolder,
)
from kvmd.machine_process.hosted import Balloon, HostedMachine
from kvmd.machine_process.kept_conversions import ConversionKeeper
from kvmd.machine_process.messages import Balloon as BalloonState
from kvmd.machine_process.messages import CounterValues
from kvmd.machine_process.outputs import KeptOutput
from kvmd.machine_process.segments import SegmentWriter
from kvmd.machine_process.steps import Steps
from kvmd.ranges import PageState
from kvmd.runnable import SHUTDOWN_SECONDS
from kvmd.stop import NOT_SHUT_DOWN, STOPPED, Stop, StopReason
from kvmd.units import PAGE_SIZE
from kvmd.virtio.host_port import PortConnection

OUTPUT_KEPT = 256 << 10
"""Bytes of console and of log that are kept in memory for those who follow."""

_COUNT_AT_ONCE = 256


class MachineHost:
    """Runs one machine for others, who ask through ``kvmd.machine_process.control``.

    Args:
        machine: opened, not yet run; closed by its owner.
        folder: the machine's, borrowed.
        log_buffer: what the log was configured to write to.
        log: for the process's own events.
        shutdown_seconds: see ``SHUTDOWN_SECONDS``.

    Attributes:
        end_written: whether how it ended is in the folder.
    """

    def __init__(
        self,
        machine: HostedMachine,
        folder: MachineFolder,
        *,
        log_buffer: LogBuffer,
        log: structlog.typing.FilteringBoundLogger,
        shutdown_seconds: float = SHUTDOWN_SECONDS,
    ) -> None:
        self.machine = machine
        self._shutdown_seconds = shutdown_seconds
        self.started_ns: int | None = None
        self.end_written = False
        self.log = log.bind(machine=machine.spec.name)
        self.steps = Steps(folder.fd, self._file_failed)
        self.console = KeptOutput(SegmentWriter(folder.fd, CONSOLE), OUTPUT_KEPT, self._file_failed)
        self.log_output = KeptOutput(SegmentWriter(folder.fd, LOG), OUTPUT_KEPT, self._file_failed)
        self._folder = folder
        self._console_pump = OutputPump(machine.console, self.console, self._file_failed)
        self._log_pump = OutputPump(log_buffer, self.log_output, self._file_failed)
        self._sampler = ConversionSampler(
            machine.records.reader(from_oldest=True), machine=machine.spec.name, log=structlog.get_logger("kvmd")
        )
        self._keeper = ConversionKeeper(machine.records.reader(from_oldest=True), folder.fd, self._file_failed)
        self._start = trio.Event()
        self._never_started = False
        self._pressed = False

    @property
    def state(self) -> str:
        """``created``, ``running``, ``paused`` or ``stopped``."""
        if self._never_started:
            return "stopped"
        return "stopped" if self.machine.state == "closed" else self.machine.state

    async def run(self, serve: Callable[[MachineHost], Awaitable[None]], ready: Callable[[], None]) -> Stop:
        """Hold the machine ready, run it when asked, and write down how it ended.

        Args:
            serve: answers clients, until it is cancelled.
            ready: called once, when clients are answered and the first step is written.
        """
        self.steps.tell("created", "created")
        try:
            async with trio.open_nursery() as outer:
                outer.start_soon(self._log_pump.run)
                async with trio.open_nursery() as inner:
                    await inner.start(self._watch_signals)
                    inner.start_soon(serve, self)
                    ready()
                    await self._start.wait()
                    stop = await self._run_machine()
                    # Whoever follows finds the rest in the folder; all of it must be there before the end is.
                    inner.cancel_scope.cancel()
                log_end(self.machine, stop, self.log)
                self._log_pump.end()
            self._write_end(stop)
        finally:
            for output in (self.console, self.log_output, self.steps, self._keeper):
                output.close()
        return stop

    async def start(self) -> None:
        """Run the guest.

        Raises:
            MachineStateError: it was started, or stopped, before.
        """
        if self._start.is_set() or self.state != "created":
            found = "running" if self.state == "created" else self.state
            raise MachineStateError("start", needed="created", found=found)
        self.started_ns = time.time_ns()
        self.steps.tell("started", "running")
        self._start.set()
        while self.machine.state == "created":  # a few turns of the event loop: run() has no event to wait for
            await trio.lowlevel.checkpoint()

    async def pause(self) -> None:
        """Take the vCPUs out of the guest.

        Raises:
            MachineStateError: it is not running, or it ended meanwhile.
        """
        await self.machine.pause()
        self.steps.tell("paused", "paused")

    async def resume(self) -> None:
        """Let the vCPUs in again.

        Raises:
            MachineStateError: it is not paused.
        """
        await self.machine.resume()
        self.steps.tell("resumed", "running")

    def stop(self) -> None:
        """Stop the guest; it ends when it has. One that was never started ends as well. Harmless the second time."""
        if not self._start.is_set():
            self._never_started = True
            self._start.set()
        self.machine.stop(NOT_SHUT_DOWN if self._pressed else STOPPED)

    def press_power_button(self) -> None:
        """Ask the guest to shut down.

        Raises:
            NoSuchDevice: it has no power button.
            MachineStateError: it is not running.
        """
        press = self.machine.power_button
        if press is None:
            raise NoSuchDevice("the machine has no power button: Linux guests have one")
        if self.state != "running":
            raise MachineStateError("press the power button", needed="running", found=self.state)
        press()
        self._pressed = True

    async def balloon(self, target_bytes: int | None) -> BalloonState:
        """Return what the guest does without, after asking it for ``target_bytes``, if any.

        Raises:
            NoSuchDevice: it has no balloon.
            IndexError: the target is impossible.
        """
        balloon = self.machine.balloon
        if balloon is None:
            raise NoSuchDevice("the machine has no balloon: Linux guests have one with balloon = true")
        if target_bytes is not None:
            most = self.machine.spec.memory
            if target_bytes % PAGE_SIZE or not 0 <= target_bytes < most:
                raise IndexError(f"target: {target_bytes} is not a number of whole pages below the {most} of memory")
            balloon.set_target(target_bytes)
        return _balloon_state(balloon, await self._held_bytes())

    def attach_agent(self) -> PortConnection:
        """Return a connection to the agent, which its owner closes.

        Raises:
            NoSuchDevice: the machine has no port for one.
            DeviceInUse: somebody else talks to it.
        """
        port = self.machine.agent
        if port is None:
            raise NoSuchDevice("the machine has no port for an agent: Linux guests have one with agent = NAME")
        return port.attach()

    async def counters(self) -> CounterValues:
        """Return what the machine did so far."""
        while self.machine.stats.catch_up(_COUNT_AT_ONCE):
            await trio.lowlevel.checkpoint()
        return self._count(None if self.machine.balloon is None else await self._held_bytes())

    async def _run_machine(self) -> Stop:
        if self._never_started:
            return Stop.because(StopReason.OPERATOR, "stopped by the operator before it was started")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._console_pump.run)
            nursery.start_soon(self._sampler.run)
            nursery.start_soon(self._keeper.run)
            try:
                stop = await self.machine.run()
            except Exception as error:
                self.log.exception("machine-failed")
                stop = Stop.because(StopReason.BUG, f"a bug of kvmd's: {error!r}")
            self._console_pump.end()
            self._sampler.end()
            self._keeper.end()
        return stop

    async def _watch_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Stop the guest at SIGTERM: what service managers send.

        One that has a power button is asked first, and stopped when it has not shut down in time; a second signal does
        not wait.
        """
        asked = False
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            task_status.started()
            async with trio.open_nursery() as nursery:
                async for number in received:
                    name = signal.Signals(number).name
                    if asked or self.machine.power_button is None or self.state != "running":
                        self.log.warning("stopping", signal=name)
                        self.stop()
                        continue
                    asked = True
                    self.log.warning("shutting-down", signal=name, seconds=self._shutdown_seconds)
                    self.press_power_button()
                    nursery.start_soon(self._stop_later)

    async def _stop_later(self) -> None:
        await trio.sleep(self._shutdown_seconds)
        self.log.warning("not-shut-down", seconds=self._shutdown_seconds, consequence="it is stopped")
        self.stop()

    async def _held_bytes(self) -> int:
        # A millisecond for each GiB, as often as somebody asks: not in the event loop's thread.
        return await trio.to_thread.run_sync(self.machine.held_bytes)

    def _count(self, held_bytes: int | None = None) -> CounterValues:
        """Return the counters; without ``held_bytes`` of a machine at its end, which will hold none."""
        balloon = self.machine.balloon
        snapshot = self.machine.stats.snapshot()
        shared = private = 0
        for range_, state in self.machine.memory_map():
            if state is PageState.SHARED:
                shared += range_.size_bytes
            else:
                private += range_.size_bytes
        return counter_values(
            snapshot,
            shared_bytes=shared,
            private_bytes=private,
            balloon=None if balloon is None else _balloon_state(balloon, held_bytes or 0),
            held_back_us=self.machine.held_back_us,
        )

    def _write_end(self, stop: Stop) -> None:
        """Write what outlives the process; the end last, since who finds it looks no further."""
        end = EndFile(
            reason=stop.reason.value,
            message=stop.message,
            status=int(stop.status),
            signal=None,
            wall_ns=time.time_ns(),
            started_ns=self.started_ns,
            facts=dict(self.machine.facts),
            counters=self._count(),
        )
        ring = self.machine.records
        first = max(0, ring.appended - min(LAST_RECORDS, ring.capacity))
        _, records = RecordReader(ring, first).take(LAST_RECORDS)
        self.steps.tell("stopped", "stopped", reason=end.reason, message=end.message, status=end.status)
        try:
            self._folder.write(LAST_CONVERSIONS, LastConversions(ring.appended, records))
        except OSError as error:
            self._file_failed(error)
        else:
            self._keeper.discard()
        try:
            self._folder.write(END, end, durable=True)
            self.end_written = True
        except OSError as error:
            # The parent still sees the exit status, which says the most important thing.
            print(f"{END} was not written: {error.strerror}: {end.reason}: {end.message}", file=sys.stderr)  # noqa: T201

    def _file_failed(self, error: OSError) -> None:
        self.log.error("machine-file-not-written", problem=error.strerror, consequence="the guest goes on")


def _balloon_state(balloon: Balloon, held_bytes: int) -> BalloonState:
    return BalloonState(balloon.target_bytes, balloon.actual_bytes, balloon.discarded_bytes, held_bytes)
