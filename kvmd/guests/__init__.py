"""The guests that kvmd brings along: small programs that exercise conversions and check what they see.

Their sources are in ``src`` (``make -C kvmd/guests/src`` rebuilds them), the programs in ``elf``; the ABI
that they are written to is in ``docs/payload-abi.md``. Each ends with status 0 where all was as the ABI says,
1 where it was not (and says on the console what), and 2 where this machine cannot run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_ELF_FOLDER = Path(__file__).parent / "elf"


@dataclass(frozen=True, slots=True)
class Guest:
    """One guest program.

    Attributes:
        name: what the command line calls it.
        description: one line.
        arguments: the meaning of each of its arguments, in order, with the default in parentheses.
    """

    name: str
    description: str
    arguments: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Where the ELF file is."""
        return _ELF_FOLDER / f"{self.name}.elf"


GUESTS = {
    guest.name: guest
    for guest in (
        Guest("hello", "print a greeting with the number of vCPUs and the memory size"),
        Guest(
            "echo", "print what is typed; some bytes do more: q ends it, s and p convert a page, c converts for ever"
        ),
        Guest(
            "pingpong",
            "each vCPU walks its own pages, touching the shared and then the private view of each",
            ("pages of each vCPU (16)", "rounds (8)"),
        ),
        Guest(
            "contend",
            "all vCPUs fight over the same pages; no private byte may show in a shared view",
            ("pages (4)", "rounds of each vCPU (64)"),
        ),
        Guest(
            "explicit",
            "explicit conversions of ranges, good and bad, and what each must answer",
            ("how to ask: 0 port 0xC2, 1 VMCALL, 2 VMMCALL (0)",),
        ),
        Guest(
            "large",
            "one vCPU converts a large range there and back, the others one page each meanwhile",
            ("MiB of the large range (32)", "rounds (4)"),
        ),
        Guest(
            "conformance",
            "the conversions of the kernel's own private_mem_conversions_test, checked byte by byte",
            ("1 where a program on the host answers its questions (0)", "rounds (1)"),
        ),
        Guest(
            "hostile",
            "one misbehaviour, for tests of the machine",
            ("which one, as docs/payload-abi.md lists them", "what that one makes of it"),
        ),
    )
}
"""All guests, by name."""


HOSTILE = {
    1: "execute ud2",
    2: "jump to an address outside memory",
    3: "read an unmapped virtual address",
    4: "read and write outside memory and unknown ports: all ones, ignored; ends with 0",
    5: "spin for ever on every vCPU",
    6: "copy a page from its shared to its private view in one instruction: no progress is possible",
    7: "end with the reserved status 121",
    8: "touch the shared view of pinned memory",
    9: "rep insb into a view that is not live, with argument 1 on a machine where that is lost; ends with 0",
    10: "execute hlt: a fault at CPL 3",
    11: "send argument 1 bytes (65536) to the console without polling; ends with 0",
    12: "execute code in the shared view, with argument 1 also in a view that is not live; ends with 0",
    13: "make every other page shared by touching it, to the end of memory",
    14: "the same by explicit requests, up to the first EAGAIN; prints how many; ends with 0",
    15: "access that straddles a live and a not live page; ends with 0",
    16: "all vCPUs count argument 1 times (10000) in one shared page; ends with 0",
}
"""What argument 0 of the hostile guest selects. Those that end with 0 are well behaved; the machine must bear
them. The others it must stop, with a diagnosis."""
