from __future__ import annotations

import ctypes
import errno
import os

import pytest

from kvmd.kvm import ioctl as subject


class Argument(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char * 0x123),)


class TooLarge(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char * (1 << 14)),)


def test_numbers_are_put_together_as_in_asm_generic_ioctl_h() -> None:
    assert subject.io(0x80) == 0x0000_AE80
    assert subject.ior(0x81, Argument) == 0x8123_AE81
    assert subject.iow(0x82, Argument) == 0x4123_AE82
    assert subject.iowr(0x05, Argument) == 0xC123_AE05


def test_an_argument_larger_than_fourteen_bits_has_no_number() -> None:
    with pytest.raises(ValueError, match="16384 bytes"):
        subject.iow(0x82, TooLarge)


def test_errno_is_kept_and_the_operation_named() -> None:
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match="ask the pipe: Inappropriate ioctl") as caught:
            subject.ioctl(read_end, subject.io(0), 0, "ask the pipe")
        assert caught.value.errno == errno.ENOTTY
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_bad_descriptor_is_an_error_not_a_result() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        subject.ioctl(-1, subject.io(0), 0, "ask nobody")
