"""The software CPU beside KVM: conversions end to end, and bare guest code."""

from __future__ import annotations

import ctypes
import mmap
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

from kvmd.benchmark.measure import CannotMeasure, Options, Ratio, Report, take_turns
from kvmd.benchmark.runs import Load, on_memslots, require_kvm, run_kvmd
from kvmd.hv.exits import PortIo
from kvmd.hv.vcpu import Registers, Vcpu
from kvmd.kvm.fault_layout import MERGED
from kvmd.kvm.system import Kvm
from kvmd.ranges import GpaRange, PageState
from kvmd.software.availability import missing_emulator
from kvmd.units import MIB, PAGE_SIZE

TARGET = 1.0
"""What a conversion on the software CPU may take at most, in conversions on KVM with memslots."""

_LOADS = (Load(vcpus=1, rounds=17), Load(vcpus=4, rounds=5))

_LOOPS = {
    # 1: add rax, rcx; add rdx, rax; add rsi, rdx; dec rcx; jnz 1b; out 0x10, al
    "registers": (bytes.fromhex("4801c8 4801c2 4801d6 48ffc9 75f2 e610"), 5, 20_000_000),
    # 1: mov rax, [0x20000]; add rdx, rax; mov [0x20008], rdx; dec rcx; jnz 1b; out 0x10, al
    "memory": (bytes.fromhex("488b042500000200 4801c2 4889142508000200 48ffc9 75e8 e610"), 5, 4_000_000),
}
"""By name: code that counts RCX down, its instructions in each turn, and turns."""

_CODE, _TABLES = 0x10000, (0x1000, 0x2000, 0x3000)
_FLAGS, _LARGE = 0x7, 0x80


def measure(options: Options) -> Report:
    """Measure conversions with 1 and 4 vCPUs, and two loops."""
    require_kvm()
    if problem := missing_emulator():
        raise CannotMeasure(problem)
    report = Report("software", "the software CPU beside KVM")
    for load in _LOADS:
        vcpus = f"{load.vcpus} vCPU{'s' if load.vcpus > 1 else ''}"
        software, kvm = f"a conversion on software, {vcpus}", f"on KVM, {vcpus}"
        series = take_turns(
            {software: partial(_conversion, load, "software"), kvm: partial(_conversion, on_memslots(load), "kvm")},
            rounds=options.rounds(20),
            unit="us",
        )
        report.ratios.append(Ratio(series[software], series[kvm], TARGET))
    with ExitStack() as stack:
        runners = {"software": stack.enter_context(_on_software()), "KVM": stack.enter_context(_on_kvm())}
        for name, (code, count, turns) in _LOOPS.items():
            labels = {kind: f"10^9 instructions on {kind}, {name}" for kind in runners}
            series = take_turns(
                {labels[kind]: partial(_time, run, code, count, turns) for kind, run in runners.items()},
                rounds=options.rounds(10),
                unit="s",
            )
            report.ratios.append(Ratio(series[labels["software"]], series[labels["KVM"]]))
    report.notes.append(
        f"conversions: pingpong, 16 pages for each vCPU, {_LOADS[0].steady} conversions a round, the first walk not "
        "counted; protection emulated with memslots on KVM"
    )
    return report


def _conversion(load: Load, accelerator: Literal["kvm", "software"]) -> float:
    return run_kvmd(load, accelerator).us_per_conversion


def _time(run: Callable[[bytes, int], None], code: bytes, count: int, turns: int) -> float:
    """Return the seconds that 10^9 instructions take."""
    started = time.perf_counter()
    run(code, turns)
    return (time.perf_counter() - started) / (count * turns) * 1e9


def _run_loop(vcpu: Vcpu, ram: int, code: bytes, turns: int) -> None:
    ctypes.memmove(ram + _CODE, code, len(code))
    vcpu.set_registers(Registers(rip=_CODE, rcx=turns, rflags=0x3002))
    found = vcpu.run()
    if not isinstance(found, PortIo):
        raise CannotMeasure(f"the loop ended with {found}")


@contextmanager
def _ram() -> Iterator[int]:
    memory = mmap.mmap(-1, MIB)
    ram = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    root, pointers, directory = _TABLES
    for place, entry in ((root, pointers), (pointers, directory), (directory, _LARGE)):
        ctypes.memmove(ram + place, struct.pack("<Q", entry | _FLAGS), 8)
    yield ram


@contextmanager
def _on_kvm() -> Iterator[Callable[[bytes, int], None]]:
    with _ram() as ram, Kvm.open() as kvm, kvm.create_vm() as vm:
        vm.set_memory_region(0, 0, MIB, ram)
        vcpu = vm.create_vcpu(0, MERGED)
        vcpu.set_cpuid(kvm.supported_cpuid())
        vcpu.set_long_mode(cr3=_TABLES[0], cpl=3)
        yield partial(_run_loop, vcpu, ram)
        vcpu.close()


@contextmanager
def _on_software() -> Iterator[Callable[[bytes, int], None]]:
    from kvmd.software.memory import GuestMemory  # noqa: PLC0415 - needs the emulator
    from kvmd.software.vm import SoftwareVm  # noqa: PLC0415 - needs the emulator

    with _ram() as ram:
        vm = SoftwareVm(GuestMemory(MIB, {PageState.SHARED: ram}, c_bit=None, initial=PageState.SHARED))
        vcpu = vm.create_vcpu(0)
        vcpu.set_long_mode(cr3=_TABLES[0], cpl=3)

        def run(code: bytes, turns: int) -> None:
            # Written from outside, so it has to be translated anew.
            vm.note_written(GpaRange(_CODE, _CODE + PAGE_SIZE), PageState.SHARED)
            _run_loop(vcpu, ram, code, turns)

        yield run
        vcpu.close()
        vm.close()
