"""What is said of a machine's file that describes none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from kvmd.errors import ConfigError
from kvmd.spec.machine import spec_of

HERE = Path("/etc/kvmd")
"""Where the file is."""


def complaint(document: Mapping[str, object]) -> str:
    """Return it, which is one line."""
    with pytest.raises(ConfigError) as caught:
        spec_of(document, base=HERE)
    message = str(caught.value)
    assert "\n" not in message
    return message
