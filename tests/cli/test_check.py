import json
from typing import Self

import pytest

from kvmd.cli import check as module
from kvmd.cli.main import run_cli
from kvmd.errors import HostError
from kvmd.kvm.capabilities import CapabilityReport
from kvmd.stop import ExitStatus
from tests.cli.test_host_report import answers


class FakeKvm:
    @classmethod
    def open(cls) -> Self:
        return cls()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class NoKvm:
    @classmethod
    def open(cls) -> FakeKvm:
        raise HostError("/dev/kvm is missing: load the module")


def fake_host(monkeypatch: pytest.MonkeyPatch, reports: list[CapabilityReport]) -> None:
    monkeypatch.setattr(module, "Kvm", FakeKvm)
    monkeypatch.setattr(module, "probe", lambda _kvm: tuple(reports))


def test_a_usable_host_is_status_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_host(monkeypatch, answers())
    assert run_cli(["check"]) == 0
    assert capsys.readouterr().out.startswith("kvmd can run guests on this host.")


def test_a_host_of_no_use_is_status_121(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_host(monkeypatch, answers(KVM_CAP_USER_MEMORY=0))
    monkeypatch.setattr(module, "missing_emulator", lambda: "the package unicorn is not installed")
    assert run_cli(["check"]) == ExitStatus.HOST
    assert capsys.readouterr().out.startswith("kvmd cannot run guests on this host.")


def test_json_is_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_host(monkeypatch, answers(KVM_CAP_USER_MEMORY=0))
    monkeypatch.setattr(module, "missing_emulator", lambda: "no emulator")
    assert run_cli(["check", "--json"]) == ExitStatus.HOST
    found = json.loads(capsys.readouterr().out)
    assert (found["usable"], found["accelerator"]) == (False, None)


def test_a_host_without_kvm_says_why_and_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "Kvm", NoKvm)
    monkeypatch.setattr(module, "missing_emulator", lambda: None)
    assert run_cli(["check"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("kvmd can run guests on this host.")
    assert "cannot be used: /dev/kvm is missing: load the module" in text
    assert "What is lost without KVM:" in text
    assert run_cli(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problem"] == "/dev/kvm is missing: load the module"
    assert found["accelerator"] == "software"
    assert found["accelerators"]["kvm"] == {"usable": False, "problem": "/dev/kvm is missing: load the module"}


def test_a_host_without_either_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "Kvm", NoKvm)
    monkeypatch.setattr(module, "missing_emulator", lambda: "install kvmd[software]")
    assert run_cli(["check"]) == ExitStatus.HOST
    text = capsys.readouterr().out
    assert text.startswith("kvmd cannot run guests on this host.")
    assert "software CPU   install kvmd[software]" in text
    assert "lost" not in text


def test_what_guests_networks_lack_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_host(monkeypatch, answers())
    monkeypatch.setattr(module, "missing_for_bridges", lambda: None)
    monkeypatch.setattr(module, "missing_for_namespaces", lambda: "no CAP_SYS_ADMIN")
    assert run_cli(["check"]) == 0
    assert "  networks       bridges\n                 namespaces: no CAP_SYS_ADMIN\n" in capsys.readouterr().out
    assert run_cli(["check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["networks"] == {
        "bridges": {"usable": True, "problem": None},
        "namespaces": {"usable": False, "problem": "no CAP_SYS_ADMIN"},
    }
