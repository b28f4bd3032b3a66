"""Configuration in TOML: how a file is read, and how what is wrong in it is told, in one line with the key."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import msgspec

from kvmd.errors import ConfigError
from kvmd.units import MIB, format_size

_FILE_LIMIT = MIB
_SHOWN_LIMIT = 60


def read_toml(path: Path, *, whose: str) -> dict[str, object]:
    """Return what a TOML file says.

    Args:
        path: the file.
        whose: configuration it is, such as ``machine``.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not TOML; one line with the file.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > _FILE_LIMIT:
        raise ConfigError(f"{path}: more than {format_size(_FILE_LIMIT)} is no {whose}'s configuration")
    try:
        # The newline: of a mistake on an unfinished last line, tomllib would say "at end of document".
        return tomllib.loads(data.decode() + "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: not TOML: line {line} is not UTF-8 text") from error
    # A number of more than 4300 digits is a plain ValueError; thousands of nested brackets recurse.
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(str(error))
        raise ConfigError(f"{path}: not TOML: {reason}") from error


class Keys:
    """What would be right for each key of a file.

    Args:
        right: by key, with the table's name before it (``api.socket``): the second half of every message.
    """

    def __init__(self, right: Mapping[str, str]) -> None:
        self._right = right

    def __getitem__(self, key: str) -> str:
        return self._right[key]

    def need(self, key: str, value: object, holds: bool) -> None:  # noqa: FBT001 - the condition is what it is about
        """Raise ConfigError with the key, the value and what would be right, unless the condition holds."""
        if not holds:
            raise ConfigError(f"{key}: {shown(value)} is not possible: expected {self._right[key]}")

    def refused(self, error: msgspec.ValidationError, document: Mapping[str, object]) -> ConfigError:
        """Return msgspec's complaint with the key, the value and what would be right."""
        key = re.sub(r"\[.*", "", str(error).rpartition(" - at `$.")[2].removesuffix("`"))
        value: object = document
        for part in key.split("."):
            value = cast("Mapping[str, object]", value).get(part)
        return ConfigError(f"{key}: {shown(value)} is not possible: expected {self._right[key]}")


def refuse_unknown(table: Mapping[str, object], kind: type[msgspec.Struct], prefix: str = "") -> None:
    """Raise ConfigError for a key that ``kind`` has no field for, with the nearest one that it has."""
    known = kind.__struct_fields__
    for key in table:
        if key not in known:
            raise ConfigError(
                f"unknown key {prefix}{one_line(key)}{suggestion(key, known)}: the keys here are {', '.join(known)}"
            )


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean ...?)`` where one of the known words is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: object) -> str:
    """Return ``value`` for a message: on one line, and not the whole of it where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN_LIMIT else text[: _SHOWN_LIMIT - 3] + "..."


def one_line(text: str) -> str:
    """Return the text, or what Python would write for it where it would not stay on its line."""
    return text if text.isprintable() else repr(text)
