"""What the API's benchmarks put in place of a fleet has to suffice for all of the API's routes."""

from __future__ import annotations

from kvmd.api.access import AccessRules
from kvmd.api.app import make_app
from kvmd.api.models import HostFacts
from kvmd.api.services import Services
from kvmd.benchmark.api import Source


def test_the_api_can_be_made_over_it() -> None:
    services = Services(fleet=Source(), host=HostFacts(usable=True))  # type: ignore[arg-type]  # as much as is measured
    assert make_app(services, AccessRules(own_uid=0)) is not None
