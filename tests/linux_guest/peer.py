"""The host's end of the guest's transfers by TCP: takes a file, or sends one, as often as it is asked."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from dataclasses import dataclass

from kvmd.closing import Closing
from tests.linux_guest.pattern import PIECE, pieces

SECONDS = 120.0
"""How long one read or write may take, on a guest that is emulated twice over."""

NO_DIGEST = bytes(32)


@dataclass(frozen=True)
class Transfer:
    """One connection that came to its end.

    Attributes:
        way: ``sent`` by the guest or ``taken``.
        size: bytes of the file.
        sha256: in hex; of zeros where no checksums are made.
        seconds: from the first byte to the last.
    """

    way: str
    size: int
    sha256: str
    seconds: float


class Peer(Closing):
    """Listens from the start; serves one connection after the other, in a thread of its own.

    Args:
        address: to listen at; it has to be there.
        size: of the file that is sent, in bytes.
        checksums: make them; else 32 zeros are sent instead, for speed.

    Attributes:
        port: the one that it listens at.
        transfers: all that came to an end; complete once ``close`` has returned.
        problem: why a connection was given up, or None.
    """

    def __init__(self, address: str, *, size: int, checksums: bool = True) -> None:
        self.transfers: list[Transfer] = []
        self.problem: OSError | None = None
        self._size = size
        self._checksums = checksums
        self._listening = socket.create_server((address, 0))
        self.port: int = self._listening.getsockname()[1]
        self._ending = False
        self._thread = threading.Thread(target=self._serve, name="peer")
        self._thread.start()

    def close(self) -> None:
        """Serve no more; a transfer under way is waited for."""
        if not self._ending:
            self._ending = True
            # Wakes accept(); closing alone would not.
            self._listening.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(SECONDS)
                try:
                    match connection.recv(1):
                        case b"u":
                            self.transfers.append(self._take(connection))
                        case b"d":
                            self.transfers.append(self._send(connection))
                        case _:
                            pass
                except OSError as error:
                    self.problem = error

    def _take(self, connection: socket.socket) -> Transfer:
        sha, size, start = hashlib.sha256(), 0, time.perf_counter()
        while data := connection.recv(1 << 18):
            size += len(data)
            if self._checksums:
                sha.update(data)
        seconds = time.perf_counter() - start
        digest = sha.digest() if self._checksums else NO_DIGEST
        connection.sendall(digest)
        return Transfer("sent", size, digest.hex(), seconds)

    def _send(self, connection: socket.socket) -> Transfer:
        sha, start = hashlib.sha256(), time.perf_counter()
        if self._checksums:
            for piece in pieces(self._size):
                sha.update(piece)
                connection.sendall(piece)
        else:
            many = bytes(16 * PIECE)
            for done in range(0, self._size, len(many)):
                connection.sendall(many[: self._size - done])
        digest = sha.digest() if self._checksums else NO_DIGEST
        connection.sendall(digest)
        connection.shutdown(socket.SHUT_WR)
        # Until the guest has closed, it has not all.
        while connection.recv(1):
            pass
        return Transfer("taken", self._size, digest.hex(), time.perf_counter() - start)
