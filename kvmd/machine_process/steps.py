"""The steps of a machine's life: numbered, in memory for those who follow, and in a file for those who come later."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from kvmd.machine_process.folder import LIFECYCLE
from kvmd.machine_process.lifecycle import Change, LifecycleEvent, LifecycleLog
from kvmd.machine_process.segments import SegmentWriter, read_segments

_SEGMENT_BYTES = 256 << 10
_READ_AT_ONCE = 1 << 20


class Steps:
    """Writes the lifecycle of one machine.

    Args:
        folder: descriptor of its folder, borrowed.
        failed: told when a step cannot be written to the file.
    """

    def __init__(self, folder: int, failed: Callable[[OSError], None]) -> None:
        self.log = LifecycleLog()
        for event in read_steps(folder):
            self.log.append(event)
        self._writer = SegmentWriter(folder, LIFECYCLE, segment_bytes=_SEGMENT_BYTES)
        self._failed = failed
        self._wakes: list[Callable[[], None]] = []

    @property
    def ended(self) -> bool:
        """Whether the last step was the machine's end."""
        return self.log.ended

    def tell(
        self,
        change: Change,
        state: str,
        *,
        reason: str = "",
        message: str = "",
        status: int | None = None,
        signal: int | None = None,
    ) -> None:
        """Add a step; the arguments are those of ``LifecycleEvent``."""
        event = LifecycleEvent(
            number=self.log.last + 1,
            wall_ns=time.time_ns(),
            change=change,
            state=state,
            reason=reason,
            message=message,
            status=status,
            signal=signal,
        )
        self.log.append(event)
        try:
            self._writer.append(msgspec.json.encode(event) + b"\n")
        except OSError as error:
            self._failed(error)
        for wake in self._wakes:
            wake()

    def follow(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` at each step from now on. It must neither block nor raise."""
        self._wakes.append(wake)

    def forget(self, wake: Callable[[], None]) -> None:
        """Take back a callback of ``follow``."""
        self._wakes.remove(wake)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def read_steps(folder: int) -> list[LifecycleEvent]:
    """Return the steps that the files in a machine's folder hold, without lines that are none, in order.

    Raises:
        OSError: a file cannot be read.
    """
    data = bytearray()
    offset = 0
    while (piece := read_segments(folder, LIFECYCLE, offset, _READ_AT_ONCE)).data:
        data += piece.data
        offset = piece.end
    found: dict[int, LifecycleEvent] = {}
    for line in data.splitlines():
        try:
            event = msgspec.json.decode(line, type=LifecycleEvent)
        except (msgspec.MsgspecError, ValueError):
            continue  # half a line: the first of a segment whose predecessor is gone, or the disk was full
        found[event.number] = event
    # Without gaps, as the log wants them: what lies before one is no use to anybody who follows.
    steps: list[LifecycleEvent] = []
    for number in sorted(found):
        if steps and number != steps[-1].number + 1:
            steps.clear()
        steps.append(found[number])
    return steps
