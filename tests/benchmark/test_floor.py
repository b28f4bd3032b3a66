"""The C floor beside kvmd: the same KVM calls for the same guest, or it says nothing about kvmd."""

import json
import subprocess
from collections import Counter
from collections.abc import Callable

import pytest
import trio

from kvmd.benchmark.runs import Load
from kvmd.benchmark.sources import build_floor
from kvmd.guests import GUESTS
from kvmd.kvm import ioctl, uapi, vm
from kvmd.machine import Machine
from kvmd.memory import libc
from kvmd.spec.machine import MachineSpec

pytestmark = [pytest.mark.kvm, pytest.mark.compiler]

_CALLS = {
    uapi.KVM_SET_USER_MEMORY_REGION2: "slot_calls",
    uapi.KVM_CREATE_GUEST_MEMFD: "guest_memfds",
}
_LOAD = Load(pages=3, rounds=3, tripwire="guest_memfd")


def of_the_floor(mode: str) -> dict[str, int]:
    command = [str(build_floor()), f"--mode={mode}", f"--memory={_LOAD.memory_bytes}", "--tripwire=guest_memfd"]
    command += [f"--arg={_LOAD.pages}", f"--arg={_LOAD.rounds}", str(GUESTS["pingpong"].path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own program
    found = json.loads(done.stdout)
    assert found["conversions"] == _LOAD.conversions
    return {name: found[name] for name in ("slot_calls", "guest_memfds", "discards")}


def of_kvmd(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    counted: Counter[str] = Counter()

    def counting(call: Callable[..., int]) -> Callable[..., int]:
        def counts(fd: int, request: int, argument: object) -> int:
            if request in _CALLS:
                counted[_CALLS[request]] += 1
            return call(fd, request, argument)

        return counts

    punch_hole = libc.punch_hole

    def punch(fd: int, offset: int, size: int) -> None:
        counted["discards"] += 1
        punch_hole(fd, offset, size)

    spec = MachineSpec(
        image=GUESTS["pingpong"].path,
        memory=_LOAD.memory_bytes,
        protection="emulated",
        tripwire="guest_memfd",
        arguments=(_LOAD.pages, _LOAD.rounds),
    )
    with Machine.open(spec) as machine:
        for name in ("raw_ioctl", "quick_ioctl"):
            monkeypatch.setattr(vm, name, counting(getattr(ioctl, name)))
        monkeypatch.setattr(libc, "punch_hole", punch)
        stop = trio.run(machine.run)
        assert stop.status == 0, stop.message
        return dict(counted)


def test_the_floor_makes_the_calls_that_kvmd_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    kvmd = of_kvmd(monkeypatch)
    assert kvmd["discards"] == _LOAD.conversions
    assert of_the_floor("early") == of_the_floor("placed") == kvmd
    # Where nothing is made for the next conversion, the last one makes one guest_memfd less.
    for mode in ("service", "thread"):
        assert of_the_floor(mode) == kvmd | {"guest_memfds": kvmd["guest_memfds"] - 1}
