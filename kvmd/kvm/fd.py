"""A file descriptor with one owner."""

from __future__ import annotations

import os
import warnings

from kvmd.closing import Closing


class OwnedFd(Closing):
    """A file descriptor that is closed exactly once.

    Closing is idempotent. An object dropped without being closed closes its descriptor and warns with
    ResourceWarning: a leak of a VM's descriptor keeps all of its memory alive.

    Args:
        fd: the descriptor, not negative; the object owns it from now on.
        name: what it is, for messages.

    Attributes:
        number: the descriptor, -1 once it is closed: for calls that refuse that by themselves.
    """

    __slots__ = ("__weakref__", "_name", "number")

    def __init__(self, fd: int, name: str) -> None:
        # Set first: __del__ runs even when this method raises.
        self.number = -1
        self._name = name
        if fd < 0:
            raise ValueError(f"{fd} is no descriptor for {name}")
        self.number = fd

    @property
    def closed(self) -> bool:
        """Tell whether the descriptor is gone."""
        return self.number < 0

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            ValueError: it is closed.
        """
        if self.number < 0:
            raise ValueError(f"{self._name} is used after it was closed")
        return self.number

    def close(self) -> None:
        """Close the descriptor; harmless the second time."""
        # The number is forgotten before close(2), which frees it even when it fails (close(2), NOTES): a
        # second close would hit whoever got the number next.
        fd, self.number = self.number, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if self.number >= 0:
            warnings.warn(f"{self._name} was never closed", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self.number}"
        return f"<{type(self).__name__} {self._name}: {state}>"
