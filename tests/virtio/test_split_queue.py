from __future__ import annotations

import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmd.memory.accessor import Inaccessible
from kvmd.virtio.abi import DESC_INDIRECT, DESC_NEXT, DESC_WRITE
from kvmd.virtio.split_queue import QueueError, SplitQueue
from tests.virtio.driver import SIZE, Driver, DriverQueue, Memory, guest_memory


class Pair:
    """Both sides of a queue."""

    def __init__(self, memory: Memory, size: int = 8, *, indirect_limit: int = 8, event_idx: bool = False) -> None:
        self.memory = memory
        self.driver = DriverQueue(cast("Driver", SimpleNamespace(memory=memory)), 0, size)
        addresses = (self.driver.table, self.driver.avail, self.driver.used)
        self.ring = SplitQueue(memory.accessor, size, addresses, indirect_limit=indirect_limit, event_idx=event_idx)
        self.ring.attach()


@pytest.fixture
def memory() -> Iterator[Memory]:
    with guest_memory() as memory:
        yield memory


@pytest.fixture
def pair(memory: Memory) -> Pair:
    return Pair(memory)


def test_an_empty_queue_has_nothing(pair: Pair) -> None:
    assert pair.ring.pop() is None
    assert pair.ring.publish() is False


@pytest.mark.parametrize("indirect", [False, True])
def test_a_chain_is_what_the_driver_described(pair: Pair, *, indirect: bool) -> None:
    pair.driver.offer([(0x1000, 1), (0x2000, 2)], [(0x3000, 3)], indirect=indirect)
    chain = pair.ring.pop()
    assert chain is not None
    assert (chain.readable, chain.writable) == ([(0x1000, 1), (0x2000, 2)], [(0x3000, 3)])
    assert pair.ring.outstanding == 1
    pair.ring.push(chain, 3)
    assert pair.driver.device_used_index == 0, "not yet published"
    pair.ring.publish()
    assert pair.driver.take_used() == [(chain.head, 3)]
    assert pair.ring.pop() is None


def test_direct_descriptors_may_lead_to_an_indirect_table(pair: Pair) -> None:
    table = pair.memory.allocate(32)
    pair.memory.write(table, struct.pack("<QIHHQIHH", 0x2000, 2, DESC_NEXT, 1, 0x3000, 3, DESC_WRITE, 0))
    pair.driver.describe(0, 0x1000, 1, DESC_NEXT, 1)
    # The write flag of such a descriptor means nothing (clause 2.7.5.3.2).
    pair.driver.describe(1, table, 32, DESC_INDIRECT | DESC_WRITE)
    pair.driver.offer_head(0)
    chain = pair.ring.pop()
    assert chain is not None
    assert (chain.readable, chain.writable) == ([(0x1000, 1), (0x2000, 2)], [(0x3000, 3)])


def test_indices_wrap(pair: Pair) -> None:
    for turn in range(70000):
        pair.driver.offer([(0x1000, 1)])
        chain = pair.ring.pop()
        assert chain is not None
        pair.ring.push(chain, turn)
        assert pair.ring.publish()
        assert pair.driver.take_used() == [(chain.head, turn)]
    assert pair.ring.outstanding == 0


def test_a_full_queue_given_back_in_another_order(pair: Pair) -> None:
    heads = [pair.driver.offer([(0x1000, 1)]) for _ in range(8)]
    chains = list(iter(pair.ring.pop, None))
    assert [chain.head for chain in chains] == heads
    for chain in reversed(chains):
        pair.ring.push(chain, 0)
    pair.ring.publish()
    assert [head for head, _ in pair.driver.take_used()] == heads[::-1]


def test_what_is_put_back_comes_again(pair: Pair) -> None:
    heads = [pair.driver.offer([(0x1000, 1)]) for _ in range(3)]
    for head in heads:
        for _ in range(2):
            chain = pair.ring.pop()
            assert chain is not None
            assert chain.head == head
            pair.ring.unpop()
        pair.ring.pop()
    assert pair.ring.pop() is None


# -- interrupts and notifications ------------------------------------------------------------------------------------


def give_back(pair: Pair, count: int = 1) -> bool:
    for _ in range(count):
        pair.driver.offer([(0x1000, 1)])
        chain = pair.ring.pop()
        assert chain is not None
        pair.ring.push(chain, 0)
    return pair.ring.publish()


