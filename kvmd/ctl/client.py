"""The control API as a client sees it: requests with their answers, streams, and connections that become a console."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from socket import socket
from typing import Any, cast

from kvmd.ctl.errors import CutOff, NotKvmd, Refused
from kvmd.ctl.text import shown
from kvmd.ctl.wire import Wire, connect

# http.client imports ssl where there is one, 10 ms and more for what no Unix socket needs; it is prepared for hosts
# without. An entry of None in sys.modules makes an import fail (Python's import system, 5.3.1).
_modules = cast("dict[str, Any]", sys.modules)
_hidden = "ssl" not in _modules
if _hidden:
    _modules["ssl"] = None
try:
    import http.client
finally:
    if _hidden:
        del _modules["ssl"]

import json  # noqa: E402 - where the alphabet puts it
from urllib.parse import quote, urlencode  # noqa: E402 - likewise

PREFIX = "/v1"
ANSWER_SECONDS = 60.0
"""How long an answer may take, beyond what it was asked to wait."""

SILENCE_SECONDS = 45.0
"""A stream says something every 15 seconds: after this long its connection is taken for lost."""

ANSWER_LIMIT = 32 << 20
"""Bytes of an answer: more than the largest map of memory has."""

_CHUNK_BYTES = 65536
_PROBLEM_PREFIX = "urn:kvmd:problem:"
_DETAIL_LIMIT = 1000
_FIRST_ERROR = 400

Query = Sequence[tuple[str, object]]


def machine_target(name: str, *parts: str) -> str:
    """Return the address of a machine, or of something of its."""
    return "/".join((f"{PREFIX}/machines", quote(name, safe=""), *parts))


class Connection(http.client.HTTPConnection):
    """An HTTP connection over a wire that is connected already."""

    def __init__(self, wire: Wire) -> None:
        # The API's server looks at the peer's credentials, not at the host.
        super().__init__("kvmd")
        self.auto_open = 0
        self.sock = cast("socket", wire)
        self._wire = wire

    def hang_up(self) -> None:
        """Close the connection."""
        self.close()
        self._wire.hang_up()


class Stream:
    """A response that is read as it comes."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self._response = response

    def read(self) -> bytes:
        """Return what has come, after waiting for it; nothing at the response's end.

        Raises:
            CutOff: the connection ended first.
            BrokenPipeError: nobody reads the output any more.
        """
        with _told():
            return _read_some(self._response)


class Client:
    """Asks the daemon.

    Args:
        path: of its socket; None for the one by default.
        output: the descriptor that streams are shown on, see ``Wire``.
    """

    def __init__(self, path: str | None, *, output: int | None = None) -> None:
        self.path = path
        self._output = output

    def get(self, target: str, query: Query = (), *, seconds: float = ANSWER_SECONDS) -> Any:
        """Return a resource."""
        return self._ask("GET", target, query, seconds=seconds)

    def post(
        self,
        target: str,
        body: object = None,
        *,
        query: Query = (),
        files: Sequence[int] = (),
        seconds: float = ANSWER_SECONDS,
    ) -> Any:
        """Do something; return what came of it.

        Args:
            target: the resource.
            body: sent as JSON, where it is not None.
            query: its parameters.
            files: descriptors that go with the request.
            seconds: how long it may take.
        """
        return self._ask("POST", target, query, body=body, files=files, seconds=seconds)

    def put(self, target: str, body: object) -> Any:
        """Change a resource, and return what it is then."""
        return self._ask("PUT", target, body=body)

    def delete(self, target: str) -> None:
        """Remove a resource."""
        self._ask("DELETE", target)

    def begin(self, method: str, target: str) -> Connection:
        """Send a request whose answer nobody waits for; it is given up where the connection is hung up.

        For a signal's handler, which must not wait: what the request did is seen elsewhere.
        """
        connection = Connection(Wire(connect(self.path), seconds=ANSWER_SECONDS))
        try:
            with _told():
                connection.request(method, target)
        except BaseException:
            connection.hang_up()
            raise
        return connection

    @contextmanager
    def stream(
        self,
        target: str,
        query: Query = (),
        headers: Mapping[str, str] | None = None,
        *,
        silence_seconds: float | None = SILENCE_SECONDS,
    ) -> Iterator[Stream]:
        """Open a response without an end of its own.

        Args:
            target: the resource.
            query: its parameters.
            headers: of the request.
            silence_seconds: see ``Wire``.

        Raises:
            CtlError: as ``get``.
        """
        wire = Wire(connect(self.path), silence_seconds=silence_seconds, output=self._output)
        with _closing(Connection(wire)) as connection:
            with _told():
                response = _answer(connection, "GET", _with_query(target, query), headers=headers)
                if response.status >= _FIRST_ERROR:
                    wire.set_deadline(ANSWER_SECONDS)
                    raise _refusal(response, _whole(response))
            yield Stream(response)

    @contextmanager
    def upgrade(self, target: str, protocol: str) -> Iterator[socket]:
        """Turn a connection into one of another protocol; it blocks no more than the caller wants.

        Raises:
            CtlError: as ``get``.
        """
        wire = Wire(connect(self.path), seconds=ANSWER_SECONDS, read_ahead=False)
        with _closing(Connection(wire)) as connection:
            with _told():
                headers = {"Connection": "upgrade", "Upgrade": protocol}
                response = _answer(connection, "GET", target, headers=headers)
                if response.status != http.client.SWITCHING_PROTOCOLS:
                    raise _refusal(response, _whole(response))
                if (response.getheader("upgrade") or "").lower() != protocol:
                    raise NotKvmd("what answers on the socket speaks another protocol than kvmd's")
            yield wire.socket

    def _ask(
        self,
        method: str,
        target: str,
        query: Query = (),
        *,
        body: object = None,
        files: Sequence[int] = (),
        seconds: float = ANSWER_SECONDS,
    ) -> Any:
        wire = Wire(connect(self.path), seconds=seconds)
        wire.pass_files(files)
        with _told(), _closing(Connection(wire)) as connection:
            response = _answer(connection, method, _with_query(target, query), body=body)
            content = _whole(response)
            if response.status >= _FIRST_ERROR:
                raise _refusal(response, content)
            return _parsed(content) if content else None


