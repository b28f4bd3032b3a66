from __future__ import annotations

import pytest

from kvmd.hv.exits import FaultDefect
from kvmd.hv.vcpu import Registers
from kvmd.stop import RESERVED_STATUSES, ExitStatus, LinuxStatus, Stop, StopReason

IN_ORDER = {StopReason.GUEST_POWER_OFF: LinuxStatus.POWERED_OFF, StopReason.GUEST_REBOOT: LinuxStatus.REBOOT}
REASONS = [reason for reason in StopReason if reason is not StopReason.GUEST_EXIT]


def test_kvmd_s_statuses_are_those_that_guests_may_not_use() -> None:
    assert [int(status) for status in ExitStatus] == list(RESERVED_STATUSES)


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_a_reserved_status_and_a_name_for_the_log(reason: StopReason) -> None:
    assert reason.exit_status in RESERVED_STATUSES or reason.exit_status is IN_ORDER[reason]
    assert reason.value == reason.value.lower().strip()
    assert set(reason.value) <= set("abcdefghijklmnopqrstuvwxyz-")


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (StopReason.OPERATOR, 126),
        (StopReason.KILLED, 127),
        (StopReason.TRIPLE_FAULT, 122),
        (StopReason.NO_PROGRESS, 122),
        (StopReason.PINNED_MEMORY, 122),
        (StopReason.UNKNOWN_FAULT_FLAGS, 122),
        (StopReason.MEMSLOTS_EXHAUSTED, 123),
        (StopReason.STATE_EXHAUSTED, 123),
        (StopReason.MEMORY_POISONED, 124),
        (StopReason.FAULT_WITHOUT_INFORMATION, 124),
        (StopReason.HOST_OUT_OF_MEMORY, 124),
        (StopReason.BACKEND_FAILED, 124),
        (StopReason.VCPU_STUCK, 124),
        (StopReason.BUG, 125),
    ],
)
def test_the_status_says_whose_fault_it_is(reason: StopReason, status: int) -> None:
    assert reason.exit_status == status


def test_a_guest_s_own_exit_has_no_status_of_kvmd_s() -> None:
    with pytest.raises(ValueError, match="is the guest's own"):
        _ = StopReason.GUEST_EXIT.exit_status
    with pytest.raises(ValueError, match="is the guest's own"):
        Stop.because(StopReason.GUEST_EXIT, "ended")


@pytest.mark.parametrize("defect", FaultDefect)
def test_every_defect_of_a_fault_is_a_reason(defect: FaultDefect) -> None:
    assert StopReason(defect.value).exit_status in {ExitStatus.GUEST_FAULT, ExitStatus.HOST_FAULT}


def test_a_stop_takes_its_status_from_its_reason() -> None:
    registers = Registers(rip=0x1000)
    stop = Stop.because(StopReason.BUG, "oh", vcpu=3, registers=registers)
    assert stop == Stop(StopReason.BUG, "oh", 125, 3, registers)
    assert Stop.because(StopReason.KILLED, "twice").vcpu is None


def test_names_are_used_once() -> None:
    assert len({reason.value for reason in StopReason}) == len(StopReason.__members__)
