from __future__ import annotations

from pathlib import Path

import pytest

from kvmd.network import availability
from kvmd.network.availability import missing_for_bridges, missing_for_namespaces
from kvmd.network.own_thread import in_own_thread
from tests.own_network import CAP_NET_ADMIN, keep_capabilities, own_network

pytestmark = pytest.mark.network


@own_network
def test_what_is_missing_for_networks_is_found_without_making_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert missing_for_bridges() is None

    def with_one() -> tuple[str | None, str | None]:
        keep_capabilities(CAP_NET_ADMIN)
        return missing_for_bridges(), missing_for_namespaces()

    def with_none() -> str | None:
        keep_capabilities()
        return missing_for_bridges()

    assert in_own_thread(with_one) == (None, "no CAP_SYS_ADMIN")
    assert in_own_thread(with_none) == "no CAP_NET_ADMIN: docs/network.md says how to give it"
    monkeypatch.setattr(availability, "DEVICE", tmp_path / "tun")
    assert missing_for_bridges() == f"{tmp_path}/tun is missing: load the module tun (modprobe tun)"
