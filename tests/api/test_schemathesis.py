"""schemathesis against the API over its socket: every operation, good data and bad.

Twice: many examples against the server with a fleet in memory, where each finds the same machines, and some against the
real daemon with real machines on KVM.

Its pytest plugin stays away (pyproject.toml): importing schemathesis would cost every test run two seconds.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy, one_of

from kvmd.guests import GUESTS
from kvmd.ranges import PageState
from kvmd.spec.machine import spec_of
from kvmd.units import PAGE_SIZE
from tests.api.serving import Serving, serving_api
from tests.api.write_openapi import COMMITTED
from tests.fleet.conftest import Site
from tests.fleet.fakes import FakeFleet
from tests.fleet.test_commands import ask, daemon, end, socket_of
from tests.gate import Facility, require_whole

EXAMPLES = 25
EXAMPLES_OF_DAEMON = 10
BASE = "http://kvmd"
WAIT_SECONDS = 0.01

ENDED, LIVE, FRESH, HELD = "ended", "live", "fresh", "held"

STATES = {ENDED: "stopped", LIVE: "running", FRESH: "created", HELD: "paused"}
"""Machines that each example finds, and their states."""

DOCUMENT = json.loads(COMMITTED.read_text(encoding="utf-8"))
OPERATIONS = {
    operation["operationId"]: (path, method)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
ENDLESS = "/v1/events"
"""A stream without an end of its own: the client takes its first chunk for the whole, and hangs up."""

SWITCHED = 101
TOO_LARGE = 413
UPGRADED = {
    name: {"connection": "upgrade", "upgrade": protocol}
    for name, protocol in (("attach_console", "kvmd-console"), ("attach_agent", "kvmd-agent"))
}
"""What every second request for one of these asks for; it ends with the header of its answer."""

LINUX = {"kernel": str(GUESTS["hello"].path), "agent": "agent", "balloon": True}
"""A guest with all devices; the fleet in memory takes any file for a kernel."""

WAITING = {"wait_for_machine", "stop_machine"}
SELDOM_RIGHT = {"create_machine", "read_memory", "set_balloon"}
"""No made-up image is there, no made-up address is in memory, and no made-up size is a number of pages."""

END_WITH_THEIR_MACHINE = {"follow_machine_events", "follow_console", "follow_log", "type_into_console"}


def _modes() -> list[tuple[str, str]]:
    """Return the operations with good data, and with bad data those of which any can be bad: every text is a name."""
    found = []
    for name in sorted(OPERATIONS):
        path, method = OPERATIONS[name]
        operation = DOCUMENT["paths"][path][method]
        found.append((name, "positive"))
        if name == "create_machine" or any(part["in"] == "query" for part in operation.get("parameters", ())):
            found.append((name, "negative"))
    return found


class Server(Protocol):
    """Who is asked."""

    path: Path
    examples: int

    def refill(self) -> None:
        """Make the machines what each example expects."""

    def settle(self) -> None:
        """Return once the last client's leaving has been seen."""


class DaemonServer:
    """``kvmd daemon`` with machines on KVM; where an example changed one, it is made anew."""

    examples = EXAMPLES_OF_DAEMON

    def __init__(self, path: Path) -> None:
        self.path = path

    def refill(self) -> None:
        found = {machine["name"]: machine["state"] for machine in self._ask("GET", "")["machines"]}
        for name, state in found.items():
            if STATES.get(name) != state:
                if state in {"running", "paused"}:
                    self._ask("POST", f"/{name}/kill")
                self._ask("DELETE", f"/{name}")
        for name, state in STATES.items():
            if found.get(name) != state:
                image = "builtin:hello" if name == ENDED else "builtin:echo"
                self._ask("POST", "", {"image": image, "name": name, "memory": "2M"})
                if name != FRESH:
                    self._ask("POST", f"/{name}/start")
        if found.get(ENDED) != "stopped":
            self._ask("GET", f"/{ENDED}/wait?state=stopped")
        if found.get(HELD) != "paused":
            self._ask("POST", f"/{HELD}/pause")

    def settle(self) -> None:
        """Nothing of a client's keeps it from being stopped."""

    def _ask(self, method: str, target: str, body: object = None) -> Any:
        status, answer = ask(self.path, method, f"/v1/machines{target}", body)
        assert status < 300, answer
        return answer


class ServerThread:
    """The API in a thread of its own: schemathesis' client blocks."""

    examples = EXAMPLES

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ready: SimpleQueue[Serving] = SimpleQueue()
        self._thread = threading.Thread(target=partial(trio.run, self._main), name="api-under-schemathesis")
        self._thread.start()
        self.serving = self._ready.get()

    async def _main(self) -> None:
        async with serving_api(self.path) as serving:
            self._token = trio.lowlevel.current_trio_token()
            self._ready.put(serving)
            await serving.over.wait()

    def refill(self) -> None:
        """Make the fleet what each example expects."""
        trio.from_thread.run(refill, self.serving.fleet, trio_token=self._token)

    def settle(self) -> None:
        """Return once the server has seen the last client leave."""
        trio.from_thread.run(self._alone, trio_token=self._token)

    async def _alone(self) -> None:
        with trio.fail_after(10):
            while self.serving.server.open_connections:  # noqa: ASYNC110 - nobody tells
                await trio.sleep(0.001)

    def stop(self) -> None:
        trio.from_thread.run_sync(self.serving.server.stop, trio_token=self._token)
        self._thread.join()


