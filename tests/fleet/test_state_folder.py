"""The state folder where the host lacks something."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmd.fleet.state_folder import StateFolder


def test_a_folder_that_cannot_be_opened_leaves_its_name_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFolder(tmp_path)
    state.machines.mkdir()
    real: Callable[..., int] = os.open

    def full(path: os.PathLike[str], flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path, flags)

    with monkeypatch.context() as patch:
        patch.setattr("kvmd.fleet.state_folder.os.open", full)
        with pytest.raises(OSError, match="Too many open files"):
            state.make("guest")
    assert os.open is real
    os.close(state.make("guest"))
