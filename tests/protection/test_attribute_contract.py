"""What attributes do to a guest, on the fake VM and on the real one: so that the fake is an honest one."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from typing import Protocol

import pytest

from kvmd.errors import BackendError
from kvmd.kvm.system import Kvm
from kvmd.kvm.vm import Vm
from kvmd.protection.attributes import ATTRIBUTE_PRIVATE
from kvmd.ranges import GPA_LIMIT, GpaRange
from tests.protection.fakes import FakeMemfd, FakeVm
from tests.protection.on_kvm import GPA, PAGE, Memfd, OnKvm, on_kvm


class Subject(Protocol):
    """Either VM; ``found`` tells what a guest's load of a byte meets: memory, a tripwire, or a hole."""

    def slot(self, number: int, first: int, pages: int, memfd: Memfd | None = None) -> None: ...

    def delete(self, number: int) -> None: ...

    def memfd(self, pages: int) -> Memfd: ...

    def mark(self, range_: GpaRange, attributes: int) -> None: ...

    def found(self, page: int) -> str: ...


class OnAny:
    """What both VMs do alike."""

    def __init__(self, vm: Vm | FakeVm) -> None:
        self._vm = vm

    def delete(self, number: int) -> None:
        self._vm.delete_memory_region(number)

    def memfd(self, pages: int) -> Memfd:
        return self._vm.create_guest_memfd(pages * PAGE)

    def mark(self, range_: GpaRange, attributes: int) -> None:
        self._vm.set_memory_attributes(range_, attributes)


class OnFake(OnAny):
    def __init__(self) -> None:
        self._fake = FakeVm(64, software_protected=True)
        super().__init__(self._fake)

    def slot(self, number: int, first: int, pages: int, memfd: Memfd | None = None) -> None:
        assert memfd is None or isinstance(memfd, FakeMemfd)
        self._fake.set_memory_region(number, GPA + first * PAGE, pages * PAGE, 0x7000_0000_0000, 0, memfd)

    def found(self, page: int) -> str:
        found = self._fake.access(GPA + page * PAGE)
        return "memory" if found in {"live", "private"} else found


class OnRealKvm(OnAny):
    def __init__(self, vm: Vm, guest: OnKvm) -> None:
        super().__init__(vm)
        self._guest = guest

    def slot(self, number: int, first: int, pages: int, memfd: Memfd | None = None) -> None:
        self._guest.set(number, GPA + first * PAGE, pages * PAGE, self._guest.address + first * PAGE, memfd=memfd)

    def found(self, page: int) -> str:
        found = self._guest.access(GPA + page * PAGE)
        return "memory" if found == "live" else found


@pytest.fixture(params=["fake", pytest.param("kvm", marks=[pytest.mark.kvm, pytest.mark.private_memory])])
def on(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "fake":
        yield OnFake()
        return
    kvm: Kvm = request.getfixturevalue("kvm")
    vm: Vm = request.getfixturevalue("protected_vm")
    with on_kvm(kvm, vm) as guest:
        yield OnRealKvm(vm, guest)


def pages(first: int, end: int) -> GpaRange:
    return GpaRange(GPA + first * PAGE, GPA + end * PAGE)


def refused(number: int) -> AbstractContextManager[pytest.ExceptionInfo[BackendError]]:
    return pytest.raises(BackendError, check=lambda error: error.errno == number)


def test_a_private_page_of_a_slot_without_guest_memfd_is_a_tripwire(on: Subject) -> None:
    on.slot(0, 0, 4)
    on.mark(pages(1, 3), ATTRIBUTE_PRIVATE)
    assert [on.found(page) for page in range(4)] == ["memory", "tripwire", "tripwire", "memory"]
    on.mark(pages(2, 4), 0)
    assert [on.found(page) for page in range(4)] == ["memory", "tripwire", "memory", "memory"]


def test_a_guest_memfd_serves_private_pages_and_host_memory_the_others(on: Subject) -> None:
    with closing(on.memfd(4)) as memfd:
        on.slot(0, 0, 4, memfd)
        on.mark(pages(0, 2), ATTRIBUTE_PRIVATE)
        assert {on.found(page) for page in range(4)} == {"memory"}
    # Without its last descriptor there is no private memory left; shared pages never needed it.
    assert [on.found(page) for page in range(4)] == ["tripwire", "tripwire", "memory", "memory"]


def test_a_private_page_without_slot_is_a_tripwire_not_a_hole(on: Subject) -> None:
    on.mark(pages(0, 1), ATTRIBUTE_PRIVATE)
    assert [on.found(0), on.found(1)] == ["tripwire", "hole"]


def test_a_hole_that_was_found_stays_one_until_a_memslot_changes(on: Subject) -> None:
    """KVM remembers it (an MMIO SPTE), and only looks through memslots for what an attribute takes away."""
    assert on.found(0) == "hole"
    on.mark(pages(0, 1), ATTRIBUTE_PRIVATE)
    assert on.found(0) == "hole"
    on.slot(0, 2, 1)
    assert on.found(0) == "tripwire"


def test_attributes_outlive_slots(on: Subject) -> None:
    on.slot(0, 0, 1)
    on.mark(pages(0, 1), ATTRIBUTE_PRIVATE)
    on.delete(0)
    assert on.found(0) == "tripwire"
    on.slot(0, 0, 1)
    assert on.found(0) == "tripwire"
    on.mark(pages(0, 1), 0)
    assert on.found(0) == "memory"


def test_what_is_set_already_can_be_set_again(on: Subject) -> None:
    on.slot(0, 0, 2)
    private = ATTRIBUTE_PRIVATE
    for attributes, found in ((0, "memory"), (private, "tripwire"), (private, "tripwire"), (0, "memory")):
        on.mark(pages(0, 2), attributes)
        assert on.found(1) == found


@pytest.mark.parametrize("attributes", [1, 4, 16, ATTRIBUTE_PRIVATE | 1, 1 << 63])
def test_an_unknown_attribute_is_refused_and_changes_nothing(on: Subject, attributes: int) -> None:
    on.slot(0, 0, 1)
    with refused(errno.EINVAL):
        on.mark(pages(0, 1), attributes)
    assert on.found(0) == "memory"


def test_no_slot_is_asked_for(on: Subject) -> None:
    on.mark(GpaRange(GPA_LIMIT - PAGE, GPA_LIMIT), ATTRIBUTE_PRIVATE)
    on.mark(GpaRange(GPA_LIMIT - PAGE, GPA_LIMIT), 0)


def test_a_hole_is_punched_in_whole_pages(on: Subject) -> None:
    with closing(on.memfd(2)) as memfd:
        on.slot(0, 0, 2, memfd)
        on.mark(pages(0, 2), ATTRIBUTE_PRIVATE)
        memfd.punch_hole(0, PAGE)
        for offset, size in ((0, 0), (0x800, PAGE), (0, 0x800)):
            with refused(errno.EINVAL):
                memfd.punch_hole(offset, size)
        assert on.found(0) == "memory"


def test_a_vm_without_private_memory_has_no_attributes() -> None:
    with refused(errno.EINVAL):
        FakeVm().set_memory_attributes(pages(0, 1), ATTRIBUTE_PRIVATE)
