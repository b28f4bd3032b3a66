from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.network.tap import GUEST_OFFLOADS, tun_offloads

CSUM, TSO4, TSO6, ECN, USO4, USO6 = (1 << bit for bit in (1, 7, 8, 9, 54, 55))


@pytest.mark.parametrize(
    ("features", "flags"),
    [
        (0, 0),
        (CSUM, 0x01),
        (CSUM | TSO4, 0x03),
        (CSUM | TSO4 | TSO6 | ECN, 0x0F),
        (CSUM | USO4 | USO6, 0x61),
        (GUEST_OFFLOADS, 0x6F),
        # Without what they stand on.
        (TSO4 | TSO6, 0),
        (CSUM | ECN, 0x01),
        (CSUM | USO4, 0x01),
        # Features of something else: VIRTIO_F_VERSION_1, HOST_TSO4.
        (1 << 32 | 1 << 11, 0),
    ],
)
def test_what_the_kernel_is_told(features: int, flags: int) -> None:
    assert tun_offloads(features) == flags


@given(st.integers(0, (1 << 64) - 1))
def test_whatever_a_guest_negotiates_the_kernel_takes(features: int) -> None:
    # set_offload() in drivers/net/tun.c refuses a flag that is left over, or one of the USO flags alone.
    flags = tun_offloads(features)
    assert flags & ~0x6F == 0
    assert flags & 0x60 in {0, 0x60}
    assert flags & 1 or not flags
