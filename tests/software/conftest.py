"""The tiny guest of tests/hv on the software CPU alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gate import Facility, require_whole
from tests.hv.conftest import Bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Yield 1 MiB of memory, and what starts vCPUs on it."""
    require_whole(Facility.SOFTWARE)
    found = Bench("software")
    try:
        found.open()
        yield found
    finally:
        found.close()
