"""Imports point one way: from the daemon down to the kernel's interface.

Source is parsed, never imported, so an import inside a function or under ``if TYPE_CHECKING`` counts like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

import kvmd

LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("start", ("kvmd.__main__",)),
    ("command lines", ("kvmd.cli", "kvmd.ctl")),
    ("benchmarks", ("kvmd.benchmark",)),
    ("API", ("kvmd.api",)),
    ("fleet", ("kvmd.fleet",)),
    ("machine's process", ("kvmd.machine_process",)),
    ("machine's end", ("kvmd.machine_end",)),
    ("what runs", ("kvmd.runnable",)),
    ("machine", ("kvmd.machine",)),
    ("Linux's devices", ("kvmd.linux_devices",)),
    ("accelerator", ("kvmd.accelerator",)),
    ("hardware of others than payloads on KVM", ("kvmd.software_hardware", "kvmd.linux_hardware")),
    ("hardware", ("kvmd.hardware",)),
    ("host's choice", ("kvmd.host_choice",)),
    ("vCPU tasks", ("kvmd.vcpu_tasks",)),
    ("exits", ("kvmd.exit_handler",)),
    ("conversion service", ("kvmd.conversion_service",)),
    ("conversion log", ("kvmd.conversion_log",)),
    ("output", ("kvmd.console_pump", "kvmd.log", "kvmd.journal", "kvmd.service_manager")),
    ("buffers", ("kvmd.nonblocking", "kvmd.log_buffer")),
    ("run gate", ("kvmd.run_gate",)),
    ("service's place", ("kvmd.service_place",)),
    ("request channel", ("kvmd.request_channel",)),
    ("wait watch, bell, turn", ("kvmd.wait_watch", "kvmd.bell", "kvmd.loop_turn")),
    ("CPUs", ("kvmd.boot_cpu", "kvmd.host_load")),
    ("protection", ("kvmd.protection",)),
    ("spec", ("kvmd.spec", "kvmd.daemon_config")),
    ("guests' networks", ("kvmd.network",)),
    ("configuration files", ("kvmd.toml_file",)),
    ("Linux, virtio", ("kvmd.linux", "kvmd.virtio")),
    ("guest's surroundings", ("kvmd.devices", "kvmd.payload", "kvmd.guests", "kvmd.acpi")),
    ("conversion rules", ("kvmd.conversion",)),
    ("memory", ("kvmd.memory",)),
    ("accelerators", ("kvmd.kvm", "kvmd.software")),
    ("last words, guest files", ("kvmd.last_words", "kvmd.guest_files")),
    ("stop reasons", ("kvmd.stop",)),
    ("accelerator's language", ("kvmd.hv",)),
    ("words of the command line", ("kvmd.options", "kvmd.picture", "kvmd.lazy_group")),
    ("ranges", ("kvmd.ranges",)),
    ("ground", ("kvmd.units", "kvmd.errors", "kvmd.closing")),
    ("version", ("kvmd",)),
)
"""Top first. A module may import what is below it and what is in its own member of a layer: two members of one layer
do not know each other. A member stands for its submodules too; ``kvmd`` itself for ``kvmd/__init__.py`` alone."""

FORBIDDEN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kvmd.conversion", ("trio", "structlog", "fcntl", "kvmd.kvm")),
    ("kvmd.memory", ("trio", "structlog", "kvmd.kvm")),
    ("kvmd.payload", ("trio", "structlog", "kvmd.kvm")),
    ("kvmd.linux", ("trio", "structlog", "kvmd.kvm")),
    ("kvmd.acpi", ("trio", "structlog", "kvmd.kvm")),
    ("kvmd.protection.pieces", ("trio", "structlog", "threading", "ctypes")),
    ("kvmd.protection", ("trio", "kvmd.kvm")),
    (
        "kvmd.virtio",
        ("kvmd.memory.anonymous", "kvmd.memory.backing", "kvmd.memory.host_memory", "kvmd.memory.page_state"),
    ),
    ("kvmd.run_gate", ("trio", "kvmd.kvm")),
    ("kvmd.hv", ("trio", "structlog", "ctypes")),
    ("kvmd.ctl", ("trio", "structlog", "msgspec", "kvmd.fleet", "kvmd.machine", "kvmd.spec", "kvmd.stop", "kvmd.log")),
)
"""What some modules must do without though it may lie below them: they decide, others act."""

KVM_USERS = (
    "kvmd.kvm",
    "kvmd.hardware",
    "kvmd.linux_hardware",
    "kvmd.host_choice",
    "kvmd.cli",
    "kvmd.benchmark",
)
"""Who may name KVM at all: everything else would run on another accelerator as it is."""

LOCKERS = {
    "kvmd.fleet.state_folder": {"flock", "LOCK_EX", "LOCK_NB", "LOCK_UN"},
    "kvmd.virtio.disk": {
        *("fcntl", "F_OFD_GETLK", "F_OFD_SETLK", "F_RDLCK", "F_UNLCK", "F_WRLCK"),
        *("flock", "LOCK_EX", "LOCK_NB", "LOCK_SH"),
    },
    "kvmd.network.tap": {"ioctl"},
}
"""Who may import what of the module of fcntl and ioctl: locks of files, and taps. KVM's ioctls are kvmd.kvm's alone."""

FACES = ("kvmd.cli", "kvmd.ctl", "kvmd.options", "kvmd.lazy_group")
FACES_ONLY = ("click", "rich")
"""Packages for people's eyes: a daemon's core must not draw."""

API_USERS = ("kvmd.api", "kvmd.benchmark")
API_ONLY = ("fastapi", "starlette", "pydantic", "anyio", "h11")
"""Packages that the control API alone stands on, and what measures it: `kvmd run` must not wait for their import."""

NETLINK_USERS = ("kvmd.network.links",)
NETLINK = ("pyroute2",)
"""Brings asyncio along: whoever asks for no network never imports it."""

COMPUTED = "<computed>"

PACKAGE = Path(kvmd.__file__).parent


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    name: str
    file: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """What its relative imports start from."""
        return self.name if self.file.endswith("__init__.py") else self.name.rpartition(".")[0]


def parse(file: str, source: str) -> Module:
    """Parse the source of ``file``, a path from the repository's root such as ``kvmd/kvm/vm.py``."""
    name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Module(name, file, ast.parse(source))


