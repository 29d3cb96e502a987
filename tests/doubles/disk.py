"""The disk as SQLite sees it: says which files were synced, and fails when told to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import apsw


class Disk(apsw.VFS):
    """synced: the names of files synced so far. reads: how many there were. failure: what a write to a log raises."""

    def __init__(self) -> None:
        self.synced: list[str] = []
        self.reads = 0
        self.failure: type[apsw.Error] | None = None
        super().__init__("disk double", "unix", makedefault=True)

    def xOpen(self, name: Any, flags: Any) -> apsw.VFSFile:  # noqa: N802 SQLite's own name, as those below
        return DiskFile(self, name, flags)


class DiskFile(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: Any) -> None:
        self._disk = disk
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else name or ""
        super().__init__("unix", name, flags)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self._disk.reads += 1
        return super().xRead(amount, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self._disk.synced.append(self._name)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self._disk.failure and self._name.endswith("-wal"):
            raise self._disk.failure
        super().xWrite(data, offset)


@contextmanager
def disk_double() -> Iterator[Disk]:
    """Until the block ends, files that are opened lie on such a disk."""
    disk = Disk()
    try:
        yield disk
    finally:
        disk.unregister()
        apsw.set_default_vfs("unix")
