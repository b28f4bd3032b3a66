"""One run of the ``pingpong`` guest: by kvmd in this process, or by the C floor in one of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import time
from dataclasses import dataclass, replace
from typing import Literal

import trio

from kvmd.benchmark.measure import CannotMeasure
from kvmd.benchmark.sources import build_floor
from kvmd.benchmark.tally import Run, Tally
from kvmd.conversion.ring import DEFAULT_CAPACITY, RecordReader
from kvmd.errors import BackendError, HostError
from kvmd.guests import GUESTS
from kvmd.host_choice import create_vm
from kvmd.kvm.system import Kvm
from kvmd.machine import Machine
from kvmd.spec.machine import MachineSpec
from kvmd.stop import Stop, StopReason
from kvmd.units import MIB, PAGE_SIZE

_FOLLOW_SECONDS = 2.0
"""How often the records of a long run are taken, which the ring would drop otherwise."""

_ROOM = 16 * MIB
"""What a guest has besides the pages that it walks, at most."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the guest does.

    Attributes:
        vcpus: how many walk.
        pages: that each of them walks.
        rounds: walks over them, the first of which cuts memory into pages and is reported apart.
        memory: of the machine, in bytes; None for 64 MiB, or the next power of two that has the pages.
        protection, tripwire: as in a machine's specification.
    """

    vcpus: int = 1
    pages: int = 16
    rounds: int = 17
    memory: int | None = None
    protection: str = "emulated"
    tripwire: Literal["auto", "attribute", "guest_memfd", "hole"] = "auto"

    @property
    def memory_bytes(self) -> int:
        """Bytes of the machine's memory."""
        if self.memory is not None:
            return self.memory
        size = 64 * MIB
        while size < self.vcpus * self.pages * PAGE_SIZE + _ROOM:
            size *= 2
        return size

    @property
    def first_round(self) -> int:
        """Conversions of the first round."""
        return 2 * self.vcpus * self.pages

    @property
    def steady(self) -> int:
        """Conversions of the other rounds."""
        return self.conversions - self.first_round

    @property
    def conversions(self) -> int:
        """Conversions of all rounds."""
        return self.first_round * self.rounds

    def spec(self, accelerator: Literal["kvm", "software"] = "kvm") -> MachineSpec:
        """Return the machine that does it. Raises ConfigError where there is none."""
        return MachineSpec(
            image=GUESTS["pingpong"].path,
            vcpus=self.vcpus,
            memory=self.memory_bytes,
            accelerator=accelerator,
            protection=self.protection,
            tripwire=self.tripwire,
            arguments=(self.pages, self.rounds),
        )


def settled(load: Load) -> Load:
    """Return the load with the protection and the tripwire that kvmd gives it here, where that is left to kvmd.

    What stands beside kvmd has to make the same calls, and these are others for each tripwire.

    Raises:
        CannotMeasure: this host has not what it asks for.
        ConfigError: there is no such machine.
    """
    spec = load.spec()
    require_kvm()
    try:
        with Kvm.open() as kvm:
            vm, choice = create_vm(kvm, spec.protection, spec.tripwire)
            vm.close()
    except (BackendError, HostError) as error:
        raise CannotMeasure(str(error)) from error
    tripwire = load.tripwire if choice.tripwire is None else choice.tripwire.value
    return replace(load, protection=choice.protection, tripwire=tripwire)


def on_memslots(load: Load) -> Load:
    """Return the load with emulated protection by memslots, whatever else this host has. Raises as ``settled``."""
    found = settled(load)
    return replace(load, tripwire="guest_memfd") if found.tripwire == "attribute" else found


def run_kvmd(load: Load, accelerator: Literal["kvm", "software"] = "kvm") -> Run:
    """Run the guest under kvmd, on KVM or the software CPU.

    Raises:
        CannotMeasure: the guest did not do what it should, or the host cannot run it.
        ConfigError: there is no such machine.
    """
    if accelerator == "kvm":
        require_kvm()
    spec = load.spec(accelerator)
    gc.collect()
    tally = Tally(load.first_round)
    try:
        machine = Machine.open(spec)
    except HostError as error:
        raise CannotMeasure(str(error)) from error
    with machine:
        reader = machine.records.reader()
        stop = trio.run(_run, machine, reader, tally)
        _take(reader, tally)
        printed = machine.console.take().decode(errors="replace").strip()
    if stop.reason is not StopReason.GUEST_EXIT or stop.status:
        raise CannotMeasure(f"kvmd stopped the guest: {stop.message}{f': {printed}' if printed else ''}")
    return tally.run(load.conversions)


