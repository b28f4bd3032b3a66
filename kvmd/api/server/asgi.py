"""The shapes of ASGI (version 3.0, HTTP specification 2.3) that this server and its apps speak.

2.3 is announced and meant: a message sent after the client has gone is dropped, and frameworks that would otherwise
wait for an OSError (2.4) listen for ``http.disconnect`` instead.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HUNG_UP = "kvmd.hung_up"
"""Extension: an async function that returns once the client neither sends nor reads any more, whatever of it is still
unread."""

VERSIONS = {"version": "3.0", "spec_version": "2.3"}

PEER = "kvmd.peer"
"""Extension: the ``Peer`` that connected."""

DRAINING = "kvmd.draining"
"""Extension: a ``trio.Event``, set when the server stops. A response without an end of its own ends then; one that is
still there at the drain deadline is cancelled."""

PASSED_FILE = "kvmd.passed_file"
"""Extension: an open descriptor that came with the request (SCM_RIGHTS), present only where one did. The server closes
it after the response."""

UPGRADE = "kvmd.upgrade"
"""Extension: the protocol that the client offers to go on with (RFC 9110 7.8), present only where it does. An app that
takes it sends ``http.response.start`` with status 101; from then on ``http.response.body`` and ``http.request`` carry
raw bytes, and ``http.request`` without ``more_body`` says that the client sends no more."""
