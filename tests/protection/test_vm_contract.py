"""What a VM does with memslots, on the fake and on the real one: so that the fake is an honest one."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from typing import Protocol

import pytest

from kvmd.errors import BackendError, SwapFailed
from kvmd.kvm.guest_memfd import GuestMemfd
from tests.protection.fakes import FakeMemfd, FakeVm
from tests.protection.on_kvm import GPA, PAGE, TRIPWIRE, Memfd, on_kvm


class Subject(Protocol):
    """Either VM, with the same few things for the tests: addresses, and a guest's access."""

    @property
    def slot_count(self) -> int: ...

    @property
    def address(self) -> int:
        """Host memory of ``PAGES`` pages for the guest."""

    def set(
        self,
        slot: int,
        gpa: int,
        size: int,
        address: int,
        *,
        flags: int = 0,
        memfd: Memfd | None = None,
        offset: int = 0,
    ) -> None: ...

    def delete(self, slot: int) -> None: ...

    def swap(self, dying: int, tripwire_gpa: int, memfd: Memfd, rising: int, live_gpa: int) -> None:
        """Swap the views of one page."""

    def memfd(self, size: int, flags: int = TRIPWIRE) -> Memfd: ...

    def access(self, gpa: int) -> str: ...


class OnFake:
    address = 0x7000_0000_0000

    def __init__(self) -> None:
        self.slot_count = 64
        self._vm = FakeVm(self.slot_count)

    def set(
        self,
        slot: int,
        gpa: int,
        size: int,
        address: int,
        *,
        flags: int = 0,
        memfd: Memfd | None = None,
        offset: int = 0,
    ) -> None:
        assert memfd is None or isinstance(memfd, FakeMemfd)
        self._vm.set_memory_region(slot, gpa, size, address, flags, memfd, offset)

    def delete(self, slot: int) -> None:
        self._vm.delete_memory_region(slot)

    def swap(self, dying: int, tripwire_gpa: int, memfd: Memfd, rising: int, live_gpa: int) -> None:
        assert isinstance(memfd, FakeMemfd)
        self._vm.swap_views(dying, tripwire_gpa, self.address, memfd, rising, live_gpa, self.address, PAGE)

    def memfd(self, size: int, flags: int = TRIPWIRE) -> Memfd:
        return self._vm.create_guest_memfd(size, flags)

    def access(self, gpa: int) -> str:
        return self._vm.access(gpa)


