"""What a host can do for kvmd, made of the answers of its KVM: no I/O here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvmd.kvm import uapi
from kvmd.kvm.capabilities import CapabilityReport
from kvmd.kvm.capability_table import VM_TYPE_NAMES
from kvmd.kvm.fault_layout import choose_layout
from kvmd.kvm.needs import ATTRIBUTE_TRIPWIRE, GUEST_MEMFD, GUEST_MEMFD_TRIPWIRE, Need, first_lacking

_LACKS_NEEDED = "lacks something that kvmd needs, see below"

_LOST = (
    "speed: guest code runs ten to twenty-five times slower, one vCPU at a time",
    "protection guest-memfd, and the tripwires of protection emulated",
    "instructions that the emulator lacks, such as AVX",
    "(docs/software-cpu.md has the whole list)",
)

_NOT_BUILT_YET = "not built yet"
_PROTECTIONS_TO_COME = {"snp": uapi.KVM_X86_SNP_VM, "tdx": uapi.KVM_X86_TDX_VM}


@dataclass(frozen=True, slots=True)
class HostReport:
    """A host in kvmd's eyes.

    Attributes:
        usable: whether guests can run.
        fault_layout: the name of the layout that memory faults are decoded with.
        tripwires: the kinds that work here, the one that ``auto`` takes first.
        protections: every kind by name: None where it works here, else why not.
        strongest: the protection that ``auto`` takes, or None where none works.
        vcpus: the most that a machine can have, and how many KVM recommends; 0 where it does not say.
        memslots: the most that a machine can have.
        capabilities: the answers themselves.
    """

    usable: bool
    fault_layout: str
    tripwires: tuple[str, ...]
    protections: dict[str, str | None]
    strongest: str | None
    vcpus: tuple[int, int]
    memslots: int
    capabilities: tuple[CapabilityReport, ...]

    @property
    def missing(self) -> tuple[CapabilityReport, ...]:
        """The capabilities that KVM lacks, or could not be asked for, in any type of VM."""
        return tuple(report for report in self.capabilities if not report.value)


def report_of(reports: Sequence[CapabilityReport]) -> HostReport:
    """Return what the answers mean."""
    plain = {r.capability.name: r.value or 0 for r in reports if r.vm_type in (None, uapi.KVM_X86_DEFAULT_VM)}
    offered = {report.vm_type for report in reports if report.value is not None}
    usable = all(report.value for report in reports if report.capability.required)
    unusable = None if usable else "no guest can run on this host"
    lacking = _lacking(reports, uapi.KVM_X86_SW_PROTECTED_VM, GUEST_MEMFD)
    guest_memfd = unusable or (f"no {lacking} here" if lacking else None)
    protections = {"guest-memfd": guest_memfd, "emulated": unusable, "none": unusable}
    kinds = (
        ("attribute", _lacking(reports, uapi.KVM_X86_SW_PROTECTED_VM, ATTRIBUTE_TRIPWIRE)),
        ("guest_memfd", _lacking(reports, uapi.KVM_X86_DEFAULT_VM, GUEST_MEMFD_TRIPWIRE)),
        ("hole", None),
    )
    for name, vm_type in _PROTECTIONS_TO_COME.items():
        protections[name] = _NOT_BUILT_YET + ("" if vm_type in offered else f"; no {VM_TYPE_NAMES[vm_type]} here")
    recommended = plain.get("KVM_CAP_NR_VCPUS", 0)
    return HostReport(
        usable=usable,
        fault_layout=choose_layout(memory_fault_info=plain.get("KVM_CAP_MEMORY_FAULT_INFO", 0) > 0).name,
        tripwires=tuple(name for name, need in kinds if need is None),
        protections=protections,
        strongest=next((name for name in ("guest-memfd", "emulated") if protections[name] is None), None),
        vcpus=(plain.get("KVM_CAP_MAX_VCPUS", 0) or recommended, recommended),
        memslots=plain.get("KVM_CAP_NR_MEMSLOTS", 0),
        capabilities=tuple(reports),
    )


def _lacking(reports: Sequence[CapabilityReport], vm_type: int, needs: tuple[Need, ...]) -> Need | None:
    """Return the first need that a VM of the type would not meet."""
    answers = {r.capability.number: r.value or 0 for r in reports if r.vm_type in (None, vm_type)}
    return first_lacking(needs, lambda number: answers.get(number, 0))


def as_json(report: HostReport, software: str | None = None) -> dict[str, object]:
    """Return the report as plain data for ``kvmd check --json``.

    Args:
        report: of this host's KVM.
        software: why the software CPU cannot be used; None where it can.
    """
    kvm = None if report.usable else _LACKS_NEEDED
    return {
        "usable": report.usable or software is None,
        **_accelerators_json(kvm, software),
        "fault_layout": report.fault_layout,
        "tripwires": list(report.tripwires),
        "protections": {
            name: {"usable": problem is None, "problem": problem} for name, problem in report.protections.items()
        },
        "auto": report.strongest,
        "max_vcpus": report.vcpus[0],
        "recommended_vcpus": report.vcpus[1],
        "memslots": report.memslots,
        "capabilities": [
            {
                "name": entry.capability.name,
                "vm_type": _vm_type_name(entry.vm_type),
                "value": entry.value,
                "problem": entry.problem,
                "required": entry.capability.required,
                "purpose": entry.capability.purpose,
                "without": entry.capability.without,
            }
            for entry in report.capabilities
        ],
    }


def without_kvm_json(problem: str, software: str | None) -> dict[str, object]:
    """Return what ``kvmd check --json`` says where there is no KVM.

    Args:
        problem: why not.
        software: why the software CPU cannot be used either; None where it can.
    """
    report: dict[str, object] = {"usable": software is None, "problem": problem}
    return report | _accelerators_json(problem, software)


def without_kvm_text(problem: str, software: str | None) -> str:
    """Return the same for a person."""
    lines = [_verdict(software is None), "", f"  KVM            cannot be used: {problem}", _software_line(software)]
    if software is None:
        lines += ["", "What is lost without KVM:", *(f"  {line}" for line in _LOST)]
    return "\n".join(lines)


def _accelerators_json(kvm: str | None, software: str | None) -> dict[str, object]:
    problems = {"kvm": kvm, "software": software}
    return {
        "accelerators": {name: {"usable": not why, "problem": why} for name, why in problems.items()},
        "accelerator": next((name for name, why in problems.items() if why is None), None),
    }


def _verdict(usable: bool) -> str:  # noqa: FBT001 - the answer is what it is about
    return f"kvmd {'can' if usable else 'cannot'} run guests on this host."


def _software_line(problem: str | None) -> str:
    return f"  software CPU   {problem or 'works'}"


def networks_json(networks: Mapping[str, str | None]) -> dict[str, object]:
    """Return what of Linux guests' networks works, as plain data.

    Args:
        networks: ``bridges`` and ``namespaces``: None where it works here, else why not.
    """
    found = {name: {"usable": problem is None, "problem": problem} for name, problem in networks.items()}
    return {"networks": found}


def as_text(report: HostReport, software: str | None = None, networks: Mapping[str, str | None] | None = None) -> str:
    """Return the report for a person, in lines of at most 79 columns where names allow; see ``as_json``.

    Args:
        report: of this host's KVM.
        software: why the software CPU cannot be used; None where it can.
        networks: see ``networks_json``.
    """
    networks = networks or {}
    usable_networks = [name for name, problem in networks.items() if problem is None]
    working = [name for name, problem in report.protections.items() if problem is None]
    lines = [
        _verdict(report.usable or software is None),
        "",
        f"  KVM            {'works: guests run on it unless told otherwise' if report.usable else _LACKS_NEEDED}",
        _software_line(software),
        f"  memory faults  layout {report.fault_layout}",
        f"  tripwires      {', '.join(report.tripwires)}   ({report.tripwires[0]} is used by default)",
        f"  protection     {', '.join(working) or 'none works here'}"
        + (f"   (auto takes {report.strongest})" if report.strongest else ""),
        *(f"  {'':14} {name}: {problem}" for name, problem in report.protections.items() if problem),
        *([f"  networks       {', '.join(usable_networks) or 'none works here'}"] if networks else []),
        *(f"  {'':14} {name}: {problem}" for name, problem in networks.items() if problem),
        f"  vCPUs          up to {report.vcpus[0]}, {report.vcpus[1]} recommended",
        f"  memslots       {report.memslots}",
        "",
        "What KVM can do:",
        *(f"  {_title(entry):38} {entry.value}" for entry in report.capabilities if entry.value),
    ]
    if report.missing:
        lines += ["", "What it lacks, and what that costs:"]
        for entry in report.missing:
            needed = "   (kvmd needs it)" if entry.capability.required else ""
            lines += [
                f"  {_title(entry)}{needed}",
                f"    {'for':8} {entry.capability.purpose}",
                f"    {'without':8} {entry.capability.without}",
            ]
            if entry.problem:
                lines.append(f"    {'because':8} {entry.problem}")
    return "\n".join(lines)


def _title(entry: CapabilityReport) -> str:
    """Return the capability's name, with the type of VM where that is not the plain one."""
    if entry.vm_type in (None, uapi.KVM_X86_DEFAULT_VM):
        return entry.capability.name
    return f"{entry.capability.name} of {_vm_type_name(entry.vm_type)}"


def _vm_type_name(vm_type: int | None) -> str | None:
    return None if vm_type is None else VM_TYPE_NAMES.get(vm_type, f"type {vm_type}")
