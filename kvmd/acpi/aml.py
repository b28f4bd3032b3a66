"""A small writer of AML, ACPI's machine language: terms in, bytes out.

Source: ACPI 6.5, chapter 20 ("ACPI Machine Language Specification"); resources 6.4. Only what describes devices: names,
numbers, strings, packages, buffers, scopes, devices, resource descriptors, and methods that do nothing but notify.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

_ZERO, _ONE = b"\x00", b"\x01"
_BYTE, _WORD, _DWORD, _STRING, _QWORD = b"\x0a", b"\x0b", b"\x0c", b"\x0d", b"\x0e"
_NAME, _SCOPE, _BUFFER, _PACKAGE = b"\x08", b"\x10", b"\x11", b"\x12"
_DEVICE = b"\x5b\x82"
_METHOD, _NOTIFY = b"\x14", b"\x86"
_SERIALIZED = 1 << 3
_ROOT = b"\\"

_SEGMENT = re.compile(r"[A-Z_][A-Z0-9_]{0,3}", re.ASCII)
_EISA = re.compile(r"[A-Z]{3}[0-9A-F]{4}", re.ASCII)

_END_TAG = b"\x79\x00"
_INTEGER_LIMIT = 1 << 64


def integer(value: int) -> bytes:
    """Return a number, 0 to 2^64 - 1, in its shortest form (20.2.3).

    Raises:
        ValueError: it is out of range.
    """
    if not 0 <= value < _INTEGER_LIMIT:
        raise ValueError(f"{value} is no number of AML's")
    if value < 2:  # noqa: PLR2004 - zero and one have codes of their own
        return (_ZERO, _ONE)[value]
    for prefix, form, bits in ((_BYTE, "<B", 8), (_WORD, "<H", 16), (_DWORD, "<I", 32)):
        if value < 1 << bits:
            return prefix + struct.pack(form, value)
    return _QWORD + struct.pack("<Q", value)


def string(text: str) -> bytes:
    """Return an ASCII string.

    Raises:
        ValueError: it holds something else, or a NUL.
    """
    data = text.encode("ascii")
    if b"\0" in data:
        raise ValueError(f"{text!r} has a NUL in it")
    return _STRING + data + b"\0"


def eisa_id(text: str) -> bytes:
    """Return a device's identity such as ``PNP0501`` as ASL's EISAID makes it a number (19.3.4).

    Raises:
        ValueError: it is no such identity.
    """
    if _EISA.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not three letters and four hexadecimal digits")
    letters = [ord(letter) - ord("A") + 1 for letter in text[:3]]
    vendor = letters[0] << 10 | letters[1] << 5 | letters[2]
    return _DWORD + struct.pack(">HH", vendor, int(text[3:], 16))


def package(elements: Sequence[bytes]) -> bytes:
    """Return a package of up to 255 terms."""
    return _PACKAGE + _sized(struct.pack("B", len(elements)) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """Return a buffer."""
    return _BUFFER + _sized(integer(len(data)) + data)


def name(segment: str, value: bytes) -> bytes:
    """Return the definition of a name such as ``_HID``; with a backslash before it, at the root."""
    return _NAME + _path(segment) + value


def scope(path: str, terms: Sequence[bytes]) -> bytes:
    """Return terms within a scope such as ``_SB``."""
    return _SCOPE + _sized(_path(path) + b"".join(terms))


def device(segment: str, terms: Sequence[bytes]) -> bytes:
    """Return a device with what belongs to it."""
    return _DEVICE + _sized(_path(segment) + b"".join(terms))


def method(segment: str, arguments: int, terms: Sequence[bytes]) -> bytes:
    """Return a method of up to 7 arguments, of which one caller is in at a time (20.2.5.2)."""
    return _METHOD + _sized(_path(segment) + struct.pack("B", arguments | _SERIALIZED) + b"".join(terms))


def notify(segment: str, value: int) -> bytes:
    """Return what tells a device's driver that something happened (20.2.5.3)."""
    return _NOTIFY + _path(segment) + integer(value)


# -- resources ---------------------------------------------------------------------------------------------------------


def resources(descriptors: Sequence[bytes]) -> bytes:
    """Return a resource template, as ``_CRS`` has it: a buffer of descriptors and the end tag."""
    return buffer(b"".join(descriptors) + _END_TAG)


def ports(first: int, count: int) -> bytes:
    """Return fixed I/O ports, all 16 bits of their numbers decoded (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 0x01, first, first, 1, count)


def memory(gpa: int, size_bytes: int) -> bytes:
    """Return fixed, writable addresses below 4 GiB (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 0x01, gpa, size_bytes)


def edge_interrupt(gsi: int) -> bytes:
    """Return an interrupt line: edge-triggered, active high, not shared (6.4.3.6)."""
    return struct.pack("<BHBBI", 0x89, 6, 0x03, 1, gsi)


# -- encoding ----------------------------------------------------------------------------------------------------------


def _path(path: str) -> bytes:
    root, segment = (_ROOT, path[1:]) if path.startswith("\\") else (b"", path)
    if _SEGMENT.fullmatch(segment) is None:
        raise ValueError(f"{path!r} is no name of AML's")
    return root + segment.ljust(4, "_").encode("ascii")


def _sized(body: bytes) -> bytes:
    """Return ``body`` with the length before it that counts itself, too (20.2.4, PkgLength)."""
    for extra in range(4):
        length = len(body) + 1 + extra
        if extra == 0 and length < 1 << 6:
            return struct.pack("B", length) + body
        if extra and length < 1 << 4 + 8 * extra:
            return struct.pack("B", extra << 6 | length & 0xF) + (length >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"{len(body)} bytes are more than a term of AML's can have")
