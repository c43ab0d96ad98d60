"""Reading an LMDB file without the library: bounds are checked, so a damaged file cannot end the process.

LMDB maps its file and trusts the offsets in it: one that was cut off, or was made to do harm, gives a signal there. The
format (version 1 of its data, `mdb.c` of OpenLDAP): pages of equal size, the first two hold the meta data, of which
the one with the larger transaction number counts. A page begins with its number (8 bytes), padding (2), flags (2), and the
ends of its list of nodes (2 + 2), or the number of pages of an overflow. Nodes have the lower and upper half of the
data's size (2 + 2), flags (2), the size of the key (2), the key and the data; in a branch the first three are the number
of the child page. All of it little-endian.
"""

from __future__ import annotations

import bisect
import struct

from dsno_cluster.trajectories.exchange.samples import BadPart

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER = 16
_BRANCH, _LEAF, _OVERFLOW, _META = 0x01, 0x02, 0x04, 0x08
_BIG, _SUB, _DUPLICATES = (
    0x01,
    0x02,
    0x04,
)  # flags of a node: data on overflow pages, a database, several values
_NO_PAGE = 2**64 - 1
_DEEPEST = 32
_META_FORMAT = "<IIQQ"  # magic, version, address, size of the map
_DATABASE_FORMAT = "<IHHQQQQQ"  # pad, flags, depth, branch, leaf and overflow pages, entries, root


class Tree:
    """The main database of an LMDB file, by key.

    Raises BadPart, which begins with `where`, for data that is no LMDB file or is cut off.
    """

    def __init__(self, data: memoryview, where: str) -> None:
        self.data, self.where = data, where
        metas = [meta for meta in (self._meta(0), self._second_meta()) if meta is not None]
        if not metas:
            raise BadPart(f"{where}: is not an LMDB file")
        _, self.page_size, self.root, self.entries, last_page = max(metas)
        if (last_page + 1) * self.page_size > len(data):
            raise BadPart(
                f"{where}: is cut off: it has {len(data):,} bytes of {(last_page + 1) * self.page_size:,}; copy it again"
            )

    def get(self, key: bytes) -> memoryview | None:
        """The value of a key, or None. Raises BadPart for a damaged tree."""
        if self.root == _NO_PAGE:
            return None
        number = self.root
        try:
            for _ in range(_DEEPEST):
                page = self._page(number)
                flags, nodes = self._nodes(page)
                at = self._search(page, nodes, key)
                if flags & _LEAF:
                    node = page[nodes[at] :] if at >= 0 and self._key(page, nodes[at]) == key else None
                    return None if node is None else self._value(node)
                number = _child(page, nodes[max(at, 0)])
        except (struct.error, IndexError) as error:
            raise self._damaged() from error
        raise self._damaged()

    def _damaged(self) -> BadPart:
        return BadPart(f"{self.where}: is damaged: a page of the LMDB file leads nowhere")

    def _second_meta(self) -> tuple[int, int, int, int, int] | None:
        for size in (4096, 8192, 16384, 32768, 65536, 2048, 1024, 512):
            if (meta := self._meta(size)) is not None and meta[1] == size:
                return meta
        return None

    def _meta(self, at: int) -> tuple[int, int, int, int, int] | None:
        """(transaction, page size, root, entries, last page) of the meta page at an offset, or None."""
        databases = at + _HEADER + struct.calcsize(_META_FORMAT)
        size = struct.calcsize(_DATABASE_FORMAT)
        try:
            (flags,) = struct.unpack_from("<H", self.data, at + 10)
            magic, version, _, _ = struct.unpack_from(_META_FORMAT, self.data, at + _HEADER)
            free = struct.unpack_from(_DATABASE_FORMAT, self.data, databases)
            main = struct.unpack_from(_DATABASE_FORMAT, self.data, databases + size)
            last_page, transaction = struct.unpack_from("<QQ", self.data, databases + 2 * size)
        except struct.error:
            return None
        page_size = free[0]
        sound = magic == _MAGIC and version == _VERSION and flags & _META and 512 <= page_size <= 65536
        if not sound or page_size & (page_size - 1) or main[1] & _DUPLICATES:
            return None
        return transaction, page_size, main[7], main[6], last_page

    def _page(self, number: int) -> memoryview:
        begin = number * self.page_size
        if number < 2 or begin + self.page_size > len(self.data):
            raise self._damaged()
        return self.data[begin : begin + self.page_size]

    def _nodes(self, page: memoryview) -> tuple[int, tuple[int, ...]]:
        """The flags of a page and the offsets of its nodes."""
        flags, lower = struct.unpack_from("<HH", page, 10)
        count = (lower - _HEADER) // 2
        if not flags & (_BRANCH | _LEAF) or not 0 < count <= len(page) // 2:
            raise self._damaged()
        return flags, struct.unpack_from(f"<{count}H", page, _HEADER)

    def _key(self, page: memoryview, node: int) -> bytes:
        (size,) = struct.unpack_from("<H", page, node + 6)
        if node + 8 + size > len(page):
            raise self._damaged()
        return bytes(page[node + 8 : node + 8 + size])

    def _search(self, page: memoryview, nodes: tuple[int, ...], key: bytes) -> int:
        """The last node whose key is not above `key`; -1 if there is none. A branch's first key is empty, the lowest."""
        return bisect.bisect_right(nodes, key, key=lambda node: self._key(page, node)) - 1

    def _value(self, node: memoryview) -> memoryview:
        low, high, flags, key_size = struct.unpack_from("<HHHH", node)
        size, begin = low | high << 16, 8 + key_size
        if flags & (_SUB | _DUPLICATES):
            raise BadPart(f"{self.where}: holds a database within the database; only plain values are read")
        if not flags & _BIG:
            if begin + size > len(node):
                raise self._damaged()
            return node[begin : begin + size]
        (number,) = struct.unpack_from("<Q", node, begin)
        page = self._page(number)
        (page_flags,) = struct.unpack_from("<H", page, 10)
        first = number * self.page_size + _HEADER
        if not page_flags & _OVERFLOW or first + size > len(self.data):
            raise self._damaged()
        return self.data[first : first + size]


def _child(page: memoryview, node: int) -> int:
    low, high, highest = struct.unpack_from("<HHH", page, node)
    return int(low | high << 16 | highest << 32)
