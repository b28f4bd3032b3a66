import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import ConfigError
from kvmd.guests import GUESTS
from kvmd.network.spec import NetworkSpec
from kvmd.spec.conversion import ConversionSpec
from kvmd.spec.disks import DiskSpec
from kvmd.spec.limits import LimitsSpec
from kvmd.spec.machine import MachineSpec, load_spec, resolve_image, spec_of
from kvmd.units import MIB
from tests.spec.complaints import HERE, complaint

EXAMPLES = Path(__file__).parents[2] / "config"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "guest.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_an_image_is_enough() -> None:
    spec = spec_of({"image": "a.elf"}, base=HERE)
    assert spec == MachineSpec(
        image=HERE / "a.elf",
        name="a",
        vcpus=1,
        memory=64 * MIB,
        protection="emulated",
        tripwire="auto",
        cpl=3,
        arguments=(),
        conversion=ConversionSpec(chunk=32 * MIB, no_progress_limit=8, max_ranges=65536),
    )


def test_everything_can_be_written(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        image = "/srv/guest.elf"
        name = "web-1"
        vcpus = 4
        memory = "1G"
        protection = "none"
        tripwire = "hole"
        initial = "shared"
        cpl = 0
        arguments = [1, 0xffffffffffffffff]
        [conversion]
        chunk = 4096
        no_progress_limit = 3
        max_ranges = 10
        rate = 500
        """,
    )
    assert load_spec(path) == MachineSpec(
        image=Path("/srv/guest.elf"),
        name="web-1",
        vcpus=4,
        memory=1 << 30,
        protection="none",
        tripwire="hole",
        initial="shared",
        cpl=0,
        arguments=(1, 2**64 - 1),
        conversion=ConversionSpec(chunk=4096, no_progress_limit=3, max_ranges=10, rate=500),
    )


MACHINES = sorted(path for path in EXAMPLES.glob("*.toml") if path.name != "kvmd.toml")  # that one is the daemon's


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.name)
def test_the_examples_are_right(path: Path) -> None:
    spec = load_spec(path)
    assert spec.kernel is not None or spec.guest.parent == GUESTS["hello"].path.parent


LINUX_EXAMPLES = {
    "linux.toml": "without a disk",
    "linux-disk.toml": "with one",
    "linux-bridge.toml": "on a bridge",
}


@pytest.mark.parametrize("name", LINUX_EXAMPLES, ids=list(LINUX_EXAMPLES.values()))
def test_the_examples_of_linux_are_right_with_what_is_commented_out_too(name: str, tmp_path: Path) -> None:
    text = re.sub(r"^# (?=[a-z_]+ = \S+$)", "", (EXAMPLES / name).read_text(), flags=re.MULTILINE)
    spec = load_spec(write(tmp_path, text.replace("balloon = false", "balloon = true")))
    assert spec.kernel == Path("/boot/vmlinuz")
    assert bool(spec.disks) == (name == "linux-disk.toml")
    assert bool(spec.networks) == (name == "linux-bridge.toml")
    if name == "linux.toml":
        assert (spec.balloon_target, spec.agent) == (128 * MIB, "org.qemu.guest_agent.0")
    for network in spec.networks:
        assert (network.mtu, network.mac, network.tap) == (9000, "52:54:00:12:34:56", "linux0")


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        ("", MachineSpec),
        ("[[disks]]", DiskSpec),
        ("[[networks]]", NetworkSpec),
        ("[conversion]", ConversionSpec),
        ("[limits]", LimitsSpec),
    ],
)
def test_every_key_is_in_an_example(table: str, kind: type[msgspec.Struct]) -> None:
    shown = set()
    for path in MACHINES:
        here = ""
        for line in path.read_text().splitlines():
            if line.startswith("["):
                here = line
                shown.add(("", here.strip("[]")))
            elif key := re.match(r"(?:# )?([a-z_]+) = ", line):
                shown.add((here, key[1]))
    assert [name for name in kind.__struct_fields__ if (table, name) not in shown] == []


def test_a_relative_image_starts_at_the_folder_of_the_file(tmp_path: Path) -> None:
    assert load_spec(write(tmp_path, 'image = "images/a.elf"')).image == tmp_path / "images/a.elf"


def test_a_built_in_image_is_looked_up() -> None:
    spec = spec_of({"image": "builtin:hello"}, base=HERE)
    assert spec.image == GUESTS["hello"].path
    assert spec.name == "hello"


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("My Guest.ELF", "my-guest"),
        ("vmlinux-6.18", "vmlinux-6.18"),
        ("...", "guest"),
        ("ä.elf", "guest"),
        ("x" * 100, "x" * 63),
    ],
)
def test_the_name_is_made_of_the_image(image: str, name: str) -> None:
    assert spec_of({"image": image}, base=HERE).name == name


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({"memry": 1}, ["unknown key memry", "did you mean memory?", "image, name, vcpus, memory"]),
        ({"zzz": 1}, ["unknown key zzz: the keys here are"]),
        ({"vcpus": "4"}, ["vcpus: '4'", "expected a whole number from 1 to 4096"]),
        ({"vcpus": True}, ["vcpus: True", "a whole number"]),
        ({"vcpus": 0}, ["vcpus: 0", "from 1"]),
        ({"vcpus": 4097}, ["vcpus: 4097", "4096"]),
        ({"memory": "64Q"}, ["memory: '64Q' is not a size", '"64M"']),
        ({"memory": 0}, ["memory: 0", "pages of 4 KiB"]),
        ({"memory": -4096}, ["memory: -4096", "pages of 4 KiB"]),
        ({"memory": 4097}, ["memory: 4097", "pages of 4 KiB"]),
        ({"memory": 1.5}, ["memory: 1.5", '"64M"']),
        ({"memory": "65T"}, ["memory:", "at most 64 TiB"]),
        ({"memory": 16**5000}, ["memory: a number of thousands of digits", "at most 64 TiB"]),
        ({"arguments": [16**5000]}, ["arguments: a number of thousands of digits"]),
        ({"arguments": [1, "x"]}, ["arguments: [1, 'x']", "2^64"]),
        ({"arguments": [-1]}, ["arguments: [-1]", "from 0"]),
        ({"arguments": [0] * 9}, ["arguments:", "up to 8"]),
        ({"protection": "emulate"}, ["protection: 'emulate'", '"emulated", "guest-memfd", "auto" or "none"']),
        ({"protection": 5}, ["protection: 5", '"emulated"']),
        ({"tripwire": "holes"}, ["tripwire: 'holes'", '"attribute"', '"guest_memfd"']),
        ({"initial": "open"}, ["initial: 'open'", '"private" or "shared"']),
        ({"cpl": 1}, ["cpl: 1", "3 (user mode) or 0"]),
        ({"cpl": "3"}, ["cpl: '3'", "3 (user mode) or 0"]),
        ({"name": ""}, ["name: ''", "such as"]),
        ({"name": "Web 1"}, ["name: 'Web 1'", "a-z"]),
        ({"name": "a" * 64}, ["name: ", "up to 63"]),
        ({"image": "builtin:helo"}, ["no built-in guest 'helo' (did you mean hello?)", "pingpong"]),
        ({"image": 7}, ["image: 7", "ELF"]),
        ({"image": "a\0b"}, ["image:", "ELF"]),
        ({"image": ""}, ["image: ''", "ELF"]),
    ],
)
def test_what_is_wrong_is_said_with_the_key_and_what_would_be_right(
    document: dict[str, object], parts: list[str]
) -> None:
    message = complaint({"image": "a.elf", **document})
    for part in parts:
        assert part in message


@pytest.mark.parametrize("protection", ["guest-memfd", "auto"])
def test_other_protections_can_be_asked_for(protection: str) -> None:
    assert spec_of({"image": "a.elf", "protection": protection}, base=HERE).protection == protection


@pytest.mark.parametrize("protection", ["snp", "tdx"])
def test_protections_to_come_are_known_but_refused(protection: str) -> None:
    assert "not built yet" in complaint({"image": "a.elf", "protection": protection})


def test_a_missing_image_is_said() -> None:
    with pytest.raises(ConfigError, match="image is missing: expected the path"):
        spec_of({}, base=HERE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image = ", "line 1"),
        ('image = "a"\nimage = "b"', "line 2"),
        (b'image = "a"\nname = "\xff"', "line 2 is not UTF-8"),
        ("vcpus = " + "9" * 5000, "not TOML"),
        ("arguments = " + "[" * 5000, "not TOML"),
        ("\0", "not TOML"),
        (" " * (MIB + 1), "more than 1 MiB"),
    ],
)
def test_what_is_not_toml_is_said_with_the_file_and_the_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_spec(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_value_is_said_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'image = "a"\nvcpus = 0')
    with pytest.raises(ConfigError) as caught:
        load_spec(path)
    assert str(caught.value) == f"{path}: vcpus: 0 is not possible: expected a whole number from 1 to 4096"


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.toml: No such file"):
        load_spec(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match=r"cannot read .*: Is a directory"):
        load_spec(tmp_path)


def test_overrides_change_what_is_given_and_are_checked() -> None:
    spec = spec_of({"image": "a.elf", "vcpus": 2}, base=HERE)
    changed = spec.with_overrides(vcpus=8, memory=None, arguments=(1, 2))
    assert (changed.vcpus, changed.memory, changed.arguments) == (8, spec.memory, (1, 2))
    assert spec.vcpus == 2
    with pytest.raises(ConfigError, match="vcpus: 0"):
        spec.with_overrides(vcpus=0)


def test_an_absolute_image_stays() -> None:
    assert resolve_image("/a/b.elf", base=HERE) == Path("/a/b.elf")


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.datetimes(), st.dates(), st.times()
)
keys = st.one_of(
    st.sampled_from(
        [
            *MachineSpec.__struct_fields__,
            *ConversionSpec.__struct_fields__,
            *LimitsSpec.__struct_fields__,
            "",
            "a.b",
            "`$",
            "[0]",
            " - at",
        ]
    ),
    st.text(),
)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=8)


@given(document=st.dictionaries(keys, values), with_image=st.booleans())
def test_an_arbitrary_document_is_a_machine_or_one_clear_line(document: dict[str, object], *, with_image: bool) -> None:
    if with_image:
        document["image"] = "a.elf"
    try:
        spec = spec_of(document, base=HERE)
    except ConfigError as error:
        complaints = str(error).splitlines()
    else:
        complaints = ["none"]
        assert spec.vcpus >= 1
    assert len(complaints) == 1


LINUX: dict[str, object] = {"kernel": "vmlinuz"}


def test_a_linux_machine_has_its_own_defaults() -> None:
    spec = spec_of(LINUX | {"initrd": "initrd.img", "disks": [{"path": "a.raw"}, {"path": "/b.raw"}]}, base=HERE)
    assert (spec.kernel, spec.initrd, spec.image) == (HERE / "vmlinuz", HERE / "initrd.img", None)
    assert (spec.protection, spec.initial, spec.name) == ("none", "shared", "vmlinuz")
    assert [key for key, _ in spec.files] == ["kernel", "initrd", "disks[0].path", "disks[1].path"]
    assert [disk.path for disk in spec.disks] == [HERE / "a.raw", Path("/b.raw")]


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({}, ["image is missing", "for Linux, kernel"]),
        (LINUX | {"image": "a.elf"}, ["not both"]),
        ({"kernel": ""}, ["kernel: ''", "bzImage"]),
        (LINUX | {"initrd": 5}, ["initrd: 5", "RAM disk"]),
        (LINUX | {"cmdline": 5}, ["cmdline: 5", "console=ttyS0"]),
        (LINUX | {"protection": "emulated"}, ['protection: "emulated" is not for Linux', '"none"']),
        (LINUX | {"protection": "auto"}, ['protection: "auto" is not for Linux']),
        (LINUX | {"protection": "guest-memfd", "initial": "private"}, ['initial: "private"', '"shared"']),
        (LINUX | {"arguments": [1]}, ["arguments: only payloads"]),
        (LINUX | {"networks": [{"kind": "tap"}]}, ["networks[0].kind: 'tap'"]),
        (LINUX | {"entropy": "yes"}, ["entropy: 'yes'", "true or false"]),
        ({"image": "a.elf", "cmdline": "quiet"}, ["cmdline: only Linux has it"]),
        ({"image": "a.elf", "disks": [{"path": "a"}]}, ["disks: only Linux has it"]),
        ({"image": "a.elf", "initrd": "i"}, ["initrd: only Linux has it"]),
    ],
)
def test_what_is_wrong_with_a_linux_machine_is_said_likewise(document: dict[str, object], parts: list[str]) -> None:
    message = complaint(document)
    for part in parts:
        assert part in message