async def _run(machine: Machine, reader: RecordReader, tally: Tally) -> Stop:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_follow, reader, tally)
        stop = await machine.run()
        nursery.cancel_scope.cancel()
    return stop


async def _follow(reader: RecordReader, tally: Tally) -> None:
    while True:
        await trio.sleep(_FOLLOW_SECONDS)
        _take(reader, tally)


def _take(reader: RecordReader, tally: Tally) -> None:
    lost, records = reader.take(DEFAULT_CAPACITY)
    if lost:
        raise CannotMeasure(f"{lost} records were lost: this host is too busy")
    tally.add(records)


def run_floor(load: Load, mode: str) -> Run:
    """Run the guest under the C floor.

    Args:
        load: what the guest does, ``settled``.
        mode: who converts: the faulting ``thread``, a ``service`` thread, or one that answers ``early``, as kvmd's
            does: before it discards the side left behind and makes the next tripwire's guest_memfd; or the same
            ``placed`` on the boot CPU.

    Raises:
        CannotMeasure: it cannot be built, or cannot run the guest.
    """
    if why := floor_cannot(load):
        raise CannotMeasure(why)
    command = [str(build_floor()), f"--mode={mode}", f"--vcpus={load.vcpus}", f"--memory={load.memory_bytes}"]
    command += [f"--skip={load.first_round}", f"--arg={load.pages}", f"--arg={load.rounds}"]
    if load.tripwire == "hole":
        command += ["--tripwire=hole"]
    seconds = max(60, load.conversions // 200)
    done = subprocess.run(
        [*command, f"--timeout={seconds}", str(GUESTS["pingpong"].path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * seconds,
    )
    return parse_floor(done.stdout, done.stderr, load)


def floor_cannot(load: Load) -> str | None:
    """Return why the C floor has nothing to set beside a load, or None."""
    if load.protection != "emulated":
        return f"the C program has emulated protection only, not {load.protection}"
    if load.tripwire == "attribute":
        return "the C program has the tripwires guest_memfd and hole only, not attribute: choose one with --tripwire"
    return None


def parse_floor(output: str, errors: str, load: Load) -> Run:
    """Return what the C floor printed.

    Args:
        output: its line of JSON, or nothing where it could not begin.
        errors: what it said besides.
        load: what it was to do.

    Raises:
        CannotMeasure: it could not, or did not do just that.
    """
    if not output.strip():
        last = errors.strip().splitlines()[-1:] or ["it said nothing"]
        raise CannotMeasure(f"the C floor cannot run here: {last[0]}")
    report = json.loads(output)
    if report["status"] or report["conversions"] != load.conversions:
        why = report["stopped"] or f"{report['conversions']} conversions instead of {load.conversions}"
        raise CannotMeasure(f"the C floor stopped the guest: {why}")
    if report["discards"] != report["conversions"] or report["pauses"] != report["cuts"]:
        raise CannotMeasure(f"the C floor did not do what kvmd does: {output.strip()}")
    return Run(
        conversions=load.steady,
        us_per_conversion=report["us_per_conversion"],
        us_in_kvm=report["us_in_kvm"],
        first_round=load.first_round,
        us_first_round=report["us_first_round"],
        us_first=report["us_in_kvm_first"],
    )


def require_kvm() -> None:
    """Raise CannotMeasure where there is no /dev/kvm to use."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise CannotMeasure("/dev/kvm is not there, or not accessible")


def timed_open(spec: MachineSpec) -> tuple[float, Machine]:
    """Return the seconds that opening a machine took, and the machine, which the caller closes."""
    started = time.perf_counter()
    machine = Machine.open(spec)
    return time.perf_counter() - started, machine
