"""Numbers of the virtio standard: "Virtual I/O Device (VIRTIO) Version 1.2", OASIS, by clause."""

from __future__ import annotations

import enum


class Status(enum.IntFlag):
    """Device status, clause 2.1."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class DeviceId(enum.IntEnum):
    """Device types, clause 5."""

    NETWORK = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON = 5


F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_ACCESS_PLATFORM = 1 << 33
"""Reserved feature bits, clause 6."""

INTERRUPT_QUEUE = 1
INTERRUPT_CONFIG = 2
"""InterruptStatus of the MMIO transport, clause 4.2.2: a queue's used buffers, and a change of the configuration."""

DESC_NEXT = 1
DESC_WRITE = 2
DESC_INDIRECT = 4
"""Descriptor flags, clause 2.7.5."""

DESC_BYTES = 16
USED_ELEMENT_BYTES = 8

AVAIL_NO_INTERRUPT = 1
USED_NO_NOTIFY = 1
"""Flags of the two rings, clauses 2.7.6 and 2.7.8; without meaning once F_EVENT_IDX was negotiated."""

DESC_ALIGN = 16
AVAIL_ALIGN = 2
USED_ALIGN = 4
"""Alignment of the three parts of a split queue, clause 2.7."""

QUEUE_SIZE_LIMIT = 32768
"""The largest queue, clause 2.7."""

SECTOR_BYTES = 512
"""The unit of a block device's capacity and addresses, whatever its block size is (clause 5.2.4)."""
