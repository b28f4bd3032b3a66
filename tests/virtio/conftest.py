"""For all tests of devices: a driver that resets one finds it reset, however busy this machine is."""

from __future__ import annotations

import pytest

from kvmd.virtio import device
from tests.virtio.driver import WATCHDOG_SECONDS


@pytest.fixture(autouse=True)
def _resets_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a reset wait as long as it takes, but in the test of one that may not."""
    monkeypatch.setattr(device, "RESET_SECONDS", WATCHDOG_SECONDS)
