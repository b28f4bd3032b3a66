import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.errors import ConfigError
from kvmd.guests import GUESTS
from kvmd.network.spec import NetworkSpec
from kvmd.spec import ConversionSpec, DiskSpec, LimitsSpec, MachineSpec, load_spec, resolve_image, spec_of
from kvmd.units import MIB

HERE = Path("/etc/kvmd")
EXAMPLES = Path(__file__).parent.parent / "config"


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "guest.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(**document: object) -> str:
    with pytest.raises(ConfigError) as caught:
        spec_of({"image": "a.elf", **document}, base=HERE)
    message = str(caught.value)
    assert "\n" not in message
    return message


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
        ({"conversion": {"chnk": 1}}, ["unknown key conversion.chnk (did you mean chunk?)", "max_ranges"]),
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
        ({"conversion": 3}, ["conversion: 3", "[conversion]"]),
        ({"conversion": {"chunk": 1}}, ["conversion.chunk: 1", "4 KiB to 1 GiB"]),
        ({"conversion": {"chunk": "x"}}, ["conversion.chunk: 'x' is not a size"]),
        ({"conversion": {"no_progress_limit": 0}}, ["conversion.no_progress_limit: 0", "from 1"]),
        ({"conversion": {"max_ranges": "many"}}, ["conversion.max_ranges: 'many'", "16777216"]),
        ({"conversion": {"rate": 0}}, ["conversion.rate: 0", "1 to 1000000"]),
        ({"conversion": {"rate": 1_000_001}}, ["conversion.rate: 1000001"]),
        ({"conversion": {"rate": "fast"}}, ["conversion.rate: 'fast'"]),
        ({"limits": 3}, ["limits: 3", "[limits]"]),
        ({"limits": {"cpu": 1}}, ["unknown key limits.cpu (did you mean cpus?)", "memory, cpus, tasks"]),
        ({"limits": {"memory": "63M"}}, ["limits.memory: 66060288", "from 64 MiB", "guest memory included"]),
        ({"limits": {"memory": 64 * MIB + 1}}, ["limits.memory: 67108865", "pages of 4 KiB"]),
        ({"limits": {"memory": 1 << 63}}, ["limits.memory: "]),
        ({"limits": {"memory": "much"}}, ["limits.memory: 'much' is not a size"]),
        ({"limits": {"cpus": 0}}, ["limits.cpus: 0", "0.01"]),
        ({"limits": {"cpus": float("nan")}}, ["limits.cpus: nan"]),
        ({"limits": {"cpus": "2"}}, ["limits.cpus: '2'", "such as 1.5"]),
        ({"limits": {"tasks": 16}}, ["limits.tasks: 16", "16 more than vcpus"]),
        ({"limits": {"tasks": 19}, "vcpus": 4}, ["limits.tasks: 19", "16 more than vcpus"]),
        ({"limits": {"tasks": 5000}}, ["limits.tasks: 5000", "4352"]),
    ],
)
def test_what_is_wrong_is_said_with_the_key_and_what_would_be_right(
    document: dict[str, object], parts: list[str]
) -> None:
    message = complaint(**document)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("protection", ["guest-memfd", "auto"])
def test_other_protections_can_be_asked_for(protection: str) -> None:
    assert spec_of({"image": "a.elf", "protection": protection}, base=HERE).protection == protection


@pytest.mark.parametrize("protection", ["snp", "tdx"])
def test_protections_to_come_are_known_but_refused(protection: str) -> None:
    assert "not built yet" in complaint(protection=protection)


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
        (LINUX | {"disks": "a.raw"}, ["disks: 'a.raw'", "[[disks]]"]),
        (LINUX | {"disks": ["a.raw"]}, ["disks[0]: 'a.raw'", "a table"]),
        (LINUX | {"disks": [{}]}, ["disks[0].path: is missing", "raw disk image"]),
        (LINUX | {"disks": [{"path": "a", "readonly": True}]}, ["disks[0].readonly", "did you mean read_only?"]),
        (LINUX | {"disks": [{"path": "a"}, {"path": "b", "direct": 1}]}, ["disks[1].direct: 1", "true or false"]),
        (LINUX | {"disks": [{"path": "a"}] * 9}, ["disks:", "up to 8"]),
        (LINUX | {"networks": [{"kind": "tap"}]}, ["networks[0].kind: 'tap'"]),
        (LINUX | {"entropy": "yes"}, ["entropy: 'yes'", "true or false"]),
        ({"image": "a.elf", "cmdline": "quiet"}, ["cmdline: only Linux has it"]),
        ({"image": "a.elf", "disks": [{"path": "a"}]}, ["disks: only Linux has it"]),
        ({"image": "a.elf", "initrd": "i"}, ["initrd: only Linux has it"]),
    ],
)
def test_what_is_wrong_with_a_linux_machine_is_said_likewise(document: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        spec_of(document, base=HERE)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_are_given_or_not() -> None:
    spec = spec_of({"image": "a.elf", "limits": {"memory": "512M", "cpus": 1.5, "tasks": 17}}, base=HERE)
    assert spec.limits == LimitsSpec(memory=512 * MIB, cpus=1.5, tasks=17)
    assert spec.limits.given
    assert not spec_of({"image": "a.elf", "limits": {}}, base=HERE).limits.given
    assert not MachineSpec(image=HERE / "a.elf").limits.given


def test_every_limit_is_shown_in_the_example() -> None:
    limits = load_spec(Path(__file__).parent.parent / "config" / "limits.toml").limits
    assert None not in (limits.memory, limits.cpus, limits.tasks)
