"""Real taps and bridges, each test in a network namespace of its own."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import structlog
import trio

from kvmd.errors import HostError
from kvmd.network import namespace, tap
from kvmd.network.left_behind import is_anything_ours, remove_left_behind
from kvmd.network.links import Links
from kvmd.network.naming import GROUP, LOCK, guest_mac
from kvmd.network.networks import Networks, open_networks
from kvmd.network.own_thread import in_own_thread
from kvmd.network.spec import NetworkSpec
from kvmd.network.tap import Tap, changing
from tests.network.guest import BROADCAST, SECONDS, TEST, Guest, ip
from tests.own_network import CAP_NET_ADMIN, keep_capabilities, own_network

pytestmark = pytest.mark.network

MADE = NetworkSpec(kind="made-bridge", bridge="vms", addresses=("10.9.0.1/24", "fd00:9::1/64"))
JOINED = NetworkSpec(bridge="br0")
ALONE = NetworkSpec(kind="namespace", addresses=("10.9.0.1/24",))


def links() -> set[str]:
    return {name for _, name in socket.if_nameindex()} - {"lo"}


def make_bridge(name: str = "br0") -> None:
    ip("link", "add", name, "type", "bridge")
    ip("link", "set", name, "up")


def talk_udp(guest: Guest, address: str = "10.9.0.2") -> None:
    """Send a datagram from this thread's network to the guest, and get it back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(SECONDS)
        client.connect((address, 7))
        client.send(b"hello, guest")
        assert guest.answer_udp() == b"hello, guest"
        assert client.recv(100) == b"hello, guest"


# -- what packets do ---------------------------------------------------------------------------------------------


@own_network
def test_the_host_and_a_guest_talk_through_a_made_bridge() -> None:
    with open_networks([MADE], machine="web") as networks:
        (network,) = networks.guest
        assert network.tap.name == "kvmd-web"
        assert network.mac == bytes.fromhex(guest_mac("web", 0).replace(":", ""))
        assert network.mtu == 1500
        assert links() == {"vms", "kvmd-web"}
        talk_udp(Guest(network))
    assert links() == set()


@own_network
def test_guests_talk_through_a_bridge_that_stays_as_it_was() -> None:
    make_bridge()
    ip("link", "set", "br0", "mtu", "1400")
    with open_networks([JOINED], machine="a") as a, open_networks([JOINED], machine="b") as b:
        one, other = Guest(a.guest[0]), Guest(b.guest[0])
        assert a.guest[0].mtu == 1400
        one.write(other.mac, TEST, b"to the other one")
        assert other.read(TEST).payload == b"to the other one"
        other.write(BROADCAST, TEST, b"to all")
        assert one.read(TEST).payload == b"to all"
    assert links() == {"br0"}
    assert "mtu 1400" in ip("link", "show", "br0")
    assert not is_anything_ours()


@own_network
def test_isolated_guests_reach_the_host_and_not_each_other() -> None:
    spec = NetworkSpec(kind="made-bridge", bridge="vms", addresses=("10.9.0.1/24",), isolated=True)
    with open_networks([spec], machine="a") as a, open_networks([spec], machine="b") as b:
        one, other = Guest(a.guest[0]), Guest(b.guest[0], "10.9.0.3")
        one.write(other.mac, TEST, b"psst")
        one.write(BROADCAST, TEST, b"psst, all")
        # A bridge forwards within the write: had these gone through, they would be the first that is read.
        talk_udp(other, "10.9.0.3")
        talk_udp(one)
        assert TEST not in other.kinds
    with open_networks([MADE], machine="a") as a, open_networks([MADE], machine="b") as b:
        one, other = Guest(a.guest[0]), Guest(b.guest[0])
        one.write(BROADCAST, TEST, b"hello, all")
        assert other.read(TEST).payload == b"hello, all"


@own_network
def test_a_guest_in_a_namespace_of_its_own() -> None:
    with open_networks([ALONE], machine="web") as networks:
        assert links() == set()
        assert namespace.is_there("kvmd-web")

        def inside() -> None:
            namespace.enter("kvmd-web")
            assert links() == {"kvmd-web"}
            talk_udp(Guest(networks.guest[0]))

        in_own_thread(inside)
        with pytest.raises(HostError, match="networks\\[0\\]: there is a network namespace kvmd-web that is in use"):
            open_networks([ALONE], machine="web")
        assert namespace.is_there("kvmd-web")
    assert not namespace.is_there("kvmd-web")
    assert list(Path("/run/netns").iterdir()) == []


