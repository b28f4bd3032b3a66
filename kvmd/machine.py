"""A machine: one guest with its vCPUs, memory, devices and conversion service, from its image to its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import structlog
import trio

from kvmd.accelerator import open_hardware, open_linux_hardware
from kvmd.closing import Closing
from kvmd.conversion.changes import ImplicitPolicy, Limits
from kvmd.conversion.rate_limit import RateLimit
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.rules import ConversionRules
from kvmd.conversion.stats import ConversionStats
from kvmd.conversion_service import ConversionService
from kvmd.devices.console import ConsoleOutput
from kvmd.devices.console_input import ConsoleInput
from kvmd.devices.mmio import MmioBus, MmioCounter
from kvmd.devices.ports import PortBus
from kvmd.devices.power import (
    KEYBOARD_COMMAND_PORT,
    PANIC_PORT,
    RESET_PORT,
    SLEEP_PORT,
    EndSwitch,
    PanicPort,
    SleepRegisters,
    acpi_reset,
    keyboard_reset,
)
from kvmd.devices.uart16550 import Uart16550
from kvmd.errors import ImageError, MachineStateError
from kvmd.exit_handler import VcpuSurroundings
from kvmd.guest_files import read_file
from kvmd.hardware import Hardware
from kvmd.memory.accessor import HostAccessor
from kvmd.payload.elf import parse_elf
from kvmd.ranges import GpaRange, PageState
from kvmd.run_gate import RunGate
from kvmd.service_place import ServicePlace
from kvmd.spec.machine import MachineSpec
from kvmd.stop import STOPPED, Stop, StopReason
from kvmd.units import format_size
from kvmd.vcpu_tasks import VcpuTasks

if TYPE_CHECKING:
    from kvmd.linux_devices import LinuxDevices
    from kvmd.virtio.balloon import BalloonDevice
    from kvmd.virtio.host_port import HostPort

_COM1 = 0x3F8
_UART_PORTS = 8
_PANIC_LINES = 60
_COUNT_SECONDS = 1.0
_COUNT_AT_ONCE = 256


class Machine(Closing):
    """One machine, opened but not yet run.

    Attributes:
        spec: what it is made of.
        stats: counters of its conversions.
        records: the last conversions.
        console: what the guest prints.
        typed: what the guest reads from its console.
        ports: its I/O ports, with a count of accesses that nothing answered.
        mmio: the same of memory-mapped I/O.
        memory: how the host reads and writes the guest's shared memory.
        pinned: memory that never converts.
        facts: for the first log line.
        agent: the host's end of the port of a program in the guest; None where there is none.
        balloon: what memory the guest does without; None where there is no balloon.
        power_button: presses the power button; None where there is none.
    """

    def __init__(
        self, spec: MachineSpec, hardware: Hardware, gate: RunGate, parked: _Parked, opened: Mapping[str, int]
    ) -> None:
        self.spec = spec
        self.records = RecordRing()
        self.stats = ConversionStats(self.records.reader())
        self.console = ConsoleOutput()
        self.typed = ConsoleInput()
        self.ports = PortBus()
        self.mmio = MmioCounter()
        self._hardware = hardware
        self._gate = gate
        self._parked = parked
        self._state = hardware.state
        self._memory_lock = hardware.lock
        self.pinned = hardware.pinned
        self.memory = HostAccessor(
            hardware.state,
            hardware.shared,
            hardware.lock,
            # A payload's memory that never converts is all pinned; what asks for views is Linux's devices alone.
            converts=hardware.pinned != hardware.state.range,
            hole=hardware.hole,
        )
        bus, switch = (None, None) if hardware.platform is None else (MmioBus(), EndSwitch())
        line = None if hardware.platform is None else hardware.platform.console
        uart = Uart16550(self.console, self.typed) if line is None else Uart16550(self.console, self.typed, line.pull)
        self.ports.add(_COM1, _UART_PORTS, uart)
        self._devices: LinuxDevices | None = None
        self.agent: HostPort | None = None
        self.balloon: BalloonDevice | None = None
        self.power_button: Callable[[], None] | None = None
        if hardware.platform is not None and bus is not None and switch is not None:
            from kvmd.linux_devices import LinuxDevices  # noqa: PLC0415 - payloads start faster without it

            _add_power(self.ports, switch)
            self._devices = LinuxDevices.open(spec, hardware.platform, self.memory, bus, opened)
            # Before what they are connected to; also where the rest of this, or a signal, fails.
            hardware.resources.callback(self._devices.close)
            self.agent, self.balloon = self._devices.agent, self._devices.balloon
            self.power_button = hardware.platform.button.pull
        limits = Limits(
            chunk_bytes=spec.conversion.chunk,
            no_progress=spec.conversion.no_progress_limit,
            segments=spec.conversion.max_ranges,
            implicit=ImplicitPolicy(spec.conversion.implicit),
        )
        rate = None if spec.conversion.rate is None else RateLimit(spec.conversion.rate)
        rules = ConversionRules(hardware.state, pinned=self.pinned, limits=limits)
        place = ServicePlace(moves=hardware.deletes_memslots)
        self._service = ConversionService(
            rules, hardware.protection, memory_lock=hardware.lock, ring=self.records, rate=rate, place=place
        )
        around = VcpuSurroundings(self._service, hardware.protection, self.ports, self.mmio, bus, switch, rate, place)
        self._tasks = VcpuTasks(hardware.vcpus, gate, around, self._on_stopping)
        self.facts: dict[str, object] = {
            "vcpus": spec.vcpus,
            "memory": format_size(spec.memory),
            **hardware.facts,
            **({} if self._devices is None else self._devices.facts),
        }
        self._state_name = "created"
        # A pause waits for disks: who resumes meanwhile comes after it.
        self._changing = trio.Lock()

    @classmethod
    def open(cls, spec: MachineSpec, *, files: Sequence[int] = ()) -> Self:
        """Read the image and build the machine.

        Args:
            spec: what it is made of.
            files: open ones to read in place of those that the spec names, one for each of ``spec.files``, from their
                beginning; or none. They stay open.

        Raises:
            KvmdError: it cannot be built; nothing is left behind.
        """
        parked = _Parked()
        gate = RunGate(parked.set)
        opened = dict(zip((key for key, _ in spec.files), files, strict=True)) if files else {}
        if spec.kernel is not None:
            hardware = _open_linux(spec, spec.kernel, opened)
        else:
            image = parse_elf(read_file("image", spec.guest, opened.get("image")))
            hardware = open_hardware(spec, image, gate.quiesce)
        try:
            return cls(spec, hardware, gate, parked, opened)
        except BaseException:
            hardware.resources.close()
            raise

    @property
    def state(self) -> str:
        """``created``, ``running``, ``paused``, ``stopped`` or ``closed``."""
        return self._state_name

    async def run(self) -> Stop:
        """Run the guest to its end and say why it ended. Cancelling stops it.

        Raises:
            MachineStateError: it was run before.
        """
        self._need("run", "created")
        self._state_name = "running"
        log = structlog.get_logger("kvmd.machine").bind(machine=self.spec.name)
        kind = "image" if self.spec.kernel is None else "kernel"
        log.info("machine-starting", **{kind: str(self.spec.guest)}, **self.facts)
        if self._hardware.not_on_kvm:
            log.warning("no-kvm", because=self._hardware.not_on_kvm)
        self._parked.bind(trio.lowlevel.current_trio_token())
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._service.run)
                nursery.start_soon(self._count)
                if self._devices is not None:
                    nursery.start_soon(self._devices.serve)
                stop = await self._tasks.run()
                nursery.cancel_scope.cancel()
        finally:
            self._state_name = "stopped"
        if stop.reason is StopReason.GUEST_PANIC:
            lines = self.console.tail().decode(errors="replace").splitlines()[-_PANIC_LINES:]
            log.error("console-tail", lines=lines)
        return stop

    def stop(self, message: str = STOPPED) -> None:
        """Stop the guest as the operator wishes. On the event loop's thread; harmless when it has ended."""
        self._tasks.stop(Stop.because(StopReason.OPERATOR, message))

    async def pause(self) -> None:
        """Take all vCPUs out of the guest, with their I/O completed, and let devices rest: its memory stays as it is.

        Raises:
            MachineStateError: it is not running, or it ended meanwhile.
        """
        async with self._changing:
            self._need("pause", "running")
            self._state_name = "paused"
            self._parked.clear()
            # A vCPU that waits for room on the console would never park.
            self.console.release()
            self._gate.pause()
            await self._parked.wait()
            if self._devices is not None:
                await self._devices.pause()
            self._need("pause", "paused")

    async def resume(self) -> None:
        """Let the vCPUs in again.

        Raises:
            MachineStateError: it is not paused.
        """
        async with self._changing:
            self._need("resume", "paused")
            self._state_name = "running"
            self.console.restore()
            if self._devices is not None:
                self._devices.resume()
            self._gate.resume()

    def held_bytes(self) -> int:
        """Return how much of the host's memory the shared side of the guest's takes up."""
        return self._hardware.shared.held_bytes()

    @property
    def held_back_us(self) -> int:
        """How long vCPUs were kept out of the guest by ``conversion.rate``, all together, in microseconds."""
        return self._gate.held_back_ns // 1000

    def memory_map(self) -> list[tuple[GpaRange, PageState]]:
        """Return the state of all memory, as the fewest ranges, in order."""
        with self._memory_lock:
            return self._state.coalesced()

    def close(self) -> None:
        """Give up everything, once ``run`` has returned; harmless the second time."""
        if self._state_name == "closed":
            return
        if self._state_name in {"running", "paused"}:
            raise MachineStateError("close", needed="not running", found=self._state_name)
        self._state_name = "closed"
        if self._tasks.abandoned:
            # A thread is still inside KVM_RUN and would find its memory gone. The process's end frees it.
            self._hardware.resources.pop_all()
            return
        self._service.dispose()
        self._hardware.resources.close()

    async def _count(self) -> None:
        """Count conversions now and then, not while a vCPU waits for its answer."""
        while True:
            await trio.sleep(_COUNT_SECONDS)
            while self.stats.catch_up(_COUNT_AT_ONCE):
                await trio.lowlevel.checkpoint()

    def _on_stopping(self, stop: Stop) -> None:
        self._service.close(stop)
        self.console.release()

    def _need(self, action: str, needed: str) -> None:
        if self._state_name != needed:
            raise MachineStateError(action, needed=needed, found=self._state_name)


