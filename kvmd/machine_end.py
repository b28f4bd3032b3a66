"""What the log says of a machine's end."""

from __future__ import annotations

from dataclasses import asdict

import structlog

from kvmd.conversion.messages import Outcome
from kvmd.runnable import Runnable
from kvmd.stop import Stop, StopReason


def log_end(machine: Runnable, stop: Stop, log: structlog.typing.FilteringBoundLogger) -> None:
    """Log what was odd, and as the last line why the machine ended and what it did."""
    log = log.bind(machine=machine.spec.name)
    if machine.ports.unclaimed:
        ports = [hex(port) for port in machine.ports.unclaimed_ports]
        log.warning("ports-unclaimed", accesses=machine.ports.unclaimed, first_ports=ports)
    if machine.mmio.unclaimed:
        addresses = [hex(gpa) for gpa in machine.mmio.unclaimed_addresses]
        log.warning("addresses-unclaimed", accesses=machine.mmio.unclaimed, first_gpas=addresses)
    if machine.held_back_us:
        seconds = round(machine.held_back_us / 1e6, 3)
        log.warning(
            "conversions-held-back", vcpu_seconds=seconds, by=f"conversion.rate = {machine.spec.conversion.rate}"
        )
    quiet = stop.reason in {
        StopReason.GUEST_EXIT,
        StopReason.GUEST_POWER_OFF,
        StopReason.GUEST_REBOOT,
        StopReason.OPERATOR,
    }
    if stop.registers is not None and not quiet:
        values = {name: hex(value) for name, value in asdict(stop.registers).items()}
        log.error("registers", vcpu=stop.vcpu, **values)
    snapshot = machine.stats.snapshot()
    (log.info if quiet else log.error)(
        "machine-stopped",
        reason=stop.reason.value,
        message=stop.message,
        status=int(stop.status),
        **({} if stop.vcpu is None else {"vcpu": stop.vcpu}),
        **{outcome.value: snapshot.requests(outcome=outcome) for outcome in Outcome},
    )