def test_without_event_indices_flags_say_who_wants_to_hear(pair: Pair) -> None:
    assert give_back(pair)
    pair.driver.take_used()
    pair.memory.write(pair.driver.avail, b"\1\0")
    assert not give_back(pair)
    pair.driver.take_used()
    pair.ring.disarm()
    assert pair.driver.used_flags == 1
    assert pair.ring.arm() is False
    assert pair.driver.used_flags == 0
    pair.driver.offer([(0x1000, 1)])
    assert pair.ring.arm() is True


def test_event_indices_save_interrupts(memory: Memory) -> None:
    pair = Pair(memory, event_idx=True)
    pair.driver.set_used_event(2)
    assert not give_back(pair)
    assert not give_back(pair)
    assert give_back(pair), "the index passes 2"
    assert not give_back(pair)
    assert pair.ring.publish() is False
    pair.driver.take_used()
    pair.driver.set_used_event(5)
    assert give_back(pair, 4), "it passes 5 within a batch: one interrupt"


def test_event_indices_save_notifications(memory: Memory) -> None:
    pair = Pair(memory, event_idx=True)
    assert pair.ring.arm() is False
    assert pair.driver.avail_event == 0
    give_back(pair, 3)
    pair.ring.disarm()
    assert pair.driver.used_flags == 0, "a flag that means nothing then"
    assert pair.driver.avail_event == 0
    pair.ring.arm()
    assert pair.driver.avail_event == 3


# -- what no driver should do ----------------------------------------------------------------------------------------


def take(pair: Pair, count: int) -> None:
    """Let the device take that many buffers of a byte, and give none back."""
    for index in range(count):
        pair.driver.describe(index, 0x1000, 1)
        pair.driver.offer_head(index)
        assert pair.ring.pop() is not None


def break_rule(pair: Pair, what: str) -> None:  # noqa: C901, PLR0912 - one case a rule
    queue = pair.driver
    match what:
        case "head":
            queue.offer_head(8)
        case "next":
            queue.describe(0, 0x1000, 1, DESC_NEXT, 8)
            queue.offer_head(0)
        case "loop":
            queue.describe(0, 0x1000, 1, DESC_NEXT, 1)
            queue.describe(1, 0x1000, 1, DESC_NEXT, 0)
            queue.offer_head(0)
        case "zero":
            queue.describe(0, 0x1000, 0)
            queue.offer_head(0)
        case "order":
            queue.describe(0, 0x1000, 1, DESC_WRITE | DESC_NEXT, 1)
            queue.describe(1, 0x1000, 1)
            queue.offer_head(0)
        case "4 GiB":
            for index in range(3):
                queue.describe(index, 0x1000, 0xFFFFFFFF, DESC_NEXT if index < 2 else 0, index + 1)
            queue.offer_head(0)
        case "jump":
            queue.set_avail_index(9)
        case "backwards":
            queue.set_avail_index(-1)
        case "backwards under what is in use":
            take(pair, 3)
            queue.set_avail_index(2)
        case "more than all":
            take(pair, 8)
            queue.offer_head(0)
        case "indirect and next":
            queue.describe(0, 0x1000, 16, DESC_INDIRECT | DESC_NEXT, 1)
            queue.offer_head(0)
        case "indirect in indirect":
            table = pair.memory.allocate(16)
            pair.memory.write(table, struct.pack("<QIHH", table, 16, DESC_INDIRECT, 0))
            queue.describe(0, table, 16, DESC_INDIRECT)
            queue.offer_head(0)
        case "indirect loop":
            table = pair.memory.allocate(16)
            pair.memory.write(table, struct.pack("<QIHH", table, 16, DESC_NEXT, 0))
            queue.describe(0, table, 16, DESC_INDIRECT)
            queue.offer_head(0)
        case _:
            queue.describe(0, 0x1000, int(what.removeprefix("indirect ")), DESC_INDIRECT)
            queue.offer_head(0)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("head", "descriptor 8 of a table of 8"),
        ("next", "descriptor 8 of a table of 8"),
        ("loop", "the chain at descriptor 0 is longer than its table: it has a loop"),
        ("zero", "descriptor 0 of the chain at 0 has no bytes"),
        ("order", "the chain at descriptor 0 has a readable part after a writable one"),
        ("4 GiB", "the chain at descriptor 0 describes 12884901885 bytes, more than 4 GiB"),
        ("jump", "the available index jumped to 9: 9 new buffers and 0 in use are more than 8"),
        ("backwards", "the available index jumped to 65535: 65535 new buffers and 0 in use are more than 8"),
        (
            "backwards under what is in use",
            "the available index jumped to 2: 65535 new buffers and 3 in use are more than 8",
        ),
        ("more than all", "the available index jumped to 9: 1 new buffers and 8 in use are more than 8"),
        ("indirect and next", "descriptor 0 is both indirect and followed by another"),
        ("indirect in indirect", "an indirect table within an indirect table"),
        ("indirect loop", "the chain at descriptor 0 is longer than its table: it has a loop"),
        ("indirect 0", "an indirect table of 0 bytes: it must be 1 to 8 times 16"),
        ("indirect 17", "an indirect table of 17 bytes: it must be 1 to 8 times 16"),
        ("indirect 144", "an indirect table of 144 bytes: it must be 1 to 8 times 16"),
    ],
)
def test_a_broken_rule_is_named(pair: Pair, what: str, message: str) -> None:
    break_rule(pair, what)
    with pytest.raises(QueueError) as caught:
        pair.ring.pop()
    assert str(caught.value) == message


