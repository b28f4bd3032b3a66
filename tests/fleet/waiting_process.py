"""A process that waits for a fake machine, as a unit's: ``python tests/fleet/waiting_process.py SOCKET``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kvmd.machine_process import process
from kvmd.machine_process.waiting import wait_to_become
from kvmd.service_manager import ServiceManager
from tests.fleet.fake_machine import open_fake

if __name__ == "__main__":
    # There is no cgroup behind it; whether limits are in force is looked at in the lab.
    vars(process)["lacking_limits"] = lambda *_: []
    sys.exit(wait_to_become(Path(sys.argv[1]), open_fake, ServiceManager.of_this_process(), journal=False))
