"""Machines on a KVM with private memory: here where this host has it, else in the lab (lab/README.md)."""

from __future__ import annotations

from tests.machine.conftest import open_machine, run

__all__ = ["open_machine", "run"]
