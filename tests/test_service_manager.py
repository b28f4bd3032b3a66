"""What is said to systemd, and what it said."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog.testing

from kvmd.errors import HostError
from kvmd.service_manager import ServiceManager


@pytest.fixture
def notified(tmp_path: Path) -> Iterator[socket.socket]:
    """The end that systemd listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(10)
        yield listening


@pytest.fixture
def manager(notified: socket.socket) -> Iterator[ServiceManager]:
    made = ServiceManager({"NOTIFY_SOCKET": str(notified.getsockname())}, 1)
    yield made
    made.close()
    made.close()


def test_each_notice_is_one_datagram(manager: ServiceManager, notified: socket.socket) -> None:
    manager.ready("serving 3 machines")
    assert notified.recv(1000) == b"READY=1\nSTATUS=serving 3 machines"
    manager.alive()
    assert notified.recv(1000) == b"WATCHDOG=1"
    manager.stopping("draining")
    assert notified.recv(1000) == b"STOPPING=1\nSTATUS=draining"
    manager.reloading()
    first, second = notified.recv(1000).decode().split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0


def test_a_status_cannot_smuggle_in_a_variable(manager: ServiceManager, notified: socket.socket) -> None:
    manager.status("one\nFDSTORE=1\r\n two")
    assert notified.recv(1000) == b"STATUS=one FDSTORE=1 two"


def test_a_manager_that_does_not_listen_ends_nothing(manager: ServiceManager, notified: socket.socket) -> None:
    notified.close()
    with structlog.testing.capture_logs() as logs:
        manager.alive()
        manager.alive()
    (told,) = logs
    assert told["event"] == "service-manager-does-not-listen"
    assert (told["notice"], told["problem"]) == ("WATCHDOG=1", "Connection refused")


def test_an_abstract_address() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind("\0kvmd-test-" + str(os.getpid()))
        listening.settimeout(10)
        manager = ServiceManager({"NOTIFY_SOCKET": "@kvmd-test-" + str(os.getpid())}, 1)
        manager.alive()
        assert listening.recv(100) == b"WATCHDOG=1"
        manager.close()


def test_a_socket_that_nobody_listens_on(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="unset NOTIFY_SOCKET"):
        ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "none")}, 1)


def test_without_a_manager_nothing_is_said_and_nothing_known() -> None:
    manager = ServiceManager({}, 1)
    manager.ready("serving")
    manager.alive()
    assert manager.watchdog_seconds is None
    assert manager.listened == {}
    manager.close()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time(environment: dict[str, str], seconds: float | None) -> None:
    assert ServiceManager(environment, 42).watchdog_seconds == seconds


@pytest.mark.parametrize(
    ("environment", "listened"),
    [
        ({"LISTEN_FDS": "2", "LISTEN_PID": "42", "LISTEN_FDNAMES": "api:events"}, {"api": 3, "events": 4}),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "42", "LISTEN_FDNAMES": "api"}, {"api": 3, "fd4": 4}),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "42"}, {"fd3": 3}),
        ({"LISTEN_FDS": "1", "LISTEN_PID": "43"}, {}),
        ({"LISTEN_FDS": "1"}, {}),
        ({"LISTEN_FDS": "x", "LISTEN_PID": "42"}, {}),
    ],
)
def test_descriptors_handed_over(environment: dict[str, str], listened: dict[str, int]) -> None:
    assert ServiceManager(environment, 42).listened == listened


def test_no_child_takes_the_variables_for_its_own(notified: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(notified.getsockname()))
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    manager = ServiceManager.of_this_process()
    assert manager.watchdog_seconds == 0.5
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(os.environ)
    manager.close()
