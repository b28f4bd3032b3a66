"""On which machines the conversion service looks for a place."""

from __future__ import annotations

import pytest

from kvmd.guests import GUESTS
from kvmd.machine import Machine
from kvmd.service_place import ServicePlace
from kvmd.spec.machine import MachineSpec


def moves(spec: MachineSpec, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return whether each machine's service was told that it may move."""
    told: list[bool] = []

    def place(*, moves: bool) -> ServicePlace:
        told.append(moves)
        return ServicePlace(moves=moves)

    monkeypatch.setattr("kvmd.machine.ServicePlace", place)
    with Machine.open(spec):
        return told


@pytest.mark.kvm
@pytest.mark.parametrize(("protection", "looks"), [("emulated", True), ("none", False)])
def test_it_does_where_memslots_are_deleted(protection: str, looks: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001 - a parameter of a test
    spec = MachineSpec(image=GUESTS["hello"].path, protection=protection, tripwire="guest_memfd")
    assert moves(spec, monkeypatch) == [looks]


@pytest.mark.software
def test_it_does_not_on_the_software_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert moves(MachineSpec(image=GUESTS["hello"].path, accelerator="software"), monkeypatch) == [False]
