"""For all tests: the gates to what the host may lack, and the check that nothing is left behind."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from kvmd.kvm.system import Kvm
from kvmd.kvm.uapi import KVM_X86_SW_PROTECTED_VM
from kvmd.kvm.vm import Vm
from tests.gate import Facility, require_whole
from tests.leaks import Belongings, open_fds

# A deadline for an example would be a timed test: on a busy machine it fails for nothing.
settings.register_profile("kvmd", deadline=None)
settings.load_profile("kvmd")

_MARKED = {
    "kvm": Facility.KVM,
    "private_memory": Facility.PRIVATE_MEMORY,
    "compiler": Facility.COMPILER,
    "software": Facility.SOFTWARE,
    "network": Facility.NETWORK,
}

_CLOCKS = {"autojump_clock", "mock_clock"}


def pytest_itemcollected(item: pytest.Item) -> None:
    """Refuse a clock that trio would not be given: pytest-trio passes on those alone that are a test's arguments."""
    for mark in item.iter_markers("usefixtures"):
        if _CLOCKS & set(mark.args):
            raise pytest.UsageError(f"{item.nodeid}: the clock has to be an argument of the test, or it is not used")


@pytest.fixture(scope="session", autouse=True)
def _signals_as_on_a_terminal() -> None:
    """Heed what ``nohup``, or a script that runs the tests in the background, made ignored.

    kvmd leaves such a signal ignored, and so do the processes that tests start: whoever sends one would wait for ever.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread or a descriptor.

    Fixtures that no test asks for by name are set up before the others and torn down after them: what a test's own
    fixtures opened is closed by the time of the second look. Fixtures of a module or the session are older still, so
    what they keep is there at both.
    """
    before = Belongings.now()
    yield
    left = before.left_behind()
    if left:
        pytest.fail(f"left behind: {', '.join(left)}", pytrace=False)


@pytest.fixture(autouse=True)
def _gates(_nothing_left_behind: None, request: pytest.FixtureRequest) -> None:
    """Hold every marked test to the gate of its facility."""
    for marker, facility in _MARKED.items():
        if request.node.get_closest_marker(marker) is not None:
            require_whole(facility)


@pytest.fixture
def fds() -> Callable[[], frozenset[str]]:
    """Return a function that lists this process's descriptors."""
    return open_fds


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """Yield the open /dev/kvm."""
    require_whole(Facility.KVM)
    with Kvm.open() as device:
        yield device


@pytest.fixture
def protected_vm(kvm: Kvm) -> Iterator[Vm]:
    """Yield an empty virtual machine whose pages have attributes."""
    require_whole(Facility.PRIVATE_MEMORY)
    with kvm.create_vm(KVM_X86_SW_PROTECTED_VM) as machine:
        yield machine


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    """Yield an empty virtual machine."""
    with kvm.create_vm() as machine:
        yield machine
