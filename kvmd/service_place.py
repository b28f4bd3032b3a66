"""Where the conversion service runs: on the boot CPU while it is faster there, and with it the vCPU that asks alone.

``kvmd.conversion.placement`` decides; this moves the threads.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import structlog

from kvmd.boot_cpu import BootCpuStay
from kvmd.conversion.placement import Placement
from kvmd.host_load import runnable_tasks

_log: structlog.stdlib.BoundLogger = structlog.get_logger("kvmd.service_place")


class ServicePlace:
    """The place of one machine's conversion service.

    Everything but ``vcpu`` is for the event loop's thread, which the service runs in.

    Args:
        moves: there may be a better place: conversions delete memslots. Else everybody stays where the scheduler likes.
    """

    def __init__(self, *, moves: bool = False) -> None:
        self._moves = moves
        self._placement = Placement(os.cpu_count() or 1)
        self._service = BootCpuStay()
        # The id of a thread that has ended is somebody else's.
        self._lock = threading.Lock()
        self._vcpus: dict[int, BootCpuStay] = {}
        self._kept: int | None = None

    @contextmanager
    def vcpu(self, index: int) -> Iterator[None]:
        """Let the calling thread be moved as that of the vCPU with this index, for the block."""
        with self._lock:
            self._vcpus[index] = BootCpuStay(threading.get_native_id())
        try:
            yield
        finally:
            with self._lock:
                self._vcpus.pop(index).end()

    def served(self, vcpus: Iterable[int]) -> None:
        """Count requests that were answered: the index of the vCPU that asked, for each."""
        if self._moves:
            self._placement.served(vcpus)

    def pause(self) -> None:
        """Let the calling thread go before it may start threads or processes, which would inherit its place."""
        self._service.end()

    def resume(self) -> None:
        """Take the place for the next requests, which follow those before."""
        if not self._moves:
            return
        placement = self._placement
        before = placement.on_boot_cpu
        placement.look(time.monotonic_ns(), runnable_tasks())
        if placement.on_boot_cpu != before:
            _log.debug("service-moves", to_boot_cpu=placement.on_boot_cpu, vcpu=placement.alone)
        self._keep(placement.alone if placement.on_boot_cpu and self._service.begin() else None)

    def leave(self) -> None:
        """Let all threads go, and time nothing: what comes now is far away, or large."""
        self._placement.break_off()
        self._service.end()
        self._keep(None)

    def _keep(self, vcpu: int | None) -> None:
        """Keep the thread of this vCPU where the service is, or none; the one before may go."""
        if vcpu == self._kept:
            return
        with self._lock:
            before, self._kept = self._kept, vcpu
            if before in self._vcpus:
                self._vcpus[before].end()
            if vcpu in self._vcpus:
                self._vcpus[vcpu].begin()
