"""One connection: requests one after the other, each whole before the app sees it."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

import h11
import structlog
import trio

from kvmd.api.problems import MEDIA_TYPE, Problem, ProblemType, of_status
from kvmd.api.server.asgi import DRAINING, HUNG_UP, PASSED_FILE, PEER, UPGRADE, VERSIONS, App, Scope
from kvmd.api.server.exchange import Exchange
from kvmd.api.server.limits import Limits
from kvmd.api.server.peer import Peer
from kvmd.api.server.wire import Wire


class Connection:
    """Serves one client until it leaves, misbehaves, or the server stops.

    Args:
        app: answers requests.
        wire: the client; closed by ``run``.
        peer: who it is.
        limits: how much it may take up.
        draining: set when the server stops.
        log: told of bugs.
    """

    def __init__(
        self,
        app: App,
        wire: Wire,
        peer: Peer,
        *,
        limits: Limits,
        draining: trio.Event,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._app = app
        self._wire = wire
        self._peer = peer
        self._limits = limits
        self._draining = draining
        self._log = log
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self._between_requests: trio.CancelScope | None = None
        self._first = True
        self._head = False

    def drain(self) -> None:
        """Take no further request: end now where none is being answered, else after that."""
        if self._between_requests is not None:
            self._between_requests.cancel()

    async def run(self) -> None:
        """Serve."""
        try:
            while await self._answer_one():
                self._http.start_next_cycle()
                self._wire.drop_passed()
        except Problem as problem:
            await self._refuse(problem)
        finally:
            self._wire.close()

    async def _answer_one(self) -> bool:
        """Answer the next request; return whether there may be another one."""
        try:
            request = await self._next_request()
            if request is None:
                return False
            if not request.http_version.startswith(b"1."):
                raise Problem(ProblemType.HTTP_VERSION, "kvmd speaks HTTP/1.1 and HTTP/1.0")
            self._head = request.method == b"HEAD"
            body = await self._body_of(request)
            # After the content: a descriptor may have come with its last bytes.
            scope = self._scope_of(request)
        except h11.RemoteProtocolError as error:
            raise of_status(error.error_status_hint, _one_line(str(error))) from error
        exchange = Exchange(
            self._wire, self._http, head=self._head, body=body, limits=self._limits, draining=self._draining
        )
        try:
            await self._app(scope, exchange.receive, exchange.send)
            exchange.check_answered()
        except Exception:  # noqa: BLE001 - a bug in the app ends one response, not the daemon
            self._log.exception("api-bug", method=request.method.decode("ascii"), path=scope["path"])
            if not exchange.started:
                await self._refuse(Problem(ProblemType.INTERNAL, "the log of kvmd says what happened"))
            return False
        finally:
            if PASSED_FILE in scope["extensions"]:
                self._wire.passed.insert(0, scope["extensions"][PASSED_FILE])
                self._wire.drop_passed()
        return (
            exchange.complete
            and not exchange.gone
            and not self._draining.is_set()
            and self._http.our_state is self._http.their_state is h11.DONE
        )

    async def _next_request(self) -> h11.Request | None:
        """Return the next request's header, or None where there will be none."""
        limits = self._limits
        if self._draining.is_set():
            return None
        begun = bool(self._http.trailing_data[0])
        waiting = limits.header_seconds if begun or self._first else limits.idle_seconds
        self._first = False
        with trio.CancelScope(deadline=trio.current_time() + waiting) as scope:
            self._between_requests = scope
            while (event := self._http.next_event()) is h11.NEED_DATA:
                data = await self._wire.receive()
                if data and not begun:
                    begun = True
                    scope.deadline = trio.current_time() + limits.header_seconds
                self._http.receive_data(data)
        self._between_requests = None
        if scope.cancelled_caught:
            if begun and not self._draining.is_set():
                raise Problem(
                    ProblemType.REQUEST_TIMEOUT, f"the header did not arrive within {limits.header_seconds:g} s"
                )
            return None
        return event if isinstance(event, h11.Request) else None

    async def _body_of(self, request: h11.Request) -> bytes:
        """Return the request's content."""
        limits = self._limits
        too_large = Problem(ProblemType.CONTENT_TOO_LARGE, f"more than {limits.body_bytes} bytes of content")
        # h11 has seen to it that there is one length at most, and that it is a number.
        length = next((value for name, value in request.headers if name == b"content-length"), b"0")
        if int(length) > limits.body_bytes:
            raise too_large
        event = self._http.next_event()
        if isinstance(event, h11.EndOfMessage):
            return b""
        body = bytearray()
        with trio.move_on_after(limits.body_seconds):
            if self._http.they_are_waiting_for_100_continue:
                go_on = self._http.send(h11.InformationalResponse(status_code=100, headers=[])) or b""
                await self._wire.send(go_on)
            while True:
                match event:
                    case h11.NEED_DATA:
                        self._http.receive_data(await self._wire.receive())
                    case h11.Data(data=data):
                        body += data
                        if len(body) > limits.body_bytes:
                            raise too_large
                    case _:
                        return bytes(body)
                event = self._http.next_event()
        raise Problem(ProblemType.REQUEST_TIMEOUT, f"the content did not arrive within {limits.body_seconds:g} s")

    def _scope_of(self, request: h11.Request) -> Scope:
        raw_path, _, query = _origin_form(request).partition(b"?")
        try:
            path = unquote_to_bytes(raw_path).decode()
        except UnicodeDecodeError as error:
            raise Problem(ProblemType.BAD_REQUEST, "the request's path is not UTF-8 text") from error
        extensions: dict[str, object] = {
            PEER: self._peer,
            DRAINING: self._draining,
            HUNG_UP: self._wire.wait_hung_up,
        }
        if self._wire.passed:
            extensions[PASSED_FILE] = self._wire.passed.pop(0)
        headers = list(request.headers)
        if request.http_version == b"1.1" and request.method == b"GET":
            offered = [value for name, value in headers if name == b"upgrade"]
            if offered:
                extensions[UPGRADE] = offered[0].decode("latin-1")
        return {
            "type": "http",
            "asgi": VERSIONS,
            "http_version": request.http_version.decode("ascii"),
            "method": request.method.decode("ascii"),
            "scheme": "http",
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": None,
            "server": None,
            "state": {},
            "extensions": extensions,
        }

    async def _refuse(self, problem: Problem) -> None:
        """Answer a request that the app never sees, and end the connection: what follows cannot be told apart."""
        if self._http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return
        self._log.debug("api-refused", problem=problem.kind.value[0], detail=problem.detail, uid=self._peer.uid)
        with trio.move_on_after(self._limits.unread_seconds):
            await self._wire.send(refusal(self._http, problem, head=self._head))
            await self._wire.linger(self._limits.linger_seconds)


