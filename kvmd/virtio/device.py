"""A virtio device without its transport: status, features, queue set-up, configuration, interrupts, reset and failure.

vCPU threads drive it through a transport (``mmio``), the event loop serves its queues (``serving``). Clauses are those
of virtio 1.2.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable

import structlog
import trio

from kvmd.closing import Closing
from kvmd.virtio.abi import (
    F_ACCESS_PLATFORM,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    INTERRUPT_CONFIG,
    INTERRUPT_QUEUE,
    Status,
)
from kvmd.virtio.activation import Activation
from kvmd.virtio.device_model import DeviceModel
from kvmd.virtio.live_queue import LiveQueue, Standstill, Transfers
from kvmd.virtio.memory import GuestMemory
from kvmd.virtio.queue_setup import QueueSetup

RESET_SECONDS = 1.0
"""How long a reset holds up the vCPU that asked for it while I/O straight into guest memory ends. After that the status
goes on being read as NEEDS_RESET until it has: a driver that follows clause 2.1.2 waits for 0."""

PAUSE_SECONDS = 5.0
"""How long a pause waits for I/O."""

FAILURES_LOGGED = 8
"""A guest that breaks and resets a device for ever, or accepts what it was not offered, does not fill the log."""

_log = structlog.get_logger(__name__)


class VirtioDevice(Closing):
    """One device.

    Args:
        model: its kind.
        memory: guest memory.
        signal: raises the device's interrupt; thread-safe, must not block: mostly a write to an irqfd.
        name: for the log, such as ``disk0``.
        access_platform: offer F_ACCESS_PLATFORM, for guests that must hand shared memory to devices by their DMA API
            since the rest of theirs is private.

    Attributes:
        notified: an eventfd for each queue, to be written to at its notifications (KVM_IOEVENTFD, or ``notify``).
        standstill: what may be done with the queues: all, but in a pause.
    """

    def __init__(
        self,
        model: DeviceModel,
        memory: GuestMemory,
        signal: Callable[[], None],
        *,
        name: str,
        access_platform: bool | None = None,
    ) -> None:
        self.model = model
        self.name = name
        self._memory = memory
        self._signal = signal
        platform = memory.converts if access_platform is None else access_platform
        self.offered = (
            model.features | F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | (F_ACCESS_PLATFORM if platform else 0)
        )
        # Innermost: held for some instructions, never while another lock is taken.
        self._lock = threading.Lock()
        self._status = Status(0)
        self._accepted = 0
        self._config = model.config
        self._config_generation = 0
        self._interrupts = 0
        self._activation: Activation | None = None
        self._draining: Transfers | None = None
        self._failures = 0
        self._refusals = 0
        self.standstill = Standstill()
        self.queues = self._new_queues()
        self._fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(len(model.queue_sizes) + 1)]
        self.notified = tuple(self._fds[1:])
        model.bind(self)

    def _new_queues(self) -> list[QueueSetup]:
        return [QueueSetup(index, limit, limit) for index, limit in enumerate(self.model.queue_sizes)]

    # -- a vCPU's thread, through the transport ------------------------------------------------------------------------

    @property
    def status(self) -> int:
        """The device status; not 0 after a reset while I/O that it has to wait for is under way."""
        draining = self._draining
        if draining is not None:
            if draining.busy:
                return int(Status.NEEDS_RESET)
            self._draining = None
        return int(self._status)

    @property
    def interrupts(self) -> int:
        """InterruptStatus."""
        return self._interrupts

    @property
    def config_generation(self) -> int:
        """Changes of the configuration by the device, in 32 bits."""
        return self._config_generation & 0xFFFFFFFF

    @property
    def accepted(self) -> int:
        """The features that the driver chose so far."""
        return self._accepted

    def acknowledge(self, interrupts: int) -> None:
        """Clear these bits of InterruptStatus."""
        with self._lock:
            self._interrupts &= ~interrupts

    def accept(self, half: int, features: int) -> None:
        """Take 32 bits of the driver's features; ignored after FEATURES_OK (clause 3.1.1) and for bits past 63."""
        with self._lock:
            if self._status & Status.FEATURES_OK or half > 1:
                return
            shift = 32 * half
            self._accepted = self._accepted & ~(0xFFFFFFFF << shift) | features << shift

    def notify(self, queue: int) -> None:
        """Take a notification where no ioeventfd does."""
        if queue < len(self.notified):
            _write_eventfd(self.notified[queue])

    def read_config(self, offset: int, size_bytes: int) -> bytes:
        """Return bytes of the configuration; zeros past its end."""
        with self._lock:
            return self._config[offset : offset + size_bytes].ljust(size_bytes, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a write to the configuration; ignored where nothing is writable."""
        with self._lock:
            if offset + len(data) <= len(self._config):
                self._config = self.model.config_written(offset, data) or self._config

    def set_queue(self, index: int, change: Callable[[QueueSetup], None]) -> None:
        """Change the set-up of a queue; ignored where there is no such queue, or it is ready (clause 4.2.3.2)."""
        with self._lock:
            if index < len(self.queues) and not self.queues[index].ready:
                change(self.queues[index])

    def set_ready(self, index: int, *, ready: bool) -> None:
        """Take QueueReady (clause 4.2.2). A queue becomes ready between FEATURES_OK and DRIVER_OK.

        It may be taken down at any time, and is not touched any more when this returns; in use, the device rests from
        then on until it is reset.
        """
        if not ready:
            self._take_down(index)
            return
        problem = None
        with self._lock:
            if index >= len(self.queues) or self._status & Status.NEEDS_RESET or self.queues[index].ready:
                return
            queue = self.queues[index]
            if self._status & Status.DRIVER_OK or not self._status & Status.FEATURES_OK:
                problem = f"queue {index} was set up out of turn"
            else:
                problem = queue.problem(self._memory)
                queue.ready = problem is None
        if problem is not None:
            self.fail(problem)

    def _take_down(self, index: int) -> None:
        with self._lock:
            if index >= len(self.queues):
                return
            self.queues[index].ready = False
            activation = self._activation
        if activation is not None and index in activation.queues:
            activation.queues[index].stop()
            activation.transfers.wait(RESET_SECONDS)

    def set_status(self, value: int) -> None:
        """Take a write to the device status (clauses 2.1 and 3.1.1). Only a reset clears bits.

        A write of 0 waits, some milliseconds mostly and ``RESET_SECONDS`` at most, for I/O that may still touch memory
        which belongs to the driver again when this returns.
        """
        if value == 0:
            self._reset()
            return
        problem = None
        with self._lock:
            if self._draining is not None and self._draining.busy:
                return
            new = Status(value & 0xFF & ~Status.NEEDS_RESET) & ~self._status
            if new & Status.FEATURES_OK:
                refusal = self._refusal()
                if refusal is not None:
                    new &= ~Status.FEATURES_OK
                    self._tell_refusal(refusal)
            self._status |= new
            if new & Status.DRIVER_OK:
                if not self._status & Status.FEATURES_OK:
                    problem = "DRIVER_OK before FEATURES_OK"
                elif not self._status & Status.NEEDS_RESET:
                    self._activate()
        if problem is not None:
            self.fail(problem)
        elif new & Status.DRIVER_OK:
            self._tell_server()

    def _tell_refusal(self, reason: str) -> None:
        self._refusals += 1
        if self._refusals <= FAILURES_LOGGED:
            more = {"note": "further ones of this device are not logged"} if self._refusals == FAILURES_LOGGED else {}
            _log.warning("virtio driver refused", device=self.name, reason=reason, **more)

    def _refusal(self) -> str | None:
        if not self._accepted & F_VERSION_1:
            return "a legacy driver: it does not accept VIRTIO_F_VERSION_1"
        unknown = self._accepted & ~self.offered
        if unknown:
            return f"the driver accepts features that were not offered: {unknown:#x}"
        return self.model.refusal(self._accepted)

    def _activate(self) -> None:
        activation = Activation(self, self._accepted, self._memory)
        for index, setup in enumerate(self.queues):
            if setup.ready:
                ring = setup.rings(self._memory, self._accepted)
                activation.queues[index] = LiveQueue(index, ring, self._memory, activation, self.notified[index])
        self._activation = activation

    def _reset(self) -> None:
        with self._lock:
            activation, self._activation = self._activation, None
            self._status = Status(0)
            self._accepted = 0
            self._interrupts = 0
            self._config = self.model.config
            self.queues = self._new_queues()
            if activation is not None:
                self._draining = activation.transfers
        if activation is None:
            return
        activation.end()
        for queue in activation.queues.values():
            queue.stop()
        self._tell_server()
        activation.transfers.wait(RESET_SECONDS)

    # -- any thread ----------------------------------------------------------------------------------------------------

    def interrupt(self, activation: Activation) -> None:
        """Tell the driver that buffers were given back."""
        with self._lock:
            if self._activation is not activation:
                return
            self._interrupts |= INTERRUPT_QUEUE
        self._signal()

    def set_config(self, config: bytes, *, tell: bool = True) -> None:
        """Replace the configuration, and tell the driver where one is at work (clause 2.5)."""
        with self._lock:
            self._config = config
            self._config_generation += 1
            tell = tell and bool(self._status & Status.DRIVER_OK)
            if tell:
                self._interrupts |= INTERRUPT_CONFIG
        if tell:
            self._signal()

    def fail(self, reason: str, of: Activation | None = None) -> None:
        """Stop until the driver resets the device (NEEDS_RESET, clause 2.1.2), and say so once.

        Args:
            reason: for the log.
            of: the activation that it happened to; nothing is done where that one is over.
        """
        with self._lock:
            activation = self._activation
            if self._status & Status.NEEDS_RESET or of not in (None, activation):
                return
            self._status |= Status.NEEDS_RESET
            tell = bool(self._status & Status.DRIVER_OK)
            if tell:
                self._interrupts |= INTERRUPT_CONFIG
            self._failures += 1
            failures = self._failures
        if activation is not None:
            activation.end()
        self._tell_server()
        if tell:
            self._signal()
        if failures <= FAILURES_LOGGED:
            more = {"note": "further failures of this device are not logged"} if failures == FAILURES_LOGGED else {}
            _log.warning(
                "virtio device failed: it waits for the guest to reset it", device=self.name, reason=reason, **more
            )

    @property
    def failures(self) -> int:
        """How often the device has failed so far."""
        return self._failures

    # -- the event loop ------------------------------------------------------------------------------------------------

    @property
    def activation(self) -> Activation | None:
        """What has to be served, if anything."""
        activation = self._activation
        return None if activation is None or activation.ended else activation

    async def changed(self) -> None:
        """Wait until ``activation`` may have changed. For one task."""
        await trio.lowlevel.wait_readable(self._fds[0])
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fds[0])

    async def pause(self) -> None:
        """Leave guest memory as it is, once the requests that worker threads have are answered.

        No vCPU runs any more. What cannot be answered without somebody else, such as a console that nobody reads, is
        answered after the pause. A disk that takes longer than ``PAUSE_SECONDS`` is not waited for, but logged.
        """
        self.standstill.taking = False
        activation = self.activation
        if activation is not None:
            self._settle(activation)
            await trio.to_thread.run_sync(activation.work.wait, PAUSE_SECONDS)
            if activation.work.busy:
                _log.warning("virtio device not paused", device=self.name, problem="its I/O does not come to an end")
        self.standstill.giving = False
        if activation is not None:
            self._settle(activation)

    def resume(self) -> None:
        """Go on, with what the driver asked for meanwhile too."""
        self.standstill.giving = True
        self.standstill.taking = True
        for fd in self.notified:
            _write_eventfd(fd)

    def _settle(self, activation: Activation) -> None:
        for queue in activation.queues.values():
            queue.settle()

    def _tell_server(self) -> None:
        _write_eventfd(self._fds[0])

    def close(self) -> None:
        """Give up the eventfds and what the model holds. Nobody serves the device or touches its registers any more."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)
        self.model.close()


def _write_eventfd(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):  # it counts to 2**64 - 2: whoever waits for it is awake
        os.eventfd_write(fd, 1)
