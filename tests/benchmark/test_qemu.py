"""QEMU beside kvmd: what is missing of it takes no figure of kvmd's own away."""

import os
from pathlib import Path

import pytest

from kvmd.benchmark.measure import CannotMeasure, Report
from kvmd.benchmark.qemu import need_qemu, qemu_firmware


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVMD_BENCH_BUILD", str(tmp_path / "build"))
    return tmp_path / "build"


def put_qemu(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.compiler
@pytest.mark.usefixtures("build")
def test_a_qemu_that_does_not_start_is_missing_and_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_qemu(tmp_path, "echo 'error: MSR 0x10a' >&2; echo 'Assertion failed.' >&2; exit 1", monkeypatch)
    report = Report("start", "title")
    assert qemu_firmware(report) is None
    assert report.missing == ["QEMU microvm ended before its guest said anything: Assertion failed."]


@pytest.mark.compiler
def test_a_qemu_that_starts_was_tried_with_its_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, build: Path
) -> None:
    put_qemu(tmp_path, "echo hello", monkeypatch)
    report = Report("start", "title")
    assert qemu_firmware(report) == build / "firmware.bin"
    assert report.missing == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVMD_BENCH_BUILD", str(tmp_path / "file" / "build"))
    monkeypatch.setattr("shutil.which", lambda _: "/bin/true")
    with pytest.raises(CannotMeasure, match="name a folder that can be written in KVMD_BENCH_BUILD"):
        need_qemu()
