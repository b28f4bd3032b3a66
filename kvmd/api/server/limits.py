"""How much of the daemon one client may take up."""

from __future__ import annotations

from dataclasses import dataclass

from kvmd.units import KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on connections and requests.

    Attributes:
        connections: open at once, by all clients.
        connections_per_user: open at once by one user, unless it is root or the daemon's own, so that nobody who may
            only look can lock the operators out.
        header_bytes: of a request line with its header fields, and of chunk headers and trailers.
        body_bytes: of a request's content; it is read whole before the app sees the request.
        header_seconds: from a request's first byte to the end of its header; also from connecting to the first byte.
        body_seconds: from the end of the header to the end of the content.
        idle_seconds: between two requests on one connection.
        unread_seconds: a response with an end may stay unread; streams may for ever, since a terminal may be held.
        drain_seconds: from the server's stop to the moment when what is left is cancelled.
        linger_seconds: after a refusal, for the client to read it before it is told that nobody reads its request.
    """

    connections: int = 1024
    connections_per_user: int = 256
    header_bytes: int = 16 * KIB
    body_bytes: int = 64 * KIB
    header_seconds: float = 10
    body_seconds: float = 30
    idle_seconds: float = 75
    unread_seconds: float = 30
    drain_seconds: float = 5
    linger_seconds: float = 1
