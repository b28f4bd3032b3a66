"""A machine as the operator writes it, in one TOML file, checked before anything is opened."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from kvmd.errors import ConfigError
from kvmd.network.spec import NetworkSpec, networks_of
from kvmd.spec.conversion import CONVERSION_KEYS, ConversionSpec
from kvmd.spec.disks import DISKS_EXPECTED, DiskSpec, disks_of
from kvmd.spec.limits import LIMITS_KEYS, OWN_TASKS, VCPU_LIMIT, LimitsSpec
from kvmd.toml_file import Keys, read_toml, refuse_unknown, shown, suggestion
from kvmd.units import MIB, PAGE_MASK, format_size, parse_size

BUILTIN_PREFIX = "builtin:"
"""What starts the name of an image that kvmd brings along."""

MEMORY_LIMIT = 1 << 46
"""Bytes of guest memory, at most: above lies the shared view (docs/payload-abi.md)."""

ARGUMENT_LIMIT = 8

NAME_LIMIT = 63
NAME_PATTERN = rf"[a-z0-9][a-z0-9._-]{{0,{NAME_LIMIT - 1}}}"
"""What machines may be called, as a regular expression."""

AGENT_LIMIT = 63
"""Characters of the name of an agent's port."""

_AGENT = re.compile(rf"[a-zA-Z0-9][a-zA-Z0-9._-]{{0,{AGENT_LIMIT - 1}}}", re.ASCII)
_PROTECTIONS = frozenset({"emulated", "guest-memfd", "auto", "none"})
_NOT_BUILT_YET = frozenset({"snp", "tdx"})
_ACCELERATORS = frozenset({"auto", "kvm", "software"})
_TRIPWIRES = frozenset({"auto", "attribute", "guest_memfd", "hole"})
_SIZES = frozenset({"memory", "balloon_target", "conversion.chunk", "limits.memory"})
_U64_LIMIT = 1 << 64

_KEYS = Keys(
    {
        "name": 'up to 63 of a-z, 0-9, ".", "_" and "-", the first a letter or digit, such as "guest-1"',
        "image": 'the path of an ELF file, relative to this file, or a built-in guest such as "builtin:hello"',
        "kernel": "the path of a bzImage, or of an ELF vmlinux with PVH, relative to this file; in place of image",
        "initrd": "the path of an initial RAM disk, relative to this file",
        "cmdline": 'the kernel\'s command line, such as "console=ttyS0"',
        "disks": DISKS_EXPECTED,
        "networks": "up to 8 tables, [[networks]], with keys of their own",
        "entropy": "true or false",
        "balloon": "true or false",
        "balloon_target": "a size in pages of 4 KiB that is less than memory, with balloon = true",
        "agent": f'up to {AGENT_LIMIT} of a-z, A-Z, 0-9, ".", "_" and "-", such as "org.qemu.guest_agent.0"',
        "vcpus": f"a whole number from 1 to {VCPU_LIMIT}",
        "memory": 'a size in pages of 4 KiB, such as "64M"',
        "accelerator": '"auto", "kvm" or "software"',
        "protection": '"emulated", "guest-memfd", "auto" or "none"',
        "tripwire": '"auto", "attribute", "guest_memfd" or "hole"',
        "initial": '"private" or "shared"',
        "cpl": "3 (user mode) or 0",
        "arguments": f"up to {ARGUMENT_LIMIT} whole numbers from 0 to 2^64 - 1, such as [16, 8]",
        "conversion": "a table: [conversion], with keys of its own",
        **CONVERSION_KEYS,
        "limits": "a table: [limits], with keys of its own",
        **LIMITS_KEYS,
    }
)
"""What would be right, by key: the second half of every message."""


class MachineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A machine, complete and checked; what only the host can tell is checked when it is opened.

    Attributes:
        image: a payload guest's ELF file; None for a Linux guest.
        kernel: a Linux guest's kernel; None for a payload.
        initrd: of Linux, its initial RAM disk.
        cmdline: of Linux, the kernel's command line.
        disks: of Linux, its disks.
        networks: of Linux, its network cards.
        entropy: of Linux, whether it has a source of randomness.
        balloon: of Linux, whether it can give memory back.
        balloon_target: of Linux with a balloon, bytes that it is asked to do without from the start.
        agent: of Linux, the name of a port for a program in it that the host talks to; empty for none.
        name: by default made of the image's file name.
        vcpus: how many, from 1.
        memory: bytes, a multiple of the page size.
        accelerator: what runs the guest: ``kvm``, ``software`` (an emulator), or ``auto`` for KVM where it works.
        protection: ``emulated`` (two views of memory by an address bit), ``guest-memfd`` (one view, and private
            memory that the host cannot map), ``none``, or ``auto`` for the strongest that the host offers; by default
            ``emulated`` for payloads, ``none`` for Linux.
        tripwire: of ``emulated``, what makes the view that is not live trip: ``attribute``, ``guest_memfd``,
            ``hole``, or ``auto`` for the best that the host offers.
        initial: the state that the guest's own memory starts in, by default ``private``, and ``shared`` for Linux;
            without protection all memory is shared.
        cpl: the privilege level that payload guests start at.
        arguments: what the boot information passes to the guest, each an unsigned 64-bit number.
        conversion: bounds on conversions.
        limits: what its process may take of the host.

    Raises:
        ConfigError: a value is impossible; the message names the key and what would be right.
    """

    image: Path | None = None
    name: str = ""
    vcpus: int = 1
    memory: int = 64 * MIB
    accelerator: Literal["auto", "kvm", "software"] = "auto"
    protection: str = ""
    tripwire: Literal["auto", "attribute", "guest_memfd", "hole"] = "auto"
    initial: Literal["private", "shared", ""] = ""
    cpl: Literal[0, 3] = 3
    arguments: tuple[int, ...] = ()
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    disks: tuple[DiskSpec, ...] = ()
    networks: tuple[NetworkSpec, ...] = ()
    entropy: bool = True
    balloon: bool = False
    balloon_target: int = 0
    agent: str = ""
    conversion: ConversionSpec = msgspec.field(default_factory=ConversionSpec)
    limits: LimitsSpec = msgspec.field(default_factory=LimitsSpec)

    def __post_init__(self) -> None:
        if (self.image is None) == (self.kernel is None):
            raise ConfigError(
                f"image is missing: expected {_KEYS['image']}; or, for Linux, kernel: {_KEYS['kernel']}"
                if self.image is None
                else "kernel: a machine has either an image (a payload) or a kernel (Linux), not both"
            )
        if not self.name:
            msgspec.structs.force_setattr(self, "name", _name_of(self.guest))
        if not self.protection:
            msgspec.structs.force_setattr(self, "protection", "emulated" if self.kernel is None else "none")
        if not self.initial:
            msgspec.structs.force_setattr(self, "initial", "private" if self.kernel is None else "shared")
        _KEYS.need("name", self.name, re.fullmatch(NAME_PATTERN, self.name, re.ASCII) is not None)
        _KEYS.need("vcpus", self.vcpus, 1 <= self.vcpus <= VCPU_LIMIT)
        _KEYS.need("memory", self.memory, self.memory > 0 and not self.memory & PAGE_MASK)
        if self.memory > MEMORY_LIMIT:
            raise ConfigError(
                f"memory: {shown(self.memory)} bytes are more than a guest can have: "
                f"at most {format_size(MEMORY_LIMIT)}"
            )
        if self.protection in _NOT_BUILT_YET:
            raise ConfigError(f'protection: "{self.protection}" is not built yet: expected ' + _KEYS["protection"])
        _KEYS.need("protection", self.protection, self.protection in _PROTECTIONS)
        # The type says so too, but a spec that a program makes has not been through msgspec.
        self._check_kind()
        _KEYS.need("accelerator", self.accelerator, self.accelerator in _ACCELERATORS)
        _KEYS.need("tripwire", self.tripwire, self.tripwire in _TRIPWIRES)
        _KEYS.need("initial", self.initial, self.initial in {"private", "shared"})
        _KEYS.need("cpl", self.cpl, self.cpl in {0, 3})
        _KEYS.need("arguments", list(self.arguments), len(self.arguments) <= ARGUMENT_LIMIT)
        _KEYS.need("arguments", list(self.arguments), all(0 <= value < _U64_LIMIT for value in self.arguments))
        tasks = self.limits.tasks
        _KEYS.need("limits.tasks", tasks, tasks is None or tasks >= self.vcpus + OWN_TASKS)

    @property
    def files(self) -> tuple[tuple[str, Path], ...]:
        """The files that the guest is made of, each with its key: what somebody may bring along, already open."""
        if self.kernel is None:
            return (("image", self.guest),)
        initrd = () if self.initrd is None else (("initrd", self.initrd),)
        disks = tuple((f"disks[{index}].path", disk.path) for index, disk in enumerate(self.disks))
        return (("kernel", self.kernel), *initrd, *disks)

    def _check_kind(self) -> None:
        """Refuse what belongs to the other kind of guest."""
        if self.kernel is None:
            for key in ("initrd", "cmdline", "disks", "networks", "balloon", "balloon_target", "agent"):
                if getattr(self, key):
                    raise ConfigError(
                        f"{key}: only Linux has it, and this machine has no kernel: give one, or leave it out"
                    )
            return
        if self.protection not in {"none", "guest-memfd"}:
            raise ConfigError(
                f'protection: "{self.protection}" is not for Linux, which knows nothing of two views of its memory: '
                'expected "none", or "guest-memfd" with initial = "shared"'
            )
        if self.initial == "private":
            raise ConfigError(
                'initial: "private" is not possible for Linux: a kernel cannot be put into private memory, nor does it '
                'convert any by itself: expected "shared"'
            )
        fits = not self.balloon_target & PAGE_MASK and (
            self.balloon_target == 0 or (self.balloon and 0 < self.balloon_target < self.memory)
        )
        _KEYS.need("balloon_target", self.balloon_target, fits)
        _KEYS.need("agent", self.agent, not self.agent or _AGENT.fullmatch(self.agent) is not None)
        if self.arguments:
            raise ConfigError("arguments: only payloads have them: expected cmdline, for Linux")

    @property
    def guest(self) -> Path:
        """The file that the guest is known by: the payload's image, or the kernel."""
        guest = self.kernel if self.image is None else self.image
        assert guest is not None  # noqa: S101 - checked when it was made
        return guest

    def with_overrides(self, **overrides: Any) -> Self:
        """Return this spec with the given fields changed; a field given as None stays as it is.

        Raises:
            ConfigError: the result is impossible.
        """
        return msgspec.structs.replace(self, **{key: value for key, value in overrides.items() if value is not None})


