import pytest

from tests.spec.complaints import complaint


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({"disks": "a.raw"}, ["disks: 'a.raw'", "[[disks]]"]),
        ({"disks": ["a.raw"]}, ["disks[0]: 'a.raw'", "a table"]),
        ({"disks": [{}]}, ["disks[0].path: is missing", "raw disk image"]),
        ({"disks": [{"path": "a", "readonly": True}]}, ["disks[0].readonly", "did you mean read_only?"]),
        ({"disks": [{"path": "a"}, {"path": "b", "direct": 1}]}, ["disks[1].direct: 1", "true or false"]),
        ({"disks": [{"path": "a"}] * 9}, ["disks:", "up to 8"]),
    ],
)
def test_what_is_wrong_is_said_with_the_key_and_what_would_be_right(
    document: dict[str, object], parts: list[str]
) -> None:
    message = complaint({"kernel": "vmlinuz"} | document)
    for part in parts:
        assert part in message
