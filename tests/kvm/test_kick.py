"""Kicks from other threads, at any moment: none may be lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from kvmd.hv.exits import Exit, Interrupted
from kvmd.kvm.vcpu import KvmVcpu

pytestmark = pytest.mark.kvm

SPIN = b"\xeb\xfe"  # jmp $
LOST_AFTER_S = 20.0
"""A lost kick leaves the guest spinning for ever: this only has to be longer than a busy machine stalls."""


class Runner:
    """A vCPU thread that serves numbered commands: it looks at the newest whenever it is interrupted."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self.vcpu = vcpu
        self.published = 0
        self.stopping = False
        self.interruptions = 0
        self.strangers: list[Exit] = []
        self._served = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self.vcpu.prepare_thread()
        while not self.stopping:
            found = self.vcpu.run()
            self.vcpu.clear_exit_request()
            if isinstance(found, Interrupted):
                self.interruptions += 1
            else:
                self.strangers.append(found)
            with self._changed:
                self._served = self.published
                self._changed.notify_all()
        self.vcpu.release_thread()

    def served(self, number: int) -> bool:
        """Wait until command ``number`` was seen; false where its kick is lost."""
        with self._changed:
            return self._changed.wait_for(lambda: self._served >= number, LOST_AFTER_S)

    def stop(self) -> None:
        self.stopping = True
        self.vcpu.request_exit()
        self._thread.join(LOST_AFTER_S)
        assert not self._thread.is_alive()


def test_no_kick_of_a_storm_is_lost(boot: Callable[..., KvmVcpu]) -> None:
    runner = Runner(boot(SPIN))
    moments = random.Random(39)  # noqa: S311  reproducible moments, no secret
    kicks = 3000
    for number in range(1, kicks + 1):
        for _ in range(moments.randrange(300)):
            pass
        runner.published = number
        runner.vcpu.request_exit()
        assert runner.served(number), f"kick {number} was lost"
    runner.stop()
    assert runner.strangers == []
    assert runner.interruptions >= kicks


def test_the_last_kick_of_several_threads_is_served(boot: Callable[..., KvmVcpu]) -> None:
    runner = Runner(boot(SPIN))
    publishing = threading.Lock()

    def storm() -> None:
        for _ in range(500):
            with publishing:
                runner.published += 1
            runner.vcpu.request_exit()

    threads = [threading.Thread(target=storm) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runner.served(2000)
    runner.stop()
    assert runner.strangers == []


def test_kicks_around_the_thread_s_beginning_and_end_hit_nobody(boot: Callable[..., KvmVcpu]) -> None:
    # A kick that reached a thread that does not block the signal would end the process.
    vcpu = boot(SPIN)
    done = threading.Event()

    def storm() -> None:
        while not done.is_set():
            vcpu.request_exit()

    kicker = threading.Thread(target=storm)
    kicker.start()

    def live_and_die() -> None:
        vcpu.prepare_thread()
        assert isinstance(vcpu.run(), Interrupted)
        vcpu.clear_exit_request()
        vcpu.release_thread()

    for _ in range(20):
        thread = threading.Thread(target=live_and_die)
        thread.start()
        thread.join(LOST_AFTER_S)
        assert not thread.is_alive()
    done.set()
    kicker.join()
