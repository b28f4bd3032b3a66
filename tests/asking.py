"""Asks the conversion service as a vCPU's thread does."""

from __future__ import annotations

from kvmd.bell import Bell
from kvmd.conversion.messages import Answer, ConversionRequest
from kvmd.conversion_service import ConversionService


def ask(service: ConversionService, request: ConversionRequest) -> Answer:
    """Ask with a bell of one's own, and block the calling thread until answered."""
    with Bell() as bell:
        return service.request(request, bell)
