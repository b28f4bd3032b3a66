"""What conversions and a machine's start cost, by the size of blocks and of memory.

Memory starts as blocks of bounded size. The first conversion in each has to cut it, at a cost that grows with its
size; the start has to make all of them, at a cost that grows with their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from kvmd.benchmark.measure import Options, Ratio, Report, Series, take_turns_together
from kvmd.benchmark.runs import Load, on_memslots, run_kvmd, timed_open
from kvmd.protection import emulated
from kvmd.units import GIB, KIB, MIB, format_size

_BLOCKS = (512 * KIB, 1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB)
_USUAL = 2 * MIB
_MEMORIES = (64 * MIB, 1 * GIB, 4 * GIB)


def measure(options: Options) -> Report:
    """Measure block sizes in little and much memory."""
    report = Report("blocks", "start and first conversion by block size and memory")
    for memory in _MEMORIES:
        _measure_blocks(report, memory, options)
    report.notes += [
        f"a block grows with memory, so that there are never more than {emulated.MOST_BLOCKS}",
        "`start` is Machine.open; `first` the time within the very first conversion, which cuts a block",
    ]
    return report


def _measure_blocks(report: Report, memory: int, options: Options) -> None:
    load = on_memslots(Load(rounds=2, memory=memory))

    def with_blocks(block: int) -> Sequence[float]:
        with _block_bytes(block):
            return _start_ms(load), run_kvmd(load).us_first

    columns = take_turns_together(
        {_label(block): partial(with_blocks, block) for block in _BLOCKS},
        rounds=options.rounds(10 if memory < GIB else 6),
        units=("ms", "us"),
    )
    for column, what in enumerate(("start", "first")):
        for block in _BLOCKS:
            if block != _USUAL:
                subject, beside = columns[_label(block)][column], columns[_label(_USUAL)][column]
                where = f"{format_size(memory)}, {what}"
                report.ratios.append(Ratio(_named(subject, f"{where}, {subject.label}"), beside))


def _start_ms(load: Load) -> float:
    seconds, machine = timed_open(load.spec())
    machine.close()
    return seconds * 1000


@contextmanager
def _block_bytes(block: int) -> Iterator[None]:
    usual = emulated.BLOCK_BYTES
    emulated.BLOCK_BYTES = block
    try:
        yield
    finally:
        emulated.BLOCK_BYTES = usual


def _label(block: int) -> str:
    return f"blocks of {format_size(block)}"


def _named(series: Series, label: str) -> Series:
    return replace(series, label=label)
