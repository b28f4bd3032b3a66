"""Every payload guest on the software CPU and on KVM: what can be seen of it is the same."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from kvmd.conversion.messages import Outcome
from kvmd.kvm.system import Kvm
from kvmd.units import MIB, page_ceil, page_floor
from tests.machine.conftest import Ran

Run = Callable[..., Awaitable[Ran]]

pytestmark = [pytest.mark.kvm, pytest.mark.software]

VMCALL, VMMCALL = 1, 2
"""What the first argument of `explicit` says of how to ask (docs/payload-abi.md)."""

RACING = frozenset({"contend"})
"""Guests whose vCPUs race for the same pages: how often each converts is chance, which pages do is not."""


@dataclass(frozen=True)
class Case:
    """A guest and how it is run."""

    guest: str
    arguments: tuple[int, ...] = ()
    vcpus: int = 1
    options: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return "-".join(map(str, (self.guest, *self.arguments, f"{self.vcpus}vcpus", *(v for _, v in self.options))))


CASES = [
    *(Case("hello", vcpus=vcpus) for vcpus in (1, 4, 64)),
    *(Case("pingpong", (8, 4), vcpus) for vcpus in (1, 4)),
    Case("pingpong", (8, 4), 2, (("initial", "shared"),)),
    Case("pingpong", (8, 4), 1, (("cpl", 0),)),
    Case("pingpong", (1 << 20,)),
    Case("pingpong", options=(("protection", "none"),)),
    *(Case("contend", (4, 24), vcpus) for vcpus in (2, 4)),
    *(Case("explicit", (0,), vcpus) for vcpus in (1, 4)),
    Case("large"),
    Case("conformance"),
    *(Case("hostile", (which,)) for which in (1, 2, 3, 4, 6, 7, 10, 13, 14, 15, 99)),
    Case("hostile", (8,)),
    Case("hostile", (9,)),
    Case("hostile", (10,), 1, (("cpl", 0),)),
    Case("hostile", (11, 5000)),
    Case("hostile", (12, 1)),
    *(Case("hostile", (16,), vcpus) for vcpus in (1, 4)),
]


def seen(ran: Ran, case: Case) -> dict[str, object]:
    """Return what has to be the same: of conversions the set, since vCPUs make them in any order."""
    converted = [record for record in ran.records if record.outcome is Outcome.CONVERTED]
    racing = case.guest in RACING or case.arguments[:1] == (16,)
    # Of an access that it emulates, KVM reports the very bytes; of others, and the software CPU of all, the page.
    each = [
        (record.cause, page_floor(record.gpa), page_ceil(record.gpa + record.size_bytes), record.to)
        for record in converted
    ]
    return {
        "console": sorted(ran.output.splitlines()) if case.vcpus > 1 else ran.output,
        "reason": ran.stop.reason,
        "status": ran.stop.status,
        # Where the boot information lies depends on the size of the page tables, and so on the host's processor.
        "message": re.sub(r"gpa 0x1\w{5} ", "gpa ... ", ran.stop.message),
        "vcpu": ran.stop.vcpu,
        "rip": ran.stop.registers.rip if ran.stop.registers is not None else None,
        "pages": None if racing else ran.machine.memory_map(),
        "conversions": {conversion[1] for conversion in each} if racing else Counter(each),
        "refused": sum(record.outcome is Outcome.REFUSED for record in ran.records),
    }


def own_hypercall(kvm: Kvm) -> int:
    """Return the argument by which `explicit` asks with the hypercall instruction of the host's processor.

    The other one is an invalid instruction where KVM lets the user level run on it natively.
    """
    vendor = next(entry for entry in kvm.supported_cpuid() if entry.function == 0)
    is_intel = struct.pack("=III", vendor.ebx, vendor.edx, vendor.ecx) == b"GenuineIntel"
    return VMCALL if is_intel else VMMCALL


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_guest_cannot_tell_what_runs_it(run: Run, case: Case) -> None:
    await is_the_same(run, case)


async def test_a_hypercall_of_the_user_level_is_refused_alike(run: Run, kvm: Kvm) -> None:
    await is_the_same(run, Case("explicit", (own_hypercall(kvm),)))


async def is_the_same(run: Run, case: Case) -> None:
    """Run a case on both, and see that nothing differs."""
    options = {"memory": 16 * MIB, **dict(case.options), "vcpus": case.vcpus}
    kvm = await run(case.guest, *case.arguments, accelerator="kvm", **options)
    software = await run(case.guest, *case.arguments, accelerator="software", **options)
    expected, found = seen(kvm, case), seen(software, case)
    for key in expected:
        assert found[key] == expected[key], (key, software.stop, kvm.stop)
