"""Which of the host's facilities the tests may use: ask, skip with the reason, or insist.

Each facility has an environment variable of three states:

``auto`` (or unset)
    use it where it is there; skip with the reason where it is not.
``off``
    do not use it, even where it is there.
``required``
    a missing one is a failure: for a host that is known to have it, so that nothing is skipped unnoticed.
"""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kvmd.errors import HostError
from kvmd.kvm.needs import GUEST_MEMFD, SOFTWARE_PROTECTED_VM, first_lacking
from kvmd.kvm.system import Kvm
from kvmd.kvm.uapi import KVM_X86_SW_PROTECTED_VM
from kvmd.network.own_thread import in_own_thread
from kvmd.network.tap import Tap
from kvmd.software.availability import missing_emulator
from tests.own_network import leave_network


class Facility(enum.Enum):
    """What a host may lack; the value is the variable that speaks of it."""

    KVM = "KVMD_TEST_KVM"
    PRIVATE_MEMORY = "KVMD_TEST_PRIVATE_MEMORY"
    COMPILER = "KVMD_TEST_COMPILER"
    SOFTWARE = "KVMD_TEST_SOFTWARE"
    NETWORK = "KVMD_TEST_NETWORK"
    ACPI = "KVMD_TEST_ACPI"
    SHELLCHECK = "KVMD_TEST_SHELLCHECK"
    SYSTEMD = "KVMD_TEST_SYSTEMD"
    LINUX = "KVMD_TEST_LINUX"


class Gate(enum.Enum):
    """What a facility's variable says."""

    AUTO = "auto"
    OFF = "off"
    REQUIRED = "required"


def gate_of(facility: Facility) -> Gate:
    """Return the state of the facility's gate.

    Raises:
        pytest.fail.Exception: the variable holds something else, which must not pass for ``auto``.
    """
    text = os.environ.get(facility.value) or Gate.AUTO.value
    try:
        return Gate(text)
    except ValueError:
        pytest.fail(f"{facility.value}={text}: use {', '.join(gate.value for gate in Gate)}", pytrace=False)


def require(facility: Facility, missing: str | None) -> None:
    """Go on only where the facility may be used.

    Args:
        facility: the one that the test is about to use.
        missing: why it, or the part of it that the test needs, is not there; None where it is.

    Raises:
        pytest.skip.Exception: it is off, or it is missing and not required.
        pytest.fail.Exception: it is missing although it is required.
    """
    gate = gate_of(facility)
    if gate is Gate.OFF:
        pytest.skip(f"{facility.value}=off")
    if missing is None:
        return
    if gate is Gate.REQUIRED:
        pytest.fail(f"{facility.value}=required, but {missing}", pytrace=False)
    pytest.skip(missing)


def require_whole(facility: Facility) -> None:
    """Go on only where the facility as such is there; it is not even looked for where it is off."""
    if gate_of(facility) is Gate.OFF:
        require(facility, None)
    require(facility, _MISSING[facility]())


@cache
def missing_kvm() -> str | None:
    """Return why /dev/kvm cannot be used, or None."""
    try:
        with Kvm.open():
            return None
    except HostError as error:
        return str(error)


@cache
def missing_private_memory() -> str | None:
    """Return why there are no VMs with private memory, or None."""
    try:
        with Kvm.open() as kvm:
            if first_lacking((SOFTWARE_PROTECTED_VM,), kvm.check_extension):
                return "this KVM has no KVM_X86_SW_PROTECTED_VM: run them in the lab"
            with kvm.create_vm(KVM_X86_SW_PROTECTED_VM) as vm:
                lacking = first_lacking(GUEST_MEMFD, vm.check_extension)
                return f"this KVM has no {lacking}: run them in the lab" if lacking else None
    except HostError as error:
        return str(error)


@cache
def missing_compiler() -> str | None:
    """Return why nothing that includes linux/kvm.h can be compiled, or None."""
    compiler = shutil.which("cc")
    if compiler is None:
        return "there is no C compiler (cc)"
    probe = subprocess.run(  # noqa: S603  the compiler, on a line written here
        [compiler, "-fsyntax-only", "-x", "c", "-"],
        input="#include <linux/kvm.h>\n",
        check=False,
        capture_output=True,
        text=True,
    )
    return f"linux/kvm.h cannot be compiled: {probe.stderr.strip()[:200]}" if probe.returncode else None


@cache
def missing_network() -> str | None:
    """Return why no test can have a network namespace with taps and bridges of its own, or None."""

    def look() -> str | None:
        try:
            leave_network()
        except OSError as error:
            return f"a network namespace cannot be made: {error.strerror}: run them as root"
        try:
            Tap.make("probe").close()
        except HostError as error:
            return str(error)
        return None

    return in_own_thread(look)


@cache
def missing_iasl() -> str | None:
    """Return why ACPI's tables cannot be compiled, or None."""
    return None if shutil.which("iasl") else "there is no iasl: install acpica-tools"


@cache
def missing_shellcheck() -> str | None:
    """Return why scripts cannot be checked, or None."""
    return None if shutil.which("shellcheck") else "there is no shellcheck"


@cache
def missing_systemd() -> str | None:
    """Return why no systemd can be booted in namespaces here, or None.

    Only in the lab: whatever goes wrong there is gone with it.
    """
    if "virtme" not in Path("/proc/cmdline").read_text(encoding="utf-8"):
        return "a systemd is booted in the lab only: lab/test tests/lab/test_systemd.py"
    for program in ("/lib/systemd/systemd", "/usr/bin/dbus-daemon", "/usr/lib/polkit-1/polkitd"):
        if not Path(program).exists():
            return f"there is no {program}"
    return None


_MISSING: dict[Facility, Callable[[], str | None]] = {
    Facility.ACPI: missing_iasl,
    Facility.SHELLCHECK: missing_shellcheck,
    Facility.KVM: missing_kvm,
    Facility.PRIVATE_MEMORY: missing_private_memory,
    Facility.COMPILER: missing_compiler,
    Facility.SOFTWARE: missing_emulator,
    Facility.NETWORK: missing_network,
    Facility.SYSTEMD: missing_systemd,
}
