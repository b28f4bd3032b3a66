"""AML's encoding: numbers, lengths and names, by the specification's own examples and at their edges."""

from __future__ import annotations

import pytest

from kvmd.acpi import aml


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x1_0000, "0c00000100"),
        (0xFFFF_FFFF, "0cffffffff"),
        (1 << 32, "0e0000000001000000"),
        ((1 << 64) - 1, "0effffffffffffffff"),
    ],
)
def test_a_number_takes_its_shortest_form(value: int, code: str) -> None:
    assert aml.integer(value).hex() == code


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_a_number_that_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="no number"):
        aml.integer(value)


@pytest.mark.parametrize(
    ("size", "lead"),
    [(0, "01"), (62, "3f"), (63, "4104"), (4093, "4fff"), (4094, "810001"), (1 << 20, "c4000001")],
)
def test_a_length_counts_itself(size: int, lead: str) -> None:
    # Clause 20.2.4: the two top bits of the first byte say how many bytes follow it.
    assert aml._sized(bytes(size))[: len(lead) // 2].hex() == lead


def test_a_length_of_more_than_28_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="more than a term"):
        aml._sized(bytes((1 << 28) - 3))


def test_an_identity_is_the_number_that_the_specification_gives() -> None:
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"
    assert aml.eisa_id("PNP0A03").hex() == "0c41d00a03"


@pytest.mark.parametrize("text", ["pnp0501", "PNP501", "PNP050G", ""])
def test_what_is_no_identity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not three letters"):
        aml.eisa_id(text)


@pytest.mark.parametrize("name", ["", "1ABC", "ABCDE", "ab", "A\\B"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        aml.name(name, aml.integer(0))


def test_names_are_padded_and_may_start_at_the_root() -> None:
    assert aml.name("_S5", aml.integer(0)) == b"\x08_S5_\x00"
    assert aml.name("\\_S5", aml.integer(0)) == b"\x08\\_S5_\x00"


def test_text_is_ascii_without_nul() -> None:
    assert aml.string("AB") == b"\x0dAB\x00"
    for text in ("A\0B", "\xe4"):
        with pytest.raises(ValueError, match=r"NUL|ascii"):
            aml.string(text)
