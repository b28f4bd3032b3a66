"""What the API refuses, as problem documents (RFC 9457): every type, its status, and how one is written."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

MEDIA_TYPE = b"application/problem+json"
PREFIX = "urn:kvmd:problem:"
"""Types are names, not addresses: there is no web server that could answer for a daemon behind a socket. They never
change; docs/api.md says what each means."""


class ProblemType(enum.Enum):
    """A kind of problem: the end of its ``type``, its status, and its ``title``."""

    BAD_REQUEST = "bad-request", 400, "The request is not valid HTTP or not valid JSON"
    FORBIDDEN = "forbidden", 403, "The caller may not do this"
    NOT_FOUND = "not-found", 404, "There is no such resource"
    UNKNOWN_MACHINE = "unknown-machine", 404, "There is no machine of that name"
    NO_SUCH_DEVICE = "no-such-device", 404, "The machine does not have this device"
    METHOD_NOT_ALLOWED = "method-not-allowed", 405, "The resource does not have this method"
    REQUEST_TIMEOUT = "request-timeout", 408, "The request did not arrive in time"
    MACHINE_EXISTS = "machine-exists", 409, "A machine of that name is there already"
    WRONG_STATE = "wrong-state", 409, "The machine is in a state that does not allow this"
    DEVICE_IN_USE = "device-in-use", 409, "Somebody else has what one has at a time"
    PRIVATE_MEMORY = "private-memory", 409, "The memory is private: only the guest may see it"
    CONTENT_TOO_LARGE = "content-too-large", 413, "The request's content is larger than any that makes sense"
    UNSUPPORTED_MEDIA_TYPE = "unsupported-media-type", 415, "The request's content is of another type"
    OUTSIDE_MEMORY = "outside-memory", 416, "The range is not within the machine's memory"
    INVALID_REQUEST = "invalid-request", 422, "A field is unknown, missing or has an impossible value"
    INVALID_SPEC = "invalid-spec", 422, "The machine cannot be made as described"
    INVALID_IMAGE = "invalid-image", 422, "The image cannot be used"
    UPGRADE_REQUIRED = "upgrade-required", 426, "The resource needs an upgraded connection"
    UNKNOWN_EVENT = "unknown-event", 422, "The stream never had an event of that id"
    HEADER_TOO_LARGE = "header-too-large", 431, "The request's header is larger than any that makes sense"
    INTERNAL = "internal", 500, "kvmd has a bug; its log says more"
    NOT_IMPLEMENTED = "not-implemented", 501, "The request needs something of HTTP that kvmd does not know"
    HOST_LACKS = "host-lacks", 503, "The host lacks something that was asked for"
    BACKEND_FAILED = "backend-failed", 503, "The host refused a change of the machine"
    TOO_MANY_CONNECTIONS = "too-many-connections", 503, "There are too many connections"
    MACHINE_SILENT = "machine-silent", 504, "The machine's process does not answer"
    HTTP_VERSION = "http-version", 505, "The request is of a version of HTTP that kvmd does not speak"
    STOPPING = "stopping", 503, "kvmd is stopping"

    @property
    def uri(self) -> str:
        """The value of the document's ``type``."""
        return PREFIX + self.value[0]

    @property
    def status(self) -> int:
        """The response's status."""
        return self.value[1]

    @property
    def title(self) -> str:
        """What all problems of the type have in common."""
        return self.value[2]


class Problem(Exception):
    """A request that is answered with a problem document.

    Attributes:
        kind: its type.
        detail: one line on this occurrence.
        more: members of its own, such as ``needed`` and ``found``.
        headers: further header fields of the response.
    """

    def __init__(
        self,
        kind: ProblemType,
        detail: str,
        *,
        more: Mapping[str, object] | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        # A client's own words may be in it, and it ends up on terminals and in logs.
        self.detail = detail if detail.isprintable() else repr(detail)
        super().__init__(self.detail)
        self.kind = kind
        self.more = dict(more or {})
        self.headers = headers

    def document(self) -> bytes:
        """Return the document."""
        return msgspec.json.encode(
            {
                "type": self.kind.uri,
                "title": self.kind.title,
                "status": self.kind.status,
                "detail": self.detail,
                **self.more,
            }
        )


def of_status(status: int, detail: str) -> Problem:
    """Return the problem that a bare HTTP status stands for."""
    kind = next((kind for kind in ProblemType if kind.status == status), None)
    if kind is None:
        kind = ProblemType.INTERNAL if status >= ProblemType.INTERNAL.status else ProblemType.BAD_REQUEST
    return Problem(kind, detail)
