"""The one place that configures structlog, and what a conversion looks like as an event."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal, Protocol, TextIO, cast

import msgspec
import structlog

from kvmd.conversion.record import ConversionRecord
from kvmd.units import format_size

LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]


class LogStream(Protocol):
    """Where log lines go."""

    def write(self, text: str, /) -> int:
        """Write ``text``, which is whole lines."""

    def flush(self) -> None:
        """Write what is buffered."""

    def isatty(self) -> bool:
        """Tell whether people read it on a terminal."""


_FIRST_KEYS = ("timestamp", "level", "event")


class EventSink(Protocol):
    """Takes events as they are: ``kvmd.journal.Journal``."""

    def send(self, event: Mapping[str, Any], /) -> bool:
        """Take one, without waiting; tell whether it was taken."""


def configure(
    *,
    log_format: LogFormat,
    stream: LogStream,
    level: LogLevel = "info",
    journal: EventSink | None = None,
    journal_only: bool = False,
) -> None:
    """Send all log events from ``level`` up to ``stream``, each as one line; the last call holds.

    Args:
        log_format: ``json``: one object a line, ``timestamp`` (ISO 8601, UTC), ``level`` and ``event`` first;
            ``console``: for people, in colour only where ``stream`` is a terminal.
        stream: where it goes.
        level: the lowest that is shown.
        journal: takes every event, too, as fields.
        journal_only: ``stream`` gets only what the journal did not take, with journald's prefix for its level
            (sd-daemon(3)).
    """
    renderer: structlog.typing.Processor
    if log_format == "json":
        renderer = _render_json_text
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=stream.isatty(),
            pad_event_to=0,
            sort_keys=False,
            exception_formatter=structlog.dev.plain_traceback,
        )
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    processors.append(structlog.processors.format_exc_info if log_format == "json" else _in_few_words)
    if journal is not None:
        processors.append(_Tee(journal, only=journal_only))
    structlog.configure(
        processors=[*processors, _with_prefix(renderer) if journal_only else renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", stream)),
        cache_logger_on_first_use=False,
    )


class _Tee:
    """A processor that hands each event to the journal, and where that is enough to nobody else."""

    def __init__(self, journal: EventSink, *, only: bool) -> None:
        self._journal = journal
        self._only = only

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if self._journal.send(event) and self._only:
            raise structlog.DropEvent
        return event


_PREFIXES = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>", "critical": "<2>"}


def _with_prefix(renderer: structlog.typing.Processor) -> structlog.typing.Processor:
    def render(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
        prefix = _PREFIXES.get(str(event.get("level")), "<6>")
        text = str(renderer(logger, method, event))
        return "\n".join(prefix + line for line in text.splitlines())

    return render


def conversion_event(record: ConversionRecord, machine: str) -> dict[str, object]:
    """Return ``record`` as the fields of a flat event; its name is ``conversion``.

    Keys: ``sequence``; ``time`` (ISO 8601, UTC, microseconds); ``monotonic_ns``; ``machine``; ``vcpu``; ``cause``;
    ``gpa`` (hexadecimal text); ``size`` (bytes); ``from`` (null where the range was not all in one state); ``to``;
    ``outcome``; ``merged``; ``waiting_us``, ``applying_us`` and ``discarding_us`` (microseconds).
    """
    return {
        "sequence": record.sequence,
        "time": iso_time(record.wall_ns),
        "monotonic_ns": record.monotonic_ns,
        "machine": machine,
        "vcpu": record.vcpu,
        "cause": record.cause.value,
        "gpa": hex(record.gpa),
        "size": record.size_bytes,
        "from": None if record.came_from is None else record.came_from.value,
        "to": record.to.value,
        "outcome": record.outcome.value,
        "merged": record.merged,
        "waiting_us": record.waiting_ns / 1000,
        "applying_us": record.applying_ns / 1000,
        "discarding_us": record.discarding_ns / 1000,
    }


def render_json(_logger: object, _method: str, event: MutableMapping[str, Any]) -> bytes:
    """Return ``event`` as one line of JSON, without the newline: a structlog processor that comes last."""
    ordered = {key: event[key] for key in _FIRST_KEYS if key in event}
    ordered.update(event)
    try:
        return msgspec.json.encode(ordered, enc_hook=repr)
    except ValueError:
        # Text that is no Unicode, such as a file name of other bytes, and numbers beyond 64 bits.
        return json.dumps(ordered, default=repr).encode()


def _in_few_words(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Make one short line of a conversion, which a person sees many of; other events stay as they are."""
    if event.get("event") != "conversion":
        return event
    return {
        "timestamp": event["timestamp"],
        "level": event["level"],
        "event": (
            f"conversion {event['sequence']}: vcpu {event['vcpu']} {event['cause']} {event['gpa']} "
            f"{format_size(event['size'])} {event['from'] or 'mixed'} -> {event['to']} {event['outcome']}"
        ),
        "us": f"{event['waiting_us']:.0f}+{event['applying_us']:.0f}+{event['discarding_us']:.0f}",
    }


def _render_json_text(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
    return render_json(logger, method, event).decode()


def iso_time(wall_ns: int) -> str:
    """Return nanoseconds since the epoch as RFC 3339 has them, in UTC, to the microsecond."""
    seconds, nanoseconds = divmod(wall_ns, 1_000_000_000)
    return f"{_second(seconds)}.{nanoseconds // 1000:06d}Z"


@functools.lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    """Return a second since the epoch as text; conversions come thousands to one second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
