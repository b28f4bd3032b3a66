from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.units import GIB, KIB, MIB, PAGE_SIZE, TIB, format_size, page_ceil, page_floor, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64M", 64 * MIB),
        ("64m", 64 * MIB),
        ("64MB", 64 * MIB),
        ("64MiB", 64 * MIB),
        ("64 MiB", 64 * MIB),
        ("  2 G ", 2 * GIB),
        ("1k", KIB),
        ("3T", 3 * TIB),
        ("12B", 12),
        ("007K", 7 * KIB),
    ],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "M",
        "-1M",
        "+1",
        "1.5G",
        "1e6",
        "1P",
        "64 M M",
        "0x1000",
        "1_000",
        "64MiBs",
        "١٢",
        "1\n2",
        "1,000",
        "1 2M",
    ],
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(
        ValueError, match="is not a size: write a whole number with K, M, G or T, such as 64M"
    ) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (4 * KIB, "4 KiB"),
        (1536, "1.5 KiB"),
        (64 * MIB, "64 MiB"),
        (GIB, "1 GiB"),
        (2 * GIB + GIB // 4, "2.2 GiB"),
        (TIB, "1 TiB"),
        (10 * TIB, "10 TiB"),
        (1 << 62, "4194304 TiB"),
    ],
)
def test_a_size_is_written_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@given(count=st.integers(1, 1023), unit=st.sampled_from([1, KIB, MIB, GIB, TIB]))
def test_what_is_written_exactly_is_read_back(count: int, unit: int) -> None:
    assert parse_size(format_size(count * unit)) == count * unit


@given(gpa=st.integers(0, 1 << 60))
def test_a_page_holds_its_addresses(gpa: int) -> None:
    floor, ceil = page_floor(gpa), page_ceil(gpa)
    assert floor <= gpa <= ceil
    assert floor % PAGE_SIZE == ceil % PAGE_SIZE == 0
    assert ceil - floor == (PAGE_SIZE if gpa % PAGE_SIZE else 0)