def load_spec(path: Path) -> MachineSpec:
    """Return the machine that the TOML file at ``path`` describes.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or describes no machine; one line with file, key
            and what would be right.
    """
    document = read_toml(path, whose="machine")
    try:
        return spec_of(document, base=path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def spec_of(document: Mapping[str, object], *, base: Path) -> MachineSpec:
    """Return the machine that a parsed file describes.

    Args:
        document: what ``tomllib`` made of it.
        base: the folder that a relative image path starts at.

    Raises:
        ConfigError: it describes no machine; one line with key and what would be right.
    """
    refuse_unknown(document, MachineSpec)
    for name, kind in (("conversion", ConversionSpec), ("limits", LimitsSpec)):
        section = document.get(name, {})
        if isinstance(section, Mapping):
            refuse_unknown(section, kind, f"{name}.")
    if document.get("name") == "":
        raise ConfigError(f"name: '' is not possible: expected {_KEYS['name']}")

    complete = _with_sizes_in_bytes(document, "")
    if "image" in document:
        complete["image"] = resolve_image(document["image"], base=base)
    for key in ("kernel", "initrd"):
        if key in document:
            complete[key] = resolve_file(key, document[key], base=base)
    if "disks" in document:
        complete["disks"] = disks_of(document["disks"], base=base)
    if "networks" in document:
        complete["networks"] = networks_of(document["networks"])
    try:
        return msgspec.convert(complete, MachineSpec)
    except msgspec.ValidationError as error:
        raise _KEYS.refused(error, document) from error


def resolve_image(image: object, *, base: Path) -> Path:
    """Return the path of the image that a file or a command line names.

    Args:
        image: a path, or ``builtin:`` and the name of a guest that kvmd brings along.
        base: the folder that a relative path starts at.

    Raises:
        ConfigError: there is no such built-in guest, or the path is none.
    """
    if not isinstance(image, str) or not image or "\0" in image:
        raise ConfigError(f"image: {shown(image)} is not possible: expected {_KEYS['image']}")
    if not image.startswith(BUILTIN_PREFIX):
        return base / image
    from kvmd.guests import GUESTS  # noqa: PLC0415 - most machines run a guest of their own

    name = image.removeprefix(BUILTIN_PREFIX)
    if name not in GUESTS:
        raise ConfigError(
            f"image: there is no built-in guest {shown(name)}{suggestion(name, GUESTS)}: "
            f"the built-in ones are {', '.join(GUESTS)}"
        )
    return GUESTS[name].path


def resolve_file(key: str, file: object, *, base: Path) -> Path:
    """Return the path of a file that a key of a machine's file names.

    Args:
        key: such as ``kernel``.
        file: what it says.
        base: the folder that a relative path starts at.

    Raises:
        ConfigError: it is no path.
    """
    if not isinstance(file, str) or not file or "\0" in file:
        raise ConfigError(f"{key}: {shown(file)} is not possible: expected {_KEYS[key]}")
    return base / file


def _name_of(image: Path) -> str:
    """Return a machine's name made of its image's file name."""
    stem = image.stem if image.suffix.lower() in {".elf", ".bin"} else image.name
    name = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).lstrip("._-")[:63]
    return name or "guest"


def _with_sizes_in_bytes(table: Mapping[str, object], prefix: str) -> dict[str, object]:
    """Return ``table`` with text such as ``"64M"`` made a number, in nested tables too."""
    result: dict[str, object] = {}
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, Mapping):
            result[name] = _with_sizes_in_bytes(value, f"{key}.")
        elif key in _SIZES and isinstance(value, str):
            try:
                result[name] = parse_size(value)
            except ValueError as error:
                raise ConfigError(f"{key}: {shown(value)} is not a size: expected {_KEYS[key]}") from error
        else:
            result[name] = value
    return result
