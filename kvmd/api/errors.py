"""Every error that can come out of a request, as a problem document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from kvmd.api.problems import MEDIA_TYPE, Problem, ProblemType, of_status
from kvmd.errors import (
    BackendError,
    ConfigError,
    DeviceInUse,
    HostError,
    ImageError,
    KvmdError,
    MachineExists,
    MachineSilent,
    MachineStateError,
    NoSuchDevice,
    UnknownMachine,
)
from kvmd.memory.accessor import PrivateMemory

_ERRORS_LIMIT = 8
"""How many mistakes in one request are listed."""

_PLAIN: tuple[tuple[type[KvmdError], ProblemType], ...] = (
    (UnknownMachine, ProblemType.UNKNOWN_MACHINE),
    (MachineExists, ProblemType.MACHINE_EXISTS),
    (ConfigError, ProblemType.INVALID_SPEC),
    (ImageError, ProblemType.INVALID_IMAGE),
    (HostError, ProblemType.HOST_LACKS),
    (BackendError, ProblemType.BACKEND_FAILED),
    (MachineSilent, ProblemType.MACHINE_SILENT),
    (NoSuchDevice, ProblemType.NO_SUCH_DEVICE),
    (DeviceInUse, ProblemType.DEVICE_IN_USE),
)


def install(app: FastAPI) -> None:
    """Let ``app`` answer every error with a problem document.

    All handlers are coroutines: Starlette would run a plain function in a worker thread.
    """
    app.exception_handler(Problem)(_problem)
    app.exception_handler(KvmdError)(_kvmd_error)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http)
    app.exception_handler(Exception)(_bug)


def problem_of(error: KvmdError) -> Problem:
    """Return how an error of kvmd's is told to clients."""
    match error:
        case MachineStateError(needed=needed, found=found):
            return Problem(ProblemType.WRONG_STATE, str(error), more={"needed": needed, "found": found})
        case PrivateMemory(gpa=gpa):
            return Problem(ProblemType.PRIVATE_MEMORY, str(error), more={"gpa": hex(gpa)})
        case _:
            kind = next((kind for base, kind in _PLAIN if isinstance(error, base)), ProblemType.INTERNAL)
            return Problem(kind, str(error))


def response_of(problem: Problem) -> Response:
    """Return the problem document as a response."""
    response = Response(problem.document(), problem.kind.status, media_type=MEDIA_TYPE.decode())
    response.raw_headers.extend(problem.headers)
    return response


async def _problem(_request: Request, error: Problem) -> Response:
    return response_of(error)


async def _kvmd_error(_request: Request, error: KvmdError) -> Response:
    return response_of(problem_of(error))


async def _invalid(_request: Request, error: RequestValidationError) -> Response:
    return response_of(_problem_of_mistakes(error.errors()))


def _problem_of_mistakes(mistakes: Sequence[Any]) -> Problem:
    shown = [{"where": _where(mistake["loc"]), "problem": mistake["msg"]} for mistake in mistakes[:_ERRORS_LIMIT]]
    first = shown[0]
    if mistakes[0]["type"] == "json_invalid":
        return Problem(ProblemType.BAD_REQUEST, f"the content is not JSON: {mistakes[0]['ctx']['error']}")
    detail = f"{first['where']}: {first['problem']}"
    if len(mistakes) > 1:
        detail += f" (and {len(mistakes) - 1} more)"
    return Problem(ProblemType.INVALID_REQUEST, detail, more={"errors": shown})


def _where(location: Sequence[object]) -> str:
    """Return the place of a mistake, such as ``body.vcpus``; a name that the client made up may be anything."""
    text = ".".join(str(part) for part in location)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else text[:197] + "..."  # noqa: PLR2004 - a line


async def _http(_request: Request, error: HTTPException) -> Response:
    """Answer what Starlette and FastAPI refuse themselves: unknown paths and methods, content that is no JSON."""
    problem = of_status(error.status_code, error.detail)
    allowed = (error.headers or {}).get("Allow")
    if allowed is not None:
        problem.headers = ((b"allow", allowed.encode("latin-1")),)
    return response_of(problem)


async def _bug(_request: Request, _error: Exception) -> Response:
    """Answer a bug without its details; the server logs it, since Starlette raises it again."""
    return response_of(Problem(ProblemType.INTERNAL, "the log of kvmd says what happened"))
