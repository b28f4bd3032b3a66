"""The daemons that machines over HTTP are measured with."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvmd.benchmark import post


@pytest.mark.kvm
@pytest.mark.parametrize("run", [post.daemon, post.daemon_with_pool])
def test_a_daemon_prints_nothing_among_the_results(
    run: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with run(tmp_path) as path:
        assert path.is_socket()
    assert capfd.readouterr().out == ""
