"""What kvmd raises, by who can mend it.

::

    KvmdError
    ├── ConfigError       the operator's request cannot be meant: file, key and what would be right
    ├── ImageError        the guest image is not one that kvmd can start
    ├── HostError         this host lacks something: a device, a permission, a capability, memory
    │   └── MissingCapability
    ├── BackendError      the accelerator refused a change of a running machine
    │   ├── SlotsExhausted
    │   └── SwapFailed
    ├── MachineStateError an action that the machine's state does not allow
    ├── MachineExists     a machine of that name is there already
    ├── UnknownMachine    there is no machine of that name
    ├── MachineSilent     a machine's process does not answer
    ├── NoSuchDevice      the machine does not have what the action is about
    └── DeviceInUse       somebody else has it

Every message is one line that says what is wrong and how to mend it. A failed system call stays the
``__cause__`` of the error that names the operation.
"""

from __future__ import annotations


class KvmdError(Exception):
    """Base of all errors that kvmd raises on purpose."""


class ConfigError(KvmdError):
    """The operator's configuration or command line cannot be carried out as written."""


class ImageError(KvmdError):
    """The guest image is malformed, or does not fit the machine."""


class HostError(KvmdError):
    """The host lacks something that was asked for."""


class MissingCapability(HostError):
    """KVM is there but lacks a capability.

    Attributes:
        capability: its name in the KVM API, such as ``KVM_CAP_GUEST_MEMFD_FLAGS``.
    """

    def __init__(self, capability: str, message: str) -> None:
        super().__init__(message)
        self.capability = capability


class BackendError(KvmdError):
    """The accelerator refused a change of a running machine.

    Attributes:
        errno: the system call's error number, or 0 where there was none.
    """

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class SlotsExhausted(BackendError):
    """The machine has no memslot left, even after merging those that could be."""


class SwapFailed(BackendError):
    """The accelerator refused one of the steps that make the other view of some pages live.

    Attributes:
        made: how many of the steps were made before it.
    """

    def __init__(self, message: str, errno: int, made: int) -> None:
        super().__init__(message, errno)
        self.made = made


class MachineStateError(KvmdError):
    """The action needs another state.

    Attributes:
        action: what was to be done.
        needed: the states that the action works in.
        found: the state that the machine is in.
    """

    def __init__(self, action: str, *, needed: str, found: str) -> None:
        super().__init__(f"cannot {action}: needs a machine that is {needed}, this one is {found}")
        self.action = action
        self.needed = needed
        self.found = found


class MachineExists(KvmdError):
    """A machine of that name is there already."""


class UnknownMachine(KvmdError):
    """There is no machine of that name."""


class NoSuchDevice(KvmdError):
    """The machine does not have the device that the action is about."""


class DeviceInUse(KvmdError):
    """Somebody else has the device, which one has at a time."""


class MachineSilent(KvmdError):
    """A machine's process does not answer in time, though it has not ended."""
