"""Which pages hold code that some vCPU may have translated: whoever changes one has to have translations dropped.

Each vCPU has an emulator, and each emulator keeps translations of its own. It notices what its own vCPU writes over
them, but neither what another vCPU writes nor what comes from outside. So pages are let be written or executed one by
one, in ``touch``, and a page that is both makes the translations of all others void.
"""

from __future__ import annotations

from kvmd.software.page_walk import Access

READ, WRITE, EXECUTE = 1, 2, 4
"""What an emulator may do with a page without asking again: Unicorn's UC_PROT_READ, UC_PROT_WRITE, UC_PROT_EXEC."""


class CodePages:
    """The pages of one machine that were written, executed, or both; called by one thread at a time.

    A page is the number of a page in guest-physical addresses, C-bit included: the views are different memory.

    Attributes:
        generation: grows whenever translations have to be dropped by every vCPU.
        mixed: pages that were both written and executed: while there are any, a vCPU that enters after another has to
            drop its translations, since the other may have written over them.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.mixed: set[int] = set()
        self._written: set[int] = set()
        self._executed: set[int] = set()

    def touch(self, page: int, access: int) -> int:
        """Note an access and return what the vCPU may do with the page until it asks again."""
        if access == Access.FETCH:
            self._executed.add(page)
        elif access == Access.WRITE:
            self._written.add(page)
        allowed = READ
        if page in self._written:
            allowed |= WRITE
        if page in self._executed:
            allowed |= EXECUTE
            if allowed & WRITE:
                self.mixed.add(page)
        return allowed

    def holds_code(self, first: int, end: int) -> bool:
        """Tell whether a page of ``[first, end)`` was executed."""
        return bool(within(self._executed, first, end))

    def overwrite(self, first: int, end: int) -> None:
        """Note that the pages ``[first, end)`` were written from outside; vCPUs may do with them what they might."""
        if self.holds_code(first, end):
            self.generation += 1

    def forget(self, first: int, end: int) -> None:
        """Note that the pages ``[first, end)`` are empty now, and that every vCPU will ask for them anew."""
        self.overwrite(first, end)
        for pages in (self._written, self._executed, self.mixed):
            pages.difference_update(within(pages, first, end))


def within(pages: set[int], first: int, end: int) -> set[int]:
    """Return the pages in ``[first, end)``, looking at the fewer of the two."""
    if end - first < len(pages):
        return {page for page in range(first, end) if page in pages}
    return {page for page in pages if first <= page < end}
