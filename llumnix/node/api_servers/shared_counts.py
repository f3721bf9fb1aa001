"""What the API servers of a node have open, in memory that all their processes share.

Each writes a row of its own and reads the others', without a lock: a limit may be passed by what
two of them admit in the same moment.
"""

import mmap
import struct
from pathlib import Path

# Requests, tokens of their prompts, and whether it takes connections.
_ROW = struct.Struct("=qqq")
_LISTENS = struct.Struct("=q")


class CountsFile:
    """The rows of all API servers of a node."""

    def __init__(self, path: Path, servers: int) -> None:
        """Open the file, which is made if it is not there."""
        size = servers * _ROW.size
        with open(path, "a+b") as file:
            if file.seek(0, 2) < size:
                file.truncate(size)
            self._memory = mmap.mmap(file.fileno(), size)
        self._servers = servers

    def put(self, server: int, requests: int, tokens: int) -> None:
        """Write what a server has open."""
        struct.pack_into("=qq", self._memory, server * _ROW.size, requests, tokens)

    def listens(self, server: int, listens: bool) -> None:
        """Write whether a server takes connections."""
        _LISTENS.pack_into(self._memory, server * _ROW.size + 16, listens)

    def clear(self, server: int) -> None:
        """A server has ended."""
        self.put(server, 0, 0)
        self.listens(server, False)

    def row(self, server: int) -> tuple[int, int, bool]:
        """Requests and tokens that a server has open, and whether it takes connections."""
        requests, tokens, listens = _ROW.unpack_from(self._memory, server * _ROW.size)
        return requests, tokens, bool(listens)

    def of(self, server: int) -> "Row":
        """The counts as that server has them."""
        return Row(self, server, self._servers)


class Row:
    """One server's row, and the sum of the others."""

    def __init__(self, counts: CountsFile, server: int, servers: int) -> None:
        self._counts = counts
        self._server = server
        self._others = [other for other in range(servers) if other != server]

    def tell(self, requests: int, tokens: int) -> None:
        """This server has so many requests open, with prompts of so many tokens."""
        self._counts.put(self._server, requests, tokens)

    def others(self) -> tuple[int, int]:
        """What all the others have open together."""
        rows = [self._counts.row(other) for other in self._others]
        return sum(row[0] for row in rows), sum(row[1] for row in rows)

    def listens(self, well: bool) -> None:
        """Whether this server takes connections, and can serve them."""
        self._counts.listens(self._server, well)

    def is_ahead(self) -> bool:
        """Whether another server that takes connections has fewer requests open."""
        mine = self._counts.row(self._server)[0]
        rows = [self._counts.row(other) for other in self._others]
        return any(listens and requests < mine for requests, _, listens in rows)
