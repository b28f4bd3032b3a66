"""Where a page of code may hold AVX instructions, which the emulator gets wrong without a word.

It takes most instructions with a VEX prefix of 128 bits for the SSE instruction without one, which has an operand less.
So the emulator is stopped before each of them. Nothing here knows where instructions begin: an address is only ever
reached by a guest if one begins there, and one that begins with these bytes is one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

BEYOND = 4
"""Bytes behind a page that have to be looked at: what a prefix that is the page's last byte belongs to."""

_VEX = re.compile(
    rb"\xc5|\xc4(?=[\x01-\x03\x21-\x23\x41-\x43\x61-\x63\x81-\x83\xa1-\xa3\xc1-\xc3\xe1-\xe3])", re.DOTALL
)
_THREE_BYTES = 0xC4
_MAP_MASK = 0x1F
_GENERAL = {2: frozenset({0xF2, 0xF3, 0xF5, 0xF6, 0xF7}), 3: frozenset({0xF0})}
"""By opcode map, the opcodes of BMI1 and BMI2: VEX prefixes, but general registers, which the emulator has right."""

_BEFORE = frozenset({0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67, *range(0x40, 0x50)})


def vector_instructions(code: bytes, size_bytes: int) -> Iterator[int]:
    """Yield the offsets below ``size_bytes`` at which an instruction, if one begins there, has a VEX prefix.

    Args:
        code: the page, and as much of what is behind it as there is of ``BEYOND``.
        size_bytes: of the page.
    """
    for match in _VEX.finditer(code):
        offset = match.start()
        if code[offset] == _THREE_BYTES:
            opcode = code[offset + 3 : offset + 4]
            if opcode and opcode[0] in _GENERAL.get(code[offset + 1] & _MAP_MASK, frozenset()):
                continue
        if offset < size_bytes:
            yield offset
        while offset > 0 and code[offset - 1] in _BEFORE:
            offset -= 1
            yield offset