def _answer(
    connection: Connection, method: str, target: str, *, body: object = None, headers: Mapping[str, str] | None = None
) -> http.client.HTTPResponse:
    content = None if body is None else json.dumps(body).encode()
    more = {} if content is None else {"Content-Type": "application/json"}
    # A server that refuses may close before it has seen all of the request: its answer says why.
    with suppress(ConnectionError):
        connection.request(method, target, body=content, headers={**more, **(headers or {})})
    return connection.getresponse()


def _with_query(target: str, query: Query) -> str:
    return f"{target}?{urlencode(list(query))}" if query else target


@contextmanager
def _closing(connection: Connection) -> Iterator[Connection]:
    try:
        yield connection
    finally:
        connection.hang_up()


@contextmanager
def _told() -> Iterator[None]:
    """Tell what a connection or its other side may do to one, in kvmctl's words."""
    try:
        yield
    except BrokenPipeError:
        raise
    except http.client.RemoteDisconnected as error:
        raise CutOff("kvmd closed the connection without an answer") from error
    except http.client.IncompleteRead as error:
        raise CutOff("kvmd's answer stopped in the middle") from error
    except ConnectionError as error:
        raise CutOff("kvmd closed the connection in the middle of an answer") from error
    except (http.client.HTTPException, ValueError) as error:
        raise NotKvmd("what answers on the socket does not speak HTTP as kvmd does") from error


def _read_some(response: http.client.HTTPResponse) -> bytes:
    # Never read(): it would believe a chunk that says it is as large as memory.
    data = response.read1(_CHUNK_BYTES)
    if not data and response.length:
        raise http.client.IncompleteRead(data)
    return data


def _whole(response: http.client.HTTPResponse) -> bytes:
    parts = []
    size = 0
    while data := _read_some(response):
        size += len(data)
        if size > ANSWER_LIMIT:
            raise NotKvmd(f"the answer has more than {ANSWER_LIMIT >> 20} MiB: that is none of kvmd's")
        parts.append(data)
    return b"".join(parts)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NotKvmd("what answers on the socket does not send JSON as kvmd does") from error


def _refusal(response: http.client.HTTPResponse, content: bytes) -> Refused | NotKvmd:
    """Return what a response that says no means."""
    document: object = None
    if (response.getheader("content-type") or "").startswith("application/problem+json"):
        document = _parsed(content)
    match document:
        case {"type": str(kind), "detail": str(detail)} if kind.startswith(_PROBLEM_PREFIX):
            problem = cast("dict[str, object]", document)
            return Refused(kind.removeprefix(_PROBLEM_PREFIX), shown(detail)[:_DETAIL_LIMIT], problem)
        case _:
            return NotKvmd(f"what answers on the socket is not kvmd: it said {response.status} and no more")
