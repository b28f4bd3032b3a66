"""One run of the ``pingpong`` guest: by kvmd in this process, or by the C floor in one of its own."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from bench.measure import CannotMeasure
from kvmd.conversion.messages import Outcome
from kvmd.conversion.record import ConversionRecord
from kvmd.conversion.ring import DEFAULT_CAPACITY
from kvmd.guests import GUESTS
from kvmd.machine import Machine
from kvmd.spec import MachineSpec
from kvmd.stop import StopReason
from kvmd.units import MIB

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Load:
    """What the guest does.

    Attributes:
        vcpus: how many walk.
        pages: that each of them walks.
        rounds: walks over them, the first of which cuts memory into pages and is reported apart.
        memory: of the machine, in bytes.
    """

    vcpus: int = 1
    pages: int = 16
    rounds: int = 17
    memory: int = 64 * MIB

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


@dataclass(frozen=True, slots=True)
class Run:
    """What a run cost, in microseconds.

    Attributes:
        us_per_conversion: wall time of each conversion but the first round's, the guest's own time included.
        us_in_kvm: of that, the mean time of changing slots and of discarding the side left behind.
        us_first_round: wall time of each conversion of the first round.
        us_first: time of changing slots in the very first one, which cuts a block.
    """

    us_per_conversion: float
    us_in_kvm: float
    us_first_round: float
    us_first: float


def run_kvmd(load: Load, accelerator: Literal["kvm", "software"] = "kvm") -> Run:
    """Run the guest under kvmd, on KVM or the software CPU.

    Raises:
        CannotMeasure: the guest did not do what it should.
    """
    if accelerator == "kvm":
        require_kvm()
    if load.conversions > DEFAULT_CAPACITY:
        raise ValueError(f"{load.conversions} conversions do not fit into the ring of records")
    spec = MachineSpec(
        image=GUESTS["pingpong"].path,
        vcpus=load.vcpus,
        memory=load.memory,
        accelerator=accelerator,
        arguments=(load.pages, load.rounds),
    )
    gc.collect()
    with Machine.open(spec) as machine:
        reader = machine.records.reader()
        stop = trio.run(machine.run)
        if stop.reason is not StopReason.GUEST_EXIT or stop.status:
            raise CannotMeasure(f"kvmd stopped the guest: {stop.message}")
        _, records = reader.take(DEFAULT_CAPACITY)
    return _of_records(load, [record for record in records if record.outcome is Outcome.CONVERTED])


def _of_records(load: Load, records: list[ConversionRecord]) -> Run:
    if len(records) != load.conversions:
        raise CannotMeasure(f"{len(records)} conversions instead of {load.conversions}")
    first = records[: load.first_round]
    rest = records[load.first_round :]
    in_kvm = sum(record.applying_us + record.discarding_us for record in rest) / len(rest)
    return Run(
        us_per_conversion=(rest[-1].monotonic_ns - first[-1].monotonic_ns) / 1000 / len(rest),
        us_in_kvm=in_kvm,
        us_first_round=(first[-1].monotonic_ns - first[0].monotonic_ns) / 1000 / max(1, len(first) - 1),
        us_first=first[0].applying_us,
    )


def run_floor(load: Load, mode: str) -> Run:
    """Run the guest under the C floor, whose conversions are made by the faulting ``thread`` or by a ``service``."""
    command = [str(build_floor()), f"--mode={mode}", f"--vcpus={load.vcpus}", f"--memory={load.memory}"]
    command += [f"--skip={load.first_round}", f"--arg={load.pages}", f"--arg={load.rounds}"]
    done = subprocess.run(
        [*command, str(GUESTS["pingpong"].path)], capture_output=True, text=True, check=False, timeout=120
    )
    if not done.stdout:
        raise CannotMeasure(f"the C floor cannot run here: {done.stderr.strip()}")
    report = json.loads(done.stdout)
    if report["status"] or report["conversions"] != load.conversions:
        raise CannotMeasure(f"the C floor stopped the guest: {done.stdout.strip()}")
    return Run(report["us_per_conversion"], report["us_in_kvm"], report["us_first_round"], report["us_in_kvm_first"])


def build_floor() -> Path:
    """Return the C floor, compiled where it is older than its sources. Raises CannotMeasure."""
    return _compiled("floor", "floor*.[ch]")


def build_bare() -> Path:
    """Return the loop of bare ioctls, compiled where it is older than its source. Raises CannotMeasure."""
    return _compiled("bare", "bare.c")


def _compiled(name: str, pattern: str) -> Path:
    """Return a C program of this folder's.

    Raises:
        CannotMeasure: there is no C compiler.
    """
    # The lab's root file system is read-only but for this.
    folder = Path(os.environ.get("KVMD_BENCH_BUILD", _ROOT / "build" / "bench"))
    program = folder / name
    sources = sorted(Path(__file__).parent.glob(pattern))
    if program.exists() and all(program.stat().st_mtime > source.stat().st_mtime for source in sources):
        return program
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotMeasure(f"the {name} program needs a C compiler: install gcc")
    folder.mkdir(parents=True, exist_ok=True)
    code = [str(source) for source in sources if source.suffix == ".c"]
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(program), *code], check=True)
    return program


def require_kvm() -> None:
    """Raise CannotMeasure where there is no /dev/kvm to use."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise CannotMeasure("/dev/kvm is not there, or not accessible")


def timed_open(spec: MachineSpec) -> tuple[float, Machine]:
    """Return the seconds that opening a machine took, and the machine, which the caller closes."""
    started = time.perf_counter()
    machine = Machine.open(spec)
    return time.perf_counter() - started, machine
