"""What a process that will be some machine imports before it knows which: none has to wait for it then."""

from __future__ import annotations

import codecs
import gc
import importlib
from contextlib import suppress

import msgspec
import trio

from kvmd.errors import KvmdError
from kvmd.guests import GUESTS
from kvmd.machine_process.folder import MachineFile
from kvmd.machine_process.hosted import OpenMachine
from kvmd.spec.machine import MachineSpec
from kvmd.units import MIB

REHEARSED = MachineSpec(image=GUESTS["hello"].path, memory=4 * MIB)
"""The machine of a rehearsal: small, and on whatever the host has."""


def warm() -> None:
    """Import what Linux machines need beyond payloads, and leave the collector nothing to look at.

    It would write into every object: what is frozen stays shared with forks, and untouched.
    """
    importlib.import_module("kvmd.linux.kernel")
    importlib.import_module("kvmd.linux_devices")
    importlib.import_module("kvmd.linux_hardware")
    codecs.lookup("ascii")  # a module of its own, which /proc is written with
    with suppress(msgspec.MsgspecError):
        msgspec.json.decode(b"", type=MachineFile)  # what it knows of a type, it learns by its first use
    gc.collect()
    gc.freeze()


def rehearse(open_machine: OpenMachine) -> None:
    """Make a machine and give it up, in the process that will be another.

    The next one then finds its code where the interpreter has seen it, and its pages copied from the parent's. Where no
    machine can be made, the next one will say why.
    """
    trio.run(trio.lowlevel.checkpoint)
    with suppress(KvmdError, OSError):
        open_machine(REHEARSED, files=()).close()
