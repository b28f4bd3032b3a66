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
    """

    __slots__ = ("__weakref__", "_fd", "_name")

    def __init__(self, fd: int, name: str) -> None:
        # Set first: __del__ runs even when this method raises.
        self._fd = -1
        self._name = name
        if fd < 0:
            raise ValueError(f"{fd} is no descriptor for {name}")
        self._fd = fd

    @property
    def closed(self) -> bool:
        """Tell whether the descriptor is gone."""
        return self._fd < 0

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            ValueError: it is closed.
        """
        if self._fd < 0:
            raise ValueError(f"{self._name} is used after it was closed")
        return self._fd

    def close(self) -> None:
        """Close the descriptor; harmless the second time."""
        # The number is forgotten before close(2), which frees it even when it fails (close(2), NOTES): a
        # second close would hit whoever got the number next.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"{self._name} was never closed", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"fd {self._fd}"
        return f"<{type(self).__name__} {self._name}: {state}>"
