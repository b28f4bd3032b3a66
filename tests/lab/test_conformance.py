"""What the kernel's private_mem_conversions_test covers: vCPUs times memslots, guest and host both checking."""

from __future__ import annotations

import pytest

from kvmd.protection import attribute_views, guest_memfd
from kvmd.stop import StopReason
from kvmd.units import MIB, TIB
from tests.lab.host_side import ASK_ALTERNATE, ASK_PRIVATE, ASK_PUNCH, ASK_SHARED, HostSide
from tests.machine.conftest import OpenMachine, finish

pytestmark = [pytest.mark.kvm, pytest.mark.private_memory]

WAYS = [{"protection": "guest-memfd"}, {"protection": "emulated", "tripwire": "attribute"}]


@pytest.mark.parametrize("way", WAYS, ids=["guest-memfd", "attribute"])
@pytest.mark.parametrize(("vcpus", "slot_bytes"), [(1, TIB), (2, TIB), (2, 2 * MIB), (4, 3 * MIB)])
async def test_the_guest_and_the_host_find_what_they_should(
    open_machine: OpenMachine, monkeypatch: pytest.MonkeyPatch, way: dict[str, str], vcpus: int, slot_bytes: int
) -> None:
    for module in (guest_memfd, attribute_views):
        monkeypatch.setattr(module, "SLOT_BYTES", slot_bytes)
    machine = open_machine("conformance", 1, vcpus=vcpus, memory=32 * MIB, **way)
    assert machine.facts["memslots"] == slots(way["protection"], slot_bytes)
    host = HostSide(machine)
    ran = await finish(machine)
    assert (ran.stop.reason, ran.stop.status) == (StopReason.GUEST_EXIT, 0), (ran.stop, ran.output)
    assert ran.output == f"conformance: {vcpus} vCPUs: every byte as it should be\n"
    ranges = 5 * vcpus
    assert host.answered == {
        ASK_SHARED: ranges + vcpus,
        ASK_PRIVATE: ranges,
        ASK_ALTERNATE: ranges,
        ASK_PUNCH: 4 * ranges,
    }


def slots(protection: str, slot_bytes: int) -> int:
    """Return how many memslots 32 MiB of memory fall into."""
    each = -(-32 * MIB // slot_bytes)
    # Pinned memory ends at 2 MiB and has a slot of its own, or there are two views.
    return 1 + -(-32 * MIB // slot_bytes) - 2 * MIB // slot_bytes if protection == "guest-memfd" else 2 * each
