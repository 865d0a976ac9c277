"""A log, the state projected from it, and the one who projects, all in memory and ready to be asked."""

from __future__ import annotations

from server.catalog.catalog import Catalog
from server.outcomes.projector import Projector
from server.profiles import describe, repository
from server.profiles.identity import identity_key
from server.registry.blobs import BlobAbsentError
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.store import Table
from tests.support.catalogs import compiled
from tests.support.histories import History, decision_key
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_pb2 import Profile

CATALOG = compiled()
# Other attributes, in another order, one of another type: everything stored is encoded afresh under it.
OTHER = compiled(
    profileAttributes=[
        {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["gold", "silver"]},
        {"name": "age", "type": "ATTRIBUTE_TYPE_TEXT"},
        {"name": "shoe_size", "type": "ATTRIBUTE_TYPE_NUMBER"},
    ]
)
CATALOGS = {catalog.sha256: catalog for catalog in (CATALOG, OTHER)}
ANNA, BERTA = {"customer_number": "1"}, {"customer_number": "2"}
ONE, TWO = decision_key(1), decision_key(2)


def load_catalog(sha256: bytes) -> Catalog:
    if sha256 not in CATALOGS:
        raise BlobAbsentError(sha256, "is not here")
    return CATALOGS[sha256]


class World:
    """A log, the state projected from it, and the one who projects."""

    def __init__(self) -> None:
        self.log = MemoryLog(b"log-id-16-bytes.")
        self.store = MemoryStore()
        self.history = History(self.log)
        self.projector = Projector(self.log, self.store, load_catalog)
        self.catalog = CATALOG  # under which profiles are described

    def project(self) -> None:
        while self.projector.step():
            pass

    def profile(self, profile_key: bytes) -> Profile | None:
        with self.store.read() as snapshot:
            stored = repository.load(snapshot, profile_key)
            if stored is None:
                return None
            return describe.describe(snapshot, profile_key, stored, self.catalog, self.history.now_us)

    def key_of(self, namespace: str, value: str) -> bytes | None:
        with self.store.read() as snapshot:
            return repository.find(snapshot, [identity_key(Identity(namespace=namespace, value=value))])

    def contacts(self, profile_key: bytes) -> dict[str, tuple[int, int]]:
        profile = self.profile(profile_key)
        assert profile is not None
        return {each.action: (each.count, each.last_contact_time.ToMicroseconds()) for each in profile.contacts}

    def quarantined(self) -> dict[int, str]:
        return {int.from_bytes(key, "big"): value.decode() for key, value in self._rows(Table.QUARANTINE)}

    def parked(self) -> list[int]:
        return [int.from_bytes(key[16:], "big") for key, _ in self._rows(Table.PARKED)]

    def _rows(self, table: Table) -> list[tuple[bytes, bytes]]:
        with self.store.read() as snapshot:
            return list(snapshot.scan(table))
