"""Where bundles, catalog revisions and learner snapshots lie: immutable bytes, each in a file named by its sha256.

Handed bytes, it answers with their digest once they are durable; handed a digest, it answers with exactly those bytes
or says why not. It knows nothing of what the bytes mean, and which of them are in use is the log's business. Several
processes may share one folder: a name only ever stands for one content, so writers cannot disagree.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

DIGEST_BYTES = 32

_UNFINISHED = ".unfinished"


class BlobError(Exception):
    """A blob cannot be had.

    Attributes:
        digest: the sha256 that was asked for.
    """

    def __init__(self, digest: bytes, what: str) -> None:
        super().__init__(f"blob {digest.hex()} {what}")
        self.digest = digest


class BlobAbsentError(BlobError):
    """No blob has this digest."""


class BlobAlteredError(BlobError):
    """The file with this name does not hold the bytes that were put: its content has another digest."""


class Blobs:
    """The blobs of one folder, which is made when absent."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            _sync_folder(folder.parent)
        self._folder = folder

    def put(self, data: bytes) -> bytes:
        """Make data durable and return its digest; the same data again changes nothing.

        A reader sees the whole blob or none, whenever the writer is killed. An altered file of that name is replaced.

        Raises:
            OSError: the volume is full or refuses; nothing may rely on the blob.
            BlobAlteredError: the volume gave back other bytes than were written; no blob was made.

        Cost: two fsyncs, one write and one read of data.
        """
        digest = hashlib.sha256(data).digest()
        if not self._is_whole(digest):
            self._write(digest, data)
        # Also where the file was there already: its writer may have been killed between the rename and this.
        _sync_folder(self._folder)
        return digest

    def get(self, digest: bytes) -> bytes:
        """Return the bytes with this digest, verified.

        Raises:
            BlobAbsentError: there are none.
            BlobAlteredError: the file's content has another digest.

        Cost: one read and one SHA-256, about 1 ms a megabyte.
        """
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError as error:
            raise BlobAbsentError(digest, "is not here") from error
        if hashlib.sha256(data).digest() != digest:
            raise BlobAlteredError(digest, "was altered on disk")
        return data

    def has(self, digest: bytes) -> bool:
        """Say whether there is a file for this digest; only get verifies it."""
        return self._path(digest).is_file()

    def sweep(self) -> int:
        """Remove what interrupted writers left and return how many files that were.

        To be called while no other process writes: by the supervisor, before it starts one that does.
        """
        leftovers = list(self._folder.glob(f"*{_UNFINISHED}"))
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        return len(leftovers)

    def _path(self, digest: bytes) -> Path:
        assert len(digest) == DIGEST_BYTES, "a blob is named by a sha256"
        return self._folder / digest.hex()

    def _is_whole(self, digest: bytes) -> bool:
        try:
            self.get(digest)
        except BlobError:
            return False
        return True

    def _write(self, digest: bytes, data: bytes) -> None:
        path = self._path(digest)
        unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{_UNFINISHED}")
        try:
            with unfinished.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if hashlib.sha256(unfinished.read_bytes()).digest() != digest:
                raise BlobAlteredError(digest, "did not read back as written")
            unfinished.replace(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
