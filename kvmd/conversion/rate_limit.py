"""How many conversions a second a machine may make in the long run: what its guest may cost the host.

A change that is made is counted; whoever asked for it, or for anything else meanwhile, is not let into the guest again
before ``due_ns``. So a storm of conversions slows the guest that makes it, and nobody waits in the service.
"""

from __future__ import annotations

BURST_NS = 100_000_000
"""A machine that converted less than it may is let go on without a wait for as much as it may in this time."""


class RateLimit:
    """The generic cell rate algorithm (ITU-T I.371, annex A: virtual scheduling).

    Changes are counted one after the other; ``due_ns`` may be read by any thread.

    Args:
        per_second: changes a second, at least 1. A change is at most a chunk; a larger request makes several.

    Attributes:
        due_ns: the time, on the monotonic clock, from which on the machine is not ahead of its rate.
    """

    def __init__(self, per_second: int) -> None:
        self._interval_ns = 1_000_000_000 // per_second
        self._expected_ns = 0
        self.due_ns = 0

    def count(self, now_ns: int) -> None:
        """Count a change that is made now."""
        self._expected_ns = max(self._expected_ns, now_ns) + self._interval_ns
        self.due_ns = self._expected_ns - BURST_NS
