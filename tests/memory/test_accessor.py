from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from kvmd.memory.accessor import HostAccessor, OutsideMemory, PrivateMemory
from kvmd.memory.backing import Backing
from kvmd.memory.page_state import PageStateMap
from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE

PAGES = 8
SIZE = PAGES * PAGE_SIZE
WATCHDOG_SECONDS = 20.0
"""Only a test that fails waits this long."""


class WatchedLock:
    """A lock that says when somebody has to wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.waited_for = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waited_for.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()


class Rig:
    """Pages 2 to 4 (exclusive) are shared, the others private."""

    def __init__(self, shared: Backing) -> None:
        self.shared = shared
        self.state = PageStateMap(SIZE, PageState.PRIVATE)
        self.state.set(GpaRange(2 * PAGE_SIZE, 4 * PAGE_SIZE), PageState.SHARED, 1, explicit=True)
        self.lock = WatchedLock()
        # Structurally a lock, as far as the accessor uses one.
        self.accessor = HostAccessor(self.state, shared, self.lock)  # type: ignore[arg-type]  # as said


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Backing("shared", SIZE) as shared:
        yield Rig(shared)


def access(rig: Rig, kind: str, gpa: int, size: int) -> None:
    if kind == "read":
        rig.accessor.read(gpa, size)
    else:
        rig.accessor.write(gpa, b"x" * size)


kinds = pytest.mark.parametrize("kind", ["read", "write"])


def test_shared_memory_is_read_and_written_across_pages(rig: Rig) -> None:
    rig.accessor.write(3 * PAGE_SIZE - 2, b"over")
    assert rig.accessor.read(3 * PAGE_SIZE - 3, 6) == b"\0over\0"
    assert rig.accessor.read(2 * PAGE_SIZE, 2 * PAGE_SIZE).count(b"over") == 1


@kinds
@pytest.mark.parametrize(
    ("gpa", "size", "first"),
    [
        (0, 1, 0),
        (2 * PAGE_SIZE - 1, 1, PAGE_SIZE),
        (2 * PAGE_SIZE - 1, 2, PAGE_SIZE),
        (4 * PAGE_SIZE - 1, 2, 4 * PAGE_SIZE),
        (4 * PAGE_SIZE, 1, 4 * PAGE_SIZE),
        (2 * PAGE_SIZE, 3 * PAGE_SIZE, 4 * PAGE_SIZE),
        (0, SIZE, 0),
        (SIZE - 1, 1, SIZE - PAGE_SIZE),
    ],
)
def test_private_memory_is_refused_even_where_only_the_end_is(
    rig: Rig, kind: str, gpa: int, size: int, first: int
) -> None:
    with pytest.raises(PrivateMemory, match=f"at {first:#x} is private") as caught:
        access(rig, kind, gpa, size)
    assert caught.value.gpa == first
    assert rig.shared.held_bytes() == 0, "not even the shared part of it is written"
    assert not rig.lock.locked()


@kinds
@pytest.mark.parametrize(("gpa", "size"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, 0), (2 * PAGE_SIZE, 0), (1 << 70, 1)])
def test_nothing_outside_memory_and_no_nothing(rig: Rig, kind: str, gpa: int, size: int) -> None:
    with pytest.raises(IndexError, match="are not within memory"):
        access(rig, kind, gpa, size)
    assert not rig.lock.locked()


def test_a_negative_size_is_refused(rig: Rig) -> None:
    with pytest.raises(IndexError):
        rig.accessor.read(2 * PAGE_SIZE, -1)


@pytest.fixture
def in_thread() -> Iterator[Callable[[Callable[[], None]], threading.Thread]]:
    threads: list[threading.Thread] = []

    def start(work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work)
        threads.append(thread)
        thread.start()
        return thread

    yield start
    for thread in threads:
        thread.join(WATCHDOG_SECONDS)


@kinds
def test_an_access_waits_for_a_conversion_and_then_sees_its_result(
    rig: Rig, kind: str, in_thread: Callable[[Callable[[], None]], threading.Thread]
) -> None:
    refused: list[int] = []

    def device() -> None:
        try:
            access(rig, kind, 2 * PAGE_SIZE, 4)
        except PrivateMemory as error:
            refused.append(error.gpa)

    with rig.lock:
        # A conversion is under way: the page is still shared, and will not be.
        thread = in_thread(device)
        assert rig.lock.waited_for.wait(WATCHDOG_SECONDS)
        assert refused == []
        rig.state.set(GpaRange(2 * PAGE_SIZE, 3 * PAGE_SIZE), PageState.PRIVATE, 2, explicit=False)
    thread.join(WATCHDOG_SECONDS)
    assert refused == [2 * PAGE_SIZE]
    assert rig.shared.held_bytes() == 0


@kinds
def test_a_page_cannot_turn_private_in_the_middle_of_an_access(
    rig: Rig,
    kind: str,
    in_thread: Callable[[Callable[[], None]], threading.Thread],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    converting: list[bool] = []

    def converter() -> None:
        with rig.lock:
            converting.append(True)

    def in_the_middle(_gpa: int, _: object) -> bytes:
        in_thread(converter)
        assert rig.lock.waited_for.wait(WATCHDOG_SECONDS)
        assert converting == []
        return b""

    monkeypatch.setattr(rig.shared, kind, in_the_middle)
    access(rig, kind, 2 * PAGE_SIZE, 4)


# -- views, for devices ----------------------------------------------------------------------------------------------


def test_a_view_is_the_memory_itself(rig: Rig) -> None:
    with rig.accessor.hold():
        assert rig.lock.locked()
        rig.accessor.view(2 * PAGE_SIZE + 5, 3)[:] = b"abc"
        assert bytes(rig.accessor.view(2 * PAGE_SIZE + 4, 5)) == b"\0abc\0"
    assert not rig.lock.locked()
    assert rig.accessor.read(2 * PAGE_SIZE + 5, 3) == b"abc"


def test_a_view_of_private_memory_is_refused(rig: Rig) -> None:
    with rig.accessor.hold(), pytest.raises(PrivateMemory) as caught:
        rig.accessor.view(4 * PAGE_SIZE - 1, 2)
    assert caught.value.gpa == 4 * PAGE_SIZE


@pytest.mark.parametrize("converts", [False, True])
@pytest.mark.parametrize(("gpa", "size"), [(-1, 1), (SIZE, 1), (SIZE - 1, 2), (0, 0), (PAGE_SIZE, -1), (1 << 70, 1)])
def test_a_view_of_nothing_or_outside_memory_is_refused(rig: Rig, gpa: int, size: int, *, converts: bool) -> None:
    accessor = HostAccessor(rig.state, rig.shared, threading.Lock(), converts=converts)
    with accessor.hold(), pytest.raises(OutsideMemory, match="are not within memory"):
        accessor.view(gpa, size)


def test_where_nothing_converts_a_view_needs_no_lock(rig: Rig) -> None:
    state = PageStateMap(SIZE, PageState.SHARED)
    accessor = HostAccessor(state, rig.shared, threading.Lock(), converts=False)
    with accessor.hold():
        view = accessor.view(0, SIZE)
    view[0] = 7
    assert accessor.read(0, 1) == b"\7"


def test_who_tracks_writes_is_told_of_those_through_views(rig: Rig) -> None:
    rig.accessor.wrote(2 * PAGE_SIZE, 1)
    told: list[GpaRange] = []
    tracked = [rig.accessor.tracks_writes]
    rig.shared.on_write = told.append
    tracked.append(rig.accessor.tracks_writes)
    assert tracked == [False, True]
    rig.accessor.wrote(3 * PAGE_SIZE - 1, 2)
    assert told == [GpaRange(2 * PAGE_SIZE, 4 * PAGE_SIZE)]


def test_only_shared_memory_is_discarded_and_what_is_no_memory_is_passed_over(rig: Rig) -> None:
    rig.accessor.write(2 * PAGE_SIZE, b"x" * 2 * PAGE_SIZE)
    assert rig.accessor.discard(GpaRange(SIZE, 2 * SIZE)) == 0
    assert rig.accessor.discard(GpaRange(3 * PAGE_SIZE, 2 * SIZE)) == PAGE_SIZE
    assert rig.shared.held_bytes() == PAGE_SIZE
    assert rig.accessor.read(3 * PAGE_SIZE - 1, 2) == b"x\0"


@pytest.mark.parametrize("start", [0, 2, 3, 5, 6])
def test_devices_addresses_between_two_ranges_of_memory_are_not_given_back(start: int) -> None:
    hole = GpaRange(3 * PAGE_SIZE, 5 * PAGE_SIZE)
    with Backing("shared", SIZE) as shared:
        state = PageStateMap(SIZE, PageState.SHARED)
        accessor = HostAccessor(state, shared, threading.Lock(), converts=False, hole=hole)
        shared.write(0, b"x" * SIZE)
        expected = len({0, 1, 2, 5, 6} & set(range(start, 7))) * PAGE_SIZE
        assert accessor.discard(GpaRange(start * PAGE_SIZE, 7 * PAGE_SIZE)) == expected
        assert shared.held_bytes() == SIZE - expected
        assert accessor.discard(hole) == 0
