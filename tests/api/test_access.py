from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from kvmd.api.access import AccessRules, Gate, Role
from kvmd.api.server.asgi import PEER, Message, Receive, Scope, Send
from kvmd.api.server.peer import Peer
from tests.api.serving import respond, serving_api

OWN, OPERATORS, VIEWERS = 990, 50, 60
RULES = AccessRules(own_uid=OWN, operators=OPERATORS, viewers=VIEWERS)
NOBODY = 65534


def peer(uid: int, *groups: int) -> Peer:
    return Peer(1, uid, frozenset(groups))


@pytest.mark.parametrize(
    ("who", "role"),
    [
        (peer(0, 0), Role.OPERATE),
        (peer(OWN, OWN), Role.OPERATE),
        (peer(1000, 1000, OPERATORS), Role.OPERATE),
        (peer(1000, 1000, VIEWERS), Role.VIEW),
        (peer(1000, OPERATORS, VIEWERS), Role.OPERATE),
        (peer(1000, 1000), None),
        (peer(OPERATORS, 1000), None),
        (peer(1000, 0), None),
    ],
)
def test_roles(who: Peer, role: Role | None) -> None:
    assert RULES.role_of(who) is role


def test_groups_that_are_not_configured_have_no_members() -> None:
    assert AccessRules(own_uid=OWN).role_of(peer(1000, 0, 1000)) is None


async def ask(who: Peer, method: str, raw_path: bytes = b"/v1/machines") -> int:
    """Return the status of a request at the gate; 200 comes from behind it."""
    sent: list[Message] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        assert scope["method"] != "HEAD"
        await respond(send)

    async def receive() -> Message:
        await trio.lowlevel.checkpoint()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message)

    scope: dict[str, Any] = {"method": method, "raw_path": raw_path, "extensions": {PEER: who}}
    await Gate(app, RULES)(scope, receive, send)
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("who", "reading", "writing"),
    [
        (peer(1000, OPERATORS), 200, 200),
        (peer(1000, VIEWERS), 200, 403),
        (peer(1000, 1000), 403, 403),
    ],
)
async def test_the_gate(who: Peer, reading: int, writing: int) -> None:
    for method in ("GET", "HEAD", "OPTIONS"):
        assert await ask(who, method) == reading
    for method in ("POST", "PUT", "DELETE", "PATCH", "FROB", "get"):
        assert await ask(who, method) == writing


async def test_an_encoded_slash_names_nothing() -> None:
    assert await ask(peer(0), "GET", b"/v1/machines/a%2fb") == 404


CLIENT = r"""
import json, os, socket, sys
path, user, groups, *requests = sys.argv[1:]
os.setgroups(json.loads(groups))
os.setgid(int(user))
os.setuid(int(user))
fields = "Host: k\r\nConnection: close\r\nContent-Length: 0"
found = []
for request in requests:
    method, target = request.split(" ")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        connection.sendall(f"{method} {target} HTTP/1.1\r\n{fields}\r\n\r\n".encode())
        found.append(int(connection.makefile("rb").readline().split()[1]))
print(json.dumps(found))
"""
REQUESTS = [
    "GET /v1/machines",
    "GET /v1/machines/one/console/output",
    "POST /v1/machines/one/pause",
    "GET /v1/machines/one/memory?gpa=0x1000&size=1",
    "GET /v1/machines/one/console",
    "GET /v1/machines/one/agent",
    "PUT /v1/machines/one/balloon",
    "POST /v1/machines/one/power-button",
]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="kvmd-test-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(
    ("groups", "statuses"),
    [
        ([OPERATORS], [200, 200, 200, 200, 426, 426, 422, 404]),
        ([*range(1000, 2000), VIEWERS], [200, 200, 403, 403, 403, 403, 403, 403]),
        ([], [403] * 8),
    ],
)
async def test_the_kernel_says_who_asks(open_folder: Path, groups: list[int], statuses: list[int]) -> None:
    path = open_folder / "s"
    async with serving_api(path, rules=RULES) as api:
        path.chmod(0o666)
        await api.post("/v1/machines", {"image": "builtin:hello", "name": "one"})
        await api.post("/v1/machines/one/start")
        guest = api.fleet.guest("one")
        guest.convert(0x1000)
        guest.console.end()
        command = [sys.executable, "-c", CLIENT, str(path), str(NOBODY), json.dumps(groups), *REQUESTS]
        ran = await trio.run_process(command, capture_stdout=True)
    assert json.loads(ran.stdout) == statuses