@own_network
def test_the_kernel_leaves_undone_what_the_guest_does_itself() -> None:
    with open_networks([MADE], machine="web") as networks:
        (network,) = networks.guest
        guest = Guest(network)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(("10.9.0.2", 7))
            seen = []
            for features in (0, 1 << 1, 0):
                network.tap.set_offloads(features)
                client.send(b"datagram")
                seen.append(guest.read_udp().header[0])
        # VIRTIO_NET_HDR_F_NEEDS_CSUM: only where VIRTIO_NET_F_GUEST_CSUM was negotiated.
        assert [flags & 1 for flags in seen] == [0, 1, 0]
        assert network.tap.offered_offloads() & 0b1110000010 == 0b0110000010 | 1 << 9


@own_network
def test_a_segment_larger_than_the_mtu_comes_whole_where_the_guest_cuts_it() -> None:
    with open_networks([MADE], machine="web") as networks:
        (network,) = networks.guest
        network.tap.set_offloads(1 << 1 | 1 << 54 | 1 << 55)
        guest = Guest(network)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.IPPROTO_UDP, 103, 1000)  # UDP_SEGMENT, linux/udp.h
            client.connect(("10.9.0.2", 7))
            client.send(bytes(8000))
            frame = guest.read_udp()
        assert len(frame.payload) == 20 + 8 + 8000
        assert frame.header[1] == 5  # VIRTIO_NET_HDR_GSO_UDP_L4


# -- names and sharing -------------------------------------------------------------------------------------------


