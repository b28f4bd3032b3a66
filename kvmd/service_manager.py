"""What systemd and the daemon tell each other: readiness, the watchdog, and sockets handed over.

The protocol is a datagram for each notice (sd_notify(3)) and an environment variable for each fact (sd_listen_fds(3)),
so it is written here. Tried: ``systemd-python`` and ``cysystemd`` want a compiler and libsystemd's headers to install;
``sdnotify`` opens its socket for each call, hides every error, and knows neither the watchdog nor file descriptors.

Without systemd nothing is sent, and every question has the answer "nothing".
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

import structlog

from kvmd.errors import HostError

_FIRST_FD = 3
"""SD_LISTEN_FDS_START."""

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.daemon")


class ServiceManager:
    """The daemon's line to the service manager that started it.

    Args:
        environment: where systemd has put its variables. They are taken out, so that no child believes them its own.
        pid: of this process, which ``LISTEN_PID`` and ``WATCHDOG_PID`` have to name.

    Raises:
        HostError: ``NOTIFY_SOCKET`` names something that cannot be sent to.
    """

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        self._socket: socket.socket | None = None
        address = environment.get("NOTIFY_SOCKET", "")
        if address:
            # A leading "@" stands for the NUL of an abstract address.
            target = "\0" + address[1:] if address.startswith("@") else address
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            try:
                self._socket.connect(target)
            except OSError as error:
                self._socket.close()
                raise HostError(
                    f"cannot reach the service manager at {address}: {error.strerror}: unset NOTIFY_SOCKET where kvmd "
                    "was not started by one"
                ) from error
        self._unheard = False
        self._watchdog_seconds = _watchdog_seconds(environment, pid)
        self._listened = _listened(environment, pid)

    @classmethod
    def of_this_process(cls) -> ServiceManager:
        """Return the line of this process, and take its variables out of the environment."""
        manager = cls(os.environ, os.getpid())
        for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"):
            os.environ.pop(name, None)
        for fd in manager.listened.values():
            os.set_inheritable(fd, False)  # noqa: FBT003 - it takes no keyword
        return manager

    @property
    def watchdog_seconds(self) -> float | None:
        """How soon after each other ``alive`` has to be called, or None where nobody watches."""
        return self._watchdog_seconds

    @property
    def listened(self) -> Mapping[str, int]:
        """File descriptors that were handed over, by name: sockets of socket activation."""
        return self._listened

    def ready(self, status: str) -> None:
        """Say that the daemon serves, after its start or a reload."""
        self._notify("READY=1", f"STATUS={_line(status)}")

    def reloading(self) -> None:
        """Say that the configuration is being read again; ``ready`` ends it (sd_notify(3), Type=notify-reload)."""
        self._notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str) -> None:
        """Say that the daemon is on its way out."""
        self._notify("STOPPING=1", f"STATUS={_line(status)}")

    def status(self, status: str) -> None:
        """Set the line that ``systemctl status`` shows."""
        self._notify(f"STATUS={_line(status)}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._notify("WATCHDOG=1")

    def close(self) -> None:
        """Give up the line; harmless the second time."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _notify(self, *lines: str) -> None:
        """Send a notice. One that does not get through ends nothing: guests outlive their manager's troubles."""
        if self._socket is None:
            return
        try:
            self._socket.send("\n".join(lines).encode())
        except OSError as error:
            if not self._unheard:
                _log.warning("service-manager-does-not-listen", notice=lines[0], problem=error.strerror)
            self._unheard = True
        else:
            self._unheard = False


def _watchdog_seconds(environment: Mapping[str, str], pid: int) -> float | None:
    """Return half the watchdog's time, as sd_watchdog_enabled(3) advises."""
    watched = environment.get("WATCHDOG_PID", "")
    if watched and watched != str(pid):
        return None
    microseconds = environment.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2_000_000 if microseconds.isascii() and microseconds.isdigit() else None


def _listened(environment: Mapping[str, str], pid: int) -> dict[str, int]:
    count = environment.get("LISTEN_FDS", "")
    if environment.get("LISTEN_PID") != str(pid) or not (count.isascii() and count.isdigit()):
        return {}
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    return {names[index] if index < len(names) and names[index] else f"fd{fd}": fd for index, fd in enumerate(fds)}


def _line(text: str) -> str:
    """Return the text as one line: a newline would begin another variable."""
    return " ".join(text.split())
