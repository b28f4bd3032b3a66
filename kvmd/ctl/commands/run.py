"""``kvmctl run``: a machine from its beginning to its end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from kvmd.ctl.answers import exit_status, how_it_ended
from kvmd.ctl.client import Client, Connection, machine_target
from kvmd.ctl.commands.stop import SHUTDOWN_SECONDS, WAIT_LIMIT_SECONDS
from kvmd.ctl.errors import CtlError
from kvmd.ctl.following import Patience
from kvmd.ctl.output_stream import follow_output
from kvmd.ctl.request import create, machine_description, wanted
from kvmd.ctl.screen import Screen
from kvmd.ctl.session import Session, ctl_command
from kvmd.ctl.statuses import Status
from kvmd.ctl.text import shown
from kvmd.ctl.waiting import wait_for

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STOP = f"stop?timeout={WAIT_LIMIT_SECONDS}"


@ctl_command(
    "run",
    statuses=(
        "...  the guest's own, or why it ended without one:",
        f"{Status.GUEST_FAULT:d}  the guest cannot go on (triple fault, ...)",
        f"{Status.EXHAUSTED:d}  the machine ran out of something bounded, such as memslots",
        f"{Status.KILLED:d}  killed",
    ),
)
@machine_description
@click.option("-d", "--detach", is_flag=True, help="Print its name once it runs, and leave it alone.")
@click.option("--keep", is_flag=True, help="Keep it when it has ended, for logs and inspect; kvmctl rm forgets it.")
def run_command(session: Session, *, target: str, detach: bool, keep: bool, **overrides: object) -> int:
    """Create a machine, start it and follow its console; when it has ended it is forgotten.

    Ctrl-C asks it to stop, a second one ends it at once, and a third one leaves it alone. A Linux guest's power button
    is pressed before any of that; it is stopped when it has not shut down within 30 s. The exit status is the guest's.
    """
    client = session.client(watch_output=True)
    asked = wanted(target, overrides)
    machine = create(client, asked)
    has_button = "kernel" in asked.document
    guest = _Guest(session, client, str(machine["name"]), keep=keep or detach, has_button=has_button)
    if detach:
        session.answer(guest.start(), shown(guest.name))
        return Status.DONE
    return guest.run()


class _Guest:
    """One machine that this command answers for.

    Args:
        session: says how it goes.
        client: asks the daemon.
        name: the machine's.
        keep: whether it is kept when it has ended.
        has_button: whether it has a power button.
    """

    def __init__(self, session: Session, client: Client, name: str, *, keep: bool, has_button: bool) -> None:
        self.name = name
        self._session = session
        self._client = client
        self._keep = keep
        # What each signal does, in turn.
        self._escalations = ["shut-down", "stop", "kill"] if has_button else ["stop", "kill"]
        self._asked: list[Connection] = []
        self._started = False

    def start(self) -> object:
        """Let it run; where it cannot, or a signal comes first, nothing is left behind."""
        try:
            answer: object = self._client.post(machine_target(self.name, "start"))
            self._started = True
        except BaseException:
            self._forget(at_once=True)
            raise
        return answer

    def run(self) -> int:
        """Run it to its end, and return its exit status."""
        client, name = self._client, self.name
        patience = Patience(self._session.note)
        screen = Screen(self._session, name)
        with self._signals():
            self.start()
            with self._ended_where_given_up():
                target = machine_target(name, "console", "output")
                for data in follow_output(client, target, patience, dropped=self._dropped):
                    screen.show(data)
                screen.end()
                machine, _ = wait_for(client, name, ("stopped",), patience)
        return self._over(machine)

    def _dropped(self, count: int) -> None:
        self._session.note(f"{count:,} bytes of {shown(self.name)}'s output came too fast to be kept")

    def _over(self, machine: dict[str, Any]) -> int:
        if not self._keep:
            self._forget(at_once=False)
        end = machine.get("end")
        if self._session.wants_json:
            self._session.line({"event": "end", **machine}, "")
        elif not (isinstance(end, dict) and end.get("reason") == "guest-exit"):
            self._session.note(f"{shown(self.name)}: {how_it_ended(machine)}")
        return exit_status(machine)

    def _forget(self, *, at_once: bool) -> None:
        """Remove it, as far as that can be done.

        Args:
            at_once: whether to end it first where it runs.
        """
        if at_once:
            with suppress(CtlError):
                self._client.post(machine_target(self.name, "kill"))
        with suppress(CtlError):
            self._client.delete(machine_target(self.name))

    @contextmanager
    def _ended_where_given_up(self) -> Iterator[None]:
        """End the guest where this command ends before it, such as where nobody reads what it prints."""
        try:
            yield
        except CtlError:
            # It is not known what became of it.
            self._session.note(f"{shown(self.name)} may go on: see kvmctl ps, and end it with kvmctl stop")
            raise
        except BrokenPipeError:
            self._forget(at_once=True)
            raise

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let the operator's signals stop the guest, and not this command."""
        # One that was ignored when kvmctl started (nohup) stays ignored.
        previous = {number: signal.getsignal(number) for number in _SIGNALS}
        heeded = [number for number, handler in previous.items() if handler is not signal.SIG_IGN]
        for number in heeded:
            signal.signal(number, self._signalled)
        before = signal.signal(signal.SIGALRM, self._too_late)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            for number in heeded:
                signal.signal(number, previous[number])
            for connection in self._asked:
                connection.hang_up()

    def _signalled(self, _number: int, _frame: object) -> None:
        if not self._started:
            raise KeyboardInterrupt
        match self._escalations.pop(0) if self._escalations else "leave":
            case "shut-down":
                self._session.note(f"shutting {shown(self.name)} down; once more to stop it at once")
                self._ask("press the power button of", "power-button")
                signal.setitimer(signal.ITIMER_REAL, SHUTDOWN_SECONDS)
            case "stop":
                self._session.note(f"stopping {shown(self.name)}; once more to end it at once")
                self._ask("stop", _STOP)
            case "kill":
                self._session.note(f"ending {shown(self.name)}; once more to leave it alone")
                self._ask("kill", "kill")
            case _:
                raise KeyboardInterrupt

    def _too_late(self, _number: int, _frame: object) -> None:
        """Stop a guest whose power button was pressed, unless the operator did."""
        if self._escalations[:1] == ["stop"]:
            del self._escalations[0]
            self._session.note(f"{shown(self.name)} did not shut down within {SHUTDOWN_SECONDS:g} s, and is stopped")
            self._ask("stop", _STOP)

    def _ask(self, action: str, target: str) -> None:
        """Ask the daemon from a signal's handler, which does not wait: the machine's end is seen elsewhere."""
        try:
            self._asked.append(self._client.begin("POST", f"{machine_target(self.name)}/{target}"))
        except CtlError as error:
            self._session.note(f"cannot {action} {shown(self.name)}: {error}")
