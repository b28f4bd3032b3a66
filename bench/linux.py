"""A Linux guest on kvmd beside QEMU's microvm: time to init, and what its disk and network carry.

Both run the same kernel (the lab's), initial RAM disk and disk image, with two processors, on the same KVM; the guest
is the one of the tests, and says itself how long reading and sending took. Needs root, for a network namespace with a
bridge of its own. In the lab: ``LAB_TIMEOUT=1800 lab/run .venv/bin/kvmd bench linux``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Report, Series, take_turns_together
from kvmd.benchmark.runs import require_kvm
from kvmd.errors import HostError
from kvmd.network.networks import open_networks
from kvmd.network.own_thread import in_own_thread
from kvmd.network.spec import NetworkSpec
from tests.linux_guest.debian import Kernel
from tests.linux_guest.peer import Peer
from tests.linux_guest.proof import BRIDGE, GUEST, HOST, PREFIX, Ended, as_toml, run_to_end, write_initrd
from tests.linux_guest.qemu import QemuNetwork, microvm
from tests.linux_guest.report import Report as GuestReport
from tests.own_network import leave_network

TARGET_START = 1.3
"""Times QEMU's time to init, at most."""

_ROOT = Path(__file__).resolve().parents[1]
_QEMU = "qemu-system-x86_64"
_MIB = 1 << 20
_VCPUS, _MEMORY_MIB = 2, 256
_SECONDS = 300.0
_INIT = b"kvmd-test: init"
_ANY = b""
_UNITS = ("ms", "ms", "ns/KiB", "ns/KiB", "ns/KiB", "s")
_KVMD, _MICROVM = "kvmd run", "qemu -M microvm"


@dataclass(frozen=True, slots=True)
class _Guest:
    """What both run.

    Attributes:
        kernel: a bzImage.
        initrd: its initial RAM disk.
        disk: raw.
        cmdline: the kernel's.
    """

    kernel: Path
    initrd: Path
    disk: Path
    cmdline: str


def measure(options: Options) -> Report:
    """Let kvmd and QEMU take turns with the same guest."""
    require_kvm()
    kernel = subprocess.run([_ROOT / "lab" / "kernel"], capture_output=True, text=True, check=False)
    if kernel.returncode != 0:
        raise CannotMeasure(kernel.stderr.strip())
    program = shutil.which(_QEMU)
    if program is None:
        raise CannotMeasure(f"there is no {_QEMU}")
    try:
        return in_own_thread(lambda: _measure(options, program, Path(kernel.stdout.strip())))
    except (HostError, OSError) as error:
        raise CannotMeasure(f"there is no network for a guest: {error}") from error


def _measure(options: Options, program: str, kernel: Path) -> Report:
    leave_network()
    file_bytes = (4 if options.quick else 32) * _MIB
    bridge = NetworkSpec(kind="made-bridge", bridge=BRIDGE, addresses=(f"{HOST}/{PREFIX}",))
    with (
        tempfile.TemporaryDirectory() as text,
        open_networks([bridge], machine="keeper"),
        Peer(HOST, size=file_bytes, checksums=False) as peer,
    ):
        folder = Path(text)
        disk = folder / "disk.raw"
        disk.write_bytes(bytes(file_bytes))
        write_initrd(folder / "initrd", Kernel(kernel))
        does = {
            "read": file_bytes,
            "net": f"{GUEST}/{PREFIX}",
            "gateway": HOST,
            "tcp": peer.port,
            "bytes": file_bytes,
            "checksums": 0,
        }
        cmdline = "console=ttyS0 quiet panic=-1 " + " ".join(f"kvmd.test.{key}={value}" for key, value in does.items())
        guest = _Guest(kernel, folder / "initrd", disk, cmdline)
        runs: dict[str, list[Ended]] = {_KVMD: [], _MICROVM: []}

        def values(label: str, run: Callable[[], Ended]) -> Callable[[], Sequence[float]]:
            def once() -> Sequence[float]:
                ended = run()
                runs[label].append(ended)
                return _values(label, ended)

            return once

        columns = take_turns_together(
            {
                _KVMD: values(_KVMD, lambda: _on_kvmd(folder, guest)),
                _MICROVM: values(_MICROVM, lambda: _on_qemu(program, guest)),
            },
            rounds=options.rounds(5),
            units=_UNITS,
        )
    return _report(columns, runs[_KVMD], file_bytes)