def router_advertisement(guest: Guest, target: bytes) -> bytes:
    """Return the IPv6 packet by which a guest says that it is everybody's router (RFC 4861, 4.2)."""
    source = bytes.fromhex("fe80" + "00" * 6) + guest.mac[:3] + b"\xff\xfe" + guest.mac[3:] + b"\0\0"
    source = source[:16]
    # Type 134, hop limit 64, a lifetime of 1800 s.
    message = struct.pack(">BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0)
    pseudo = source + target + struct.pack(">I3xB", len(message), 58) + message
    total = sum(struct.unpack(f">{len(pseudo) // 2}H", pseudo))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    message = message[:2] + struct.pack(">H", ~total & 0xFFFF) + message[4:]
    return struct.pack(">IHBB", 6 << 28, len(message), 58, 255) + source + target + message


@own_network
def test_a_guest_cannot_make_itself_the_host_s_router() -> None:
    everybody = bytes.fromhex("ff02" + "00" * 13 + "01")

    def advertise() -> str:
        guest = Guest(networks.guest[0])
        guest.write(b"\x33\x33\0\0\0\1", 0x86DD, router_advertisement(guest, everybody))
        talk_udp(guest)  # what was written before has been looked at by now
        return ip("-6", "route", "show", "default")

    with open_networks([MADE], machine="web") as networks:
        assert advertise() == ""
        # Seen the other way round: a host that does believe has a route now.
        Path("/proc/sys/net/ipv6/conf/vms/accept_ra").write_text("1")
        assert "dev vms" in advertise()


@own_network
def test_a_derived_name_that_somebody_has_makes_way() -> None:
    make_bridge("kvmd-web")
    with open_networks([MADE, MADE], machine="web") as networks:
        names = [network.tap.name for network in networks.guest]
        assert len({*names, "kvmd-web"}) == 3
        assert {*names, "kvmd-web", "vms"} == links()
        assert networks.guest[0].mac != networks.guest[1].mac
    assert links() == {"kvmd-web"}


@own_network
def test_what_is_given_is_taken() -> None:
    spec = NetworkSpec(kind="made-bridge", bridge="vms", tap="eve0", mac="52:54:00:12:34:56", mtu=9000)
    with open_networks([spec], machine="web") as networks:
        (network,) = networks.guest
        assert (network.tap.name, network.mac.hex(), network.mtu) == ("eve0", "525400123456", 9000)
        assert "mtu 9000" in ip("link", "show", "vms")
        assert "mtu 9000" in ip("link", "show", "eve0")
        assert f"group {GROUP}" in ip("link", "show", "eve0")
        assert "alias kvmd: web 52:54:00:12:34:56" in ip("link", "show", "eve0")
        # Nobody gave it an address: nobody can talk to the host through it, not by IPv6 either.
        assert "inet" not in ip("address", "show", "vms")
        assert "inet" not in ip("address", "show", "eve0")


@own_network
def test_a_made_bridge_goes_with_its_last_guest() -> None:
    a = open_networks([MADE], machine="a")
    b = open_networks([MADE], machine="b")
    mac = ip("-br", "link", "show", "vms").split()[2]
    a.close()
    assert "vms" in links()
    assert ip("-br", "link", "show", "vms").split()[2] == mac
    talk_udp(Guest(b.guest[0]))
    b.close()
    b.close()
    assert links() == set()


@own_network
def test_guests_that_come_and_go_at_once_never_lose_their_bridge() -> None:
    wrong: list[str] = []

    def come_and_go(machine: str) -> None:
        for _ in range(5):
            with open_networks([MADE], machine=machine):
                shown = ip("-d", "link", "show", f"kvmd-{machine}")
                if "master vms" not in shown:
                    wrong.append(shown)

    threads = [threading.Thread(target=come_and_go, args=[name]) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert links() == set()


# -- errors ------------------------------------------------------------------------------------------------------


def refused(specs: Sequence[NetworkSpec], machine: str = "web") -> str:
    """Return why the networks cannot be made, having seen that nothing of them is left."""
    before = links()
    with pytest.raises(HostError) as raised:
        open_networks(specs, machine=machine)
    assert links() == before
    assert not Path("/run/netns").exists() or list(Path("/run/netns").iterdir()) == []
    text = str(raised.value)
    assert "\n" not in text
    return text


@own_network
def test_a_bridge_that_is_not_there() -> None:
    assert refused([MADE, JOINED]) == (
        "networks[1]: there is no bridge br0 in this network namespace: make it (ip link add br0 type bridge), "
        'or say kind = "made-bridge"'
    )


@own_network
def test_a_bridge_that_is_none() -> None:
    with Tap.make("br0"):
        assert refused([JOINED]) == "networks[0]: br0 is a tun, no bridge: a guest can be attached to a bridge only"
        made = NetworkSpec(kind="made-bridge", bridge="br0")
        assert refused([made]).startswith("networks[0]: there is an interface br0 that kvmd did not make: take another")


@own_network
def test_a_bridge_of_somebody_else_s_is_not_ours_to_make() -> None:
    make_bridge("vms")
    assert refused([MADE]).startswith("networks[0]: there is an interface vms that kvmd did not make")
    assert links() == {"vms"}


@own_network
def test_an_mtu_that_the_bridge_does_not_carry() -> None:
    make_bridge()
    spec = NetworkSpec(bridge="br0", mtu=9000)
    assert refused([spec]) == "networks[0]: mtu: 9000 bytes are more than bridge br0 carries: expected at most 1500"
    with open_networks([NetworkSpec(bridge="br0", mtu=1300)], machine="web") as networks:
        assert networks.guest[0].mtu == 1300
        assert "mtu 1500" in ip("link", "show", "br0")


@own_network
def test_machines_that_describe_one_bridge_differently() -> None:
    with open_networks([MADE], machine="a"):
        text = refused([NetworkSpec(kind="made-bridge", bridge="vms", addresses=("10.9.0.1/16",))])
    assert text == (
        "networks[0]: another machine made bridge vms with mtu 1500 and addresses 10.9.0.1/24, fd00:9::1/64, this one "
        "wants mtu 1500 and addresses 10.9.0.1/16: machines on one made bridge must describe it alike"
    )


@own_network
def test_a_tap_that_is_there() -> None:
    make_bridge()
    make_bridge("eve0")
    wanted = "networks[0]: there is an interface eve0 already: take another name for the tap"
    for spec in (NetworkSpec(bridge="br0", tap="eve0"), NetworkSpec(kind="made-bridge", bridge="vms", tap="eve0")):
        assert refused([spec]) == wanted


@own_network
@pytest.mark.parametrize("kind", ["bridge", "made-bridge"])
def test_an_address_that_another_guest_of_the_bridge_has(kind: Literal["bridge", "made-bridge"]) -> None:
    for name in ("br0", "br1") if kind == "bridge" else ():
        make_bridge(name)
    mac = guest_mac("first", 0)
    with open_networks([NetworkSpec(kind=kind, bridge="br0")], machine="first"):
        same = NetworkSpec(kind=kind, bridge="br0", mac=mac.upper())
        assert refused([NetworkSpec(kind=kind, bridge="br1"), same]) == (
            f"networks[1]: mac: {mac} is that of another guest on bridge br0 (kvmd-first): give each its own"
        )
        # On another bridge nobody sees it.
        with open_networks([NetworkSpec(kind=kind, bridge="br1", mac=mac)], machine="second"):
            pass
    with open_networks([same], machine="second"):
        pass


@own_network
def test_no_tun_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_bridge()
    monkeypatch.setattr(tap, "DEVICE", tmp_path / "tun")
    for spec in (JOINED, MADE, ALONE):
        assert refused([spec]).endswith("tun is missing: load the module tun (modprobe tun)")
    (tmp_path / "tun").mkdir()
    assert ": this user, or this unit's DeviceAllow=, does not allow it" in refused([JOINED])


@own_network
def test_no_capability_and_only_the_one() -> None:
    make_bridge()

    def without() -> None:
        keep_capabilities()
        for spec in (JOINED, MADE, ALONE):
            assert refused([spec]).startswith("networks[0]: no CAP_NET_ADMIN, which making tap")

    def with_net_admin() -> None:
        keep_capabilities(CAP_NET_ADMIN)
        with open_networks([JOINED, MADE], machine="web") as networks:
            talk_udp(Guest(networks.guest[1]))
        assert refused([MADE, ALONE]) == (
            "networks[1]: cannot make a network namespace: no CAP_SYS_ADMIN: docs/network.md says how to give it"
        )

    in_own_thread(without)
    in_own_thread(with_net_admin)
    assert links() == {"br0"}


@own_network
def test_an_address_that_the_kernel_refuses_undoes_all() -> None:
    # Two addresses of one subnet are fine, two equal ones in different prefixes are not.
    spec = NetworkSpec(kind="made-bridge", bridge="vms", addresses=("fd00:9::1/64", "fd00:9::1/48"))
    assert refused([spec]) == "networks[0]: cannot give vms the address fd00:9::1/48: File exists"


@own_network
def test_a_lock_that_somebody_holds_is_waited_for_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "_LOCK_SECONDS", 0.0)
    with Tap.make(LOCK):
        assert refused([MADE]).startswith(
            f"networks[0]: another process has held {LOCK}, the lock of kvmd's networks, for"
        )
    with changing():
        pass


# -- what a dead kvmd leaves -------------------------------------------------------------------------------------

DIE = """
import os, signal, sys
from kvmd.network.networks import open_networks
from kvmd.network.spec import NetworkSpec
specs = [NetworkSpec(kind="made-bridge", bridge="vms", addresses=("10.9.0.1/24",)), NetworkSpec(kind="namespace")]
networks = open_networks(specs, machine="dead")
print("there", flush=True)
sys.stdin.read()
"""


def die() -> None:
    """Let a process make a bridge and a namespace, and kill it."""
    with subprocess.Popen([sys.executable, "-c", DIE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603 - ours
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        assert {"vms", "kvmd-dead"} == links() - {"other", "kvmd-b", "vms2", "br0"}
        process.send_signal(signal.SIGKILL)


@own_network
def test_what_a_dead_machine_left_is_removed_and_nothing_else() -> None:
    assert not is_anything_ours()
    assert remove_left_behind() == []
    make_bridge()
    ip("netns", "add", "kvmd-mine")
    ip("netns", "add", "other")
    living = NetworkSpec(kind="made-bridge", bridge="vms2")
    with open_networks([living, ALONE], machine="b"):
        die()
        # The taps went with the process, which the kernel saw to.
        assert links() == {"br0", "vms", "vms2", "kvmd-b"}
        assert namespace.is_there("kvmd-dead+1")
        assert remove_left_behind() == ["bridge vms", "network namespace kvmd-dead+1"]
        assert remove_left_behind() == []
        assert links() == {"br0", "vms2", "kvmd-b"}
        assert sorted(path.name for path in Path("/run/netns").iterdir()) == ["kvmd-b+1", "kvmd-mine", "other"]
    assert links() == {"br0"}


@own_network
def test_the_next_machine_takes_the_place_of_a_dead_one() -> None:
    die()
    with open_networks([MADE, ALONE], machine="dead") as networks:
        talk_udp(Guest(networks.guest[0]))
    assert links() == set()
    assert list(Path("/run/netns").iterdir()) == []


@own_network
def test_what_cannot_be_removed_is_told_and_stays_for_the_next_start() -> None:
    die()

    def without() -> None:
        keep_capabilities()
        with pytest.raises(HostError, match="no CAP_NET_ADMIN"):
            remove_left_behind()

    in_own_thread(without)
    assert len(remove_left_behind()) == 2


@own_network
def test_an_end_that_may_not_remove_its_bridge_is_an_end_all_the_same() -> None:
    def open_and_close() -> None:
        networks = open_networks([MADE], machine="web")
        keep_capabilities()
        with structlog.testing.capture_logs() as log:
            networks.close()
        assert [entry["event"] for entry in log] == ["network-left-behind"]
        assert "no CAP_NET_ADMIN" in log[0]["problem"]

    in_own_thread(open_and_close)
    assert links() == {"vms"}
    assert remove_left_behind() == ["bridge vms"]


def test_nobody_who_wants_no_network_imports_pyroute2() -> None:
    program = (
        "import sys, kvmd.cli.main, kvmd.cli.run, kvmd.cli.check, kvmd.cli.daemon, kvmd.network.networks as n,"
        " kvmd.network.left_behind as left; n.open_networks([], machine='a').close();"
        " sys.exit('pyroute2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)  # noqa: S603 - ours
    assert done.returncode == 0


@own_network
def test_pyroute2_is_opened_used_and_closed_in_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under an event loop of trio's: what runs asyncio must not meet it, and ends before the call returns."""
    opened: dict[Links, threading.Thread] = {}
    closed: dict[Links, threading.Thread] = {}
    real_open, real_close = Links.__init__, Links.close

    def open_(links: Links) -> None:
        real_open(links)
        opened[links] = threading.current_thread()

    def close(links: Links) -> None:
        real_close(links)
        closed[links] = threading.current_thread()

    monkeypatch.setattr(Links, "__init__", open_)
    monkeypatch.setattr(Links, "close", close)

    async def main() -> None:
        with open_networks([MADE, ALONE], machine="web"):
            assert opened == closed
            assert len(opened) >= 2
        assert remove_left_behind() == []
        await trio.lowlevel.checkpoint()

    trio.run(main)
    assert opened == closed
    assert {thread.name for thread in opened.values()} == {"kvmd-network"}
    assert not any(thread.is_alive() for thread in opened.values())


def test_no_networks_are_none() -> None:
    with open_networks([], machine="a") as networks:
        assert isinstance(networks, Networks)
        assert networks.guest == []


@own_network
def test_the_daemon_removes_what_was_left_before_it_serves(tmp_path: Path) -> None:
    die()
    make_bridge()
    (tmp_path / "kvmd.toml").write_text(f'[api]\nsocket = "{tmp_path}/api"\n')
    command = [
        sys.executable,
        "-m",
        "kvmd",
        "daemon",
        "--config",
        f"{tmp_path}/kvmd.toml",
        "--state",
        f"{tmp_path}/state",
    ]
    with subprocess.Popen([*command, "--log-format", "json"], stderr=subprocess.PIPE, text=True) as process:  # noqa: S603 - ours
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(json.loads(line))
            if told[-1]["event"] == "api-serving":
                break
        left = links()
        process.terminate()
        process.stderr.read()
    assert [entry["what"] for entry in told if entry["event"] == "network-left-behind-removed"] == [
        "bridge vms",
        "network namespace kvmd-dead+1",
    ]
    assert left == {"br0"}
    assert process.returncode == 0
