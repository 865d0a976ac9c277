"""Where everything of one server lies, below its data directory.

What lives only as long as the processes do (control page, metric files) is mapped by all of them and touched on their
main loops; on a busy disk such a touch can wait for seconds. So it lies in memory, behind the link ``volatile``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final, NamedTuple, TextIO

from server.tokens import SECRET_BYTES

MEMORY: Final = Path("/dev/shm")  # noqa: S108  # what is made there has a name nobody can foresee, and one reader


class OwnedError(Exception):
    """Another process serves this data directory.

    Attributes:
        owner: its pid, as it wrote it.
    """

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


class Files(NamedTuple):
    """The parts of a data directory."""

    root: Path

    @classmethod
    def below(cls, folder: str | Path) -> Files:
        """Return the parts of a data directory, by absolute paths."""
        return cls(Path(folder).resolve())

    @property
    def log(self) -> Path:
        """The log's environment."""
        return self.root / "log"

    @property
    def state(self) -> Path:
        """The state's environment; may be deleted while the server is down, and is rebuilt."""
        return self.root / "state"

    @property
    def registry(self) -> Path:
        """Catalogs and bundles by sha256."""
        return self.root / "registry"

    @property
    def learner(self) -> Path:
        """The learner's snapshots and published arrays."""
        return self.root / "registry" / "learner"

    @property
    def arrays(self) -> Path:
        """What the learner publishes for workers."""
        return self.learner / "arrays.binpb"

    @property
    def volatile(self) -> Path:
        """What ends with the processes: a link into memory, or a folder where there is no memory to link to."""
        return self.root / "volatile"

    @property
    def metrics(self) -> Path:
        """Metric files of the running processes."""
        return self.volatile / "metrics"

    @property
    def control(self) -> Path:
        """The control page."""
        return self.volatile / "control"

    @property
    def lock(self) -> Path:
        """Held by the one supervisor."""
        return self.root / "lock"

    @property
    def secret(self) -> Path:
        """The secret that signs decision ids."""
        return self.root / "keys" / "decision_id.key"

    @property
    def receipt_key(self) -> Path:
        """The private key that signs receipts of erasures."""
        return self.root / "keys" / "receipt.key"

    def create(self) -> None:
        """Make the folders, for this account alone, and the secrets that are missing."""
        for folder in (self.root, self.registry, self.learner, self.secret.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for secret in (self.secret, self.receipt_key):
            if not secret.exists():
                _make_secret(secret)

    def own(self) -> TextIO:
        """Become the only owner of the directory, for as long as the returned file is open.

        Raises:
            OwnedError: somebody else is.
        """
        lock = self.lock.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise OwnedError(owner) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock

    def create_volatile(self) -> None:
        """Make the volatile folder anew and name its metrics to this process and its children; by the owner alone.

        Before anything imports server.telemetry: the metrics library looks at its first import only.
        """
        self.remove_volatile()
        try:
            target = tempfile.mkdtemp(prefix=self._volatile_prefix, dir=MEMORY)
        except OSError:  # no such file system here, or not for us
            self.volatile.mkdir(mode=0o700)
        else:
            self.volatile.symlink_to(target)
        self.metrics.mkdir(mode=0o700)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.metrics)

    def remove_volatile(self) -> None:
        """Remove the volatile folder, also one that a killed owner left; by the owner alone, its roles ended."""
        if self.volatile.is_symlink():
            target = self.volatile.readlink()
            # Whatever else a link may lead to is not ours to remove: in a copy of the directory of a running server it
            # leads to what that one uses.
            if target.parent == MEMORY and target.name.startswith(self._volatile_prefix):
                shutil.rmtree(target, ignore_errors=True)
            self.volatile.unlink()
        elif self.volatile.exists():
            shutil.rmtree(self.volatile)

    @property
    def _volatile_prefix(self) -> str:
        return f"tsugi-{hashlib.blake2b(bytes(self.root), digest_size=8).hexdigest()}-"

    def read_secret(self) -> bytes:
        """Return the secret."""
        return self.secret.read_bytes()


def _make_secret(path: Path) -> None:
    """Write a new secret whole, under its name only when it is on disk, and never in the place of another."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(os.urandom(SECRET_BYTES))
        file.flush()
        os.fsync(file.fileno())
    with contextlib.suppress(FileExistsError):  # somebody else was faster
        os.link(unfinished, path)
    unfinished.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
