"""Run a program that may make sockets of some address families only, as RestrictAddressFamilies= of a unit does.

    python -m tests.fleet.only_address_families AF_UNIX[,AF_...] COMMAND...

The filter is systemd's own idea (seccomp-util.c): socket(2) of any other family fails with EAFNOSUPPORT.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import socket
import struct
import sys
from collections.abc import Sequence

_SYS_SOCKET = {"x86_64": 41}
"""Its number, by machine: asm/unistd_64.h."""

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 22, 38, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K: linux/bpf_common.h
_NUMBER, _FIRST_ARGUMENT = 0, 16  # offsets in struct seccomp_data
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def instructions(families: Sequence[int]) -> bytes:
    """Return the filter: struct sock_filter (code, jump if true, jump if not, k) for each instruction."""
    number = _SYS_SOCKET[platform.machine()]
    count = len(families)
    return b"".join(
        [
            struct.pack("=HBBI", _LOAD, 0, 0, _NUMBER),
            struct.pack("=HBBI", _EQUAL, 0, count + 2, number),
            struct.pack("=HBBI", _LOAD, 0, 0, _FIRST_ARGUMENT),
            *(struct.pack("=HBBI", _EQUAL, count - place, 0, family) for place, family in enumerate(families)),
            struct.pack("=HBBI", _RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT),
            struct.pack("=HBBI", _RETURN, 0, 0, _ALLOW),
        ]
    )


def restrict(families: Sequence[int]) -> None:
    """Restrict this thread, and all that it starts from now on."""
    code = instructions(families)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(code) // 8, code)
    for arguments in ((_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program)):
        passed = [ctypes.byref(each) if isinstance(each, _Program) else ctypes.c_ulong(each) for each in arguments]
        if libc.prctl(*passed):
            raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    """Restrict, and become the program."""
    families, program = sys.argv[1], sys.argv[2:]
    restrict([int(getattr(socket, name)) for name in families.split(",")])
    os.execvp(program[0], program)  # noqa: S606 - a command of the test's


if __name__ == "__main__":
    main()
