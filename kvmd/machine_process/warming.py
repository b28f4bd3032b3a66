"""What a process that will be some machine imports before it knows which: none has to wait for it then."""

from __future__ import annotations

import gc
import importlib


def warm() -> None:
    """Import what Linux machines need beyond payloads, and leave the collector nothing to look at.

    It would write into every object: what is frozen stays shared with forks, and untouched.
    """
    importlib.import_module("kvmd.linux.kernel")
    importlib.import_module("kvmd.linux_devices")
    importlib.import_module("kvmd.linux_hardware")
    gc.collect()
    gc.freeze()
