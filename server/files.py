"""Where everything of one server lies, below its data directory."""

from __future__ import annotations

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
            descriptor = os.open(self.secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())

    def prepare_metrics(self) -> None:
        """Empty the folder of metric files and name it to this process and its children.

        Before anything imports server.telemetry: the metrics library looks at its first import only.
        """
        self.metrics.mkdir(parents=True, exist_ok=True, mode=0o700)
        for file in self.metrics.glob("*.db"):
            file.unlink()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.metrics)

    def read_secret(self) -> bytes:
        """Return the secret."""
        return self.secret.read_bytes()
