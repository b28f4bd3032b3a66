"""KVM refuses in the middle of a large request: service, rules and a real protection over a VM of KVM's rules."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import structlog
import trio

from kvmd.conversion.changes import Limits
from kvmd.conversion.hypercall import explicit_request
from kvmd.conversion.messages import Answer, GuestResult, Outcome
from kvmd.conversion.ring import RecordRing
from kvmd.conversion.rules import ConversionRules
from kvmd.conversion_service import ConversionService
from kvmd.memory.backing import Backing
from kvmd.memory.page_state import PageStateMap
from kvmd.protection.attribute_views import AttributeViews
from kvmd.protection.guest_memfd import GuestMemfdProtection
from kvmd.ranges import GpaRange, PageState
from kvmd.units import PAGE_SIZE
from tests.asking import ask
from tests.protection.fakes import FakeMemfd, FakeVm

PRIVATE, SHARED = PageState.PRIVATE, PageState.SHARED
MEMORY, CHUNK = 64, 8
"""Pages."""


@dataclass
class Rig:
    vm: FakeVm
    state: PageStateMap
    service: ConversionService

    async def ask(self, first: int, count: int, to: PageState) -> Answer:
        arguments = (first * PAGE_SIZE, count, 0x10 if to is PRIVATE else 0)
        return await trio.to_thread.run_sync(ask, self.service, explicit_request(0, arguments, 0))

    def shared(self) -> list[GpaRange]:
        return list(self.state.runs(SHARED))


@contextmanager
def rig(kind: str) -> Iterator[Rig]:
    vm, lock = FakeVm(software_protected=True), threading.Lock()
    state = PageStateMap(MEMORY * PAGE_SIZE, PRIVATE)
    with Backing("private", MEMORY * PAGE_SIZE) as private, Backing("shared", MEMORY * PAGE_SIZE) as shared:
        protection: AttributeViews[FakeMemfd] | GuestMemfdProtection[FakeMemfd]
        pinned = GpaRange(0, PAGE_SIZE)
        if kind == "attribute":
            protection = AttributeViews(vm, {PRIVATE: private, SHARED: shared}, c_bit=45, state=state)
        else:
            state.set(pinned, SHARED, 0, explicit=False)
            protection = GuestMemfdProtection(vm, shared, pinned=pinned, state=state, lock=lock)
        rules = ConversionRules(state, pinned=pinned, limits=Limits(chunk_bytes=CHUNK * PAGE_SIZE))
        service = ConversionService(rules, protection, memory_lock=lock, ring=RecordRing())
        yield Rig(vm, state, service)
        service.dispose()
        protection.close()


@pytest.mark.parametrize("kind", ["attribute", "guest-memfd"])
async def test_what_was_applied_is_known_exactly_and_the_guest_is_told(kind: str) -> None:
    with rig(kind) as on, structlog.testing.capture_logs() as lines:
        async with trio.open_nursery() as nursery:
            await nursery.start(on.service.run)
            # The third of four chunks; the guest_memfd is punched after each, the marks are two a chunk.
            on.vm.fail_next(5, errno.ENOMEM)
            answer = await on.ask(16, 4 * CHUNK, SHARED)
            assert (answer.outcome, answer.result, answer.stop) == (Outcome.FAILED, GuestResult.EAGAIN, None)
            assert on.shared()[-1] == GpaRange(16 * PAGE_SIZE, 32 * PAGE_SIZE)
            again = await on.ask(16, 4 * CHUNK, SHARED)
            assert (again.outcome, again.result) == (Outcome.CONVERTED, GuestResult.SUCCESS)
            assert on.shared()[-1] == GpaRange(16 * PAGE_SIZE, 48 * PAGE_SIZE)
            nursery.cancel_scope.cancel()
    (line,) = lines
    assert (line["event"], line["range"], line["to"]) == ("change-failed", "[0x20000, 0x28000)", "shared")
    assert "set attributes" in line["why"]
    assert "(ENOMEM)" in line["why"]


@pytest.mark.parametrize(
    ("first", "count"),
    [
        (MEMORY, 1 << 20),
        (MEMORY - 1, 2),
        (1 << 40, 1),
        (2, 1 << 52),
        (2, 1 << 63),
        ((1 << 52) - 1, 1),
        (0, 4),
    ],
)
async def test_what_memory_does_not_cover_never_gets_to_kvm(first: int, count: int) -> None:
    with rig("guest-memfd") as on:
        async with trio.open_nursery() as nursery:
            await nursery.start(on.service.run)
            before = on.vm.calls
            answer = await on.ask(first, count, PRIVATE)
            assert (answer.outcome, answer.result) == (Outcome.REFUSED, GuestResult.EINVAL)
            assert on.vm.calls == before
            nursery.cancel_scope.cancel()
