"""What ``[[networks]]`` may say, and what is told where it says something else."""

from __future__ import annotations

import tomllib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import ConfigError
from kvmd.network.naming import LOCK
from kvmd.network.spec import NETWORKS_LIMIT, NetworkSpec, networks_of


def of(text: str) -> tuple[NetworkSpec, ...]:
    return networks_of(tomllib.loads(text).get("networks", ()))


def test_all_keys() -> None:
    assert of("") == ()
    assert of('[[networks]]\nbridge = "br0"') == (NetworkSpec(kind="bridge", bridge="br0"),)
    (made, alone) = of(
        """
        [[networks]]
        kind = "made-bridge"
        bridge = "vms"
        addresses = ["10.9.0.1/24", "FD00:0::1/64"]
        mtu = 9000
        isolated = true
        mac = "52:54:00:AB:CD:EF"
        tap = "web0"
        [[networks]]
        kind = "namespace"
        addresses = ["192.0.2.0/31"]
        """
    )
    assert made == NetworkSpec(
        kind="made-bridge",
        bridge="vms",
        addresses=("10.9.0.1/24", "fd00::1/64"),
        mtu=9000,
        isolated=True,
        mac="52:54:00:ab:cd:ef",
        tap="web0",
    )
    assert alone.addresses == ("192.0.2.0/31",)
    assert networks_of([made, alone]) == (made, alone)


def test_it_travels_in_messages_as_it_is() -> None:
    networks = of('[[networks]]\nkind = "made-bridge"\nbridge = "vms"\naddresses = ["10.9.0.1/24"]')
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(networks), type=tuple[NetworkSpec, ...]) == networks
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode([{"bridge": 5}]), type=tuple[NetworkSpec, ...])


FIELDS = NetworkSpec.__struct_fields__
INTERFACE = 'up to 15 letters, digits and "_.+@=~-", such as '
TAP = f'the name of an interface that is not there yet, {INTERFACE}"web0"'
ADDRESSES = 'expected up to 16 addresses of the host, each with its prefix, such as ["10.9.0.1/24"]'
MAC = 'expected the guest\'s address, six bytes of which the first is even, such as "52:54:00:12:34:56"'


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", f'bridge is missing: expected the name of an interface, {INTERFACE}"br0"'),
        ('bridge = ""', f'bridge is missing: expected the name of an interface, {INTERFACE}"br0"'),
        (
            'bridge = "sixteen-letters-"',
            f"bridge: 'sixteen-letters-' is not possible: expected the name of an interface, {INTERFACE}\"br0\"",
        ),
        ("bridge = 5", f'bridge: 5 is not possible: expected the name of an interface, {INTERFACE}"br0"'),
        (
            'bridge = "br0"\ntap = "a/b"',
            f"tap: 'a/b' is not possible: expected {TAP}",
        ),
        (
            f'bridge = "br0"\ntap = "{LOCK}"',
            f"tap: '{LOCK}' is not possible: expected {TAP}",
        ),
        (
            'bridge = "br0"\ntap = "br0"',
            f"tap: 'br0' is the bridge's name: expected {TAP}",
        ),
        (
            'kind = "nat"',
            'kind: \'nat\' is not possible: expected "bridge", "made-bridge" or "namespace"',
        ),
        ('bridge = "br0"\nmac = "52:54:00"', f"mac: '52:54:00' is not possible: {MAC}"),
        ('bridge = "br0"\nmac = "53:54:00:00:00:00"', f"mac: '53:54:00:00:00:00' is not possible: {MAC}"),
        ('bridge = "br0"\nmac = "00:00:00:00:00:00"', f"mac: '00:00:00:00:00:00' is not possible: {MAC}"),
        (
            'bridge = "br0"\nmac = "\u0665\u0032:54:00:00:00:00"',
            f"mac: '\u0665\u0032:54:00:00:00:00' is not possible: {MAC}",
        ),
        ('bridge = "br0"\nmtu = 67', "mtu: 67 is not possible: expected bytes, a whole number from 68 to 65521"),
        (
            'bridge = "br0"\nmtu = "1500"',
            "mtu: '1500' is not possible: expected bytes, a whole number from 68 to 65521",
        ),
        ('bridge = "br0"\nisolated = 1', "isolated: 1 is not possible: expected true or false"),
        (
            'bridge = "br0"\naddresses = ["10.0.0.1/24"]',
            'addresses: bridge br0 is not kvmd\'s to configure: expected kind = "made-bridge", or none',
        ),
        (
            'kind = "namespace"\nbridge = "br0"',
            'bridge: a guest in a namespace of its own has no bridge: expected kind = "bridge"',
        ),
        (
            'kind = "namespace"\nisolated = true',
            'isolated: a guest in a namespace of its own has no bridge: expected kind = "bridge"',
        ),
        (
            'kind = "namespace"\naddresses = ["10.0.0.1/24", "10.0.0.1/24"]',
            f"addresses: ['10.0.0.1/24', '10.0.0.1/24'] says one twice: {ADDRESSES}",
        ),
        (
            'brigde = "br0"',
            f"unknown key networks[0].brigde (did you mean bridge?): the keys here are {', '.join(FIELDS)}",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_place(table: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        of(f"[[networks]]\n{table}")
    assert str(raised.value).removeprefix("networks[0].") == message


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1",
        "10.0.0.0/24",
        "10.0.0.1/33",
        "224.0.0.1/4",
        "0.0.0.0/0",
        "127.0.0.1/8",
        "fd00::/64",
        "",
        "br0",
        "::1/64",
    ],
)
def test_addresses_that_no_host_can_have(address: str) -> None:
    with pytest.raises(ConfigError) as raised:
        of(f'[[networks]]\nkind = "namespace"\naddresses = ["{address}"]')
    assert str(raised.value) == f"networks[0].addresses: {address!r} is not possible: {ADDRESSES}"


def test_what_two_networks_cannot_share() -> None:
    for key, value in (("tap", "web0"), ("mac", "52:54:00:00:00:01")):
        with pytest.raises(
            ConfigError, match=rf"^networks\[0\]\.{key}: '{value}' is there twice: expected one for each"
        ):
            of(f'[[networks]]\nbridge = "a"\n{key} = "{value}"\n' * 2)
    assert len(of('[[networks]]\nbridge = "a"\n' * NETWORKS_LIMIT)) == NETWORKS_LIMIT
    with pytest.raises(ConfigError, match=r"expected up to 8 \[\[networks\]\]$"):
        of('[[networks]]\nbridge = "a"\n' * (NETWORKS_LIMIT + 1))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(NetworkSpec.__struct_fields__) | st.text(), inner),
)


@given(ANYTHING | st.lists(st.dictionaries(st.sampled_from(NetworkSpec.__struct_fields__), ANYTHING)))
def test_anything_else_is_one_clear_line(tables: object) -> None:
    try:
        networks_of(tables)
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 - what is not refused is fine
