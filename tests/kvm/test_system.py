from __future__ import annotations

import errno
import grp
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmd.errors import BackendError, HostError, MissingCapability
from kvmd.kvm import system
from kvmd.kvm.system import Kvm

NOBODY = 65534


def failure(path: str) -> str:
    with pytest.raises(HostError) as caught:
        Kvm.open(path)
    message = str(caught.value)
    assert message.startswith(path)
    assert "\n" not in message
    return message


def test_a_missing_node_tells_all_three_remedies(tmp_path: Path) -> None:
    message = failure(str(tmp_path / "kvm"))
    assert "does not exist" in message
    for remedy in ("modprobe kvm_intel", "modprobe kvm_amd", "nested virtualisation", "--device=/dev/kvm"):
        assert remedy in message


def test_a_plain_file_is_no_kvm_device(tmp_path: Path, fds: Callable[[], frozenset[str]]) -> None:
    node = tmp_path / "kvm"
    node.touch()
    before = fds()
    assert "is not a KVM device (Inappropriate ioctl for device)" in failure(str(node))
    assert fds() == before


def test_another_device_is_no_kvm_device() -> None:
    assert "is not a KVM device" in failure(os.devnull)


def test_a_node_without_a_driver(tmp_path: Path) -> None:
    # Opening a socket's node fails with ENXIO, as does a device node whose driver is absent.
    node = tmp_path / "kvm"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(node))
        message = failure(str(node))
    assert "no driver behind it" in message
    assert "modprobe" in message


def test_a_directory_says_so(tmp_path: Path) -> None:
    assert failure(str(tmp_path)).endswith("cannot be opened: Is a directory")


OPEN_AS_NOBODY = f"""
import os, sys
from kvmd.errors import HostError
from kvmd.kvm.system import Kvm
import kvmd.kvm.capabilities, encodings.idna, grp
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
try:
    Kvm.open(sys.argv[1])
except HostError as error:
    print(error)
"""


def open_as_nobody(path: Path) -> str:
    package_root = str(Path(system.__file__).parents[2])
    found = subprocess.run(  # noqa: S603  ourselves
        [sys.executable, "-c", OPEN_AS_NOBODY, str(path)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": package_root},
    )
    return found.stdout.strip()


def test_a_forbidden_node_without_a_group_tells_how_to_make_one(tmp_path: Path) -> None:
    node = tmp_path / "kvm"
    node.touch(mode=0o000)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    message = open_as_nobody(node)
    assert message.startswith(f"{node} is forbidden to this user: it belongs to group ")
    assert "with mode 0000" in message
    assert f"chgrp kvm {node}" in message
    assert "usermod -aG kvm" in message
    assert "\n" not in message


class Node:
    st_mode = 0o020660
    st_gid = 108


def test_a_forbidden_node_names_the_group_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "stat", lambda _path: Node)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((f"virt{gid}", "x", gid, [])))
    for number in (errno.EACCES, errno.EPERM):
        message = system._remedy("/dev/kvm", OSError(number, "no"))
        assert "usermod -aG virt108 USER" in message
        assert "--device=/dev/kvm" in message


def test_a_group_without_a_name_is_told_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(gid: int) -> grp.struct_group:
        raise KeyError(gid)

    monkeypatch.setattr(os, "stat", lambda _path: Node)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    assert "usermod -aG 108 USER" in system._remedy("/dev/kvm", OSError(errno.EACCES, "no"))


def test_a_node_behind_a_closed_directory(tmp_path: Path) -> None:
    message = system._remedy(str(tmp_path / "gone" / "kvm"), OSError(errno.EACCES, "no"))
    assert "make its directory searchable" in message


def test_another_version_of_the_api(monkeypatch: pytest.MonkeyPatch, fds: Callable[[], frozenset[str]]) -> None:
    monkeypatch.setattr(system, "ioctl", lambda *_args: 11)
    before = fds()
    assert "speaks version 11 of the KVM API, kvmd needs 12" in failure(os.devnull)
    assert fds() == before


@pytest.mark.kvm
def test_the_device_answers(kvm: Kvm) -> None:
    assert kvm.vcpu_mmap_size >= 4096
    assert kvm.check_extension(3) == 1
    assert kvm.check_extension(10**6) == 0
    assert 36 <= kvm.physical_address_bits() <= 52
    assert isinstance(kvm.supports_gigabyte_pages(), bool)


@pytest.mark.kvm
def test_the_cpuid_grows_until_it_fits(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kvm._read_cpuid()
    assert {1, 0x8000_0001} <= {entry.function for entry in whole}
    monkeypatch.setattr(system, "_CPUID_CAPACITY", 1)
    assert {entry.function for entry in kvm._read_cpuid()} == {entry.function for entry in whole}
    monkeypatch.setattr(system, "_CPUID_CAPACITY_LIMIT", 1)
    with pytest.raises(BackendError, match="cannot ask for the supported CPUID: Argument list too long"):
        kvm._read_cpuid()


@pytest.mark.kvm
def test_a_type_that_nobody_offers(kvm: Kvm) -> None:
    with pytest.raises(MissingCapability, match="offers no VM of type 63") as caught:
        kvm.create_vm(63)
    assert caught.value.capability == "KVM_CAP_VM_TYPES"


@pytest.mark.kvm
def test_nothing_is_left_open(kvm: Kvm, fds: Callable[[], frozenset[str]]) -> None:
    before = fds()
    with Kvm.open() as device, device.create_vm() as vm:
        assert fds() != before
        vm.close()
        vm.close()
        device.close()
        device.close()
    assert fds() == before
    with pytest.raises(ValueError, match="/dev/kvm is used after it was closed"):
        device.check_extension(3)
    assert kvm.check_extension(3) == 1
