"""Linux machines with kernels of a few instructions: the platform around them, on any KVM.

Real kernels run in tests/lab/test_linux.py.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path
from typing import cast

import pytest
import trio
from structlog.testing import capture_logs

from kvmd.errors import BackendError, ConfigError, HostError, ImageError, KvmdError
from kvmd.machine import Machine
from kvmd.network.own_thread import in_own_thread
from kvmd.network.tap import Tap
from kvmd.spec.machine import spec_of
from kvmd.stop import Stop, StopReason
from kvmd.virtio.abi import F_VERSION_1
from kvmd.virtio.mmio import MmioTransport
from tests.linux.kernels import bzimage, running, vmlinux
from tests.own_network import CAP_NET_ADMIN, keep_capabilities, own_network
from tests.virtio.driver import Driver, DriverQueue, Memory

pytestmark = pytest.mark.kvm

HLT = b"\xf4"
HANG = b"\xeb\xfe"
SECONDS = 60.0


def out(port: int, value: int) -> bytes:
    return b"\x66\xba" + port.to_bytes(2, "little") + b"\xb0" + bytes([value]) + b"\xee"  # mov dx; mov al; out dx, al


SHOW_EAX = b"\x66\xba\xf8\x03" + b"\xee\xc1\xe8\x08" * 4  # mov dx, 0x3f8; (out dx, al; shr eax, 8) four times
SHOW_DEVICE = b"\xbb\x00\x00\x00\xd0\x8b\x03" + SHOW_EAX  # mov ebx, 0xd0000000; mov eax, [rbx]
POWER_OFF = out(0x600, 0x34)


class Host:
    """Makes machines of files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, kernel: bytes, /, **keys: object) -> Machine:
        (self.folder / "kernel").write_bytes(kernel)
        document = {"kernel": "kernel", "memory": "64M", "entropy": False, "accelerator": "kvm", **keys}
        return Machine.open(spec_of(document, base=self.folder))

    def run(self, kernel: bytes, /, **keys: object) -> tuple[Stop, bytes]:
        with self.open(kernel, **keys) as machine:

            async def to_the_end() -> Stop:
                with trio.fail_after(SECONDS):
                    return await machine.run()

            return trio.run(to_the_end), machine.console.take()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("code", "reason", "status"),
    [
        (POWER_OFF, StopReason.GUEST_POWER_OFF, 0),
        (out(0x604, 1), StopReason.GUEST_REBOOT, 133),
        (out(0x64, 0xFE), StopReason.GUEST_REBOOT, 133),
        (out(0x505, 1), StopReason.GUEST_PANIC, 122),
    ],
)
def test_a_kernel_ends_its_machine(host: Host, code: bytes, reason: StopReason, status: int) -> None:
    stop, console = host.run(running(b"".join(out(0x3F8, byte) for byte in b"hi\n") + code + HANG), vcpus=2)
    assert (stop.reason, stop.status, console) == (reason, status, b"hi\n")


def test_a_panic_is_seen_with_what_the_kernel_said_of_it(host: Host) -> None:
    # A kernel says why it panics before it shows its stack, some thirty lines.
    lines = [f"line {number}" for number in range(90)]
    said = "".join(f"{line}\r\n" for line in lines).encode()
    with capture_logs() as log:
        stop, console = host.run(running(b"".join(out(0x3F8, byte) for byte in said) + out(0x505, 1) + HANG))
    assert (stop.reason, console) == (StopReason.GUEST_PANIC, said)
    (tail,) = [event for event in log if event["event"] == "console-tail"]
    assert (tail["log_level"], tail["lines"]) == ("error", lines[-60:])


def test_an_elf_kernel_starts_by_pvh(host: Host) -> None:
    # The start information's magic number is where EBX points.
    code = b"\x8b\x03" + SHOW_EAX + POWER_OFF + HANG
    kernel = bytearray(vmlinux())
    kernel[0x200 + 0x40 : 0x200 + 0x40 + len(code)] = code
    stop, console = host.run(bytes(kernel))
    assert stop.reason is StopReason.GUEST_POWER_OFF, stop.message
    assert console == (0x336E_C578).to_bytes(4, "little")


