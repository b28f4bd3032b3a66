from __future__ import annotations

from kvmd.software.code_pages import EXECUTE, READ, WRITE, CodePages
from kvmd.software.page_walk import Access


def test_a_page_may_be_done_what_was_asked_for_and_no_more() -> None:
    pages = CodePages()
    assert pages.touch(1, Access.READ) == READ
    assert pages.touch(1, Access.WRITE) == READ | WRITE
    assert pages.touch(1, Access.READ) == READ | WRITE
    assert pages.touch(2, Access.FETCH) == READ | EXECUTE
    assert pages.mixed == set()


def test_a_page_that_is_written_and_executed_is_mixed_in_either_order() -> None:
    pages = CodePages()
    pages.touch(1, Access.WRITE)
    assert pages.touch(1, Access.FETCH) == READ | WRITE | EXECUTE
    pages.touch(2, Access.FETCH)
    assert pages.touch(2, Access.WRITE) == READ | WRITE | EXECUTE
    assert pages.mixed == {1, 2}


def test_code_that_goes_makes_a_new_generation_and_data_does_not() -> None:
    pages = CodePages()
    pages.touch(5, Access.FETCH)
    pages.touch(9, Access.WRITE)
    pages.forget(6, 20)
    assert pages.generation == 0
    pages.overwrite(5, 6)
    assert (pages.generation, pages.holds_code(0, 100)) == (1, True)
    pages.forget(0, 1 << 40)
    assert (pages.generation, pages.holds_code(0, 100)) == (2, False)
    assert pages.touch(5, Access.READ) == READ
