"""What a process does before it knows which machine it will be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from kvmd.errors import HostError
from kvmd.machine_process.hosted import HostedMachine
from kvmd.machine_process.warming import REHEARSED, rehearse
from kvmd.spec.machine import MachineSpec
from tests.fleet.fake_machine import FakeMachine


class ClosedMachine(FakeMachine):
    """A machine that tells whether it was given up."""

    closed = False

    def close(self) -> None:
        super().close()
        self.closed = True


def test_a_rehearsal_makes_a_machine_and_gives_it_up() -> None:
    made: list[ClosedMachine] = []

    def open_machine(spec: MachineSpec, *, files: Sequence[int] = ()) -> HostedMachine:
        assert (spec, tuple(files)) == (REHEARSED, ())
        made.append(ClosedMachine(spec))
        return made[-1]

    rehearse(open_machine)
    assert [machine.closed for machine in made] == [True]


def test_a_host_without_machines_is_told_of_when_one_is_wanted() -> None:
    def open_machine(spec: MachineSpec, *, files: Sequence[int] = ()) -> HostedMachine:  # noqa: ARG001 - the protocol's
        raise HostError("there is no /dev/kvm")

    rehearse(open_machine)


_NOTHING_NEW = """
import sys
from kvmd.machine import Machine
from kvmd.machine_process import process
from kvmd.machine_process.warming import REHEARSED, rehearse, warm

warm()
rehearse(Machine.open)
before = set(sys.modules)
process._name_process("next")
Machine.open(REHEARSED).close()
print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.kvm
def test_the_machine_after_it_imports_nothing() -> None:
    command = [sys.executable, "-c", _NOTHING_NEW]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - ours
    assert done.stdout.split() == []
