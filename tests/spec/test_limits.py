from pathlib import Path

import pytest

from kvmd.spec.limits import LimitsSpec
from kvmd.spec.machine import MachineSpec, load_spec, spec_of
from kvmd.units import MIB
from tests.spec.complaints import HERE, complaint


@pytest.mark.parametrize(
    ("document", "parts"),
    [
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
    message = complaint({"image": "a.elf"} | document)
    for part in parts:
        assert part in message


def test_limits_are_given_or_not() -> None:
    spec = spec_of({"image": "a.elf", "limits": {"memory": "512M", "cpus": 1.5, "tasks": 17}}, base=HERE)
    assert spec.limits == LimitsSpec(memory=512 * MIB, cpus=1.5, tasks=17)
    assert spec.limits.given
    assert not spec_of({"image": "a.elf", "limits": {}}, base=HERE).limits.given
    assert not MachineSpec(image=HERE / "a.elf").limits.given


def test_every_limit_is_shown_in_the_example() -> None:
    limits = load_spec(Path(__file__).parents[2] / "config" / "limits.toml").limits
    assert None not in (limits.memory, limits.cpus, limits.tasks)
