"""`kvmd bench linux` where it cannot measure: one line, at once. What it measures is run in the lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmd.benchmark import linux
from kvmd.benchmark.kernel_mode import kernel_instruction_ns
from kvmd.benchmark.measure import CannotMeasure, Options
from kvmd.errors import BackendError


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "require_kvm", lambda: None)
    monkeypatch.setattr(linux, "kernel_instruction_ns", lambda: 9.0)


def refusal() -> str:
    with pytest.raises(CannotMeasure) as caught:
        linux.measure(Options())
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.kvm
def test_a_loop_of_a_guest_s_kernel_is_timed() -> None:
    assert 0 < kernel_instruction_ns() < 10_000_000


@pytest.mark.usefixtures("native")
def test_a_kvm_that_emulates_guest_kernels_is_refused_with_the_way_to_the_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "kernel_instruction_ns", lambda: 1234.0)
    assert refusal() == (
        "this host's KVM emulates guest kernels (1,234 ns an instruction), and Linux would take minutes to boot; "
        "in the lab: LAB_CPUS=1 LAB_TIMEOUT=3600 lab/run .venv/bin/kvmd bench linux"
    )


@pytest.mark.usefixtures("native")
def test_a_kvm_that_runs_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> float:
        raise BackendError("it ended")

    monkeypatch.setattr(linux, "kernel_instruction_ns", fail)
    assert refusal() == "this host's KVM runs no guest kernel: it ended"


@pytest.mark.usefixtures("native")
def test_without_the_source_tree_there_is_no_guest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(linux, "LINUX_GUEST", tmp_path / "none")
    assert refusal() == "the Linux guest is not here: run kvmd from its source tree, where tests/linux_guest is"


@pytest.mark.usefixtures("native")
def test_without_a_kernel_the_lab_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMD_LAB_KERNEL", "/none")
    assert refusal() == "lab/kernel: KVMD_LAB_KERNEL=/none: no such file"


@pytest.mark.usefixtures("native")
def test_without_qemu_there_is_nothing_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(b"kernel")
    monkeypatch.setenv("KVMD_LAB_KERNEL", str(tmp_path / "bzImage"))
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert refusal() == "there is no qemu-system-x86_64: install qemu-system-x86"
