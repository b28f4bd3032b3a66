"""The networks of one machine: made before its guest starts, removed after its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import structlog

from kvmd.closing import Closing
from kvmd.errors import HostError
from kvmd.network import namespace
from kvmd.network.left_behind import is_unused_bridge, is_unused_namespace
from kvmd.network.links import Link, Links
from kvmd.network.naming import alias, bridge_mac, guest_mac, namespace_name, tap_mac, tap_names
from kvmd.network.own_thread import in_own_thread
from kvmd.network.spec import MTU_DEFAULT, NetworkSpec
from kvmd.network.tap import Tap, changing

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.network")


@dataclass(frozen=True, slots=True)
class GuestNetwork:
    """What a network device needs to know of its network.

    Attributes:
        tap: open, up and attached; its ``fd`` moves frames, its ``set_offloads`` is told what the guest negotiated.
        mac: the guest's address, 6 bytes.
        mtu: bytes that the guest may send in a packet (VIRTIO_NET_F_MTU).
        facts: for the first log line.
    """

    tap: Tap
    mac: bytes
    mtu: int
    facts: dict[str, object]


class Networks(Closing):
    """All networks of a machine: see ``open_networks``.

    Attributes:
        guest: one a ``[[networks]]``, in their order.
    """

    def __init__(self, machine: str) -> None:
        self.guest: list[GuestNetwork] = []
        self._machine = machine
        self._bridges: list[str] = []
        self._namespaces: list[str] = []
        self._taps = ExitStack()

    def close(self) -> None:
        """Remove the taps, and the bridges and namespaces that only they used; harmless the second time.

        What cannot be removed is logged, and stays for the next start: a guest that ended well has ended well.
        """
        self._taps.close()
        if self._bridges or self._namespaces:
            try:
                in_own_thread(self._remove)
            except HostError as error:
                _log.warning(
                    "network-left-behind",
                    machine=self._machine,
                    problem=str(error),
                    consequence="the next start removes it",
                )

    def make(self, specs: Sequence[NetworkSpec]) -> None:
        """Make all; in a thread of its own, and to be closed where it fails.

        Raises:
            HostError: as ``open_networks``.
        """
        makers = {"bridge": self._join, "made-bridge": self._join_made, "namespace": self._in_namespace}
        with ExitStack() as held:
            shared = next((index for index, spec in enumerate(specs) if spec.kind != "bridge"), None)
            if shared is not None:
                with _telling(shared):
                    held.enter_context(changing())
            for index, spec in enumerate(specs):
                with _telling(index):
                    self.guest.append(makers[spec.kind](spec, index))

    def _join(self, spec: NetworkSpec, index: int) -> GuestNetwork:
        """Attach to a bridge of somebody else's, which stays as it is."""
        with Links() as links:
            bridge = links.find(spec.bridge)
            if bridge is None:
                raise HostError(
                    f"there is no bridge {spec.bridge} in this network namespace: make it "
                    f'(ip link add {spec.bridge} type bridge), or say kind = "made-bridge"'
                )
            if bridge.kind != "bridge":
                kind = f"a {bridge.kind}" if bridge.kind else "hardware"
                raise HostError(f"{spec.bridge} is {kind}, no bridge: a guest can be attached to a bridge only")
            if spec.mtu is not None and spec.mtu > bridge.mtu:
                raise HostError(
                    f"mtu: {spec.mtu} bytes are more than bridge {bridge.name} carries: expected at most {bridge.mtu}"
                )
            return self._attach(links, bridge, spec, index)

    def _join_made(self, spec: NetworkSpec, index: int) -> GuestNetwork:
        """Attach to a bridge of kvmd's, and make it where it is not there; the lock is held."""
        mtu = MTU_DEFAULT if spec.mtu is None else spec.mtu
        with Links() as links:
            bridge = links.find(spec.bridge)
            if bridge is not None and is_unused_bridge(bridge, links.all()):
                links.remove(bridge)  # left behind, and perhaps unfinished
                bridge = None
            if bridge is None:
                self._bridges.append(spec.bridge)
                bridge = self._make_bridge(links, spec, mtu)
            else:
                _check_alike(links, bridge, spec, mtu)
                self._bridges.append(spec.bridge)
            return self._attach(links, bridge, spec, index)

    def _make_bridge(self, links: Links, spec: NetworkSpec, mtu: int) -> Link:
        bridge = links.make_bridge(spec.bridge, mac=bridge_mac(spec.bridge), mtu=mtu)
        links.mark(bridge, alias=alias("bridge"))
        links.ignore_routers(bridge)
        if not spec.addresses:
            links.without_own_addresses(bridge)
        for address in spec.addresses:
            links.add_address(bridge, address)
        links.raise_up(bridge)
        return bridge

    def _in_namespace(self, spec: NetworkSpec, index: int) -> GuestNetwork:
        """Make a namespace, with the tap in it; the lock is held."""
        name = namespace_name(self._machine, index)
        if namespace.is_there(name):
            if not in_own_thread(partial(is_unused_namespace, name)):
                raise HostError(
                    f"there is a network namespace {name} that is in use, or not kvmd's: "
                    "rename the machine, or remove the namespace (ip netns delete)"
                )
            namespace.remove(name)
        return in_own_thread(partial(self._in_new_namespace, spec, index, name))

    def _in_new_namespace(self, spec: NetworkSpec, index: int, name: str) -> GuestNetwork:
        namespace.become_new()
        with Links() as links:
            loopback = links.find("lo")
            if loopback is not None:
                # Before it has a name: one that has is known as kvmd's from its first moment.
                links.mark(loopback, alias=alias(self._machine))
                links.raise_up(loopback)
            self._namespaces.append(name)
            namespace.give_name(name)
            tap = self._new_tap(spec, index)
            link = self._configured(links, tap, spec, index, mtu=spec.mtu)
            links.ignore_routers(link)
            for address in spec.addresses:
                links.add_address(link, address)
            links.raise_up(link)
        return self._network(tap, spec, index, mtu=link.mtu, where=f"namespace {name}")

    def _attach(self, links: Links, bridge: Link, spec: NetworkSpec, index: int) -> GuestNetwork:
        tap = self._new_tap(spec, index)
        # A port with a smaller MTU would make the bridge's smaller (br_mtu_auto_adjust): the guest alone is told.
        link = self._configured(links, tap, spec, index, mtu=bridge.mtu)
        links.without_own_addresses(link)
        links.attach(link, bridge, isolated=spec.isolated)
        # Once it is there: of two that come at once neither misses the other.
        _check_alone(links, bridge, link, self._mac(spec, index))
        links.raise_up(link)
        return self._network(tap, spec, index, mtu=bridge.mtu, where=f"bridge {bridge.name}")

    def _new_tap(self, spec: NetworkSpec, index: int) -> Tap:
        names = [spec.tap] if spec.tap else tap_names(self._machine, index)
        return self._taps.enter_context(Tap.make_first(names))

    def _configured(self, links: Links, tap: Tap, spec: NetworkSpec, index: int, *, mtu: int | None) -> Link:
        link = links.find(tap.name)
        if link is None:
            raise HostError(f"tap {tap.name} went away as soon as it was made: somebody else manages it")
        links.mark(link, alias=alias(self._machine, self._mac(spec, index)))
        links.configure(link, mac=tap_mac(tap.name), mtu=mtu)
        return replace(link, mtu=link.mtu if mtu is None else mtu)

    def _network(self, tap: Tap, spec: NetworkSpec, index: int, *, mtu: int, where: str) -> GuestNetwork:
        mac = self._mac(spec, index)
        facts: dict[str, object] = {"network": where, "tap": tap.name, "mac": mac}
        return GuestNetwork(tap, bytes.fromhex(mac.replace(":", "")), spec.mtu or mtu, facts)

    def _mac(self, spec: NetworkSpec, index: int) -> str:
        return spec.mac or guest_mac(self._machine, index)

    def _remove(self) -> None:
        with changing(), Links() as links:
            while self._bridges:
                found = links.all()
                bridge = next((link for link in found if link.name == self._bridges[-1]), None)
                if bridge is not None and is_unused_bridge(bridge, found):
                    links.remove(bridge)
                self._bridges.pop()
            while self._namespaces:
                namespace.remove(self._namespaces[-1])
                self._namespaces.pop()