@pytest.fixture(params=["fake", pytest.param("kvm", marks=pytest.mark.kvm)])
def on(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "fake":
        yield OnFake()
        return
    kvm, vm = request.getfixturevalue("kvm"), request.getfixturevalue("vm")
    with on_kvm(kvm, vm) as subject:
        yield subject


def refused(*numbers: int) -> AbstractContextManager[pytest.ExceptionInfo[BackendError]]:
    return pytest.raises(BackendError, check=lambda error: error.errno in numbers)


def tripwire(on: Subject, slot: int, gpa: int, size: int) -> None:
    with closing(on.memfd(size)) as memfd:
        on.set(slot, gpa, size, on.address, memfd=memfd)


def is_closed(memfd: Memfd) -> bool:
    assert isinstance(memfd, FakeMemfd | GuestMemfd)
    return memfd.closed


def test_a_guest_finds_a_hole_where_there_is_no_slot(on: Subject) -> None:
    assert on.access(GPA) == "hole"


def test_a_guest_finds_memory_up_to_the_slot_s_end(on: Subject) -> None:
    on.set(0, GPA + PAGE, 2 * PAGE, on.address)
    found = [on.access(GPA + page * PAGE) for page in range(4)]
    assert found == ["hole", "live", "live", "hole"]


def test_a_deleted_slot_is_a_hole_and_its_number_is_free(on: Subject) -> None:
    on.set(0, GPA, PAGE, on.address)
    assert on.access(GPA) == "live"
    on.delete(0)
    assert on.access(GPA) == "hole"
    on.set(0, GPA + PAGE, PAGE, on.address)
    assert on.access(GPA + PAGE) == "live"


def test_a_size_of_zero_deletes_too(on: Subject) -> None:
    on.set(3, GPA, PAGE, on.address)
    on.set(3, 0, 0, 0)
    assert on.access(GPA) == "hole"
    with refused(errno.EINVAL):
        on.set(3, 0, 0, 0)


def test_a_slot_that_is_not_there_cannot_be_deleted(on: Subject) -> None:
    with refused(errno.EINVAL):
        on.delete(0)


@pytest.mark.parametrize(("gpa", "pages"), [(GPA + PAGE, 2), (GPA, 2), (GPA, 4), (GPA + 2 * PAGE, 2), (GPA + PAGE, 1)])
def test_an_overlap_is_refused_and_changes_nothing(on: Subject, gpa: int, pages: int) -> None:
    on.set(0, GPA + PAGE, 2 * PAGE, on.address)
    with refused(errno.EEXIST):
        on.set(1, gpa, pages * PAGE, on.address)
    assert [on.access(GPA + page * PAGE) for page in range(4)] == ["hole", "live", "live", "hole"]
    with refused(errno.EINVAL):
        on.delete(1)


def test_neighbours_do_not_overlap(on: Subject) -> None:
    on.set(1, GPA + PAGE, PAGE, on.address)
    on.set(0, GPA, PAGE, on.address)
    on.set(2, GPA + 2 * PAGE, PAGE, on.address)
    assert {on.access(GPA + page * PAGE) for page in range(3)} == {"live"}


def test_the_highest_number_is_below_the_count(on: Subject) -> None:
    on.set(on.slot_count - 2, GPA, PAGE, on.address)
    for number in (on.slot_count, 0xFFFF):
        with refused(errno.EINVAL):
            on.set(number, GPA + PAGE, PAGE, on.address)
        with refused(errno.EINVAL):
            on.delete(number)


@pytest.mark.parametrize(
    ("gpa", "size", "address"),
    [
        (GPA + 0x800, PAGE, 0),
        (GPA, 0x800, 0),
        (GPA, PAGE + 1, 0),
        (GPA, PAGE, 0x800),
        (2**64 - PAGE, 2 * PAGE, 0),
        (2**60, PAGE, 0),
        (GPA, 2**43, 0),
    ],
)
def test_a_slot_that_cannot_be_is_refused(on: Subject, gpa: int, size: int, address: int) -> None:
    with refused(errno.EINVAL):
        on.set(0, gpa, size, on.address + address)
    with refused(errno.EINVAL):
        on.delete(0)


@pytest.mark.parametrize("flags", [1 << 3, 1 << 31])
def test_an_unknown_flag_is_refused(on: Subject, flags: int) -> None:
    with refused(errno.EINVAL):
        on.set(0, GPA, PAGE, on.address, flags=flags)


def test_a_slot_moves_but_does_not_grow(on: Subject) -> None:
    on.set(0, GPA, 2 * PAGE, on.address)
    on.set(0, GPA, 2 * PAGE, on.address)
    on.set(0, GPA + PAGE, 2 * PAGE, on.address)
    assert [on.access(GPA + page * PAGE) for page in range(3)] == ["hole", "live", "live"]
    with refused(errno.EINVAL):
        on.set(0, GPA + PAGE, 3 * PAGE, on.address)
    with refused(errno.EINVAL):
        on.set(0, GPA + PAGE, 2 * PAGE, on.address + PAGE)


def test_a_slot_is_a_tripwire_once_its_guest_memfd_is_closed(on: Subject) -> None:
    memfd = on.memfd(3 * PAGE)
    on.set(0, GPA, 3 * PAGE, on.address, memfd=memfd)
    assert on.access(GPA) == "live"
    memfd.close()
    assert [on.access(GPA + page * PAGE) for page in range(4)] == ["tripwire", "tripwire", "tripwire", "hole"]


def test_a_tripwire_holds_until_its_slot_is_deleted(on: Subject) -> None:
    tripwire(on, 0, GPA, PAGE)
    assert [on.access(GPA) for _ in range(3)] == ["tripwire"] * 3
    on.delete(0)
    assert on.access(GPA) == "hole"
    on.set(0, GPA, PAGE, on.address)
    assert on.access(GPA) == "live"


def test_a_slot_of_a_guest_memfd_is_immutable(on: Subject) -> None:
    with closing(on.memfd(2 * PAGE)) as memfd:
        on.set(0, GPA, PAGE, on.address, memfd=memfd)
        for gpa in (GPA, GPA + PAGE):
            with refused(errno.EINVAL):
                on.set(0, gpa, PAGE, on.address, memfd=memfd)
            with refused(errno.EINVAL):
                on.set(0, gpa, PAGE, on.address)
    assert [on.access(GPA), on.access(GPA + PAGE)] == ["tripwire", "hole"]


def test_a_slot_reaches_no_further_than_its_guest_memfd(on: Subject) -> None:
    with closing(on.memfd(2 * PAGE)) as memfd:
        for size, offset in ((3 * PAGE, 0), (2 * PAGE, PAGE), (PAGE, 2 * PAGE), (PAGE, 0x800)):
            with refused(errno.EINVAL):
                on.set(0, GPA, size, on.address, memfd=memfd, offset=offset)
        on.set(0, GPA, PAGE, on.address, memfd=memfd, offset=PAGE)


def test_a_page_of_a_guest_memfd_is_bound_once(on: Subject) -> None:
    with closing(on.memfd(2 * PAGE)) as memfd:
        on.set(0, GPA, PAGE, on.address, memfd=memfd)
        # Linux 6.18 says EINVAL, 7.3 EEXIST. To kvmd it is one thing: refused, and nothing changed.
        with refused(errno.EINVAL, errno.EEXIST):
            on.set(1, GPA + PAGE, 2 * PAGE, on.address, memfd=memfd)
        on.set(1, GPA + PAGE, PAGE, on.address, memfd=memfd, offset=PAGE)
        on.delete(0)
        on.set(0, GPA, PAGE, on.address, memfd=memfd)


def test_a_closed_guest_memfd_cannot_be_bound(on: Subject) -> None:
    memfd = on.memfd(PAGE)
    memfd.close()
    with pytest.raises(ValueError, match="used after it was closed"):
        on.set(0, GPA, PAGE, on.address, memfd=memfd)
    assert on.access(GPA) == "hole"


def test_a_slot_of_a_guest_memfd_has_no_dirty_log_and_is_writable(on: Subject) -> None:
    with closing(on.memfd(PAGE)) as memfd:
        for flags in (1, 2):
            with refused(errno.EINVAL):
                on.set(0, GPA, PAGE, on.address, flags=flags, memfd=memfd)


@pytest.mark.parametrize("size", [0, 0x800, PAGE + 1])
def test_a_guest_memfd_is_whole_pages(on: Subject, size: int) -> None:
    with refused(errno.EINVAL):
        on.memfd(size)


def test_a_swap_makes_one_view_a_tripwire_and_the_other_one_live(on: Subject) -> None:
    on.set(0, GPA, PAGE, on.address)
    tripwire(on, 1, GPA + PAGE, PAGE)
    memfd = on.memfd(PAGE)
    on.swap(0, GPA, memfd, 1, GPA + PAGE)
    assert is_closed(memfd)
    assert [on.access(GPA + page * PAGE) for page in range(2)] == ["tripwire", "live"]


@pytest.mark.parametrize(
    ("made", "dying", "tripwire_gpa", "rising", "live_gpa", "found"),
    [
        (0, 9, GPA, 1, GPA + PAGE, ["live", "tripwire", "live"]),  # there is no such slot to delete
        (1, 0, GPA + 2 * PAGE, 1, GPA + PAGE, ["hole", "tripwire", "live"]),  # its place is taken
        (2, 0, GPA, 9, GPA + PAGE, ["tripwire", "tripwire", "live"]),
        (3, 0, GPA, 1, GPA + 2 * PAGE, ["tripwire", "hole", "live"]),
    ],
)
def test_a_swap_that_is_refused_says_how_far_it_came(
    on: Subject, made: int, dying: int, tripwire_gpa: int, rising: int, live_gpa: int, found: list[str]
) -> None:
    on.set(0, GPA, PAGE, on.address)
    tripwire(on, 1, GPA + PAGE, PAGE)
    on.set(2, GPA + 2 * PAGE, PAGE, on.address)
    memfd = on.memfd(PAGE)
    with pytest.raises(SwapFailed) as caught:
        on.swap(dying, tripwire_gpa, memfd, rising, live_gpa)
    assert caught.value.made == made
    assert caught.value.errno in {errno.EINVAL, errno.EEXIST}
    assert is_closed(memfd)
    assert [on.access(GPA + page * PAGE) for page in range(3)] == found


def test_a_guest_memfd_with_an_unknown_flag_is_refused(on: Subject) -> None:
    with refused(errno.EINVAL):
        on.memfd(PAGE, 1 << 63)


def test_the_fake_fails_on_demand_and_changes_nothing() -> None:
    vm = FakeVm()
    vm.set_memory_region(0, GPA, PAGE, 0)
    vm.fail_next(2, errno.ENOMEM, times=2)
    vm.set_memory_region(1, GPA + PAGE, PAGE, 0)
    with refused(errno.ENOMEM):
        vm.delete_memory_region(0)
    with refused(errno.ENOMEM):
        vm.create_guest_memfd(PAGE)
    assert set(vm.slots) == {0, 1}
    assert vm.memfds == []
    vm.delete_memory_region(0)
    assert vm.access(GPA) == "hole"
