"""The examples of docs/payload-abi.md are built as it says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmd.payload.boot import plan_boot
from kvmd.payload.elf import parse_elf
from tests.gate import Facility, require

DOCUMENT = Path(__file__).parents[2] / "docs" / "payload-abi.md"


def examples() -> list[tuple[str, str, str]]:
    """Return (language, source, command) of each example."""
    return re.findall(r"```(asm|c)\n(.*?)```\n+```sh\n(gcc .*?)```", DOCUMENT.read_text(), re.DOTALL)


def test_there_is_an_example_in_each_language() -> None:
    assert [language for language, _, _ in examples()] == ["asm", "c"]


@pytest.mark.compiler
@pytest.mark.parametrize("example", examples(), ids=lambda example: example[0])
def test_the_example_is_a_payload(example: tuple[str, str, str], tmp_path: Path) -> None:
    language, source, command = example
    require(Facility.COMPILER, None if shutil.which("gcc") else "gcc is not installed")
    (tmp_path / {"asm": "guest.S", "c": "guest.c"}[language]).write_text(source)

    one_line = command.replace("\\\n", " ")
    subprocess.run(shlex.split(one_line), cwd=tmp_path, check=True)  # noqa: S603 - our own document's command

    image = parse_elf((tmp_path / "guest.elf").read_bytes())
    boot = plan_boot(image, memory_size=16 << 20, vcpus=2, c_bit=45, gigabyte_pages=False)
    assert boot.first_free == 2 << 20
