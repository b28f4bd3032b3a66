"""A parent of machines without a hypervisor: ``python tests/fleet/fake_spawner.py FD``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kvmd.machine_process.spawner import serve
from tests.fleet.fake_machine import open_fake

if __name__ == "__main__":
    serve(int(sys.argv[1]), open_fake)
