from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmd.network.naming import LOCK, bridge_mac, guest_mac, namespace_name, tap_mac, tap_names

MACHINES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)


def test_names_are_the_machine_s_where_they_fit() -> None:
    assert tap_names("web", 0)[0] == "kvmd-web"
    assert tap_names("abcdefghij", 0)[0] == "kvmd-abcdefghij"
    # What follows is a part of what upgrades must keep: names that operators have in their firewalls.
    assert tap_names("abcdefghijk", 0)[0] == "kvmd-abc+pfuqef"
    assert tap_names("web", 1)[0] == "kvmd-web+lnmidh"
    assert namespace_name("web", 0) == "kvmd-web"
    assert namespace_name("web", 1) == "kvmd-web+1"


def test_addresses_are_stable() -> None:
    assert guest_mac("web", 0) == "12:f3:d8:c4:a9:ee"
    assert len({guest_mac("web", 0), guest_mac("web", 1), guest_mac("db", 0), bridge_mac("web")}) == 4
    assert tap_mac("kvmd-web").startswith("fe:")


@given(MACHINES, st.integers(0, 7))
def test_every_name_can_be_an_interface_s(machine: str, index: int) -> None:
    names = tap_names(machine, index)
    assert len(names) == len(set(names)) == 8
    for name in names:
        assert 0 < len(name.encode()) <= 15
        assert not set("/:% ") & set(name)
        assert name != LOCK


@given(MACHINES, MACHINES, st.integers(0, 7), st.integers(0, 7))
def test_no_machine_has_another_one_s_first_name(machine: str, other: str, index: int, other_index: int) -> None:
    if (machine, index) != (other, other_index):
        assert tap_names(machine, index)[0] != tap_names(other, other_index)[0]
        assert namespace_name(machine, index) != namespace_name(other, other_index)


@given(MACHINES, st.integers(0, 7))
def test_addresses_are_local_and_of_one(machine: str, index: int) -> None:
    for mac in (guest_mac(machine, index), bridge_mac(machine), tap_mac(machine)):
        assert int(mac[:2], 16) & 0b11 == 0b10
