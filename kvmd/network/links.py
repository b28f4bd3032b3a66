"""Interfaces of one network namespace, through rtnetlink(7): the only part of kvmd that knows pyroute2.

pyroute2 runs an asyncio loop of its own under each call: ``Links`` is opened, used and closed within one function, in a
thread that runs no event loop (``kvmd.network.own_thread``). It is imported only where a network is asked for.
"""

from __future__ import annotations

import errno
import ipaddress
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvmd.closing import Closing
from kvmd.errors import HostError
from kvmd.network.naming import GROUP

_SETTINGS = Path("/proc/sys/net/ipv6/conf")
_SCOPE_UNIVERSE = 0
_ADDR_GEN_NONE = 1  # IN6_ADDR_GEN_MODE_NONE, linux/if_link.h
_IFA_F_NODAD = 0x02  # linux/if_addr.h


@dataclass(frozen=True, slots=True)
class Link:
    """An interface as it was found.

    Attributes:
        index: its number in its namespace.
        name: its name.
        kind: ``bridge``, ``tun`` (taps too), ``veth``...; empty for hardware.
        group: see ``kvmd.network.naming.GROUP``.
        master: the index of the bridge that it is a port of, or None.
        mtu: bytes.
        alias: what is said of it.
    """

    index: int
    name: str
    kind: str
    group: int
    master: int | None
    mtu: int
    alias: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether kvmd made it."""
        return self.group == GROUP


class Links(Closing):
    """The interfaces of the calling thread's network namespace.

    Raises:
        HostError: netlink cannot be used here.
    """

    def __init__(self) -> None:
        from pyroute2 import IPRoute  # noqa: PLC0415 - a quarter of a second, and asyncio: only where a network is
        from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415 - as above

        self._refusal: type[Exception] = NetlinkError
        try:
            self._route: Any = IPRoute()
        except OSError as error:
            raise HostError(
                f"cannot open a netlink socket: {error.strerror}: this unit's RestrictAddressFamilies= needs AF_NETLINK"
            ) from error

    def close(self) -> None:
        """Close the socket."""
        self._route.close()

    def all(self) -> list[Link]:
        """Return every interface."""
        with self._telling("list interfaces"):
            return [_link_of(found) for found in self._route.get_links()]

    def find(self, name: str) -> Link | None:
        """Return the interface of that name, or None."""
        return next((link for link in self.all() if link.name == name), None)

    def addresses(self, link: Link) -> frozenset[str]:
        """Return the addresses of an interface, each with its prefix, but for those that the kernel gave it."""
        with self._telling(f"list the addresses of {link.name}"):
            return frozenset(
                str(ipaddress.ip_interface(f"{address}/{found['prefixlen']}"))
                for found in self._route.get_addr(index=link.index)
                if found["scope"] == _SCOPE_UNIVERSE
                and (address := found.get_attr("IFA_LOCAL") or found.get_attr("IFA_ADDRESS"))
            )

    def make_bridge(self, name: str, *, mac: str, mtu: int) -> Link:
        """Make a bridge of ours; it is down, and has no ports."""
        with self._telling(f"make bridge {name}"):
            self._route.link("add", ifname=name, kind="bridge", group=GROUP, address=mac)
        found = self.find(name)
        if found is None:
            raise HostError(f"bridge {name} went away as soon as it was made: somebody else manages it")
        # Not in the message that makes it: only a change keeps the kernel from adapting it to the ports that are left.
        self.configure(found, mtu=mtu)
        return replace(found, mtu=mtu)

    def mark(self, link: Link, *, alias: str) -> None:
        """Say of an interface that it is ours, and what for."""
        with self._telling(f"mark {link.name}"):
            # In this order: by its group it is known, if this ends in between.
            self._route.link("set", index=link.index, group=GROUP)
            self._route.link("set", index=link.index, ifalias=alias)

    def configure(self, link: Link, *, mac: str | None = None, mtu: int | None = None) -> None:
        """Give an interface that is down its address and MTU."""
        with self._telling(f"configure {link.name}"):
            changes = {key: value for key, value in {"address": mac, "mtu": mtu}.items() if value is not None}
            self._route.link("set", index=link.index, **changes)

    def attach(self, link: Link, bridge: Link, *, isolated: bool) -> None:
        """Make an interface a port of a bridge."""
        with self._telling(f"attach {link.name} to bridge {bridge.name}"):
            self._route.link("set", index=link.index, master=bridge.index)
            if isolated:
                self._route.brport("set", index=link.index, isolated=1)

    def without_own_addresses(self, link: Link) -> None:
        """Keep the kernel from giving an interface an IPv6 address: what has none cannot be talked to."""
        mode = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_NONE)]}
        try:
            self._route.link("set", index=link.index, IFLA_AF_SPEC={"attrs": [("AF_INET6", mode)]})
        except self._refusal as error:
            if getattr(error, "code", 0) not in {errno.EAFNOSUPPORT, errno.EOPNOTSUPP}:  # a kernel without IPv6
                raise HostError(f"cannot configure {link.name}: {_reason(error)}") from error

    def ignore_routers(self, link: Link) -> None:
        """Keep guests from telling the host where to route: by default Linux believes IPv6 router advertisements.

        The one setting that has no netlink message (Documentation/networking/ip-sysctl.rst, accept_ra).
        """
        path = _SETTINGS / link.name / "accept_ra"
        try:
            path.write_text("0", encoding="ascii")
        except FileNotFoundError:  # a kernel without IPv6
            pass
        except OSError as error:
            raise HostError(
                f"cannot write {path}: {error.strerror}: this unit's ProtectKernelTunables= needs "
                f"ReadWritePaths={_SETTINGS} beside it"
            ) from error

    def add_address(self, link: Link, address: str) -> None:
        """Add an address with its prefix, such as ``10.9.0.1/24``."""
        parsed = ipaddress.ip_interface(address)
        # Nobody else is there yet who could have it; until the check is done the address could not be used.
        flags = {"flags": _IFA_F_NODAD} if parsed.version == 6 else {}  # noqa: PLR2004 - IPv6
        with self._telling(f"give {link.name} the address {address}"):
            self._route.addr(
                "add", index=link.index, address=str(parsed.ip), prefixlen=parsed.network.prefixlen, **flags
            )

    def raise_up(self, link: Link) -> None:
        """Bring an interface up."""
        with self._telling(f"bring {link.name} up"):
            self._route.link("set", index=link.index, state="up")

    def remove(self, link: Link) -> None:
        """Remove an interface; harmless where it is gone."""
        try:
            with self._telling(f"remove {link.name}"):
                self._route.link("del", index=link.index)
        except HostError as error:
            if getattr(error.__cause__, "code", 0) != errno.ENODEV:
                raise

    @contextmanager
    def _telling(self, operation: str) -> Iterator[None]:
        try:
            yield
        except (self._refusal, OSError) as error:
            if _number(error) == errno.EPERM:
                raise HostError(f"cannot {operation}: no CAP_NET_ADMIN: docs/network.md says how to give it") from error
            raise HostError(f"cannot {operation}: {_reason(error)}") from error


def _link_of(found: Any) -> Link:
    about = found.get_attr("IFLA_LINKINFO")
    return Link(
        index=found["index"],
        name=found.get_attr("IFLA_IFNAME"),
        kind=(about.get_attr("IFLA_INFO_KIND") if about is not None else None) or "",
        group=found.get_attr("IFLA_GROUP") or 0,
        master=found.get_attr("IFLA_MASTER"),
        mtu=found.get_attr("IFLA_MTU") or 0,
        alias=found.get_attr("IFLA_IFALIAS") or "",
    )


def _number(error: Exception) -> int:
    return error.errno or 0 if isinstance(error, OSError) else getattr(error, "code", 0)


def _reason(error: Exception) -> str:
    number = _number(error)
    return os.strerror(number) if number else str(error)
