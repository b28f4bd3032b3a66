"""Who may do what: decided from the credentials that a client connected with, before anything else."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvmd.api.problems import MEDIA_TYPE, Problem, ProblemType
from kvmd.api.server.asgi import PEER, App, Receive, Scope, Send
from kvmd.api.server.peer import Peer

CALLER = "kvmd.caller"
"""Extension: the ``Caller``, in the scope of every request that comes through the gate."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Role(enum.Enum):
    """What somebody may do."""

    OPERATE = "operate"
    """Everything."""
    VIEW = "view"
    """Look at everything but guests' memory."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        uid: its user.
        role: what it may do.
    """

    uid: int
    role: Role

    def need_operator(self, what: str) -> None:
        """Refuse whoever may only look.

        Raises:
            Problem: ``forbidden``.
        """
        if self.role is not Role.OPERATE:
            raise Problem(ProblemType.FORBIDDEN, f"user {self.uid} may look, but not {what}")


@dataclass(frozen=True, slots=True)
class AccessRules:
    """Who has which role. Root and the daemon's own user operate: they could do all of it without the API.

    Attributes:
        own_uid: the daemon's user.
        operators: the group of those who operate, or None.
        viewers: the group of those who may look, or None.
    """

    own_uid: int
    operators: int | None = None
    viewers: int | None = None
    _operating: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_operating", frozenset({0, self.own_uid}))

    def role_of(self, peer: Peer) -> Role | None:
        """Return the role of whoever connected, or None for strangers."""
        if peer.uid in self._operating or self.operators in peer.groups:
            return Role.OPERATE
        return Role.VIEW if self.viewers in peer.groups else None


class Gate:
    """An ASGI app that lets requests through to another one, or refuses them.

    Attributes:
        rules: who may do what, from the next request on.

    Args:
        app: behind the gate.
        rules: who may do what.
    """

    def __init__(self, app: App, rules: AccessRules) -> None:
        self._app = app
        self.rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request through, or refuse it."""
        try:
            self._check(scope)
        except Problem as problem:
            await send_problem(problem, send)
            return
        if scope["method"] == "HEAD":
            # The same as GET (RFC 9110 9.3.2); the server drops the content.
            scope["method"] = "GET"
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        peer: Peer = scope["extensions"][PEER]
        role = self.rules.role_of(peer)
        if role is None:
            raise Problem(
                ProblemType.FORBIDDEN, f"user {peer.uid} is neither in the operators' group nor in the viewers'"
            )
        caller = Caller(peer.uid, role)
        if scope["method"] not in _SAFE_METHODS:
            caller.need_operator("change anything")
        # Decoded, it would name another resource than the one meant (RFC 3986 2.2: %2F and / are not the same).
        if b"%2f" in scope["raw_path"].lower():
            raise Problem(ProblemType.NOT_FOUND, "no resource of this API has a slash in its name")
        scope["extensions"][CALLER] = caller


async def send_problem(problem: Problem, send: Send) -> None:
    """Answer with a problem document."""
    document = problem.document()
    headers = [(b"content-type", MEDIA_TYPE), (b"content-length", b"%d" % len(document)), *problem.headers]
    await send({"type": "http.response.start", "status": problem.kind.status, "headers": headers})
    await send({"type": "http.response.body", "body": document, "more_body": False})
