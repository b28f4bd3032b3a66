"""``conversion.rate`` with real guests: a lower bound on the time that they take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from kvmd.conversion.rate_limit import BURST_NS, RateLimit
from kvmd.spec.conversion import ConversionSpec
from tests.machine.conftest import Ran

Run = Callable[..., Awaitable[Ran]]

PER_SECOND = 50
"""Far less than a guest makes that nothing holds back, on a busy machine too."""

PAGES, ROUNDS = 8, 2
INTERVAL_NS = 1_000_000_000 // PER_SECOND


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the moments of all changes as the rate was told them; a record has that of the answer, some time later."""
    moments: list[int] = []

    class Watched(RateLimit):
        def count(self, now_ns: int) -> None:
            moments.append(now_ns)
            super().count(now_ns)

    monkeypatch.setattr("kvmd.machine.RateLimit", Watched)
    return moments


@pytest.mark.parametrize("vcpus", [1, 4])
@pytest.mark.parametrize(
    "accelerator", [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("software", marks=pytest.mark.software)]
)
async def test_a_guest_converts_no_faster_than_its_rate(
    run: Run, counted: list[int], accelerator: str, vcpus: int
) -> None:
    ran = await run(
        "pingpong",
        PAGES // vcpus,
        ROUNDS,
        accelerator=accelerator,
        vcpus=vcpus,
        conversion=ConversionSpec(rate=PER_SECOND),
    )
    assert ran.stop.status == 0
    converted = len(ran.records)
    assert converted == 2 * PAGES * ROUNDS
    # What several ask for at the same time may be one change.
    assert len(counted) == converted if vcpus == 1 else 0 < len(counted) <= converted
    # Of those that ask at the same time each is let in once more.
    at_once = BURST_NS // INTERVAL_NS + vcpus
    assert counted[-1] - counted[0] >= (len(counted) - at_once - 1) * INTERVAL_NS
    assert ran.machine.held_back_us > 0


@pytest.mark.kvm
async def test_a_guest_below_its_rate_is_not_held_back(run: Run) -> None:
    ran = await run("pingpong", PAGES, ROUNDS, conversion=ConversionSpec(rate=1_000_000))
    assert ran.stop.status == 0
    assert ran.machine.held_back_us == 0
