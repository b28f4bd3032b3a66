"""All that a Linux guest is tried on, and what has to be true afterwards: whoever runs the guest.

``Proof`` makes a disk, a bridge's far end (a peer that files are sent to and taken from) and the description of the
machine, as a TOML file or the API would have it. The guest runs; what its console printed is handed to ``check``.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmd.closing import Closing
from tests.linux_guest.debian import Kernel
from tests.linux_guest.disk import make_disk, read_file
from tests.linux_guest.initrd import initrd, with_dependencies
from tests.linux_guest.pattern import pieces
from tests.linux_guest.peer import Peer
from tests.linux_guest.report import Report

BRIDGE = "kvmdproof"
HOST, GUEST, PREFIX = "10.9.0.1", "10.9.0.2", 24

LISTENING = b"kvmd-test: console listens"
"""Once the guest has printed it, ``TYPED`` and a newline is to be sent to its console."""

TYPED = b"are you there?"

_FROM_HOST_BYTES = 300_001


class Proof(Closing):
    """One guest's surroundings; the bridge's address (``HOST``) has to be there already.

    Args:
        folder: for the disk and the initial RAM disk.
        kernel: what the guest runs.
        file_bytes: how large the files are that the guest writes, sends and takes.
        end: how the guest is to end: see ``init.c``.
        console: whether somebody will type ``TYPED``; `kvmd run` passes nothing on.

    Attributes:
        disk: the raw disk's path.
        initrd: the initial RAM disk's path.
        cmdline: the kernel's.
    """

    def __init__(
        self,
        folder: Path,
        kernel: Kernel,
        *,
        file_bytes: int = 1 << 20,
        end: str = "poweroff",
        console: bool = True,
    ) -> None:
        self.kernel = kernel.image
        self.disk = folder / "disk.raw"
        self.initrd = folder / "initrd"
        self.file_bytes = file_bytes
        self._console = console
        self._from_host = b"".join(pieces(_FROM_HOST_BYTES))
        write_initrd(self.initrd, kernel)
        make_disk(self.disk, 32 << 20, {"from-host": self._from_host})
        self.peer = Peer(HOST, size=file_bytes)
        options = {
            "disk": "ext4",
            "net": f"{GUEST}/{PREFIX}",
            "gateway": HOST,
            "tcp": self.peer.port,
            "entropy": 1,
            "console": int(console),
            "bytes": file_bytes,
            "end": end,
        }
        given = " ".join(f"kvmd.test.{key}={value}" for key, value in options.items())
        # Each character is an exit, which on nested KVM costs a millisecond.
        self.cmdline = f"console=ttyS0 quiet panic=-1 {given}"

    def machine(self, name: str, *, vcpus: int = 2, memory: str = "256M") -> dict[str, object]:
        """Return the machine as ``POST /v1/machines`` takes it."""
        return {
            "name": name,
            "kernel": str(self.kernel),
            "initrd": str(self.initrd),
            "cmdline": self.cmdline,
            "vcpus": vcpus,
            "memory": memory,
            "disks": [{"path": str(self.disk)}],
            "networks": [{"kind": "bridge", "bridge": BRIDGE}],
        }

    def close(self) -> None:
        """Let the peer end."""
        self.peer.close()

    def check(self, console: bytes, *, vcpus: int = 2) -> Report:
        """Return what the guest reported, once all of it is seen to be true; after its end, and ``close``.

        Args:
            console: all that it printed.
            vcpus: how many it had.
        """
        report = Report(console)
        assert report.failures == [], report.lines
        assert report["done"] == "0 failures"
        online = "0" if vcpus == 1 else f"0-{vcpus - 1}"
        assert report["processors"] == f"{online} ran-on {vcpus}"
        assert report["ping"] == "3 of 3"
        if self._console:
            assert report["console-heard"] == TYPED.decode()
        assert report["entropy"].startswith("virtio_rng")

        file = _digest(b"".join(pieces(self.file_bytes)), self.file_bytes)
        assert report["disk-from-host"] == _digest(self._from_host, _FROM_HOST_BYTES)
        for transfer in ("tcp-send-frames", "tcp-take-frames"):
            assert report.number(transfer, "sent") > 0 < report.number(transfer, "taken")
        assert report["disk-from-guest"] == report["tcp-sent"] == report["tcp-taken"] == file
        # The host's own eyes: what the guest says of itself proves little.
        assert _digest(read_file(self.disk, "from-guest"), self.file_bytes) == file
        seen = [(transfer.way, f"{transfer.sha256} bytes {transfer.size}") for transfer in self.peer.transfers]
        assert seen == [("sent", file), ("taken", file)], self.peer.problem
        return report


def write_initrd(path: Path, kernel: Kernel) -> None:
    """Write the initial RAM disk that a kernel needs to run our init."""
    modules = [] if kernel.modules is None else with_dependencies(kernel.wanted, kernel.modules)
    path.write_bytes(initrd(modules))


def as_toml(machine: dict[str, object]) -> str:
    """Return a machine as a TOML file; texts, numbers, and lists of tables of them are all that is in one."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in machine.items() if not isinstance(value, list)]
    for key, tables in machine.items():
        for table in tables if isinstance(tables, list) else []:
            lines += [f"[[{key}]]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def _digest(data: bytes, size: int) -> str:
    assert len(data) == size
    return f"{hashlib.sha256(data).hexdigest()} bytes {size}"


@dataclass(frozen=True)
class Ended:
    """A hypervisor's run.

    Attributes:
        console: what the guest printed.
        errors: what the hypervisor said.
        status: its exit status.
        seconds: from its start until each of the texts that were watched for came.
        cpu_seconds: what it used, the guest's time included.
        began: when it was started, in seconds since 1970.
    """

    console: bytes
    errors: str
    status: int
    seconds: dict[bytes, float]
    cpu_seconds: float
    began: float


class NoEnd(AssertionError):
    """A guest took too long."""


def run_to_end(
    command: Sequence[str],
    *,
    pass_fds: tuple[int, ...] = (),
    seconds: float,
    watch: Sequence[bytes] = (),
    on_seen: Callable[[bytes], None] = lambda _: None,
) -> Ended:
    """Run a program whose standard input and output are a guest's console, and type what the guest waits for.

    Args:
        command: the program.
        pass_fds: descriptors that it inherits.
        seconds: how long it may take; then it is killed.
        watch: texts of the console whose time counts; an empty one is any.
        on_seen: called with each of them, once, when it has come.

    Raises:
        NoEnd: it took longer.
    """
    start, began = time.monotonic(), time.time()
    console, typed, seen = b"", False, dict[bytes, float]()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(  # noqa: S603 - a hypervisor
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, pass_fds=pass_fds
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        while True:
            readable, _, _ = select.select([process.stdout], [], [], max(0.0, start + seconds - time.monotonic()))
            if not readable:
                process.kill()
                raise NoEnd(f"no end within {seconds:.0f} s, after {console[-2000:].decode(errors='replace')!r}")
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                break
            console += data
            for text in watch:
                if text not in seen and text in console:
                    seen[text] = time.monotonic() - start
                    on_seen(text)
            if LISTENING in console and not typed:
                typed = True
                process.stdin.write(TYPED + b"\n")
                process.stdin.flush()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    return Ended(console, said, process.returncode, seen, used.ru_utime + used.ru_stime, began)
