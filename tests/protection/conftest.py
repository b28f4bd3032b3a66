"""Rigs of the protections that convert by attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from kvmd.protection import attribute_views, guest_memfd
from kvmd.units import PAGE_SIZE
from tests.protection.attribute_rig import KINDS, SLOT, Rig


@pytest.fixture
def _small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make memslots so short that a rig's memory needs several."""
    for module in (attribute_views, guest_memfd):
        monkeypatch.setattr(module, "SLOT_BYTES", SLOT * PAGE_SIZE)


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, _small_slots: None) -> Iterator[Callable[..., Rig]]:
    """Return a function that makes a rig of either kind, closed in the end."""
    with ExitStack() as stack:

        def build(**kwargs: object) -> Rig:
            rig = Rig(request.param, **kwargs)  # type: ignore[arg-type]  # the rig's own
            stack.callback(rig.close)
            return rig

        yield build
