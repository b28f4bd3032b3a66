"""The Linux guest of the tests on kvmd and on QEMU's microvm, in turns.

Both run the same kernel (the lab's), initial RAM disk and disk image, with two processors, on the same KVM; the guest
says itself how long reading and sending took. Needs root, for a network namespace with a bridge of its own, and the
source tree that the tests are in: nothing but ``kvmd.benchmark.linux`` imports this.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kvmd.benchmark.linux_profile import profile
from kvmd.benchmark.measure import CannotMeasure, Fact, Options, Report, Series, take_turns_together
from kvmd.network.networks import open_networks
from kvmd.network.own_thread import in_own_thread
from kvmd.network.spec import NetworkSpec
from tests.linux_guest.daemon import Daemon
from tests.linux_guest.debian import Kernel
from tests.linux_guest.peer import Peer
from tests.linux_guest.proof import BRIDGE, GUEST, HOST, PREFIX, Ended, NoEnd, as_toml, run_to_end, write_initrd
from tests.linux_guest.qemu import QemuNetwork, microvm
from tests.linux_guest.report import Report as GuestReport
from tests.own_network import leave_network

TARGET_START = 1.3
"""Times QEMU's time to init, at most."""

_COUNTERS = Path("/sys/kernel/debug/kvm")
_COUNTED = ("exits", "io_exits", "mmio_exits", "halt_exits", "irq_exits", "insn_emulation", "pf_taken")
"""KVM's own counts of all VMs there are (Documentation/virt/kvm/x86, debugfs): why vCPUs left the guest."""

_MIB = 1 << 20
_VCPUS, _MEMORY_MIB = 2, 256
_SECONDS = 300.0
_INIT = b"kvmd-test: init"
_ANY = b""
_UNITS = ("ms", "ms", "ns/KiB", "ns/KiB", "ns/KiB", "s")
_DAEMON, _KVMD, _MICROVM = "kvmd's daemon", "kvmd run", "qemu -M microvm"
_CPU = len(_UNITS) - 1
"""The column that a machine of the daemon has not: its process is nobody's child here."""


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


@dataclass(frozen=True, slots=True)
class _Run:
    """One run of a guest.

    Attributes:
        ended: how it went.
        counted: KVM's counters when init began; empty where there are none.
    """

    ended: Ended
    counted: Mapping[str, int]


def turns(options: Options, *, qemu: str, kernel: Path) -> Report:
    """Let them take turns.

    Args:
        options: of the command line.
        qemu: the path of qemu-system-x86_64.
        kernel: a bzImage that has all drivers built in.

    Raises:
        CannotMeasure: a guest did not do what it should.
        HostError, OSError: a network cannot be had.
    """
    # In the network of its own /sys is another.
    counters = os.open(_COUNTERS, os.O_RDONLY | os.O_DIRECTORY) if _COUNTERS.is_dir() else None
    try:
        return in_own_thread(lambda: _measure(options, qemu, kernel, _Counters(counters)))
    finally:
        if counters is not None:
            os.close(counters)


class _Counters:
    """Reads KVM's counters, where they can be had.

    Args:
        folder: their folder, open; None where there is none.
    """

    def __init__(self, folder: int | None) -> None:
        self._folder = folder

    def read(self) -> Mapping[str, int]:
        """Return those of ``_COUNTED`` that this kernel has."""
        found = {}
        for name in _COUNTED if self._folder is not None else ():
            try:
                file = os.open(name, os.O_RDONLY, dir_fd=self._folder)
            except FileNotFoundError:
                continue
            with os.fdopen(file) as text:
                found[name] = int(text.read())
        return found


