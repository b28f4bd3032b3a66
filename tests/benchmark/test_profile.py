"""The table of a profile."""

import pytest

from kvmd.benchmark.measure import CannotMeasure, Options
from kvmd.benchmark.profile import measure, own_time

STACKS = """\
thread (1): MainThread;run (trio/_core/_run.py:9);ConversionService.run (kvmd/conversion_service.py:128);f (a.py:1) 30
thread (1): MainThread;run (trio/_core/_run.py:9);ConversionService.run (kvmd/conversion_service.py:130);f (a.py:7) 20
thread (1): MainThread;run (trio/_core/_run.py:9);ConversionService.run (kvmd/conversion_service.py:128) 10
thread (2): main;VcpuThread.main (kvmd/vcpu_tasks.py:47);Vcpu.run (kvmd/kvm/vcpu.py:1) 40
thread (1): MainThread;ConversionService.run (kvmd/conversion_service.py:9);RequestChannel.linger (kvmd/r.py:1) 70
thread (2): main;VcpuThread.main (kvmd/vcpu_tasks.py:47);ConversionService.request (kvmd/conversion_service.py:5) 60
thread (1): MainThread;import_module (importlib/__init__.py:126) 900
"""


def test_own_time_adds_up_lines_of_a_function_and_leaves_out_what_is_no_conversion() -> None:
    shares = own_time(STACKS.splitlines())
    assert list(shares.items()) == [
        (("service", "f (a.py)"), 0.5),
        (("vCPU", "Vcpu.run (kvmd/kvm/vcpu.py)"), 0.4),
        (("service", "ConversionService.run (kvmd/conversion_service.py)"), 0.1),
    ]


@pytest.mark.kvm
def test_without_its_profiler_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(CannotMeasure, match="py-spy is not here: pip install py-spy"):
        measure(Options())