def refusal(http: h11.Connection, problem: Problem, *, head: bool = False) -> bytes:
    """Return the whole of a response that is the connection's last; without its content where ``head``."""
    document = problem.document()
    headers = [
        (b"content-type", MEDIA_TYPE),
        (b"content-length", b"%d" % len(document)),
        (b"connection", b"close"),
        *problem.headers,
    ]
    data = http.send(h11.Response(status_code=problem.kind.status, headers=headers)) or b""
    if not head:
        data += http.send(h11.Data(data=document)) or b""
    return data + (http.send(h11.EndOfMessage()) or b"")


def _origin_form(request: h11.Request) -> bytes:
    """Return the target's path and query, of whichever form it is (RFC 9112 3.2)."""
    target = request.target
    if target.startswith(b"/"):
        return target
    if target == b"*" and request.method == b"OPTIONS":
        return target
    scheme, separator, rest = target.partition(b"://")
    if separator and scheme.lower() in {b"http", b"https"}:
        authority, slash, path = rest.partition(b"/")
        return slash + path if slash else b"/" + authority[len(authority.partition(b"?")[0]) :]
    raise Problem(ProblemType.BAD_REQUEST, "the request's target is neither a path nor an http address")


def _one_line(text: str) -> str:
    return text if text.isprintable() else repr(text)
