from __future__ import annotations

import os
import threading

import pytest
import trio

from kvmd.errors import HostError
from kvmd.kvm.system import Kvm
from tests import gate as subject
from tests.gate import Facility, require, require_whole
from tests.leaks import Belongings


@pytest.fixture(params=Facility)
def facility(request: pytest.FixtureRequest) -> Facility:
    found = request.param
    assert isinstance(found, Facility)
    return found


@pytest.mark.parametrize("state", ["auto", "required", "", None])
def test_what_is_there_is_used(facility: Facility, state: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if state is None:
        monkeypatch.delenv(facility.value, raising=False)
    else:
        monkeypatch.setenv(facility.value, state)
    require(facility, None)


def test_what_is_missing_is_skipped_with_the_reason(facility: Facility, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(facility.value, "auto")
    with pytest.raises(pytest.skip.Exception, match=r"^no such thing$"):
        require(facility, "no such thing")


def test_what_is_missing_though_required_fails(facility: Facility, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(facility.value, "required")
    with pytest.raises(pytest.fail.Exception, match=f"^{facility.value}=required, but no such thing$"):
        require(facility, "no such thing")


@pytest.mark.parametrize("missing", [None, "no such thing"])
def test_what_is_off_is_skipped_in_any_case(
    facility: Facility, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(facility.value, "off")
    with pytest.raises(pytest.skip.Exception, match=f"^{facility.value}=off$"):
        require(facility, missing)


def test_what_is_off_is_not_even_looked_for(facility: Facility, monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> str | None:
        raise AssertionError("looked")

    monkeypatch.setitem(subject._MISSING, facility, look)
    monkeypatch.setenv(facility.value, "off")
    with pytest.raises(pytest.skip.Exception):
        require_whole(facility)


def test_a_misspelt_state_is_no_other_state(facility: Facility, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(facility.value, "requird")
    with pytest.raises(pytest.fail.Exception, match=f"{facility.value}=requird: use auto, off, required"):
        require(facility, None)


def test_a_missing_device_is_told_as_kvmd_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_device() -> Kvm:
        raise HostError("/dev/kvm does not exist")

    monkeypatch.setattr(Kvm, "open", no_device)
    monkeypatch.setenv(Facility.KVM.value, "required")
    monkeypatch.setitem(subject._MISSING, Facility.KVM, subject.missing_kvm.__wrapped__)
    with pytest.raises(pytest.fail.Exception, match="but /dev/kvm does not exist"):
        require_whole(Facility.KVM)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert subject.missing_compiler.__wrapped__() == "there is no C compiler (cc)"


def test_a_thread_left_behind_is_seen() -> None:
    before = Belongings.now()
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="straggler")
    thread.start()
    try:
        assert before.left_behind(grace_seconds=0) == ["thread 'straggler'"]
    finally:
        gate.set()
        thread.join()
    assert before.left_behind() == []


def test_a_descriptor_left_behind_is_seen_even_where_its_number_was_used_before() -> None:
    reader, writer = os.pipe()
    before = Belongings.now()
    os.close(writer)
    other = os.eventfd(0)
    try:
        assert other == writer
        assert before.left_behind() == [f"fd {other} -> anon_inode:[eventfd]"]
    finally:
        os.close(reader)
        os.close(other)
    assert before.left_behind() == []


async def test_a_worker_is_seen_while_it_works_and_not_while_it_idles() -> None:
    before = Belongings.now()
    gate = threading.Event()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            def work() -> None:
                # Seen from inside, so that there is no moment to be missed.
                assert "work from" in "".join(before.left_behind(grace_seconds=0))
                trio.from_thread.run_sync(scope.cancel)
                gate.wait()

            nursery.start_soon(lambda: trio.to_thread.run_sync(work, abandon_on_cancel=True))
    assert "work from" in "".join(before.left_behind(grace_seconds=0))
    gate.set()
    assert not any("work from" in line for line in before.left_behind())
