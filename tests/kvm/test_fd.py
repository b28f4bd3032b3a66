from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmd.kvm.fd import OwnedFd


def new() -> OwnedFd:
    return OwnedFd(os.open(os.devnull, os.O_RDONLY), "nothing")


def test_close_is_idempotent_and_frees_the_number_once() -> None:
    owned = new()
    number = owned.fileno()
    owned.close()
    assert owned.closed
    # The number belongs to somebody else now; a second close must not take it away from them.
    other = os.open(os.devnull, os.O_RDONLY)
    try:
        assert other == number
        owned.close()
        os.fstat(other)
    finally:
        os.close(other)


def test_use_after_close_names_the_descriptor() -> None:
    owned = new()
    owned.close()
    with pytest.raises(ValueError, match="nothing is used after it was closed"):
        owned.fileno()


def test_leaving_the_context_closes() -> None:
    with new() as owned:
        owned.fileno()
    assert owned.closed
    assert repr(owned) == "<OwnedFd nothing: closed>"


def test_repr_of_an_open_one_tells_the_number() -> None:
    with new() as owned:
        assert repr(owned) == f"<OwnedFd nothing: fd {owned.fileno()}>"


def test_a_leak_warns_and_is_closed(fds: Callable[[], frozenset[str]], recwarn: pytest.WarningsRecorder) -> None:
    before = fds()
    owned = new()
    del owned
    assert str(recwarn.pop(ResourceWarning).message) == "nothing was never closed"
    assert fds() == before


def test_a_negative_descriptor_is_refused() -> None:
    with pytest.raises(ValueError, match="-1 is no descriptor for nothing"):
        OwnedFd(-1, "nothing")


def test_a_failing_close_is_not_tried_again(tmp_path: Path) -> None:
    number = os.open(tmp_path, os.O_RDONLY)
    owned = OwnedFd(number, "stolen")
    os.close(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        owned.close()
    assert owned.closed
    owned.close()