def test_indirect_tables_only_where_they_were_negotiated(memory: Memory) -> None:
    pair = Pair(memory, indirect_limit=0)
    break_rule(pair, "indirect 16")
    with pytest.raises(QueueError, match="an indirect descriptor, which was not negotiated"):
        pair.ring.pop()


def test_an_indirect_table_outside_memory(pair: Pair) -> None:
    pair.driver.describe(0, SIZE - 16, 32, DESC_INDIRECT)
    pair.driver.offer_head(0)
    with pytest.raises(Inaccessible, match="are not within memory"):
        pair.ring.pop()


def test_a_written_buffer_is_told_to_who_has_to_know(pair: Pair) -> None:
    told: list[str] = []
    pair.memory.shared.on_write = lambda range_: told.append(str(range_))
    pair.driver.offer([(0x1000, 1)], [(0x3FFF, 2), (0x8000, 1)])
    chain = pair.ring.pop()
    assert chain is not None
    pair.ring.push(chain, 3)
    assert told == ["[0x3000, 0x5000)", "[0x8000, 0x9000)"]


GPAS = st.one_of(st.sampled_from([0, 0x1000, SIZE - 1, SIZE, 1 << 63, (1 << 64) - 1]), st.integers(0, SIZE))
DESCRIPTORS = st.tuples(
    GPAS, st.sampled_from([0, 1, 15, 16, 32, 64, 4096, 0xFFFFFFFF]), st.integers(0, 7), st.integers(0, 9)
)


@given(
    table=st.lists(DESCRIPTORS, min_size=8, max_size=8),
    inner=st.lists(DESCRIPTORS, min_size=4, max_size=4),
    heads=st.lists(st.integers(0, 9), max_size=12),
    index=st.one_of(st.none(), st.integers(0, 0xFFFF)),
    indirect_limit=st.sampled_from([0, 8]),
)
def test_any_table_gives_chains_or_a_named_reason(
    table: list[tuple[int, int, int, int]],
    inner: list[tuple[int, int, int, int]],
    heads: list[int],
    index: int | None,
    indirect_limit: int,
) -> None:
    with guest_memory() as memory:
        pair = Pair(memory, indirect_limit=indirect_limit)
        for at, (gpa, size, flags, following) in enumerate(table):
            pair.driver.describe(at, gpa, size, flags, following)
        memory.write(0x1000, b"".join(struct.pack("<QIHH", *descriptor) for descriptor in inner))
        for head in heads:
            pair.driver.offer_head(head)
        if index is not None:
            pair.driver.set_avail_index(index)
        taken = 0
        try:
            while (chain := pair.ring.pop()) is not None:
                taken += 1
                assert len(chain.readable) + len(chain.writable) <= 16
                assert all(size > 0 for _, size in (*chain.readable, *chain.writable))
        except (QueueError, Inaccessible):
            pass  # the driver's own fault; anything else is ours
        assert taken <= 8