def _measure(options: Options, program: str, kernel: Path, counters: _Counters) -> Report:
    leave_network()
    file_bytes = (1 if options.quick else 4) * _MIB
    bridge = NetworkSpec(kind="made-bridge", bridge=BRIDGE, addresses=(f"{HOST}/{PREFIX}",))
    with (
        tempfile.TemporaryDirectory() as text,
        open_networks([bridge], machine="keeper"),
        Peer(HOST, size=file_bytes, checksums=False) as peer,
        Daemon(Path(text), images=[Path(text), kernel.parent], bridges=[BRIDGE]) as daemon,
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
        runs: dict[str, list[_Run]] = {_DAEMON: [], _KVMD: [], _MICROVM: []}

        def values(label: str, run: Callable[[Callable[[bytes], None]], Ended]) -> Callable[[], Sequence[float]]:
            def once() -> Sequence[float]:
                counted: dict[str, int] = {}

                def seen(text: bytes) -> None:
                    if text == _INIT:
                        counted.update(counters.read())

                try:
                    ended = run(seen)
                except NoEnd as error:
                    raise CannotMeasure(f"{label}: {error}") from error
                runs[label].append(_Run(ended, counted))
                return _values(label, ended)

            return once

        columns = take_turns_together(
            {
                _DAEMON: values(_DAEMON, lambda seen: _on_daemon(daemon, guest, seen)),
                _KVMD: values(_KVMD, lambda seen: _on_kvmd(folder, guest, seen)),
                _MICROVM: values(_MICROVM, lambda seen: _on_qemu(program, guest, seen)),
            },
            rounds=options.rounds(5),
            units=_UNITS,
            # A boot takes a minute in the lab.
            warm_up=False,
        )
        profiled, note = profile(folder, _kvmd_run(folder), _profiled)
    report = _report(columns, file_bytes)
    report.notes.append(note)
    report.facts += _phases([run.ended for run in runs[_KVMD]])
    report.facts += [
        fact for label, of_one in runs.items() for fact in (*_frames(label, of_one), *_counts(label, of_one))
    ]
    report.facts += profiled
    return report


def _machine(guest: _Guest) -> dict[str, object]:
    return {
        "name": "bench",
        "kernel": str(guest.kernel),
        "initrd": str(guest.initrd),
        "cmdline": guest.cmdline,
        "vcpus": _VCPUS,
        "memory": f"{_MEMORY_MIB}M",
        "disks": [{"path": str(guest.disk)}],
        "networks": [{"kind": "bridge", "bridge": BRIDGE}],
    }


def _on_daemon(daemon: Daemon, guest: _Guest, seen: Callable[[bytes], None]) -> Ended:
    """Run it on a daemon that runs already, from the first request on."""
    start, began = time.monotonic(), time.time()
    daemon.ask("POST", "/v1/machines", _machine(guest))
    with daemon.console("bench") as console:
        daemon.ask("POST", "/v1/machines/bench/start")
        try:
            console.read_until(_INIT, seconds=_SECONDS)
        except AssertionError as error:
            raise NoEnd(str(error)) from error
        passed = time.monotonic() - start
        seen(_INIT)
        printed = console.read_to_end(seconds=_SECONDS)
    ended = daemon.ask("GET", "/v1/machines/bench/wait?state=stopped&timeout=60")["machine"]["end"]
    daemon.ask("DELETE", "/v1/machines/bench")
    return Ended(printed, ended["message"], ended["status"], {_INIT: passed}, 0.0, began)


def _on_kvmd(folder: Path, guest: _Guest, seen: Callable[[bytes], None]) -> Ended:
    spec = folder / "machine.toml"
    spec.write_text(as_toml(_machine(guest)), encoding="utf-8")
    return run_to_end(_kvmd_run(folder), seconds=_SECONDS, watch=(_ANY, _INIT), on_seen=seen)


def _profiled(command: Sequence[str]) -> None:
    try:
        _values("the profiled run", run_to_end(command, seconds=2 * _SECONDS, watch=(_INIT,)))
    except NoEnd as error:
        raise CannotMeasure(f"the profiled run: {error}") from error


def _kvmd_run(folder: Path) -> list[str]:
    return [sys.executable, "-m", "kvmd", "run", str(folder / "machine.toml"), "--log-format", "json"]


def _on_qemu(program: str, guest: _Guest, seen: Callable[[bytes], None]) -> Ended:
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
        return run_to_end(command, pass_fds=(network.tap.fd,), seconds=_SECONDS, watch=(_ANY, _INIT), on_seen=seen)


def _values(label: str, ended: Ended) -> Sequence[float]:
    report = GuestReport(ended.console)
    if ended.status != 0 or "done" not in report or report.failures:
        said = [*report.failures, *ended.errors.strip().splitlines()[-1:]]
        raise CannotMeasure(f"{label} ended with {ended.status}: {'; '.join(said) or 'it says nothing'}")
    rates = [
        report.number(word, "ns") / (report.number(word, "bytes") / 1024) for word in ("read", "tcp-send", "tcp-take")
    ]
    return (ended.seconds[_INIT] * 1e3, report.number("init", "ns") / 1e6, *rates, ended.cpu_seconds)


def _report(columns: dict[str, tuple[Series, ...]], file_bytes: int) -> Report:
    report = Report("linux", "a Linux guest of 2 processors, beside QEMU's microvm on the same KVM")
    names = (
        "start to init",
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
            if not (column == _CPU and label == _DAEMON)
        }
        report.compare(here, _MICROVM, TARGET_START if column == 0 else None)
    report.notes += [
        "start: the first request to a daemon that runs already, or exec; `kvmd run` imports Python's modules first",
        (
            f"one guest a round: {file_bytes // _MIB} MiB read with O_DIRECT in pieces of 1 MiB, and by TCP in pieces "
            "of 64 KiB, through a tap and a bridge; both through the host's page cache, QEMU without vhost"
        ),
    ]
    return report


def _phases(runs: Sequence[Ended]) -> list[Fact]:
    """Return where kvmd's time to init went: Python and the machine, the kernel until it prints, the rest of it."""
    names = ("from exec until the machine runs", "from there to the console's first byte", "from there to init")
    rows = []
    for ended in runs:
        starting = _logged(ended.errors, "machine-starting") - ended.began
        first, init = ended.seconds[_ANY], ended.seconds[_INIT]
        rows.append((starting, first - starting, init - first))
    return [
        Fact(Series(f"{_KVMD}: {name}", "ms", tuple(row[column] * 1e3 for row in rows)))
        for column, name in enumerate(names)
    ]


def _frames(label: str, runs: Sequence[_Run]) -> list[Fact]:
    """Return how many frames the guest's card sent and took for the two transfers: each costs a hypervisor the same."""
    reports = [GuestReport(run.ended.console) for run in runs]
    return [
        Fact(
            Series(
                f"{label}: frames {key}, in {doing}", "", tuple(float(report.number(word, key)) for report in reports)
            )
        )
        for word, doing in (("tcp-send-frames", "sending"), ("tcp-take-frames", "taking"))
        for key in ("sent", "taken")
    ]


def _counts(label: str, runs: Sequence[_Run]) -> list[Fact]:
    """Return KVM's counts at init, of those counters that every run has."""
    kept = [name for name in _COUNTED if all(name in run.counted for run in runs)]
    return [
        Fact(Series(f"{label}: {name} until init", "", tuple(float(run.counted[name]) for run in runs)))
        for name in kept
    ]


def _logged(log: str, event: str) -> float:
    """Return when an event was logged, in seconds since 1970."""
    for line in log.splitlines():
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("event") == event:
            return datetime.fromisoformat(entry["timestamp"]).timestamp()
    raise CannotMeasure(f"kvmd did not log {event}: {log[-200:]}")
