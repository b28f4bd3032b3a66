"""Stop, pause, resume and kicks on every accelerator, and what is refused before a machine starts."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import structlog
import trio

from kvmd import accelerator, software_hardware
from kvmd.errors import ConfigError, HostError, ImageError, MachineStateError
from kvmd.guests import GUESTS
from kvmd.kvm.system import Kvm
from kvmd.machine import Machine
from kvmd.spec.machine import MachineSpec
from kvmd.stop import ExitStatus, Stop, StopReason
from kvmd.units import MIB, TIB
from tests.machine.conftest import RUN_SECONDS, OpenMachine

ON_KVM = pytest.param("kvm", marks=pytest.mark.kvm)
ON_SOFTWARE = pytest.param("software", marks=pytest.mark.software)


@pytest.fixture(params=[ON_KVM, ON_SOFTWARE])
def open_machine(request: pytest.FixtureRequest, open_machine: OpenMachine) -> OpenMachine:
    """Return the usual function, for each accelerator in turn."""
    return partial(open_machine, accelerator=request.param)


async def until_converted(machine: Machine, count: int) -> None:
    """Wait until so many requests were answered: the gate that says the guest is at work."""
    reader = machine.records.reader()
    while machine.records.appended < count:
        reader.take(count)
        answered = trio.Event()
        reader.wake_once(answered.set)
        await answered.wait()


async def until_inside(machine: Machine) -> None:
    """Wait until every vCPU is in the guest, as far as its thread can say."""
    seats = machine._gate._seats
    while not all(seat.inside for seat in seats):
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("vcpus", [1, 4])
async def test_a_guest_that_spins_is_stopped(open_machine: OpenMachine, vcpus: int) -> None:
    machine = open_machine("hostile", 5, vcpus=vcpus)
    with trio.fail_after(RUN_SECONDS):
        async with trio.open_nursery() as nursery:

            async def stop_it() -> None:
                await until_inside(machine)
                machine.stop()

            nursery.start_soon(stop_it)
            stop = await machine.run()
    assert (stop.reason, stop.status) == (StopReason.OPERATOR, ExitStatus.STOPPED)
    assert machine.state == "stopped"


async def test_cancelling_the_run_stops_a_guest_that_spins(open_machine: OpenMachine) -> None:
    machine = open_machine("hostile", 5, vcpus=2)
    with trio.fail_after(RUN_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(machine.run)
            await until_inside(machine)
            nursery.cancel_scope.cancel()
    machine.close()
    assert machine.state == "closed"


@pytest.mark.parametrize(("guest", "vcpus"), [("pingpong", 1), ("pingpong", 4), ("contend", 4)])
async def test_a_storm_of_pauses_loses_nothing(open_machine: OpenMachine, guest: str, vcpus: int) -> None:
    machine = open_machine(guest, 4, 60, vcpus=vcpus)
    stops: list[Stop] = []
    done = trio.Event()

    async def run() -> None:
        stops.append(await machine.run())
        done.set()

    pauses = 0
    with trio.fail_after(RUN_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await until_converted(machine, 1)
            while not done.is_set():
                try:
                    await machine.pause()
                    frozen = machine.records.appended, machine.console.total_bytes
                    for _ in range(5):
                        await trio.lowlevel.checkpoint()
                    assert (machine.records.appended, machine.console.total_bytes) == frozen, "paused is paused"
                    await machine.resume()
                except MachineStateError:
                    break  # its last vCPU ended on the way to the pause
                pauses += 1
                await trio.lowlevel.checkpoint()
    assert machine.state == "stopped"
    # The guest checked every byte itself, and would have said so.
    assert (stops[0].reason, stops[0].status) == (StopReason.GUEST_EXIT, 0)
    assert pauses > 0


async def test_a_paused_guest_can_be_stopped(open_machine: OpenMachine) -> None:
    machine = open_machine("pingpong", 16, 10000, vcpus=4)
    with trio.fail_after(RUN_SECONDS):
        async with trio.open_nursery() as nursery:

            async def pause_and_stop() -> None:
                await until_converted(machine, 20)
                await machine.pause()
                with pytest.raises(MachineStateError, match="needs a machine that is running, this one is paused"):
                    await machine.pause()
                machine.stop()

            nursery.start_soon(pause_and_stop)
            stop = await machine.run()
    assert stop.reason is StopReason.OPERATOR


async def test_stopping_at_random_moments_leaves_nothing(open_machine: OpenMachine) -> None:
    for moment in range(1, 60, 6):
        machine = open_machine("contend", 4, 10000, vcpus=4)
        with trio.fail_after(RUN_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(machine.run)
                await until_converted(machine, moment)
                machine.stop()
        machine.close()


async def test_a_machine_runs_once(open_machine: OpenMachine) -> None:
    machine = open_machine("hello")
    assert (await machine.run()).status == 0
    with pytest.raises(MachineStateError, match="cannot run"):
        await machine.run()
    with pytest.raises(MachineStateError, match="cannot resume"):
        await machine.resume()


async def test_64_vcpus_start(open_machine: OpenMachine) -> None:
    with trio.fail_after(RUN_SECONDS):
        stop = await open_machine("hello", vcpus=64).run()
    assert stop.status == 0


def spec(**changes: object) -> MachineSpec:
    """Return the spec of a small machine, changed."""
    fields: dict[str, object] = {"image": Path(GUESTS["hello"].path), **changes}
    return MachineSpec(**fields)  # type: ignore[arg-type]  # the spec checks them


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"vcpus": 4096}, ConfigError, "this host's KVM allows at most"),
        ({"memory": 30 * TIB}, HostError, "ask for less"),
    ],
)
def test_what_kvm_does_not_have_is_said(changes: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Machine.open(spec(accelerator="kvm", **changes))


def test_memory_that_the_processor_has_no_addresses_for_is_refused(kvm: Kvm) -> None:
    # With 47 bits and more it is the spec that refuses it, for any host.
    with pytest.raises(ConfigError, match="memory"):
        Machine.open(spec(accelerator="kvm", memory=1 << kvm.physical_address_bits()))


@pytest.mark.software
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"memory": 64 * TIB}, HostError, "ask for less"),
        ({"vcpus": 257}, ConfigError, "vcpus: the software CPU allows at most 256, not 257"),
        (
            {"protection": "guest-memfd"},
            HostError,
            "protection guest-memfd needs KVM, and this is the software CPU: use",
        ),
        ({"tripwire": "hole"}, HostError, "tripwire hole needs KVM, and this is the software CPU, which needs none"),
    ],
)
def test_what_the_software_cpu_does_not_have_is_said(
    changes: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        Machine.open(spec(accelerator="software", **changes))
    assert "\n" not in str(raised.value)


def test_without_the_emulator_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software_hardware, "missing_emulator", lambda: "install kvmd[software]")
    with pytest.raises(HostError, match=r"^accelerator software: install kvmd\[software\]$"):
        Machine.open(spec(accelerator="software"))
    monkeypatch.setattr(accelerator, "kvm_problem", lambda: "/dev/kvm does not exist")
    with pytest.raises(HostError, match=r"^/dev/kvm does not exist; and for the software CPU, install kvmd"):
        Machine.open(spec(accelerator="auto"))


def test_kvmd_starts_without_the_emulator_and_names_the_extra() -> None:
    program = "import sys; sys.modules['unicorn'] = None; from kvmd.cli.main import main; main()"
    command = [sys.executable, "-c", program, "run", "builtin:hello", "--accelerator", "software"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - ours
    assert done.returncode == ExitStatus.HOST
    assert done.stderr.startswith("kvmd: error: accelerator software: the package unicorn is not installed")
    assert "install kvmd[software]" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.software
def test_auto_takes_the_software_cpu_where_kvm_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "kvm_problem", lambda: "/dev/kvm does not exist")
    with Machine.open(spec()) as machine:
        assert machine.facts["accelerator"] == "software"
        with structlog.testing.capture_logs() as logs:
            stop = trio.run(machine.run)
    assert stop.status == 0
    assert [log["because"] for log in logs if log["event"] == "no-kvm"] == ["/dev/kvm does not exist"]


@pytest.mark.kvm
def test_auto_takes_kvm_where_it_works() -> None:
    with Machine.open(spec()) as machine:
        assert machine.facts["accelerator"] == "kvm"


@pytest.mark.parametrize("on", [ON_KVM, ON_SOFTWARE])
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"memory": 1 * MIB}, ImageError, "at least"),
        ({"image": Path("/nowhere/guest.elf")}, ImageError, "/nowhere/guest.elf: No such file"),
        ({"image": Path("/dev/null")}, ImageError, "/dev/null is not a regular file"),
        ({"image": Path("/etc")}, ImageError, "/etc"),
        ({"image": Path(__file__)}, ImageError, "ELF"),
    ],
)
def test_what_cannot_be_started_says_why_in_one_line(
    changes: dict[str, object], error: type[Exception], words: str, on: str
) -> None:
    with pytest.raises(error, match=words) as raised:
        Machine.open(spec(**changes, accelerator=on))
    assert "\n" not in str(raised.value)
