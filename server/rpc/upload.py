"""How something large arrives: announced first, then in order, piece by piece, held in memory alone.

Handed the announcement and the chunks of one call, it gives the whole bytes or says what is wrong. Nothing touches a
disk before the bytes are whole and checked, so an abandoned upload leaves nothing behind; and only a few are held at
once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from server.errors import TsugiError, field_invalid, limit_exceeded
from server.rpc import validate
from tsugi.v1.error_reason_pb2 import ErrorReason

CHUNK_BYTES_MAX: Final = 65_536
UPLOADS_MAX: Final = 4  # at once, a worker and kind: they lie in memory


class Uploads:
    """Counts the uploads of one kind that a worker holds at once."""

    def __init__(self) -> None:
        self._held = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Hold one more while the block lasts.

        Raises:
            TsugiError: UPLOAD_BUSY: there are UPLOADS_MAX already.
        """
        if self._held >= UPLOADS_MAX:
            raise TsugiError(
                ErrorReason.ERROR_REASON_UPLOAD_BUSY,
                f"{UPLOADS_MAX} uploads are under way here; push again in some seconds",
                limit=UPLOADS_MAX,
            )
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1


class Upload:
    """One upload on its way; never holds more than was announced."""

    def __init__(self, sha256: str, size_bytes: int, size_bytes_max: int) -> None:
        """Begin an upload.

        Raises:
            TsugiError: FIELD_INVALID or LIMIT_EXCEEDED, naming the field of the header.
        """
        validate.revision(sha256, "header.sha256")
        if size_bytes == 0:
            raise field_invalid("header.size_bytes", "must be above 0")
        if size_bytes > size_bytes_max:
            raise limit_exceeded("header.size_bytes", size_bytes, size_bytes_max, "bytes")
        self._sha256, self._size_bytes = sha256, size_bytes
        self._chunks: list[bytes] = []
        self._received_bytes = 0
        self._hash = hashlib.sha256()  # chunk by chunk, so that the whole never stops the event loop

    def add(self, chunk: bytes) -> None:
        """Take the next chunk.

        Raises:
            TsugiError: FIELD_INVALID: it is empty. LIMIT_EXCEEDED: it is too large, or more comes than was announced.
        """
        if not chunk:
            raise field_invalid("chunk", f"1 to {CHUNK_BYTES_MAX} bytes are required, and the header comes first")
        if len(chunk) > CHUNK_BYTES_MAX:
            raise limit_exceeded("chunk", len(chunk), CHUNK_BYTES_MAX, "bytes")
        self._received_bytes += len(chunk)
        if self._received_bytes > self._size_bytes:
            raise limit_exceeded("chunk", self._received_bytes, self._size_bytes, "bytes, as header.size_bytes says")
        self._chunks.append(chunk)
        self._hash.update(chunk)

    def finish(self) -> bytes:
        """Return the whole bytes. Cost: one copy.

        Raises:
            TsugiError: UPLOAD_INCOMPLETE or UPLOAD_DIGEST_MISMATCH.
        """
        if self._received_bytes < self._size_bytes:
            raise TsugiError(
                ErrorReason.ERROR_REASON_UPLOAD_INCOMPLETE,
                f"the upload ended after {self._received_bytes} of {self._size_bytes} bytes; start again",
                received_bytes=self._received_bytes,
                size_bytes=self._size_bytes,
            )
        got = self._hash.hexdigest()
        if got != self._sha256:
            raise TsugiError(
                ErrorReason.ERROR_REASON_UPLOAD_DIGEST_MISMATCH,
                f"the bytes received have sha256 {got}, header.sha256 is {self._sha256}; start again",
                got=got,
                sha256=self._sha256,
            )
        return b"".join(self._chunks)
