import pytest

from tests.spec.complaints import complaint


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({"conversion": {"chnk": 1}}, ["unknown key conversion.chnk (did you mean chunk?)", "max_ranges"]),
        ({"conversion": 3}, ["conversion: 3", "[conversion]"]),
        ({"conversion": {"chunk": 1}}, ["conversion.chunk: 1", "4 KiB to 1 GiB"]),
        ({"conversion": {"chunk": "x"}}, ["conversion.chunk: 'x' is not a size"]),
        ({"conversion": {"no_progress_limit": 0}}, ["conversion.no_progress_limit: 0", "from 1"]),
        ({"conversion": {"max_ranges": "many"}}, ["conversion.max_ranges: 'many'", "16777216"]),
        ({"conversion": {"rate": 0}}, ["conversion.rate: 0", "1 to 1000000"]),
        ({"conversion": {"rate": 1_000_001}}, ["conversion.rate: 1000001"]),
        ({"conversion": {"rate": "fast"}}, ["conversion.rate: 'fast'"]),
    ],
)
def test_what_is_wrong_is_said_with_the_key_and_what_would_be_right(
    document: dict[str, object], parts: list[str]
) -> None:
    message = complaint({"image": "a.elf"} | document)
    for part in parts:
        assert part in message