def test_virtio_devices_are_where_acpi_says(host: Host, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    stop, console = host.run(
        running(SHOW_DEVICE + POWER_OFF + HANG), disks=[{"path": "disk.raw"}], entropy=True, balloon=True
    )
    assert stop.reason is StopReason.GUEST_POWER_OFF, stop.message
    assert console == b"virt"


class GuestMemory:
    """A machine's memory for the driver of the virtio tests."""

    def __init__(self, machine: Machine) -> None:
        self.read = machine.memory.read
        self.write = machine.memory.write
        self._free = 32 << 20

    def allocate(self, size_bytes: int, align: int = 16) -> int:
        gpa = -(-self._free // align) * align
        self._free = gpa + size_bytes
        return gpa


def test_a_notification_is_served_by_the_event_loop_and_answered_by_an_interrupt(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No vCPU leaves the guest for either: an ioeventfd takes the one, an irqfd the other, seen by the PIC here."""
    written: list[int] = []
    served: list[str] = []
    real_write, real_random = MmioTransport.write, os.urandom

    def write(transport: MmioTransport, offset: int, data: bytes) -> None:
        written.append(offset)
        real_write(transport, offset, data)

    def random(size_bytes: int) -> bytes:
        if size_bytes == 64:
            served.append(threading.current_thread().name)
        return real_random(size_bytes)

    gpa = 33 << 20  # the first queue's used ring, as the driver is told below
    code = (
        b"\xbb\x50\x00\x00\xd0\xc7\x03\x00\x00\x00\x00"  # mov ebx, 0xd0000050; mov dword [rbx], 0
        + (b"\xb9" + struct.pack("<I", gpa + 2))  # mov ecx, gpa + 2
        + b"\x66\x83\x39\x00\x74\xfa"  # again: cmp word [rcx], 0; jz again
        + b"\x66\xba\x20\x00\xec\xa8\x20\x74\xfb"  # mov dx, 0x20; again: in al, dx; test al, 1 << 5; jz again
    )
    with host.open(running(code + POWER_OFF + HANG), entropy=True) as machine:
        assert machine._devices is not None
        (device,) = machine._devices.virtio
        driver = Driver(cast("Memory", GuestMemory(machine)), MmioTransport(device), -1)
        assert driver.negotiate(F_VERSION_1)
        queue = DriverQueue(driver, 0, 16)
        queue.used = gpa
        driver.place_queue(0, 16, (queue.table, queue.avail, queue.used))
        driver.go()
        queue.offer((), [(40 << 20, 64)])
        monkeypatch.setattr(MmioTransport, "write", write)
        monkeypatch.setattr("os.urandom", random)

        async def main() -> Stop:
            with trio.fail_after(SECONDS):
                return await machine.run()

        stop = trio.run(main)
        assert stop.reason is StopReason.GUEST_POWER_OFF, stop.message
        assert queue.take_used() == [(0, 64)]
        assert machine.memory.read(40 << 20, 64) != bytes(64)
    assert served == [threading.current_thread().name]
    assert written == [], "no vCPU left the guest for it"


def test_memory_beyond_three_gibibytes_is_above_four(host: Host) -> None:
    # mov ebx, 3 GiB - 4 KiB; mov dword [rbx], "up!\\n"; mov eax, [rbx]: the last page before the devices.
    code = b"\xbb\x00\xf0\xff\xbf\xc7\x03up!\n\x8b\x03" + SHOW_EAX + POWER_OFF + HANG
    with host.open(running(code), memory="4G") as machine:
        assert machine.memory_map()[-1][0].end == 5 << 30
        with pytest.raises(KvmdError, match="not within memory"):
            machine.memory.read(0xD000_0000, 4)
        machine.memory.write((5 << 30) - 4, b"last")
        assert machine.memory.read((5 << 30) - 4, 4) == b"last"
    stop, console = host.run(running(code), memory="4G")
    assert (stop.reason, console) == (StopReason.GUEST_POWER_OFF, b"up!\n")


def test_a_triple_fault_is_one(host: Host) -> None:
    stop, _ = host.run(running(b"\x0f\x0b"))  # ud2, without an interrupt table
    assert stop.reason is StopReason.TRIPLE_FAULT


def test_the_operator_stops_processors_that_wait_to_be_started(host: Host) -> None:
    with host.open(running(HLT + HANG), vcpus=3) as machine:

        async def stopped() -> Stop:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_stop_when_running, machine)
                with trio.fail_after(SECONDS):
                    return await machine.run()

        assert trio.run(stopped).reason is StopReason.OPERATOR


async def _stop_when_running(machine: Machine) -> None:
    while machine.state != "running":
        await trio.lowlevel.checkpoint()
    await machine.pause()
    await machine.resume()
    machine.stop()


@pytest.mark.parametrize(
    ("keys", "error", "part"),
    [
        ({"kernel": "nothing"}, ImageError, "cannot read the kernel"),
        ({"initrd": "nothing"}, ImageError, "cannot read the initrd"),
        ({"initrd": "large"}, ImageError, "the initrd of 64 MiB does not fit"),
        ({"initrd": "empty"}, ImageError, "empty is empty: make it again, or leave `initrd` out"),
        ({"memory": "8M"}, ImageError, "8 MiB of memory are too few"),
        ({"cmdline": "x" * 3000}, ConfigError, "cmdline: 3000 characters"),
        ({"kernel": "short"}, ImageError, "the kernel is truncated: it says that it has"),
        ({"disks": [{"path": "nothing"}]}, ConfigError, "there is no such file"),
        ({"disks": [{"path": "odd"}]}, ConfigError, "512"),
        ({"disks": [{"path": "disk"}, {"path": "fifo"}]}, ConfigError, "neither a file nor a block device"),
        ({"disks": [{"path": "disk"}, {"path": "disk"}]}, ConfigError, "locked"),
        ({"accelerator": "software"}, ConfigError, "the software CPU runs payload guests only"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs_and_leaves_nothing(
    host: Host, tmp_path: Path, keys: dict[str, object], error: type[KvmdError], part: str
) -> None:
    (tmp_path / "large").write_bytes(bytes(64 << 20))
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "odd").write_bytes(bytes(700))
    (tmp_path / "short").write_bytes(bzimage()[:-1000])
    (tmp_path / "disk").write_bytes(bytes(1024))
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(error, match=part):
        host.open(bzimage(), **keys)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("error", [BackendError("no eventfd"), KeyboardInterrupt("no eventfd")])
def test_a_machine_without_a_conversion_service_leaves_no_devices(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(_flags: int) -> int:
        raise error

    (tmp_path / "disk").write_bytes(bytes(1024))
    keys = {"disks": [{"path": "disk"}], "entropy": True}
    monkeypatch.setattr("kvmd.bell.new_eventfd", fail)
    with pytest.raises(type(error), match="no eventfd"):
        host.open(bzimage(), **keys)
    monkeypatch.undo()
    # The disk is not locked any more.
    host.open(bzimage(), **keys).close()


@own_network
@pytest.mark.network
@pytest.mark.parametrize(
    ("network", "capabilities", "part"),
    [
        ({"bridge": "br9"}, [CAP_NET_ADMIN], "there is no bridge br9"),
        (
            {"kind": "made-bridge", "bridge": "vms", "tap": "taken"},
            [CAP_NET_ADMIN],
            "there is an interface taken already",
        ),
        ({"kind": "made-bridge", "bridge": "vms"}, [], "no CAP_NET_ADMIN"),
    ],
)
def test_a_network_that_cannot_be_undoes_the_rest(
    host: Host, tmp_path: Path, network: dict[str, object], capabilities: list[int], part: str
) -> None:
    (tmp_path / "disk").write_bytes(bytes(1024))
    others = {"disks": [{"path": "disk"}], "balloon": True, "agent": "agent", "entropy": True}

    def refused() -> None:
        keep_capabilities(*capabilities)
        before = sorted(Path("/proc/self/fd").iterdir())
        with pytest.raises(HostError, match=part) as caught:
            host.open(bzimage(), networks=[network], **others)
        assert "\n" not in str(caught.value)
        assert sorted(Path("/proc/self/fd").iterdir()) == before

    with Tap.make("taken"):
        in_own_thread(refused)
        assert {name for _, name in socket.if_nameindex()} == {"lo", "taken"}
    # The disk is not locked any more.
    host.open(bzimage(), **others).close()


def test_a_pause_is_one_of_the_devices_too(host: Host) -> None:
    with host.open(running(HLT + HANG), entropy=True, agent="agent", balloon=True, balloon_target="1M") as machine:
        assert machine.balloon is not None
        assert machine.balloon.target_bytes == 1 << 20
        assert machine._devices is not None
        devices = machine._devices.virtio

        async def paused() -> None:
            while machine.state != "running":
                await trio.lowlevel.checkpoint()
            await machine.pause()
            assert [(device.standstill.taking, device.standstill.giving) for device in devices] == [(False, False)] * 3
            await machine.resume()
            assert [(device.standstill.taking, device.standstill.giving) for device in devices] == [(True, True)] * 3
            assert machine.power_button is not None
            machine.power_button()  # nobody listens
            machine.stop()

        async def main() -> Stop:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(paused)
                with trio.fail_after(SECONDS):
                    return await machine.run()

        assert trio.run(main).reason is StopReason.OPERATOR
