from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvmd.api import images
from kvmd.api.images import opened_image
from kvmd.errors import ImageError
from tests.api.serving import Serving, serving_api
from tests.api.test_server_descriptors import send_with_fds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An allowed folder, with what is good in it and what is not, and secrets beside it."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "images-old").mkdir()
    (tmp_path / "images-old" / "guest.elf").write_bytes(b"old")
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "guest.elf").write_bytes(b"guest")
    (folder / "sub" / "other.elf").write_bytes(b"other")
    (folder / "inside").symlink_to("sub/other.elf")
    (folder / "outside").symlink_to("../secret")
    (folder / "absolute").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    (folder / "magic").symlink_to("/proc/self/root/etc/passwd")
    os.mkfifo(folder / "fifo")
    return folder


def read(image: str, *folders: Path) -> bytes:
    with opened_image(image, folders) as fd:
        assert fd is not None
        return os.read(fd, 100)


def test_files_in_an_allowed_folder_are_opened(folder: Path) -> None:
    assert read("guest.elf", folder) == b"guest"
    assert read(str(folder / "guest.elf"), folder) == b"guest"
    assert read("sub/other.elf", folder) == b"other"
    assert read("inside", folder) == b"other"
    assert read("other.elf", folder, folder / "sub") == b"other"


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("../secret", "it leads out of them"),
        ("sub/../../secret", "it leads out of them"),
        ("outside", "it leads out of them"),
        ("absolute", "it leads out of them"),
        ("up/secret", "it leads out of them"),
        ("magic", "it leads out of them"),
        ("{folder}/../secret", "it leads out of them"),
        ("{folder}/../images-old/guest.elf", "it leads out of them"),
        ("{folder}-old/guest.elf", "No such file or directory"),
        ("/etc/passwd", "No such file or directory"),
        ("/dev/zero", "No such file or directory"),
        ("missing", "No such file or directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_nothing_else_is_opened(folder: Path, image: str, why: str) -> None:
    with pytest.raises(ImageError) as caught, opened_image(image.format(folder=folder), [folder]):
        pass
    assert f"): {why}; pass the file itself" in str(caught.value)


@pytest.mark.parametrize("image", ["fifo", "sub", "."])
def test_what_is_no_file_is_not_opened(folder: Path, image: str) -> None:
    with pytest.raises(ImageError) as caught, opened_image(image, [folder]):
        pass
    assert str(caught.value) == f"the image {image} in an allowed folder ({folder}) is not an ordinary file: name one"


def test_what_kvmd_may_not_read_is_to_be_made_readable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def may_not(_folder: Path, _inside: Path) -> int:
        raise PermissionError(13, "Permission denied")  # root, which runs tests too, would be let through

    monkeypatch.setattr(images, "_open_beneath", may_not)
    with pytest.raises(ImageError, match="Permission denied; pass the file itself, or let kvmd's user read it"):
        read("guest.elf", folder)


def test_without_folders_nothing_is_opened(folder: Path) -> None:
    with pytest.raises(ImageError, match=r"allowed folder \(none\)"), opened_image(str(folder / "guest.elf"), []):
        pass


def test_a_built_in_guest_needs_no_file() -> None:
    with opened_image("builtin:hello", []) as fd:
        assert fd is None


@pytest.fixture
async def api(tmp_path: Path, folder: Path) -> AsyncIterator[Serving]:
    async with serving_api(tmp_path / "s", image_folders=(folder,)) as serving:
        yield serving


async def test_a_machine_of_an_allowed_image(api: Serving, folder: Path) -> None:
    answer = await api.post("/v1/machines", {"image": str(folder / "guest.elf")})
    assert (answer.status, answer.json["name"]) == (201, "guest")
    assert answer.json["spec"]["image"] == str(folder / "guest.elf")
    assert (await api.post("/v1/machines", {"image": "../secret"})).problem == "invalid-image"


def request(image: str) -> bytes:
    body = b'{"image":"%b"}' % image.encode()
    head = b"POST /v1/machines HTTP/1.1\r\nHost: k\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


@pytest.mark.parametrize(
    ("image", "status"), [("/home/me/my-guest.elf", b"201"), ("../..", b"201"), ("builtin:hello", b"422")]
)
async def test_a_passed_file_is_taken_whatever_its_folder(
    api: Serving, tmp_path: Path, image: str, status: bytes
) -> None:
    async with api.connect() as client:
        with (tmp_path / "secret").open("rb") as file:
            send_with_fds(client.stream, request(image), [file.fileno()])
        assert (await client.stream.receive_some(4096))[9:12] == status
    if status == b"201":
        (machine,) = (await api.get("/v1/machines")).json["machines"]
        assert machine["spec"]["image"] in {"my-guest.elf", "passed"}


async def test_what_is_passed_must_be_a_file(api: Serving) -> None:
    ends = socket.socketpair()
    with ends[0], ends[1]:
        async with api.connect() as client:
            send_with_fds(client.stream, request("x.elf"), [ends[0].fileno()])
            answer = await client.stream.receive_some(4096)
    assert b"urn:kvmd:problem:invalid-image" in answer
