"""Finds out by trial whether conversions go faster from the boot CPU.

A memslot that is deleted waits for a grace period of KVM's SRCU domain, and the kernel completes those of a small
domain in a work item on the boot CPU (Linux, kernel/rcu/srcutree.c: ``SRCU_SIZE_SMALL``). Whoever waits on another CPU
has that one woken, and is woken from there, several times a conversion. What it costs depends on the host: nothing
where attributes take the place of memslots or no CPU idles, half of the conversion in a virtual machine whose boot CPU
has to be woken. Nothing tells but the clock. So conversions are timed in either place now and then, the more rarely the
longer the answer stays the same. Where more wants to run than there are CPUs for, none idles, and machines that crowd
on one keep each other's work items waiting, which none of them can see by its clock: then all stay elsewhere.

A vCPU that converts alone takes turns with the service: neither does anything while the other does. So it is to be
where the service is. Several are not: what they do in the guest goes on beside the service.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

WINDOW = 32
"""Requests over which a place is timed, at least."""

GAIN = 0.9
"""On the boot CPU a request has to take at most this part of what it takes elsewhere."""

ALONE = 0.9
"""Who makes this part of the requests asks alone."""

SHORTEST_STAY = 8
"""Windows until the other place is tried again, at least. Each trial that changes nothing doubles their number."""

LONGEST_STAY = 256
"""The same at most."""

TRIAL_SHARE = 32
"""What a trial took longer than going on would have is made up for in so many times the time, until the next."""

MOST_LONGER = 2
"""How much longer, in times that going on takes, may count for that: the host may have been busy just then."""

CROWD = 2
"""Runnable tasks for each CPU of the host above which nobody goes to the boot CPU, in the mean over some looks."""

_LOOKS = 16


class Placement:
    """Where the thread that makes a machine's conversions should be while these follow one another.

    Args:
        cpus: of the host.

    Attributes:
        on_boot_cpu: there, and not where the scheduler likes.
        alone: the index of the vCPU that asks alone, which is to be in the same place; None where several ask.
    """

    def __init__(self, cpus: int) -> None:
        self.on_boot_cpu = False
        self.alone: int | None = None
        self._crowd = CROWD * cpus
        self._runnable = 0.0
        self._asked: Counter[int] = Counter()
        self._since_ns = 0
        # What a request took when it was timed last, by ``on_boot_cpu``.
        self._cost_ns: dict[bool, float] = {}
        self._trying = False
        self._stay = 1
        self._stayed = 0

    def served(self, vcpus: Iterable[int]) -> None:
        """Count requests that were answered: the index of the vCPU that asked, for each."""
        self._asked.update(vcpus)

    def break_off(self) -> None:
        """Time nothing over what comes now: requests that are far apart, or large."""
        self._since_ns = 0

    def look(self, now_ns: int, runnable: int) -> None:
        """Decide on the place for the next requests. Called now and then while requests follow one another.

        Args:
            now_ns: the time, on the monotonic clock.
            runnable: how many tasks of the host run or could.
        """
        answered = self._asked.total()
        self._runnable += (runnable - self._runnable) / _LOOKS
        if self._runnable > self._crowd:
            self.on_boot_cpu = self._trying = False
            self.break_off()
        elif not self._since_ns:
            self._begin(now_ns)
        elif answered >= WINDOW:
            ((vcpu, asked),) = self._asked.most_common(1)
            self.alone = vcpu if asked >= ALONE * answered else None
            self._cost_ns[self.on_boot_cpu] = max(1.0, (now_ns - self._since_ns) / answered)
            self._begin(now_ns)
            self._decide()

    def _begin(self, now_ns: int) -> None:
        self._since_ns = now_ns
        self._asked.clear()

    def _decide(self) -> None:
        costs_ns = self._cost_ns
        better_there = costs_ns[True] <= GAIN * costs_ns[False] if len(costs_ns) > 1 else self.on_boot_cpu
        leaves = better_there != self.on_boot_cpu
        self._stayed += 1
        if self._trying:
            longer = min(max(costs_ns.values()) / min(costs_ns.values()) - 1, MOST_LONGER)
            # Who leaves the place of a trial is back where it was.
            stay = 2 * self._stay if leaves else SHORTEST_STAY
            self._stay = min(max(stay, int(longer * TRIAL_SHARE)), LONGEST_STAY)
        elif leaves:
            self._stay = SHORTEST_STAY
        elif self._stayed >= self._stay:
            self._trying = True
            self.on_boot_cpu = not self.on_boot_cpu
            return
        else:
            return
        self.on_boot_cpu = better_there
        self._trying = False
        self._stayed = 0
