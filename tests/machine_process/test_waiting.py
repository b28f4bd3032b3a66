"""A process that waits for a machine has imported what any machine needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CHILD = r"""
import json, socket, sys, threading
from pathlib import Path
from kvmd.cli.machine_process import wait_to_become
from kvmd.machine import Machine
from kvmd.service_manager import ServiceManager

daemon = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
daemon.bind(sys.argv[1])
daemon.listen()
seen = {}

def serve():
    waiting, _ = daemon.accept()
    waiting.recv(4096)
    seen.update(modules=sorted(sys.modules))  # what is there when it says that it waits
    waiting.close()

thread = threading.Thread(target=serve)
thread.start()
status = wait_to_become(Path(sys.argv[1]), Machine.open, ServiceManager({}, 0), journal=False)
thread.join()
print(json.dumps([status, seen["modules"]]))
"""


def test_it_has_imported_what_linux_machines_need(tmp_path: Path) -> None:
    child = [sys.executable, "-c", CHILD, str(tmp_path / "s")]
    done = subprocess.run(child, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603 - ours
    status, modules = json.loads(done.stdout)
    assert status == 0
    late = {"kvmd.linux.kernel", "kvmd.linux_devices", "kvmd.linux_hardware"}
    beneath = {"kvmd.virtio.disk", "kvmd.virtio.console", "kvmd.linux.boot", "kvmd.acpi.tables"}
    assert late | beneath <= set(modules)