def _on_kvmd(folder: Path, guest: _Guest) -> Ended:
    machine: dict[str, object] = {
        "name": "bench",
        "kernel": str(guest.kernel),
        "initrd": str(guest.initrd),
        "cmdline": guest.cmdline,
        "vcpus": _VCPUS,
        "memory": f"{_MEMORY_MIB}M",
        "disks": [{"path": str(guest.disk)}],
        "networks": [{"kind": "bridge", "bridge": BRIDGE}],
    }
    spec = folder / "machine.toml"
    spec.write_text(as_toml(machine), encoding="utf-8")
    command = [sys.executable, "-m", "kvmd", "run", str(spec), "--log-format", "json"]
    return run_to_end(command, seconds=_SECONDS, watch=(_ANY, _INIT))


def _on_qemu(program: str, guest: _Guest) -> Ended:
    with open_networks([NetworkSpec(bridge=BRIDGE)], machine="qemu") as networks:
        (network,) = networks.guest
        command = microvm(
            program=program,
            kernel=guest.kernel,
            initrd=guest.initrd,
            cmdline=guest.cmdline,
            accelerator="kvm",
            vcpus=_VCPUS,
            memory_mib=_MEMORY_MIB,
            disk=guest.disk,
            network=QemuNetwork(network.tap.fd, network.mac.hex(":")),
        )
        return run_to_end(command, pass_fds=(network.tap.fd,), seconds=_SECONDS, watch=(_ANY, _INIT))


def _values(label: str, ended: Ended) -> Sequence[float]:
    report = GuestReport(ended.console)
    if ended.status != 0 or "done" not in report or report.failures:
        said = [*report.failures, *ended.errors.strip().splitlines()[-1:]]
        raise CannotMeasure(f"{label} ended with {ended.status}: {'; '.join(said) or 'it says nothing'}")
    rates = [
        report.number(word, "ns") / (report.number(word, "bytes") / 1024) for word in ("read", "tcp-send", "tcp-take")
    ]
    return (ended.seconds[_INIT] * 1e3, report.number("init", "ns") / 1e6, *rates, ended.cpu_seconds)


def _report(columns: dict[str, tuple[Series, ...]], runs: Sequence[Ended], file_bytes: int) -> Report:
    report = Report("linux", "a Linux guest of 2 processors, beside QEMU's microvm on the same KVM")
    names = (
        "exec to init",
        "the kernel's start to init, by the guest's clock",
        f"reading {file_bytes // _MIB} MiB of the disk past the page cache",
        f"sending {file_bytes // _MIB} MiB by TCP",
        f"taking {file_bytes // _MIB} MiB by TCP",
        "CPU time of all of it, the guest's included",
    )
    for column, name in enumerate(names):
        here = {
            label: Series(f"{label}: {name}", series[column].unit, series[column].values)
            for label, series in columns.items()
        }
        report.compare(here, _MICROVM, TARGET_START if column == 0 else None)
    report.facts += [Fact(series) for series in _phases(runs)]
    report.notes.append(
        f"one guest a round: {file_bytes // _MIB} MiB read with O_DIRECT in pieces of 1 MiB, and by TCP in pieces of "
        "64 KiB, through a tap and a bridge; both through the host's page cache, QEMU without vhost"
    )
    return report


def _phases(runs: Sequence[Ended]) -> list[Series]:
    """Return where kvmd's time to init went: Python and the machine, the kernel until it prints, the rest of it."""
    names = ("from exec until the machine runs", "from there to the console's first byte", "from there to init")
    rows = []
    for ended in runs:
        starting = _logged(ended.errors, "machine-starting") - ended.began
        first, init = ended.seconds[_ANY], ended.seconds[_INIT]
        rows.append((starting, first - starting, init - first))
    return [
        Series(f"{_KVMD}: {name}", "ms", tuple(row[column] * 1e3 for row in rows)) for column, name in enumerate(names)
    ]


def _logged(log: str, event: str) -> float:
    """Return when an event was logged, in seconds since 1970."""
    for line in log.splitlines():
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("event") == event:
            return datetime.fromisoformat(entry["timestamp"]).timestamp()
    raise CannotMeasure(f"kvmd did not log {event}: {log[-200:]}")
