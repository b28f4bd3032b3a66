"""What init says on the console, and what has to be in it."""

from __future__ import annotations

import re

_LINE = re.compile(rb"^kvmd-test: (\S+) ?([^\r\n]*)\r?\n", re.MULTILINE)


class Report:
    """The lines of init among all that a console printed.

    Args:
        console: what the guest printed so far.
    """

    def __init__(self, console: bytes) -> None:
        self.lines: list[tuple[str, str]] = [
            (word.decode(), rest.decode(errors="replace")) for word, rest in _LINE.findall(console)
        ]

    def __contains__(self, word: str) -> bool:
        return any(word == there for there, _ in self.lines)

    def __getitem__(self, word: str) -> str:
        """Return what follows the word in its one line."""
        (rest,) = [rest for there, rest in self.lines if there == word]
        return rest

    @property
    def failures(self) -> list[str]:
        """What went wrong in the guest."""
        return [rest for word, rest in self.lines if word == "failed"]

    def number(self, word: str, key: str) -> int:
        """Return the number after a key in a word's line: of ``read bytes 4096 ns 99``, 99 for ``ns``."""
        parts = self[word].split()
        return int(parts[parts.index(key) + 1])
