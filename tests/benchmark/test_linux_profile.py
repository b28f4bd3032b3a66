"""The table of a Linux guest's profile."""

from __future__ import annotations

import pytest

from kvmd.benchmark.linux_profile import shares

STACKS = """\
thread (2): main;VcpuThread.main (kvmd/vcpu_tasks.py:47);KvmVcpu.run (kvmd/kvm/vcpu.py:1) 50
thread (2): main;VcpuThread.main (kvmd/vcpu_tasks.py:47);ExitHandler.answer (kvmd/exit_handler.py:9) 10
thread (1): MainThread;run (trio/_core/_run.py:9);NetworkDevice._transmit (kvmd/virtio/net.py:7);Ring.pop (kvmd/virtio/live_queue.py:1) 15
thread (1): MainThread;run (trio/_core/_run.py:9);NetworkDevice._transmit (kvmd/virtio/net.py:8);Ring.pop (kvmd/virtio/live_queue.py:2) 5
thread (1): MainThread;run (trio/_core/_run.py:9);ConsoleDevice.run (kvmd/virtio/console.py:7) 4
thread (1): MainThread;run (trio/_core/_run.py:9) 6
thread (1): MainThread;import_module (importlib/__init__.py:126) 7
thread (1): MainThread 3
"""  # noqa: E501 - as py-spy has them


def test_each_stack_belongs_to_one_part_and_its_last_function() -> None:
    parts, functions = shares(STACKS.splitlines())
    assert [(name, round(share, 2)) for name, share in parts if share] == [
        ("vCPU: in KVM_RUN", 0.5),
        ("loop: frames from the guest", 0.2),
        ("vCPU: exits answered, console and registers included", 0.1),
        ("start and end: imports, machine, files", 0.1),
        ("loop: trio itself, waiting and waking", 0.06),
        ("loop: other devices and their queues", 0.04),
    ]
    assert sum(share for _, share in parts) == pytest.approx(1)
    assert ("outside of any Python function", 0.03) in functions
    assert functions[:2] == [("KvmVcpu.run (kvmd/kvm/vcpu.py)", 0.5), ("Ring.pop (kvmd/virtio/live_queue.py)", 0.2)]


def test_no_samples_are_no_shares() -> None:
    parts, functions = shares([])
    assert not any(share for _, share in parts)
    assert functions == []
