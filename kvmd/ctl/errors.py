"""What goes wrong between kvmctl and the daemon, each with the exit status that it ends a command with.

::

    CtlError
    ├── Mistake        the command line, or a file that it names, cannot be meant
    ├── Unreachable    nobody answers on the socket, or this user may not open it
    ├── NotKvmd        what answers does not speak the control API, or stopped in the middle of an answer
    │   └── CutOff     the connection ended before the answer did
    └── Refused        kvmd answered with a problem document
"""

from __future__ import annotations

from collections.abc import Mapping

from kvmd.ctl.statuses import Status


class CtlError(Exception):
    """Base of all; its text is one line.

    Attributes:
        status: the exit status.
        kind: a word for programs: the end of a problem's type where kvmd refused, else one of kvmctl's own.
    """

    status = Status.INTERNAL
    kind = "internal"

    def document(self) -> dict[str, object]:
        """Return what ``--output json`` says of it."""
        return {"type": f"urn:kvmctl:problem:{self.kind}", "detail": str(self)}


class Mistake(CtlError):
    """The command line, or a file that it names, cannot be meant."""

    status = Status.REQUEST
    kind = "mistake"


class Unreachable(CtlError):
    """Nobody answers on the socket, or this user may not open it."""

    status = Status.UNREACHABLE
    kind = "unreachable"


class NotKvmd(CtlError):
    """What answers does not speak the control API."""

    status = Status.INTERNAL
    kind = "not-kvmd"


class CutOff(NotKvmd):
    """The connection ended, or was silent for too long, before the answer was complete."""

    status = Status.UNREACHABLE
    kind = "cut-off"


class Refused(CtlError):
    """kvmd answered with a problem document (RFC 9457).

    Attributes:
        problem: the document.
    """

    def __init__(self, kind: str, detail: str, problem: Mapping[str, object]) -> None:
        super().__init__(detail)
        self.kind = kind
        self.problem = problem
        self.status = _STATUS.get(kind, Status.REQUEST)

    def document(self) -> dict[str, object]:
        """Return the daemon's own document."""
        return {**self.problem, "detail": str(self)}


_STATUS = {
    "forbidden": Status.UNREACHABLE,
    "host-lacks": Status.UNREACHABLE,
    "too-many-connections": Status.UNREACHABLE,
    "stopping": Status.UNREACHABLE,
    "machine-silent": Status.UNREACHABLE,
    "backend-failed": Status.HOST_FAULT,
    "internal": Status.INTERNAL,
    "not-implemented": Status.INTERNAL,
}
"""Of problems that another request would not have mended; all others are the request's."""
