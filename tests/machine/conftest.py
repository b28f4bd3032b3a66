"""Machines on the real KVM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from kvmd.conversion.messages import Cause, Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.guests import GUESTS
from kvmd.machine import Machine
from kvmd.ranges import PageState
from kvmd.spec.machine import MachineSpec
from kvmd.stop import Stop
from kvmd.units import MIB

RUN_SECONDS = 120
"""A guest that runs longer hangs: the bound is for a busy machine, not a measure of speed."""


@dataclass
class Ran:
    """A machine after its end."""

    machine: Machine
    stop: Stop
    output: str
    records: list[ConversionRecord]

    def converted(self, *, cause: Cause, to: PageState) -> int:
        """Return how many requests of the kind changed something."""
        return self.machine.stats.snapshot().requests(cause=cause, to=to, outcome=Outcome.CONVERTED)


OpenMachine = Callable[..., Machine]


@pytest.fixture
def open_machine() -> Iterator[OpenMachine]:
    """Return a function that opens a machine for a built-in guest and has it closed in the end."""
    with ExitStack() as stack:

        def open_(guest: str, *arguments: int, **spec: Any) -> Machine:
            spec.setdefault("memory", 64 * MIB)
            image = spec.pop("image", Path(GUESTS[guest].path))
            return stack.enter_context(Machine.open(MachineSpec(image=image, arguments=arguments, **spec)))

        yield open_


async def finish(machine: Machine) -> Ran:
    """Run the machine to its end, with nobody reading its console but this."""
    reader = machine.records.reader(from_oldest=True)
    output = bytearray()

    printed = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def note_output() -> None:
        printed.set()

    machine.console.set_wake(lambda: token.run_sync_soon(note_output))

    async def drain() -> None:
        nonlocal printed
        while True:
            await printed.wait()
            printed = trio.Event()
            output.extend(machine.console.take())

    with trio.fail_after(RUN_SECONDS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            stop = await machine.run()
            nursery.cancel_scope.cancel()
    output.extend(machine.console.take())
    _, records = reader.take(1 << 20)
    return Ran(machine, stop, output.decode(errors="replace"), records)


@pytest.fixture
def run(open_machine: OpenMachine) -> Callable[..., Any]:
    """Return a coroutine function that opens and runs a built-in guest."""

    async def run_(guest: str, *arguments: int, **spec: Any) -> Ran:
        return await finish(open_machine(guest, *arguments, **spec))

    return run_