async def refill(fleet: FakeFleet) -> None:
    fleet._guests.clear()
    for name in (ENDED, LIVE, FRESH, HELD):
        kind = LINUX if name in {LIVE, HELD} else {"image": "builtin:hello"}
        spec = spec_of({**kind, "name": name, "memory": "1M"}, base=Path())
        await fleet.create(spec, owner_uid=0)
        fleet.guest(name).convert(PAGE_SIZE, to=PageState.SHARED)
        if name != FRESH:
            await fleet.start(name)
    await fleet.pause(HELD)
    fleet.guest(ENDED).end()


def session_over(path: Path) -> Any:
    """Return a session of requests whose connections go to a Unix socket."""
    import requests  # noqa: PLC0415 - like schemathesis, not for every test run
    from requests.adapters import HTTPAdapter  # noqa: PLC0415 - likewise
    from urllib3.connection import HTTPConnection  # noqa: PLC0415 - likewise
    from urllib3.connectionpool import HTTPConnectionPool  # noqa: PLC0415 - likewise

    class Connection(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(20)
            connection.connect(str(path))
            return connection

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    class Adapter(HTTPAdapter):
        def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
            response = super().send(request, *arguments, **{**options, "stream": True})
            if response.ok and request.path_url.partition("?")[0] == ENDLESS:
                # requests would read to the end, and has no other way to be told that this is enough.
                response._content = next(response.raw.read_chunked())
                response._content_consumed = True
                response.raw.close()
            return response

        def get_connection_with_tls_context(self, *_args: Any, **_options: Any) -> HTTPConnectionPool:
            return self._pool

        def __init__(self) -> None:
            super().__init__()
            self._pool = Pool("kvmd")

        def close(self) -> None:
            self._pool.close()

    session = requests.Session()
    session.trust_env = False
    session.mount(BASE, Adapter())
    return session


@pytest.fixture(scope="module", params=["memory", pytest.param("daemon", marks=pytest.mark.kvm)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if request.param == "daemon":
        require_whole(Facility.KVM)
        site = Site("kvm", tmp_path_factory.mktemp("daemon") / "state")
        with daemon(site, "--stop-machines") as process:
            yield DaemonServer(socket_of(site))
            assert not [event for event in end(process) if "exception" in event or "bug" in event]
        return
    thread = ServerThread(tmp_path_factory.mktemp("api") / "s")
    try:
        yield thread
    finally:
        thread.stop()


@pytest.fixture(scope="module")
def schema() -> Any:
    import schemathesis  # noqa: PLC0415 - see above

    return schemathesis.openapi.from_dict(DOCUMENT)


@pytest.mark.filterwarnings("default")  # what schemathesis does is not ours to mend
@pytest.mark.parametrize(("operation_id", "mode"), _modes())
def test_schemathesis_finds_nothing(server: Server, schema: Any, operation_id: str, mode: str) -> None:
    from schemathesis import GenerationMode  # noqa: PLC0415 - see above
    from schemathesis.checks import CHECKS, load_all_checks  # noqa: PLC0415 - likewise

    load_all_checks()
    path, method = OPERATIONS[operation_id]
    operation = schema[path][method.upper()]
    generation = GenerationMode(mode)
    # What a schema cannot say, such as that an image exists, is refused with 422 whatever the schema allows.
    excluded = [CHECKS.get_one("positive_data_acceptance")]
    seen: list[int] = []
    upgraded = UPGRADED.get(operation_id)

    @settings(
        max_examples=server.examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(operation, generation, path, operation_id))
    def check(case: Any) -> None:
        server.refill()
        if operation_id in WAITING and isinstance(case.query.get("timeout", 30), int | float):
            case.query["timeout"] = min(case.query.get("timeout", 30), WAIT_SECONDS)
        if upgraded is not None and len(seen) % 2:
            case.headers.update(upgraded)
        with session_over(server.path) as session:
            response = case.call(base_url=BASE, session=session)
            seen.append(response.status_code)
            # 101 counts as a server's error there: everything below 200 does.
            also = [CHECKS.get_one("not_a_server_error")] if response.status_code == SWITCHED else []
            # 413 refuses, too, which that check does not know.
            also += [CHECKS.get_one("negative_data_rejection")] if response.status_code == TOO_LARGE else []
            case.validate_response(response, excluded_checks=[*excluded, *also], transport_kwargs={"session": session})

    check()
    server.settle()
    assert seen
    if mode == "positive" and operation_id not in SELDOM_RIGHT and server.examples == EXAMPLES:
        assert any(status < 300 for status in seen), seen
    if upgraded is not None:
        # The daemon's machines are payloads, which have no agent: it says so, whatever else the request is.
        has_device = isinstance(server, ServerThread) or operation_id != "attach_agent"
        assert (SWITCHED if has_device else 404) in seen
        assert 426 in seen


def cases(operation: Any, generation: Any, path: str, operation_id: str) -> SearchStrategy[Any]:
    """Return requests of any name, and of machines that there are."""
    if "{name}" not in path:
        strategy: SearchStrategy[Any] = operation.as_strategy(generation_mode=generation)
        return strategy
    names = [ENDED] if operation_id in END_WITH_THEIR_MACHINE else [ENDED, LIVE, FRESH, HELD]
    return one_of(
        operation.as_strategy(generation_mode=generation),
        *(operation.as_strategy(generation_mode=generation, path_parameters={"name": name}) for name in names),
    )
