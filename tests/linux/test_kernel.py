"""Reading kernels: what is right, what is wrong and how it is said, and that nothing but ImageError comes out."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmd.errors import ConfigError, ImageError
from kvmd.linux import pvh
from kvmd.linux.boot import plan_linux
from kvmd.linux.bzimage import BzImage
from kvmd.linux.kernel import parse_kernel
from kvmd.linux.pvh import PvhKernel
from tests.linux import kernels
from tests.linux.kernels import MIB, bzimage, note, vmlinux


def refusal(file: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        parse_kernel(file)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_bzimage_says_what_it_needs() -> None:
    kernel = parse_kernel(bzimage())
    assert isinstance(kernel, BzImage)
    assert bytes(kernel.payload) == kernels.PAYLOAD
    assert kernel.header == bzimage()[0x1F1:0x26C]
    assert (kernel.preferred_address, kernel.alignment, kernel.memory_size) == (16 * MIB, 2 * MIB, 8 * MIB)
    assert (kernel.initrd_limit, kernel.command_line_limit) == (1 << 31, 2047)


def test_an_elf_kernel_s_entry_point_is_in_a_note() -> None:
    kernel = parse_kernel(vmlinux())
    assert isinstance(kernel, PvhKernel)
    assert kernel.entry == 16 * MIB + 0x40
    four_bytes = parse_kernel(vmlinux(notes=note(b"Xen\0", 18, struct.pack("<I", 16 * MIB))))
    assert isinstance(four_bytes, PvhKernel)
    assert four_bytes.entry == 16 * MIB


def test_the_lab_s_kernel_is_one() -> None:
    found = subprocess.run(  # noqa: S603 - ours
        [Path(__file__).parents[2] / "lab" / "kernel"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode != 0:
        pytest.skip(found.stderr.strip())
    kernel = parse_kernel(Path(found.stdout.strip()).read_bytes())
    assert isinstance(kernel, BzImage)
    assert kernel.memory_size > len(kernel.payload) // 2
    assert kernel.alignment > 0


@pytest.mark.parametrize(
    ("file", "part"),
    [
        (b"", "the file is empty"),
        (b"\x1f\x8b\x08" + bytes(600), "this is gzip"),
        (b"070701" + bytes(600), "this is cpio"),
        (bytes(5000), "not a Linux kernel; give a bzImage"),
        (bzimage()[:0x1FF], "not a Linux kernel: 511 bytes are too short for one"),
        (bzimage()[:0x250], "truncated: 592 bytes"),
        (bzimage()[:0x400], "truncated: it says that it has 4096 bytes, the file has 1024"),
        (bzimage()[:-1], "truncated: it says that it has 4096 bytes, the file has 4095"),
        (bzimage({kernels.BOOT_FLAG: 0}), "no bzImage"),
        (bzimage({kernels.VERSION: 0x0205}), "boot protocol 2.05: 2.12"),
        (bzimage({kernels.LOAD_FLAGS: 0}), "zImage"),
        (bzimage({kernels.LONG_MODE: 0}), "no 64-bit entry point"),
        (bzimage({kernels.ALIGNMENT: 3}), "alignment is 0x3"),
        (bzimage({kernels.PARAGRAPHS: 0}), "truncated"),
        (vmlinux(entry=None), "no PVH entry point"),
        (vmlinux(entry=MIB), "outside every segment"),
        (vmlinux(entry=1 << 40), "outside every segment, or above 4 GiB"),
        (vmlinux()[:100], "the kernel cannot be loaded: the image is truncated"),
        (vmlinux()[:40], "the kernel cannot be loaded: the image is truncated: 40 bytes"),
        (vmlinux(notes=note(b"Xen\0", 18, b"123")), "no PVH entry point"),
        (vmlinux(notes=struct.pack("<III", 4, 1 << 31, 18) + b"Xen\0"), "no PVH entry point"),
    ],
)
def test_what_is_no_kernel_is_refused_with_the_reason(file: bytes, part: str) -> None:
    assert part in refusal(file)


def test_a_file_of_nothing_but_notes_is_not_read_to_its_end() -> None:
    # 62 headers, all of the same MiB of empty notes: read whole they took seconds.
    file = bytearray(vmlinux(notes=bytes(MIB)))
    table = file[64:120] + file[120:176] * 62
    file[0x38:0x3A] = struct.pack("<H", 63)
    file[0x20:0x28] = struct.pack("<Q", len(file))
    assert "no PVH entry point" in refusal(bytes(file + table))
    assert sum(1 for _ in pvh._notes(bytes(file + table))) < 500_000


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(max_size=2048),
        st.tuples(st.sampled_from([bzimage(), vmlinux()]), st.integers(0, 6000)).map(lambda x: x[0][: x[1]]),
        st.tuples(
            st.sampled_from([bzimage(), vmlinux()]),
            st.lists(st.tuples(st.integers(0, 0x4FF), st.integers(0, 255)), max_size=12),
        ).map(lambda x: _with_bytes(*x)),
    ),
    st.integers(1, 1 << 20).map(lambda pages: pages * 4096),
    st.integers(0, 5000),
)
def test_no_file_brings_out_anything_but_an_error_that_is_meant(file: bytes, memory: int, initrd: int) -> None:
    try:
        boot = plan_linux(parse_kernel(file), memory_size=memory, initrd=bytes(initrd), command_line="quiet")
    except (ImageError, ConfigError) as error:
        assert "\n" not in str(error)  # noqa: PT017 - whichever comes, it is one line
        return
    for write in boot.writes:
        assert any(range_.start <= write.gpa and write.gpa + len(write.data) <= range_.end for range_ in boot.memory)


def _with_bytes(file: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(file)
    for at, value in changes:
        if at < len(changed):
            changed[at] = value
    return bytes(changed)
