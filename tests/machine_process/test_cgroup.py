from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmd.machine_process.cgroup import cgroup_of, lacking_limits, unit_name, unit_number
from kvmd.spec.limits import LimitsSpec

MIB = 1 << 20


@pytest.mark.parametrize("number", [1, 42, 999_999_999])
def test_a_unit_is_named_by_its_number(number: int) -> None:
    assert unit_number(unit_name(number)) == number


@pytest.mark.parametrize(
    "name", ["", "kvmd.service", "kvmd-machine@0.service", "kvmd-machine@01.service", "kvmd-machine@x.service", "a\n"]
)
def test_other_names_are_no_machine_s(name: str) -> None:
    assert unit_number(name) is None


def test_this_process_is_in_a_cgroup() -> None:
    assert cgroup_of() == cgroup_of(os.getpid())
    with pytest.raises(OSError, match=r"cgroup"):
        cgroup_of(1 << 30)


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    """The files of a cgroup as systemd sets them up without limits."""
    for name, text in (("memory.max", "max"), ("cpu.max", "max 100000"), ("pids.max", "4352")):
        (tmp_path / name).write_text(f"{text}\n")
    return tmp_path


def test_no_limits_are_in_force_where_there_are_none(cgroup: Path) -> None:
    assert lacking_limits(LimitsSpec(), cgroup) == []
    assert lacking_limits(LimitsSpec(), cgroup, exactly=True) == []


def test_limits_are_in_force_once_the_files_say_so(cgroup: Path) -> None:
    limits = LimitsSpec(memory=96 * MIB, cpus=1.5, tasks=32)
    assert lacking_limits(limits, cgroup) == [
        "limits.memory (memory.max is none, not 100663296)",
        "limits.cpus (cpu.max is none, not 1.5)",
        "limits.tasks (pids.max is 4352, not 32)",
    ]
    (cgroup / "memory.max").write_text("100663296\n")
    (cgroup / "cpu.max").write_text("150000 100000\n")
    (cgroup / "pids.max").write_text("32\n")
    assert lacking_limits(limits, cgroup, exactly=True) == []


def test_a_lower_limit_is_one_too_but_not_the_one_that_was_asked_for(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("67108864\n")
    assert lacking_limits(LimitsSpec(memory=96 * MIB), cgroup) == []
    assert lacking_limits(LimitsSpec(memory=96 * MIB), cgroup, exactly=True) != []


def test_limits_of_the_machine_before_are_seen(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("67108864\n")
    assert lacking_limits(LimitsSpec(), cgroup, exactly=True) == ["limits.memory (memory.max is 67108864, not max)"]


def test_without_a_controller_nothing_is_in_force(tmp_path: Path) -> None:
    limits = LimitsSpec(memory=96 * MIB, cpus=1, tasks=32)
    assert [text.partition(" ")[0] for text in lacking_limits(limits, tmp_path)] == [
        "limits.memory",
        "limits.cpus",
        "limits.tasks",
    ]
    assert lacking_limits(LimitsSpec(), tmp_path) == []
