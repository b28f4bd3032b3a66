"""``python -m tests.api.write_openapi``: write the API's document to docs/openapi.json."""

from __future__ import annotations

import json
from pathlib import Path

from kvmd.api.app import make_fastapi
from kvmd.api.services import Services
from tests.api.serving import HOST
from tests.fleet.fakes import FakeFleet

COMMITTED = Path(__file__).parent.parent.parent / "docs" / "openapi.json"


def document() -> str:
    """Return the document as it is committed."""
    services = Services(fleet=FakeFleet(), host=HOST)
    return json.dumps(make_fastapi(services).openapi(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    COMMITTED.write_text(document(), encoding="utf-8")
