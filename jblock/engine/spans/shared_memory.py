"""Rows in memory that two processes of one machine share: one writes, one reads, and what tells the reader is
a message elsewhere."""

import mmap
import os
import tempfile

import numpy as np

_MOST_BYTES = 2**24
_HEAD_BYTES = 64
_ALIGNED = 64


class Ring:
    """Memory in which places follow one another, round and round. A place is free again once what lies there
    was read, and all before it: how far the reader is stands at the beginning, in a word that only it
    writes."""

    def __init__(self, file: int):
        """The memory of a file; the file is closed.

        Raises:
          ValueError: it is no such file.
          OSError: it cannot be mapped.
        """
        try:
            size = os.fstat(file).st_size
            if size <= _HEAD_BYTES:
                raise ValueError(f"shared memory of {size} bytes")
            memory = mmap.mmap(file, size)
        finally:
            os.close(file)
        self._read = np.frombuffer(memory, np.uint64, 1)
        self._bytes = np.frombuffer(memory, np.uint8, offset=_HEAD_BYTES)
        self._written = 0

    def put(self, body: memoryview) -> int | None:
        """Copies bytes into the next place; its position, counted from the beginning of time, or None where
        there is no room now."""
        most, size = len(self._bytes), len(body)
        left = most - self._written % most
        position = self._written + (left if size > left else 0)
        end = position + _rounded(size)
        read = int(self._read[0])
        if size > most or (read != self._written and end - read > most):
            return None
        at = position % most
        self._bytes[at : at + size] = np.frombuffer(body, np.uint8)
        self._written = end
        return position

    def take(self, position: int, into: memoryview) -> None:
        """Copies what lies at a position, which is free then.

        Raises:
          ValueError: nothing of that size can lie there.
        """
        at, size = position % len(self._bytes), len(into)
        if at + size > len(self._bytes):
            raise ValueError(f"{size} bytes at {at} of {len(self._bytes)} that are shared")
        np.frombuffer(into, np.uint8)[:] = self._bytes[at : at + size]
        self._read[0] = position + _rounded(size)


def new_file(most: int = _MOST_BYTES) -> int:
    """A file of memory for a ring, which no folder has."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("jblock-rows")
    else:
        with tempfile.TemporaryFile() as unnamed:
            file = os.dup(unnamed.fileno())
    os.ftruncate(file, _HEAD_BYTES + most)
    return file


def _rounded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
