"""Which threads go to the boot CPU with the conversion service, and that they come back."""

from __future__ import annotations

import threading

import pytest

from kvmd.boot_cpu import BOOT_CPU
from kvmd.conversion.placement import Placement
from kvmd.service_place import ServicePlace
from tests.affinity import Affinities

ANYWHERE = {0, 1}
SERVICE, VCPU, OTHER = 0, 101, 102


class Decided(Placement):
    """A decision of the test's own."""

    def look(self, now_ns: int, runnable: int) -> None:
        """Leave it as it is."""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Affinities:
    made = Affinities()
    made.masks = {thread: set(ANYWHERE) for thread in (SERVICE, VCPU, OTHER)}
    made.install(monkeypatch)
    return made


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Decided:
    made = Decided(2)
    monkeypatch.setattr("kvmd.service_place.Placement", lambda _: made)
    return made


@pytest.fixture
def native_id(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    ids = [VCPU]
    monkeypatch.setattr(threading, "get_native_id", lambda: ids[-1])
    return ids


def there(table: Affinities) -> set[int]:
    return {thread for thread, mask in table.masks.items() if mask == {BOOT_CPU}}


def test_the_vcpu_that_asks_alone_comes_along(table: Affinities, decided: Decided, native_id: list[int]) -> None:
    place = ServicePlace(moves=True)
    with place.vcpu(7):
        native_id.append(OTHER)
        with place.vcpu(8):
            place.resume()
            assert there(table) == set()
            decided.on_boot_cpu, decided.alone = True, 7
            place.resume()
            assert there(table) == {SERVICE, VCPU}
            place.pause()
            assert there(table) == {VCPU}, "the service's thread may start others now"
            place.resume()
            assert there(table) == {SERVICE, VCPU}
            decided.alone = 8
            place.resume()
            assert there(table) == {SERVICE, OTHER}
            decided.alone = None
            place.resume()
            assert there(table) == {SERVICE}
            decided.alone = 8
            place.resume()
            place.leave()
            assert there(table) == set()
            decided.on_boot_cpu = False
            place.resume()
            assert there(table) == set()


def test_it_goes_back_when_it_is_not_faster_there_any_more(
    table: Affinities, decided: Decided, native_id: list[int]
) -> None:
    place = ServicePlace(moves=True)
    with place.vcpu(7):
        assert native_id == [VCPU]
        decided.on_boot_cpu, decided.alone = True, 7
        place.resume()
        place.pause()
        decided.on_boot_cpu = False
        place.resume()
        assert there(table) == set()


def test_a_vcpus_thread_that_ends_is_let_go_and_not_touched_again(
    table: Affinities, decided: Decided, native_id: list[int]
) -> None:
    place = ServicePlace(moves=True)
    decided.on_boot_cpu, decided.alone = True, 7
    with place.vcpu(7):
        place.resume()
        assert there(table) == {SERVICE, native_id[-1]}
    assert there(table) == {SERVICE}
    calls = len([call for call in table.calls if call[0] == VCPU])
    place.pause()
    place.resume()
    place.leave()
    assert there(table) == set()
    assert len([call for call in table.calls if call[0] == VCPU]) == calls


def test_no_vcpu_goes_where_the_service_may_not(table: Affinities, decided: Decided, native_id: list[int]) -> None:
    table.masks[SERVICE] = {1}
    place = ServicePlace(moves=True)
    decided.on_boot_cpu, decided.alone = True, 7
    with place.vcpu(7):
        assert native_id == [VCPU]
        place.resume()
        assert there(table) == set()


def test_nobody_moves_where_there_is_no_better_place(table: Affinities, decided: Decided, native_id: list[int]) -> None:
    place = ServicePlace(moves=False)
    decided.on_boot_cpu, decided.alone = True, 7
    with place.vcpu(7):
        assert native_id == [VCPU]
        place.served([7])
        place.resume()
        place.pause()
        place.leave()
    assert table.calls == []