def all_modules() -> list[Module]:
    return [
        parse(str(path.relative_to(PACKAGE.parent)), path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def is_within(name: str, member: str) -> bool:
    return name == member or (member != "kvmd" and name.startswith(f"{member}."))


def layers_of(name: str) -> list[tuple[int, str]]:
    """Return the layers, and the members of them, that a module belongs to: there should be one."""
    return [
        (level, member) for level, (_, members) in enumerate(LAYERS) for member in members if is_within(name, member)
    ]


def imports_of(module: Module, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of every module that the source imports, wherever in it.

    Args:
        module: the importing one.
        known: names of modules, to tell ``from package import module`` from ``from module import thing``.
    """
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(names=names, level=level):
                base = (
                    ".".join(module.package.split(".")[: len(module.package.split(".")) - level + 1]) if level else ""
                )
                source = ".".join(part for part in (base, node.module) if part)
                for alias in names:
                    whole = f"{source}.{alias.name}"
                    yield node.lineno, whole if whole in known else source
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
                yield node.lineno, named_module(node.args[0] if node.args else None)
            case _:
                pass


def named_module(name: ast.expr | None) -> str:
    """Return the module that an expression names; of one with a variable end, the package before it."""
    match name:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]) if start.count(".") > 1:
            return start.rpartition(".")[0]
        case _:
            # Nobody can tell, and so nobody may.
            return COMPUTED


def upward_imports(modules: list[Module]) -> list[str]:
    """Return a line for each import that does not point down."""
    known = frozenset(module.name for module in modules)
    found = []
    for module in modules:
        for line, target in imports_of(module, known):
            if target == COMPUTED:
                found.append(f"{module.file}:{line} imports by a computed name, which nothing can check")
            if not is_within(target, "kvmd") and not target.startswith("kvmd."):
                continue
            here, there = layers_of(module.name), layers_of(target)
            if len(here) != 1 or len(there) != 1:
                continue  # see unplaced
            (own_level, own_member), (level, member) = here[0], there[0]
            if level < own_level or (level == own_level and member != own_member):
                way = "up" if level < own_level else "sideways"
                own, other = LAYERS[own_level][0], LAYERS[level][0]
                found.append(f"{module.file}:{line} ({own}) imports {target} ({other}): that is {way}")
    return found


def unplaced(modules: list[Module]) -> list[str]:
    """Return a line for each module that has no layer, or more than one."""
    found = []
    for module in modules:
        layers = [LAYERS[level][0] for level, _ in layers_of(module.name)]
        if not layers:
            found.append(f"{module.file} has no layer: add {module.name} to LAYERS")
        elif len(layers) > 1:
            found.append(f"{module.file} is in the layers {', '.join(layers)}: it belongs to one")
    return found


def forbidden_imports(modules: list[Module]) -> list[str]:
    """Return a line for each import of something that the module must do without."""
    known = frozenset(module.name for module in modules)
    found = []
    for module in modules:
        banned = list(chain.from_iterable(names for prefix, names in FORBIDDEN if is_within(module.name, prefix)))
        if not any(is_within(module.name, user) for user in KVM_USERS):
            banned.append("kvmd.kvm")
        if not any(is_within(module.name, face) for face in FACES):
            banned.extend(FACES_ONLY)
        if not any(is_within(module.name, user) for user in API_USERS):
            banned.extend(API_ONLY)
        if module.name not in NETLINK_USERS:
            banned.extend(NETLINK)
        for line, target in imports_of(module, known):
            if any(is_within(target, name) for name in banned):
                found.append(f"{module.file}:{line} imports {target}, which {module.name} must do without")
    return found


def ioctl_requests(uapi: Module) -> frozenset[str]:
    """Return the names that are the numbers of ioctls: what _IO, _IOR, _IOW and _IOWR make."""
    names = set()
    for node in uapi.tree.body:
        match node:
            case ast.Assign(
                targets=[ast.Name(id=name)], value=ast.Call(func=ast.Name(id="io" | "ior" | "iow" | "iowr"))
            ):
                names.add(name)
            case _:
                pass
    return frozenset(names)


def stray_ioctls(modules: list[Module]) -> list[str]:
    """Return a line for each place outside of kvmd.kvm that could make an ioctl, or name one of KVM's."""
    uapi = next((module for module in modules if module.name == "kvmd.kvm.uapi"), None)
    suspicious = {"ioctl", "raw_ioctl", "fcntl"} | (ioctl_requests(uapi) if uapi is not None else frozenset())
    found: list[str] = []
    for module in modules:
        if is_within(module.name, "kvmd.kvm"):
            continue
        locking = LOCKERS.get(module.name, set())
        for node in ast.walk(module.tree):
            match node:
                case ast.Name(id="fcntl" | "ioctl" as name) if name in locking:
                    continue  # the function, since the module itself cannot be imported there
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
                    names = {name}
                case ast.ImportFrom(module="fcntl", names=aliases) if {alias.name for alias in aliases} <= locking:
                    continue
                case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                    names = set(chain.from_iterable(alias.name.split(".") for alias in aliases))
                    if isinstance(node, ast.ImportFrom):
                        names.update((node.module or "").split("."))
                case _:
                    continue
            found.extend(
                f"{module.file}:{node.lineno} uses {name}: only kvmd/kvm makes ioctls"
                for name in sorted(names & suspicious)
            )
    return found


# -- kvmd as it is -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return all_modules()


def report(lines: list[str]) -> str:
    return "\n".join(["", *lines])


def test_every_module_has_one_layer(modules: list[Module]) -> None:
    lines = unplaced(modules)
    assert not lines, report(lines)


def test_every_layer_has_a_module(modules: list[Module]) -> None:
    members = [member for _, members in LAYERS for member in members]
    assert [member for member in members if not any(is_within(module.name, member) for module in modules)] == []


def test_imports_point_down(modules: list[Module]) -> None:
    lines = upward_imports(modules)
    assert not lines, report(lines)


def test_nobody_imports_what_it_must_do_without(modules: list[Module]) -> None:
    lines = forbidden_imports(modules)
    assert not lines, report(lines)


def test_only_the_kvm_package_makes_ioctls(modules: list[Module]) -> None:
    lines = stray_ioctls(modules)
    assert not lines, report(lines)


def test_the_real_imports_are_seen(modules: list[Module]) -> None:
    # Otherwise all of the above would hold for an empty folder too.
    known = frozenset(module.name for module in modules)
    edges = {(module.name, target) for module in modules for _, target in imports_of(module, known)}
    assert {
        ("kvmd.machine", "kvmd.vcpu_tasks"),
        ("kvmd.hardware", "kvmd.kvm.uapi"),
        ("kvmd.kvm.vm", "kvmd.kvm.ioctl"),
        ("kvmd.conversion_service", "trio"),
    } <= edges
    uapi = next(module for module in modules if module.name == "kvmd.kvm.uapi")
    assert {"KVM_SET_USER_MEMORY_REGION2", "KVM_SET_MEMORY_ATTRIBUTES", "KVM_RUN"} <= ioctl_requests(uapi)


# -- planted violations --------------------------------------------------------------------------------------

PLANTED_UAPI = parse("kvmd/kvm/uapi.py", "KVM_RUN = io(0x80)\nKVM_CAP_IRQCHIP = 0\n")
OTHERS = [
    PLANTED_UAPI,
    parse("kvmd/machine.py", ""),
    parse("kvmd/kvm/__init__.py", ""),
    parse("kvmd/devices/ports.py", ""),
]


def planted(file: str, source: str) -> list[Module]:
    return [*OTHERS, parse(file, source)]


@pytest.mark.parametrize(
    "source",
    [
        "import kvmd.machine",
        "from kvmd.machine import Machine",
        "from kvmd import machine",
        "from .. import machine",
        "from ..machine import Machine",
        "def late():\n    from kvmd.machine import Machine",
        "if TYPE_CHECKING:\n    from kvmd.machine import Machine",
        "import importlib\nimportlib.import_module('kvmd.machine')",
        "__import__('kvmd.machine')",
    ],
)
def test_an_import_upwards_is_told_with_file_and_layers(source: str) -> None:
    (line,) = upward_imports(planted("kvmd/memory/late.py", source))
    assert line.startswith("kvmd/memory/late.py:")
    assert line.endswith("(memory) imports kvmd.machine (machine): that is up")


def test_an_import_from_a_neighbour_is_told() -> None:
    (line,) = upward_imports(planted("kvmd/payload/elf.py", "\nfrom kvmd.devices import ports"))
    layer = "guest's surroundings"
    assert line == f"kvmd/payload/elf.py:2 ({layer}) imports kvmd.devices.ports ({layer}): that is sideways"


@pytest.mark.parametrize("name", ["name", "f'kvmd.{name}'", "f'{name}'", "'kvmd.' + name", ""])
def test_an_import_by_a_computed_name_is_told(name: str) -> None:
    (line,) = upward_imports(planted("kvmd/memory/late.py", f"import importlib\nimportlib.import_module({name})"))
    assert line == "kvmd/memory/late.py:2 imports by a computed name, which nothing can check"


@pytest.mark.parametrize(
    "source", ["from kvmd.units import PAGE_SIZE", "from . import libc", "import os", "import kvmdx"]
)
def test_an_import_downwards_is_nobody_s_business(source: str) -> None:
    assert upward_imports(planted("kvmd/memory/fine.py", source)) == []


def test_a_new_module_needs_a_layer() -> None:
    assert unplaced(planted("kvmd/newcomer.py", "")) == ["kvmd/newcomer.py has no layer: add kvmd.newcomer to LAYERS"]
    assert unplaced(planted("kvmd/memory/newcomer.py", "")) == []


@pytest.mark.parametrize(
    ("file", "source", "target"),
    [
        ("kvmd/conversion/rules.py", "import trio", "trio"),
        ("kvmd/conversion/rules.py", "def f():\n    import structlog.stdlib", "structlog.stdlib"),
        ("kvmd/conversion/rules.py", "from kvmd.kvm import uapi", "kvmd.kvm.uapi"),
        ("kvmd/memory/libc.py", "import trio", "trio"),
        ("kvmd/payload/elf.py", "from structlog import get_logger", "structlog"),
        ("kvmd/protection/pieces.py", "import structlog", "structlog"),
        ("kvmd/virtio/net.py", "from kvmd.memory.backing import Backing", "kvmd.memory.backing"),
        ("kvmd/vcpu_tasks.py", "from kvmd.kvm import uapi", "kvmd.kvm.uapi"),
        ("kvmd/machine.py", "import rich.text", "rich.text"),
        ("kvmd/api/app.py", "import rich.text", "rich.text"),
        ("kvmd/cli/main.py", "import fastapi", "fastapi"),
        ("kvmd/fleet/base.py", "from pydantic import BaseModel", "pydantic"),
        ("kvmd/network/networks.py", "from pyroute2 import IPRoute", "pyroute2"),
    ],
)
def test_a_forbidden_import_is_told(file: str, source: str, target: str) -> None:
    (line,) = forbidden_imports(planted(file, source))
    assert line.startswith(f"{file}:")
    assert f"imports {target}, which" in line


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import fcntl", "fcntl"),
        ("from fcntl import flock", "fcntl"),
        ("from kvmd.kvm.uapi import KVM_RUN", "KVM_RUN"),
        ("uapi.KVM_RUN", "KVM_RUN"),
        ("raw_ioctl(3, 4, 5)", "raw_ioctl"),
        ("libc.ioctl(3, 4, 5)", "ioctl"),
        ("prototype(('ioctl', libc))", "ioctl"),
        ("import kvmd.kvm.ioctl", "ioctl"),
    ],
)
def test_a_stray_ioctl_is_told(source: str, name: str) -> None:
    assert f"kvmd/hardware.py:1 uses {name}: only kvmd/kvm makes ioctls" in stray_ioctls(
        planted("kvmd/hardware.py", source)
    )


@pytest.mark.parametrize(
    ("file", "source", "told"),
    [
        ("kvmd/fleet/state_folder.py", "from fcntl import LOCK_EX, flock", False),
        ("kvmd/fleet/state_folder.py", "from fcntl import flock, ioctl", True),
        ("kvmd/fleet/state_folder.py", "import fcntl", True),
        ("kvmd/fleet/local.py", "from fcntl import flock", True),
        ("kvmd/virtio/disk.py", "from fcntl import F_OFD_SETLK, fcntl\nfcntl(3, F_OFD_SETLK, b'')", False),
        ("kvmd/virtio/disk.py", "from fcntl import fcntl, ioctl", True),
        ("kvmd/virtio/disk.py", "import fcntl\nfcntl.ioctl(3, 4)", True),
        ("kvmd/virtio/net.py", "from fcntl import fcntl", True),
        ("kvmd/network/tap.py", "from fcntl import ioctl\nioctl(1, 2)", False),
        ("kvmd/network/tap.py", "import fcntl", True),
        ("kvmd/network/tap.py", "uapi.KVM_RUN", True),
        ("kvmd/network/links.py", "from fcntl import ioctl", True),
    ],
)
def test_locks_and_taps_have_their_places(file: str, source: str, told: bool) -> None:  # noqa: FBT001 - a table
    assert bool(stray_ioctls(planted(file, source))) is told


def test_capabilities_are_no_ioctls() -> None:
    assert stray_ioctls(planted("kvmd/hardware.py", "from kvmd.kvm.uapi import KVM_CAP_IRQCHIP")) == []
    assert stray_ioctls(planted("kvmd/kvm/vm.py", "from kvmd.kvm.ioctl import raw_ioctl")) == []
