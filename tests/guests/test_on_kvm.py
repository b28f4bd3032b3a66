"""The guests run on this machine's KVM, under bench/floor.c: another implementation of the ABI than kvmd's own."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvmd.guests import GUESTS
from tests.gate import Facility, require, require_whole

BENCH = Path(__file__).parents[2] / "bench"

pytestmark = [pytest.mark.kvm, pytest.mark.compiler]


@dataclass(frozen=True, slots=True)
class Result:
    status: int
    stopped: str | None
    conversions: int
    explicit: int
    console: str


@dataclass(frozen=True, slots=True)
class Floor:
    program: Path

    def run(self, guest: str, *arguments: int, vcpus: int = 2, tripwire: str = "guest_memfd") -> Result:
        options = [f"--vcpus={vcpus}", f"--tripwire={tripwire}", "--timeout=30", "--kick=always"]
        options += [f"--arg={argument}" for argument in arguments]
        command = [str(self.program), *options, str(GUESTS[guest].path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - ours
        if not done.stdout:
            require(Facility.KVM, f"this host's KVM lacks what the floor needs: {done.stderr.strip()}")
        report = json.loads(done.stdout)
        return Result(report["status"], report["stopped"], report["conversions"], report["explicit"], done.stderr)


@pytest.fixture(scope="module")
def floor(tmp_path_factory: pytest.TempPathFactory) -> Floor:
    require_whole(Facility.KVM)
    require_whole(Facility.COMPILER)
    compiler = shutil.which("gcc")
    require(Facility.COMPILER, None if compiler else "gcc is not installed")
    assert compiler is not None
    program = tmp_path_factory.mktemp("floor") / "floor"
    sources = [str(path) for path in sorted(BENCH.glob("floor*.c"))]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([compiler, *flags, "-o", str(program), *sources], check=True)  # noqa: S603 - fixed command
    return Floor(program)


TRIPWIRES = pytest.mark.parametrize("tripwire", ["guest_memfd", "hole"])


def test_hello_prints_one_line(floor: Floor) -> None:
    result = floor.run("hello")

    assert (result.status, result.stopped) == (0, None)
    assert result.console == "hello from a machine of 2 vCPUs and 64 MiB\n"


@TRIPWIRES
def test_pingpong_makes_two_conversions_a_page_and_round(floor: Floor, tripwire: str) -> None:
    result = floor.run("pingpong", 5, 3, tripwire=tripwire)

    assert (result.status, result.conversions) == (0, 2 * 5 * 3 * 2), result
    assert result.console == "pingpong: 2 vCPUs walked 5 pages each, 3 rounds\n"


def test_pingpong_refuses_too_many_pages(floor: Floor) -> None:
    result = floor.run("pingpong", 1 << 20)

    assert result.status == 2
    assert "do not fit" in result.console


@TRIPWIRES
def test_contend_sees_nothing_of_the_other_side(floor: Floor, tripwire: str) -> None:
    result = floor.run("contend", vcpus=3, tripwire=tripwire)

    assert result.status == 0, result


@TRIPWIRES
def test_explicit_gets_the_answers_that_it_should(floor: Floor, tripwire: str) -> None:
    result = floor.run("explicit", tripwire=tripwire)

    assert (result.status, result.conversions) == (0, 0), result
    assert result.explicit > 200


@pytest.mark.parametrize("which", [4, 9, 12, 15, 16])
@TRIPWIRES
def test_a_well_behaved_oddity_ends_with_0(floor: Floor, which: int, tripwire: str) -> None:
    result = floor.run("hostile", which, tripwire=tripwire)

    assert (result.status, result.stopped) == (0, None), result


def test_a_fetch_converts_too(floor: Floor) -> None:
    result = floor.run("hostile", 12, 1)

    assert (result.status, result.conversions) == (0, 2), result


@pytest.mark.parametrize(
    ("which", "reason"),
    [
        (1, "triple fault"),
        (2, "emulation failure"),
        (3, "triple fault"),
        (8, "access to the shared view of pinned memory"),
        (10, "triple fault"),
    ],
)
def test_a_misbehaviour_stops_the_machine(floor: Floor, which: int, reason: str) -> None:
    assert floor.run("hostile", which).stopped == reason


def test_an_unknown_misbehaviour_is_named(floor: Floor) -> None:
    result = floor.run("hostile", 99)

    assert result.status == 2
    assert "give 1 to 16" in result.console