def open_networks(specs: Sequence[NetworkSpec], *, machine: str) -> Networks:
    """Make the networks of a machine whose guest is about to start. It blocks, for some milliseconds a network.

    Args:
        specs: what is wanted, in order.
        machine: its name, which taps, addresses and namespaces are named after.

    Raises:
        HostError: one cannot be made: which (``networks[0]: ...``) and why; nothing is left behind.
    """
    networks = Networks(machine)
    try:
        if specs:
            in_own_thread(partial(networks.make, specs))
    except BaseException:
        networks.close()
        raise
    return networks


@contextmanager
def _telling(index: int) -> Iterator[None]:
    """Say which network it was that cannot be made."""
    try:
        yield
    except HostError as error:
        raise HostError(f"networks[{index}]: {error}") from error


def _check_alone(links: Links, bridge: Link, own: Link, mac: str) -> None:
    """Refuse an address that another guest on the bridge has, of whichever daemon: each would hear half of its own."""
    for link in links.all():
        if link.master == bridge.index and link.index != own.index and link.is_ours and link.alias.endswith(f" {mac}"):
            raise HostError(
                f"mac: {mac} is that of another guest on bridge {bridge.name} ({link.name}): give each its own"
            )


def _check_alike(links: Links, bridge: Link, spec: NetworkSpec, mtu: int) -> None:
    """Refuse a made bridge that is there and is not the one that is wanted."""
    if bridge.kind != "bridge" or not bridge.is_ours:
        raise HostError(
            f"there is an interface {bridge.name} that kvmd did not make: "
            'take another name for the bridge, or join it with kind = "bridge"'
        )
    found, wanted = links.addresses(bridge), frozenset(spec.addresses)
    if (bridge.mtu, found) != (mtu, wanted):
        is_so = f"mtu {bridge.mtu} and addresses {', '.join(sorted(found)) or 'none'}"
        should = f"mtu {mtu} and addresses {', '.join(sorted(wanted)) or 'none'}"
        raise HostError(
            f"another machine made bridge {bridge.name} with {is_so}, this one wants {should}: "
            "machines on one made bridge must describe it alike"
        )
