"""Where a guest's output goes: standard output as it is, or lines of JSON."""

from __future__ import annotations

import codecs
import sys

from kvmd.ctl.session import Session


class Screen:
    """Shows what one guest prints.

    Args:
        session: says whether it is for people or programs.
        name: the machine's.
    """

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(self, data: bytes) -> None:
        """Show output at once; a slow reader is waited for."""
        if self._session.wants_json:
            self._say(self._decoder.decode(data))
            return
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def end(self) -> None:
        """Show what was left of a character."""
        if self._session.wants_json:
            self._say(self._decoder.decode(b"", final=True))

    def _say(self, text: str) -> None:
        if text:
            self._session.line({"event": "output", "machine": self._name, "text": text}, "")
