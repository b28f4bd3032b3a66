"""What a daemon makes of a machine of an earlier one that is about to end."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import trio

from kvmd.fleet.recovery import recover
from kvmd.fleet.state_folder import StateFolder
from kvmd.machine_process.folder import MACHINE, MachineFile, MachineFolder, listen_in, start_ticks
from kvmd.machine_process.framing import Framed
from kvmd.machine_process.messages import PROTOCOL, REQUEST_LIMIT, Greeting, Info, Request
from tests.fleet.conftest import spec
from tests.fleet.fake_units import FakeUnits


async def test_a_machine_whose_guest_has_stopped_lives_as_long_as_its_process(tmp_path: Path) -> None:
    state = StateFolder(tmp_path)
    state.machines.mkdir()
    with MachineFolder(state.make("guest")) as folder:
        folder.write(MACHINE, MachineFile(spec(), 0, 1))
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listen_in(folder)))

        async def be_about_to_end() -> None:
            async with await listener.accept() as stream:
                framed = Framed(stream, msgspec.msgpack.Decoder(Request), REQUEST_LIMIT)
                ticks = start_ticks(os.getpid()) or 0
                await framed.send(Greeting(protocol=PROTOCOL, machine="guest", pid=os.getpid(), start_ticks=ticks))
                await framed.receive()
                await framed.send(Info(spec=spec(), state="stopped", started_ns=2, facts={}))

        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(be_about_to_end)
            (entry,) = await recover(state, FakeUnits(tmp_path))
        with entry.folder:
            # So its end is waited for, and recorded when it is there.
            assert not entry.ended
            assert (entry.info.state, entry.info.pid) == ("running", os.getpid())
            entry.close()
