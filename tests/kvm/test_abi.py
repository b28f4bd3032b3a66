"""Every structure, offset and constant against the system's headers, by a C program."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmd.kvm import fault_layout, guest_memfd, run_page, uapi
from kvmd.kvm.exits import EXIT_NAMES
from tests.gate import Facility, require_whole

Structure = type[ctypes.Structure] | type[ctypes.Union]

# The macro says whether the header has the structure; all of these came with their ioctl.
STRUCTURES: dict[str, tuple[Structure, str]] = {
    "kvm_userspace_memory_region": (uapi.UserspaceMemoryRegion, "KVM_SET_USER_MEMORY_REGION"),
    "kvm_userspace_memory_region2": (uapi.UserspaceMemoryRegion2, "KVM_SET_USER_MEMORY_REGION2"),
    "kvm_create_guest_memfd": (uapi.CreateGuestMemfd, "KVM_CREATE_GUEST_MEMFD"),
    "kvm_memory_attributes": (uapi.MemoryAttributes, "KVM_SET_MEMORY_ATTRIBUTES"),
    "kvm_enable_cap": (uapi.EnableCap, "KVM_ENABLE_CAP"),
    "kvm_regs": (uapi.Regs, "KVM_GET_REGS"),
    "kvm_translation": (uapi.Translation, "KVM_TRANSLATE"),
    "kvm_segment": (uapi.Segment, "KVM_GET_SREGS"),
    "kvm_dtable": (uapi.Dtable, "KVM_GET_SREGS"),
    "kvm_sregs": (uapi.Sregs, "KVM_GET_SREGS"),
    "kvm_cpuid_entry2": (uapi.CpuidEntry2, "KVM_SET_CPUID2"),
    "kvm_cpuid2": (uapi.Cpuid2, "KVM_SET_CPUID2"),
    "kvm_pit_config": (uapi.PitConfig, "KVM_CREATE_PIT2"),
    "kvm_irqfd": (uapi.IrqFd, "KVM_IRQFD"),
    "kvm_ioeventfd": (uapi.IoEventFd, "KVM_IOEVENTFD"),
    "kvm_msr_entry": (uapi.MsrEntry, "KVM_SET_MSRS"),
    "kvm_msrs": (uapi.Msrs, "KVM_SET_MSRS"),
    "kvm_lapic_state": (uapi.LapicState, "KVM_GET_LAPIC"),
    "kvm_signal_mask": (uapi.SignalMask, "KVM_SET_SIGNAL_MASK"),
}

UNION_MEMBERS: dict[str, tuple[Structure, str]] = {
    "hw": (run_page.ExitUnknown, "KVM_EXIT_UNKNOWN"),
    "fail_entry": (run_page.ExitFailEntry, "KVM_EXIT_FAIL_ENTRY"),
    "io": (run_page.ExitIo, "KVM_EXIT_IO"),
    "mmio": (run_page.ExitMmio, "KVM_EXIT_MMIO"),
    "hypercall": (run_page.ExitHypercall, "KVM_EXIT_HYPERCALL"),
    "internal": (run_page.ExitInternal, "KVM_EXIT_INTERNAL_ERROR"),
    "emulation_failure": (
        run_page.ExitEmulationFailure,
        "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES",
    ),
    "system_event": (run_page.ExitSystemEvent, "KVM_EXIT_SYSTEM_EVENT"),
    "memory_fault": (run_page.ExitMemoryFault, "KVM_EXIT_MEMORY_FAULT"),
}

CONSTANTS: dict[str, int] = {
    name: value
    for module in (uapi, run_page, guest_memfd, fault_layout)
    for name, value in vars(module).items()
    if name.startswith(("KVM_", "GUEST_MEMFD_", "FALLOC_", "EHWPOISON"))
} | {name: number for number, name in EXIT_NAMES.items()}

# Linux 6.1 lacks these; every other constant has to be in any header that is at all recent.
NEWER_THAN_6_1 = {
    *("KVM_SET_USER_MEMORY_REGION2", "KVM_SET_MEMORY_ATTRIBUTES", "KVM_CREATE_GUEST_MEMFD"),
    *("KVM_CAP_USER_MEMORY2", "KVM_CAP_MEMORY_FAULT_INFO", "KVM_CAP_MEMORY_ATTRIBUTES"),
    *("KVM_CAP_GUEST_MEMFD", "KVM_CAP_VM_TYPES", "KVM_CAP_GUEST_MEMFD_FLAGS"),
    *("KVM_MEM_GUEST_MEMFD", "KVM_MEMORY_ATTRIBUTE_PRIVATE", "KVM_MEMORY_EXIT_FLAG_PRIVATE"),
    *("GUEST_MEMFD_FLAG_MMAP", "GUEST_MEMFD_FLAG_INIT_SHARED", "KVM_X86_QUIRK_SLOT_ZAP_ALL"),
    *("KVM_X86_DEFAULT_VM", "KVM_X86_SW_PROTECTED_VM", "KVM_X86_SEV_VM", "KVM_X86_SEV_ES_VM"),
    *("KVM_X86_SNP_VM", "KVM_X86_TDX_VM", "KVM_EXIT_LOONGARCH_IOCSR", "KVM_EXIT_MEMORY_FAULT"),
    *("KVM_EXIT_TDX", "KVM_EXIT_ARM_SEA", "KVM_EXIT_ARM_LDST64B", "KVM_EXIT_SNP_REQ_CERTS"),
}


def field_names(structure: Structure) -> list[str]:
    return [field[0] for field in structure._fields_]


def c_program() -> str:
    lines = ["#include <errno.h>", "#include <stddef.h>", "#include <stdio.h>"]
    lines += [f"#include <linux/{header}.h>" for header in ("kvm", "kvm_para", "falloc")]
    lines += ["int main(void) {"]

    def put(key: str, expression: str, condition: str) -> None:
        lines.extend(
            (
                f"#ifdef {condition}",
                f'printf("{key} %llu\\n", (unsigned long long)({expression}));',
                "#endif",
            )
        )

    for name, (structure, condition) in STRUCTURES.items():
        put(f"sizeof:{name}", f"sizeof(struct {name})", condition)
        for field in field_names(structure):
            put(f"{name}.{field}", f"offsetof(struct {name}, {field})", condition)
    for field in field_names(run_page.KvmRun):
        if field != "exit":  # anonymous in C
            put(f"kvm_run.{field}", f"offsetof(struct kvm_run, {field})", "KVM_RUN")
    put("union-end", "offsetof(struct kvm_run, kvm_valid_regs)", "KVM_RUN")
    for member, (structure, condition) in UNION_MEMBERS.items():
        for field in field_names(structure):
            put(f"union.{member}.{field}", f"offsetof(struct kvm_run, {member}.{field})", condition)
    for name in CONSTANTS:
        put(f"constant:{name}", name, name)
    return "\n".join([*lines, "return 0; }"])


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    require_whole(Facility.COMPILER)
    compiler = shutil.which("cc")
    assert compiler is not None
    folder = tmp_path_factory.mktemp("abi")
    source, program = folder / "abi.c", folder / "abi"
    source.write_text(c_program())
    subprocess.run([compiler, "-o", program, source], check=True)  # noqa: S603  as above
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout  # noqa: S603  as above
    return {key: int(value) for key, value in (line.split() for line in output.splitlines())}


@pytest.mark.compiler
@pytest.mark.parametrize("name", STRUCTURES)
def test_structure_has_the_header_s_size_and_offsets(name: str, header: dict[str, int]) -> None:
    structure, condition = STRUCTURES[name]
    if f"sizeof:{name}" not in header:
        pytest.skip(f"this linux/kvm.h is older than {condition}")
    assert ctypes.sizeof(structure) == header[f"sizeof:{name}"]
    for field in field_names(structure):
        assert getattr(structure, field).offset == header[f"{name}.{field}"], field


@pytest.mark.compiler
def test_kvm_run_has_the_header_s_offsets(header: dict[str, int]) -> None:
    for field in field_names(run_page.KvmRun):
        if field != "exit":
            assert getattr(run_page.KvmRun, field).offset == header[f"kvm_run.{field}"], field
    assert ctypes.sizeof(run_page.KvmRun) == header["union-end"]


@pytest.mark.compiler
@pytest.mark.parametrize("member", UNION_MEMBERS)
def test_union_member_has_the_header_s_offsets(member: str, header: dict[str, int]) -> None:
    structure, condition = UNION_MEMBERS[member]
    for field in field_names(structure):
        key = f"union.{member}.{field}"
        if key not in header:
            pytest.skip(f"this linux/kvm.h is older than {condition}")
        found = getattr(run_page.KvmRun, member).offset + getattr(structure, field).offset
        assert found == header[key], field


@pytest.mark.compiler
def test_constants_are_the_header_s(header: dict[str, int]) -> None:
    known = {name: header[f"constant:{name}"] for name in CONSTANTS if f"constant:{name}" in header}
    assert {name: CONSTANTS[name] for name in known} == known
    assert CONSTANTS.keys() - known.keys() <= NEWER_THAN_6_1


def test_newer_structures_by_their_documented_layout() -> None:
    def layout(structure: Structure) -> dict[str, int]:
        return {name: getattr(structure, name).offset for name in field_names(structure)}

    assert layout(uapi.UserspaceMemoryRegion2) == {
        "slot": 0,
        "flags": 4,
        "guest_phys_addr": 8,
        "memory_size": 16,
        "userspace_addr": 24,
        "guest_memfd_offset": 32,
        "guest_memfd": 40,
        "pad1": 44,
        "pad2": 48,
    }
    assert ctypes.sizeof(uapi.UserspaceMemoryRegion2) == 160
    assert layout(uapi.CreateGuestMemfd) == {"size": 0, "flags": 8, "reserved": 16}
    assert ctypes.sizeof(uapi.CreateGuestMemfd) == 64
    assert layout(uapi.MemoryAttributes) == {"address": 0, "size": 8, "attributes": 16, "flags": 24}
    assert ctypes.sizeof(uapi.MemoryAttributes) == 32
    assert layout(run_page.ExitMemoryFault) == {"flags": 0, "gpa": 8, "size": 16}
    assert layout(run_page.ExitMemory) == {"flags": 0, "padding": 4, "gpa": 8, "size": 16}
    assert run_page.UNION_OFFSET == 32


def test_newer_ioctl_numbers_by_value() -> None:
    # Spelled out, for the headers that lack them.
    assert uapi.KVM_SET_USER_MEMORY_REGION2 == 0x40A0AE49
    assert uapi.KVM_SET_MEMORY_ATTRIBUTES == 0x4020AED2
    assert uapi.KVM_CREATE_GUEST_MEMFD == 0xC040AED4


def test_the_hot_path_s_offsets() -> None:
    assert run_page.IMMEDIATE_EXIT_OFFSET == 1
    assert run_page.EXIT_REASON_OFFSET == 8
    assert run_page.MMIO_DATA_OFFSET == 40
    assert run_page.HYPERCALL_RET_OFFSET == 88


def test_no_system_header_is_needed_at_run_time() -> None:
    sources = Path(uapi.__file__).parent.glob("*.py")
    assert not [path.name for path in sources if "subprocess" in path.read_text()]
