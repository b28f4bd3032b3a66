"""How a machine that converts by attributes starts, and what it leaves behind."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from kvmd.errors import BackendError, HostError
from kvmd.memory.backing import Backing
from kvmd.memory.page_state import PageStateMap
from kvmd.protection.attributes import CHUNK_BYTES, parts, told
from kvmd.protection.guest_memfd import GuestMemfdProtection
from kvmd.ranges import GpaRange, PageState
from kvmd.units import MIB, PAGE_SIZE
from tests.protection.attribute_rig import C_BIT, MEMORY, PRIVATE, SHARED, Rig, pages
from tests.protection.fakes import FakeVm


@pytest.mark.parametrize("initial", PageState)
def test_memory_starts_as_it_is_told(make: Callable[..., Rig], initial: PageState) -> None:
    rig = make(initial=initial)
    rig.check()
    flagged = [slot for slot in rig.vm.slots.values() if slot.flags & ~4]
    assert not flagged, "neither dirty logging nor read-only memory"


@pytest.mark.parametrize("nth", range(1, 12))
def test_a_machine_that_kvm_refuses_is_a_host_error_and_leaves_nothing(
    make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    kind = make().kind
    vms: list[FakeVm] = []

    class Refusing(FakeVm):
        def __init__(self, slot_count: int = 512, gpa_bits: int = 48, *, software_protected: bool = False) -> None:
            super().__init__(slot_count, gpa_bits, software_protected=software_protected)
            self.fail_next(nth, errno.ENOMEM)
            vms.append(self)

    monkeypatch.setattr("tests.protection.attribute_rig.FakeVm", Refusing)
    calls = 7 if kind == "attribute" else 6
    if nth > calls:
        # The set-up is over; what KVM does not take back at the end goes with the VM.
        Rig(kind).close()
        return
    with pytest.raises(HostError, match=r"\(ENOMEM\): ask for less memory"):
        Rig(kind)
    assert all(not vm.slots for vm in vms)
    assert all(memfd.closed for vm in vms for memfd in vm.memfds)


def test_all_memory_pinned(make: Callable[..., Rig]) -> None:
    rig = make(pinned=MEMORY)
    rig.check()
    assert not rig.vm.memfds


def test_the_facts_say_what_the_machine_has(make: Callable[..., Rig]) -> None:
    rig = make()
    assert rig.protection.facts() == (
        {"protection": "emulated", "tripwire": "attribute", "c_bit": C_BIT, "memslots": 6}
        if rig.kind == "attribute"
        else {"protection": "guest-memfd", "vm_type": "KVM_X86_SW_PROTECTED_VM", "memslots": 4}
    )


def test_parts_are_cut_at_multiples() -> None:
    assert list(parts(pages(3, 20), 8 * PAGE_SIZE)) == [pages(3, 8), pages(8, 16), pages(16, 20)]
    assert list(parts(GpaRange(0, CHUNK_BYTES), CHUNK_BYTES)) == [GpaRange(0, CHUNK_BYTES)]


def test_a_large_machine_starts_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    vm = FakeVm(software_protected=True)
    sizes: list[int] = []
    set_ = vm.set_memory_attributes

    def spy(gpa_range: GpaRange, attributes: int) -> None:
        sizes.append(gpa_range.size_bytes)
        set_(gpa_range, attributes)

    monkeypatch.setattr(vm, "set_memory_attributes", spy)
    with Backing("shared", 1024 * MIB) as shared:
        state = PageStateMap(shared.size_bytes, PRIVATE)
        state.set(GpaRange(0, 2 * MIB), SHARED, 0, explicit=False)
        protection = GuestMemfdProtection(vm, shared, pinned=GpaRange(0, 2 * MIB), state=state, lock=threading.Lock())
        assert len(vm.slots) == 2
        assert max(sizes) == CHUNK_BYTES
        assert sum(sizes) == 1022 * MIB
        protection.close()
        protection.close()


def test_an_error_without_a_number_is_told_as_it_is() -> None:
    assert told(BackendError("no")) == "no"
    assert told(BackendError("no", errno.EIO)) == "no (EIO)"
