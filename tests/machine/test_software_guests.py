"""Every payload guest on the software CPU, where there need be no KVM to compare with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from kvmd.conversion.messages import Cause, Outcome
from kvmd.guests import GUESTS
from kvmd.ranges import GpaRange, PageState
from kvmd.spec.conversion import ConversionSpec
from kvmd.stop import ExitStatus, StopReason
from kvmd.units import MIB, PAGE_SIZE
from tests.machine.conftest import OpenMachine, Ran, finish

Run = Callable[..., Awaitable[Ran]]

pytestmark = pytest.mark.software

PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED


@pytest.mark.parametrize("name", [name for name in GUESTS if name not in {"hostile", "echo"}])
@pytest.mark.parametrize("vcpus", [1, 4])
async def test_a_well_behaved_guest_passes(run: Run, name: str, vcpus: int) -> None:
    ran = await run(name, vcpus=vcpus, accelerator="software")
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), ran.output


async def test_a_guest_reads_what_is_typed(open_machine: OpenMachine) -> None:
    machine = open_machine("echo", vcpus=2, accelerator="software")
    machine.typed.offer(b"aspspf")
    ran = await finish(machine)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 3)
    assert ran.output == "echo: type\naspspf"
    assert ran.converted(cause=Cause.IMPLICIT, to=SHARED) == 2


@pytest.mark.parametrize("vcpus", [1, 4, 16])
async def test_pingpong_converts_each_page_twice_a_round(run: Run, vcpus: int) -> None:
    pages, rounds = 8, 4
    ran = await run("pingpong", pages, rounds, vcpus=vcpus, accelerator="software")
    assert ran.stop.status == 0, ran.output
    expected = vcpus * pages * rounds
    assert ran.converted(cause=Cause.IMPLICIT, to=SHARED) == expected
    assert ran.converted(cause=Cause.IMPLICIT, to=PRIVATE) == expected
    hit = Counter(record.gpa // PAGE_SIZE for record in ran.records if record.outcome is Outcome.CONVERTED)
    first_free = ran.machine.pinned.end
    assert hit == {first_free // PAGE_SIZE + page: 2 * rounds for page in range(vcpus * pages)}
    assert {record.size_bytes for record in ran.records} == {PAGE_SIZE}
    assert ran.machine.memory_map() == [(GpaRange(0, 64 * MIB), PRIVATE)]


async def test_64_vcpus(run: Run) -> None:
    assert (await run("hello", vcpus=64, accelerator="software")).stop.status == 0


async def test_memory_may_start_shared(run: Run) -> None:
    ran = await run("pingpong", 3, 2, initial="shared", accelerator="software")
    assert ran.stop.status == 0, ran.output
    assert (ran.converted(cause=Cause.IMPLICIT, to=SHARED), ran.converted(cause=Cause.IMPLICIT, to=PRIVATE)) == (3, 6)


@pytest.mark.parametrize("guest", ["hello", "pingpong"])
async def test_without_protection(run: Run, guest: str) -> None:
    ran = await run(guest, protection="none", accelerator="software")
    assert ran.stop.reason is StopReason.GUEST_EXIT
    assert ran.stop.status == (0 if guest == "hello" else 1)


@pytest.mark.parametrize("instruction", [1, 2])
async def test_hypercalls_of_the_kernel_level(run: Run, instruction: int) -> None:
    ran = await run("explicit", instruction, cpl=0, accelerator="software")
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), ran.output
    assert {record.cause for record in ran.records} == {Cause.EXPLICIT}


@pytest.mark.parametrize(
    ("case", "cpl", "reason", "words"),
    [
        (1, 3, StopReason.TRIPLE_FAULT, "triple fault"),
        (2, 3, StopReason.FETCH_OUTSIDE_MEMORY, "gpa 0x4000000"),
        (3, 3, StopReason.TRIPLE_FAULT, "triple fault"),
        (6, 3, StopReason.NO_PROGRESS, "at the same time"),
        (7, 3, StopReason.RESERVED_STATUS, "121"),
        (8, 3, StopReason.PINNED_MEMORY, "gpa 0x10"),
        (10, 3, StopReason.TRIPLE_FAULT, "triple fault"),
        (10, 0, StopReason.HALTED, "halted for good"),
    ],
)
async def test_a_hostile_guest_is_stopped_with_a_named_reason(
    run: Run, case: int, cpl: int, reason: StopReason, words: str
) -> None:
    ran = await run("hostile", case, cpl=cpl, accelerator="software")
    assert ran.stop.reason is reason
    assert ran.stop.status == ExitStatus.GUEST_FAULT
    assert words in ran.stop.message
    assert ran.stop.vcpu == 0
    assert ran.stop.registers is not None
    assert ran.stop.registers.rip


@pytest.mark.parametrize(
    ("case", "argument", "vcpus"), [(4, 0, 1), (9, 0, 1), (11, 2000, 1), (12, 0, 1), (12, 1, 2), (15, 0, 1), (16, 0, 4)]
)
async def test_an_odd_guest_is_borne(run: Run, case: int, argument: int, vcpus: int) -> None:
    ran = await run("hostile", case, argument, vcpus=vcpus, accelerator="software")
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), (ran.stop, ran.output)
    if case == 4:
        assert ran.machine.mmio.unclaimed > 0
        assert all(gpa >= 64 * MIB for gpa in ran.machine.mmio.unclaimed_addresses)


async def test_a_policy_against_implicit_conversions_stops_the_guest(open_machine: OpenMachine) -> None:
    ran = await finish(open_machine("pingpong", conversion=ConversionSpec(implicit="deny"), accelerator="software"))
    assert ran.stop.reason is StopReason.IMPLICIT_DENIED
    assert ran.machine.memory_map() == [(GpaRange(0, 64 * MIB), PRIVATE)]


async def test_memory_is_given_back_when_it_converts(open_machine: OpenMachine) -> None:
    machine = open_machine("hostile", 14, memory=16 * MIB, accelerator="software")
    ran = await finish(machine)
    assert ran.stop.status == 0, ran.stop
    shared = [range_ for range_, state in machine.memory_map() if state is SHARED]
    assert len(shared) > 1000
    assert all(machine.memory.read(range_.start, PAGE_SIZE) == bytes(PAGE_SIZE) for range_ in shared[:50])


def test_a_large_machine_costs_nothing_until_it_is_touched(open_machine: OpenMachine) -> None:
    machine = open_machine("pingpong", memory=1 << 40, accelerator="software")
    assert trio.run(machine.run).status == 0


# --- with /dev/kvm hidden


HIDE = 'mount --bind "$1" /dev/kvm && shift && exec "$@"'


def hidden(*command: str, what: str = "/dev/null") -> subprocess.CompletedProcess[str]:
    """Run kvmd in a mount namespace of its own, in which /dev/kvm is something else."""
    unshare = shutil.which("unshare")
    if unshare is None or not Path("/dev/kvm").exists():
        pytest.skip("no /dev/kvm to hide, or no unshare to hide it with")
    prefix = [unshare, "--map-root-user", "--mount", "sh", "-c", HIDE, "sh", what]
    probe = subprocess.run([*prefix, "true"], check=False, capture_output=True, text=True)  # noqa: S603 - ours
    if probe.returncode:
        pytest.skip(f"this host allows no mount namespaces: {probe.stderr.strip()}")
    return subprocess.run(  # noqa: S603 - ours
        [*prefix, sys.executable, "-m", "kvmd", *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def test_the_demo_works_without_kvm_and_says_why_not() -> None:
    done = hidden("demo", "--vcpus", "2")
    assert done.returncode == 0, done.stderr
    assert "4 of 4 guests passed." in done.stdout
    assert "no-kvm" in done.stdout
    assert "/dev/kvm is not a KVM device" in done.stdout


def test_check_says_what_is_lost_without_kvm() -> None:
    done = hidden("check")
    assert done.returncode == 0
    assert "What is lost without KVM:" in done.stdout


def test_without_kvm_asking_for_it_is_an_error_of_one_line() -> None:
    done = hidden("run", "builtin:hello", "--accelerator", "kvm")
    assert done.returncode == ExitStatus.HOST
    assert done.stdout == ""
    assert done.stderr.startswith("kvmd: error: /dev/kvm is not a KVM device")
    assert done.stderr.count("\n") == 1


def test_a_file_in_its_place_is_as_good_as_none(tmp_path: Path) -> None:
    """A plain file in its place, since root may open any device."""
    file = tmp_path / "kvm"
    file.write_text("")
    done = hidden("run", "builtin:hello", what=str(file))
    assert done.returncode == 0
    assert "hello from a machine" in done.stdout
