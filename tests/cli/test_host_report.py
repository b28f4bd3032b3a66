import json

import pytest

from kvmd.cli.host_report import as_json, as_text, report_of
from kvmd.kvm import uapi
from kvmd.kvm.capabilities import CapabilityReport
from kvmd.kvm.capability_table import CAPABILITIES, Scope

VALUES = {
    "KVM_CAP_NR_VCPUS": 8,
    "KVM_CAP_MAX_VCPUS": 1024,
    "KVM_CAP_NR_MEMSLOTS": 32764,
    "KVM_CAP_GUEST_MEMFD_FLAGS": 3,
    "KVM_CAP_VM_TYPES": 1,
    "KVM_CAP_MEMORY_ATTRIBUTES": 8,
    "KVM_CAP_EXIT_HYPERCALL": 4096,
}
PLAIN = uapi.KVM_X86_DEFAULT_VM


def answers(*vm_types: int, **changes: int) -> list[CapabilityReport]:
    """Return a host that can do everything, but for the changes."""
    return [
        CapabilityReport(capability, vm_type, (VALUES | changes).get(capability.name, 1))
        for capability in CAPABILITIES
        for vm_type in ((None,) if capability.scope is Scope.SYSTEM else (PLAIN, *vm_types))
    ]


def test_a_host_that_can_do_everything() -> None:
    report = report_of(answers())
    assert report.usable
    assert report.fault_layout == "merged"
    assert report.tripwires == ("guest_memfd", "hole")
    assert report.vcpus == (1024, 8)
    assert report.memslots == 32764
    assert report.missing == ()
    text = as_text(report)
    assert "kvmd can run guests on this host." in text
    assert "lacks" not in text


def test_a_host_without_fault_information_speaks_the_layout_of_the_rfc() -> None:
    assert report_of(answers(KVM_CAP_MEMORY_FAULT_INFO=0)).fault_layout == "rfc-v9"


@pytest.mark.parametrize("flags", [0, 1, 2])
def test_a_host_without_both_guest_memfd_flags_has_holes_only(flags: int) -> None:
    report = report_of(answers(KVM_CAP_GUEST_MEMFD_FLAGS=flags))
    assert report.tripwires == ("hole",)
    assert report.usable


def test_a_host_that_lacks_what_every_guest_needs_is_of_no_use() -> None:
    report = report_of(answers(KVM_CAP_IMMEDIATE_EXIT=0))
    assert not report.usable
    text = as_text(report, "no emulator")
    assert "kvmd cannot run guests on this host." in text
    assert "kvmd can run guests on this host." in as_text(report, None)
    assert "KVM_CAP_IMMEDIATE_EXIT   (kvmd needs it)" in text
    assert report.protections["emulated"] == "no guest can run on this host"


def test_each_missing_capability_is_named_with_its_cost() -> None:
    report = report_of(answers(KVM_CAP_MEMORY_ATTRIBUTES=0, KVM_CAP_EXIT_HYPERCALL=0))
    assert [entry.capability.name for entry in report.missing] == [
        "KVM_CAP_MEMORY_ATTRIBUTES",
        "KVM_CAP_EXIT_HYPERCALL",
    ]
    text = as_text(report)
    for entry in report.missing:
        assert entry.capability.without in text
        assert entry.capability.purpose in text


def test_protections_to_come_say_whether_the_host_would_do() -> None:
    protections = report_of(answers(uapi.KVM_X86_SNP_VM)).protections
    assert protections["emulated"] is None
    assert protections["none"] is None
    assert protections["snp"] == "not built yet"
    assert protections["tdx"] == "not built yet; no KVM_X86_TDX_VM here"
    assert protections["guest-memfd"] == "no KVM_X86_SW_PROTECTED_VM here"


PROTECTED = uapi.KVM_X86_SW_PROTECTED_VM


def test_a_host_with_private_memory() -> None:
    report = report_of(answers(PROTECTED, KVM_CAP_VM_TYPES=3))
    assert report.protections["guest-memfd"] is None
    assert report.strongest == "guest-memfd"
    assert report.tripwires == ("attribute", "guest_memfd", "hole")
    text = as_text(report)
    assert "guest-memfd, emulated, none   (auto takes guest-memfd)" in text
    assert "(attribute is used by default)" in text
    assert as_json(report)["auto"] == "guest-memfd"


@pytest.mark.parametrize(
    ("lacks", "tripwires"),
    [
        ({"KVM_CAP_EXIT_HYPERCALL": 0}, ("attribute", "guest_memfd", "hole")),
        ({"KVM_CAP_MEMORY_ATTRIBUTES": 0}, ("guest_memfd", "hole")),
    ],
)
def test_what_a_type_of_vm_lacks_is_named(lacks: dict[str, int], tripwires: tuple[str, ...]) -> None:
    report = report_of(answers(PROTECTED, KVM_CAP_VM_TYPES=3, **lacks))
    (name,) = lacks
    assert (report.protections["guest-memfd"] or "").startswith(f"no {name}")
    assert report.strongest == "emulated"
    assert report.tripwires == tripwires


def test_a_type_of_vm_that_could_not_be_made_is_said() -> None:
    refused = [
        CapabilityReport(capability, uapi.KVM_X86_SNP_VM, None, "firmware too old")
        for capability in CAPABILITIES
        if capability.scope is Scope.VM
    ]
    report = report_of([*answers(), *refused])
    assert report.usable
    assert "KVM_X86_SNP_VM" in (report.protections["snp"] or "")
    assert "firmware too old" in as_text(report)


def test_the_json_form_says_the_same() -> None:
    report = report_of(answers(uapi.KVM_X86_SNP_VM, KVM_CAP_MEMORY_ATTRIBUTES=0))
    data = json.loads(json.dumps(as_json(report)))
    assert data["usable"] is True
    assert data["fault_layout"] == "merged"
    assert data["max_vcpus"] == 1024
    assert data["protections"]["emulated"] == {"usable": True, "problem": None}
    assert {entry["vm_type"] for entry in data["capabilities"]} == {None, "KVM_X86_DEFAULT_VM", "KVM_X86_SNP_VM"}
    assert len(data["capabilities"]) == len(report.capabilities)


def test_the_lines_of_the_overview_fit_a_terminal() -> None:
    overview = as_text(report_of(answers())).split("What KVM can do")[0]
    assert max(map(len, overview.splitlines())) < 80
