"""systemd's own opinion of the units."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmd.cli.daemon import SLICE
from kvmd.daemon_config import MachinesConfig
from kvmd.machine_process.cgroup import unit_name, unit_number
from kvmd.spec.limits import TASKS_LIMIT

UNITS = Path(__file__).parent.parent / "systemd"
MOST_EXPOSURE = 2.0

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """The units, with a program that is there in place of the one that is to be installed."""
    for unit in UNITS.glob("kvmd*.s*"):
        (tmp_path / unit.name).write_text(
            unit.read_text(encoding="utf-8").replace("/usr/bin/kvmd", "/bin/true"), encoding="utf-8"
        )
    return sorted(tmp_path.glob("kvmd*.s*"))


@pytest.fixture(params=["kvmd.service", "kvmd-machine@.service"])
def service_with_networks(units: list[Path], request: pytest.FixtureRequest) -> Path:
    """A service with the drop-in that lets machines have networks."""
    service = next(unit for unit in units if unit.name == request.param)
    folder = service.with_name(f"{service.name}.d")
    folder.mkdir()
    shutil.copy(UNITS / "kvmd-network.conf", folder)
    return service


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - systemd's own program
        ["systemd-analyze", *arguments],  # noqa: S607 - wherever it is
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_machines_unit_may_place_its_threads_and_set_no_other_resource() -> None:
    allowed: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.*)$", (UNITS / "kvmd-machine@.service").read_text(), re.MULTILINE):
        names = {name for word in line.lstrip("~").split() for name in calls_of(word)}
        allowed = allowed - names if line.startswith("~") else allowed | names
    assert allowed & set(calls_of("@resources")) == {"sched_setaffinity"}
    assert {"sched_getaffinity", "ioctl", "eventfd2"} <= allowed


def calls_of(word: str) -> list[str]:
    """Return the system calls that a word of a filter stands for."""
    if not word.startswith("@"):
        return [word]
    lines = analyze("syscall-filter", word).stdout.splitlines()
    return [name for line in lines[1:] if (entry := line.strip()) and entry[0] != "#" for name in calls_of(entry)]


def test_systemd_has_nothing_to_say_of_the_units(units: list[Path]) -> None:
    assert [unit.name for unit in units] == [
        "kvmd-machine@.service",
        "kvmd-view.socket",
        "kvmd.service",
        "kvmd.slice",
        "kvmd.socket",
    ]
    done = analyze("verify", *map(str, units))
    # It exits 0 for a key that it does not know.
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_a_mistake_in_a_unit_would_be_seen(units: list[Path]) -> None:
    service = next(unit for unit in units if unit.name == "kvmd.service")
    service.write_text(service.read_text(encoding="utf-8").replace("WatchdogSec=", "WatchdogSecs="), encoding="utf-8")
    done = analyze("verify", str(service))
    assert "WatchdogSecs" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["kvmd.service", "kvmd-machine@.service"])
def test_the_daemon_and_machines_are_shut_in(units: list[Path], name: str) -> None:
    service = next(unit for unit in units if unit.name == name)
    done = analyze("security", "--offline=true", str(service))
    found = re.search(r"exposure level for kvmd.*\.service: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) < MOST_EXPOSURE


def test_networks_cost_one_capability_and_no_more(service_with_networks: Path) -> None:
    done = analyze("verify", str(service_with_networks))
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)
    done = analyze("security", "--offline=true", "--no-pager", str(service_with_networks))
    found = re.search(r"exposure level for kvmd.*\.service: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) < MOST_EXPOSURE
    granted = re.findall(r"^✗ (?:CapabilityBoundingSet|AmbientCapabilities)\S+", done.stdout, re.MULTILINE)
    assert sorted(granted) == ["✗ AmbientCapabilities=", "✗ CapabilityBoundingSet=~CAP_NET_ADMIN"]


def test_units_and_code_say_the_same() -> None:
    machine = (UNITS / "kvmd-machine@.service").read_text(encoding="utf-8")
    assert f"\nTasksMax={TASKS_LIMIT}\n" in machine
    assert f"--wait-at {MachinesConfig().socket}\n" in machine
    daemon = (UNITS / "kvmd.service").read_text(encoding="utf-8")
    assert f"\nSlice={SLICE}\n" in daemon
    assert f"\nSlice={SLICE}\n" in machine


def test_the_rule_for_polkit_names_what_is_asked_of_systemd() -> None:
    rule = (UNITS / "kvmd.rules").read_text(encoding="utf-8")
    pattern = re.search(r"/(\^kvmd.*\$)/", rule)
    assert pattern is not None
    for number in (1, 7, 123456789):
        assert re.fullmatch(pattern[1], unit_name(number))
    for name in (
        "kvmd.service",
        "kvmd-machine@.service",
        "kvmd-machine@0.service",
        "kvmd-machine@1.service.d",
        "undefined",
    ):
        assert not re.fullmatch(pattern[1], name)
        assert unit_number(name) is None
    assert 'subject.user == "kvmd"' in rule