class _Parked:
    """An event that the last vCPU thread to park sets on the event loop."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None

    def bind(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token

    def clear(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Called under the gate's lock, from any thread; never blocks."""
        event = self._event
        if self._token is not None:
            self._token.run_sync_soon(event.set)

    async def wait(self) -> None:
        await self._event.wait()


def _open_linux(spec: MachineSpec, kernel: Path, opened: Mapping[str, int]) -> Hardware:
    """Read the kernel and build its machine up to the devices."""
    from kvmd.linux.kernel import parse_kernel  # noqa: PLC0415 - payloads start faster without all of this
    from kvmd.linux_devices import device_count  # noqa: PLC0415 - likewise
    from kvmd.linux_hardware import LinuxImage  # noqa: PLC0415 - likewise

    parsed = parse_kernel(read_file("kernel", kernel, opened.get("kernel")))
    initrd = b"" if spec.initrd is None else read_file("initrd", spec.initrd, opened.get("initrd"))
    if spec.initrd is not None and not initrd:
        raise ImageError(f"the initrd {spec.initrd} is empty: make it again, or leave `initrd` out")
    return open_linux_hardware(spec, LinuxImage(parsed, initrd), devices=device_count(spec))


def _add_power(ports: PortBus, switch: EndSwitch) -> None:
    """Add the registers by which a Linux guest ends its machine."""
    ports.add(SLEEP_PORT, 2, SleepRegisters(switch))
    ports.add(RESET_PORT, 1, acpi_reset(switch))
    ports.add(KEYBOARD_COMMAND_PORT, 1, keyboard_reset(switch))
    ports.add(PANIC_PORT, 1, PanicPort(switch))
