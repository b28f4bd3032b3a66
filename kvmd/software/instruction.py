"""The few instructions that the software CPU has to look at itself: bytes in, what they are out."""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 15
"""Bytes of the longest instruction."""

_REP = frozenset({0xF2, 0xF3})
_ADDRESS_SIZE = 0x67
_PREFIXES = frozenset({0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, _ADDRESS_SIZE, 0xF0, *_REP, *range(0x40, 0x50)})
_STRING_IO = frozenset({0x6C, 0x6D, 0x6E, 0x6F})

_VMCALL, _VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
_TWO_BYTE = b"\x0f"
_VECTOR_PREFIXES = (b"\xc4", b"\xc5", b"\x62")  # AVX and AVX-512
_KINDS_OF_EXTENSIONS = tuple(bytes([opcode]) for opcode in (0x01, 0x09, 0x0D, 0x1E, 0x38, 0x3A, 0xAE, 0xC7))
"""Second bytes of opcodes that processors have got new instructions in, again and again."""


@dataclass(frozen=True, slots=True)
class StringIo:
    """An INS or OUTS.

    Attributes:
        repeated: it has a REP prefix, and so counts RCX down.
        narrow: its addresses and its count are of 32 bits.
    """

    repeated: bool
    narrow: bool


def string_io(code: bytes) -> StringIo | None:
    """Return what the instruction is if it is INS or OUTS, else None."""
    prefixes, rest = _split(code)
    if not rest or rest[0] not in _STRING_IO:
        return None
    return StringIo(repeated=bool(_REP & set(prefixes)), narrow=_ADDRESS_SIZE in prefixes)


def hypercall_length(code: bytes) -> int:
    """Return the length of a VMCALL or VMMCALL in bytes, or 0 for any other instruction."""
    return len(_VMCALL) if code[:3] in (_VMCALL, _VMMCALL) else 0


def may_be_an_extension(code: bytes) -> bool:
    """Tell whether an instruction that the emulator does not know may be one that other processors have.

    What is left is undefined on all of them: UD2 and its like, and opcodes that 64-bit mode does not have.
    """
    _, rest = _split(code)
    if rest[:1] in _VECTOR_PREFIXES:
        return True
    return rest[:1] == _TWO_BYTE and rest[1:2] in _KINDS_OF_EXTENSIONS


def _split(code: bytes) -> tuple[bytes, bytes]:
    """Return the prefixes and the rest."""
    count = 0
    while count < len(code) and code[count] in _PREFIXES:
        count += 1
    return code[:count], code[count:]
