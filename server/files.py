"""Where everything of one server lies, below its data directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from server.tokens import SECRET_BYTES


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
    def metrics(self) -> Path:
        """Metric files of the running processes."""
        return self.root / "metrics"

    @property
    def control(self) -> Path:
        """The control page."""
        return self.root / "control"

    @property
    def lock(self) -> Path:
        """Held by the one supervisor."""
        return self.root / "lock"

    @property
    def secret(self) -> Path:
        """The secret that signs decision ids."""
        return self.root / "keys" / "decision_id.key"

    def create(self) -> None:
        """Make the folders, for this account alone, and the secret when there is none."""
        for folder in (self.root, self.registry, self.learner, self.secret.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.secret.exists():
            _make_secret(self.secret)

    def prepare_metrics(self) -> None:
        """Make the folder of metric files and name it to this process and its children.

        Before anything imports server.telemetry: the metrics library looks at its first import only.
        """
        self.metrics.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.metrics)

    def sweep_metrics(self) -> None:
        """Remove the metric files of processes that are gone; by the one supervisor, before it starts another."""
        for file in self.metrics.glob("*.db"):
            if not file.stem.endswith(f"_{os.getpid()}"):
                file.unlink()

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
