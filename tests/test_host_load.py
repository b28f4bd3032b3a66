"""What the host says of its load."""

from __future__ import annotations

import os

import pytest

from kvmd.host_load import runnable_tasks


def test_somebody_runs_here_and_it_is_the_caller() -> None:
    assert runnable_tasks() >= 1


@pytest.mark.parametrize(
    ("text", "tasks"),
    [(b"1.00 2.00 3.00 17/512 4711\n", 17), (b"1.00 2.00 3.00 x/512 1\n", 1), (b"1.00 2.00\n", 1), (b"", 1)],
)
def test_what_it_says_is_taken_and_nonsense_is_not(text: bytes, tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "read", lambda *_: text)
    assert runnable_tasks() == tasks


def test_a_host_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(*_: object) -> int:
        raise FileNotFoundError

    monkeypatch.setattr(os, "open", no_proc)
    assert runnable_tasks() == 1
