"""The crowd is what the projector would have left."""

from __future__ import annotations

from server.catalog.compile import compile_catalog
from server.profiles import repository
from server.profiles.identity import identity_key
from server.storage.memory import MemoryStore
from server.storage.store import Table
from tests.benchmark import crowd, world
from tests.support.populating import Person, put
from tsugi.log.v1.state_pb2 import StoredNode
from tsugi.v1.identity_pb2 import Identity

LOG_ID = b"log-id-16-bytes."


def test_a_copied_person_is_in_every_table_what_the_products_own_code_writes() -> None:
    catalog = compile_catalog(world.catalog_message())
    store, plain = MemoryStore(), MemoryStore()
    crowd.fill(store, catalog, LOG_ID, crowd.N_TEMPLATES + 3)
    identity = Identity(namespace=world.NAMESPACE, value=world.account(crowd.N_TEMPLATES + 2))
    key = identity_key(identity)
    with store.read() as snapshot, plain.write() as txn:
        profile_key = repository.find(snapshot, [key])
        assert profile_key is not None
        template = Person(world.people(3)[2], {world.NAMESPACE: identity.value})
        put(txn, profile_key, template, catalog)
        for table, place in (
            (Table.PROFILES, profile_key),
            (Table.OWNERS, profile_key),
            (Table.IDENTITIES, key),
            (Table.PARTS, key),
            (Table.NODES, key),
        ):
            assert bytes(snapshot.get(table, place) or b"") == bytes(txn.get(table, place) or b"-"), table
        assert StoredNode.FromString(bytes(snapshot.get(Table.NODES, key) or b"")).identity == identity


def test_everybody_has_one_profile_of_their_own() -> None:
    store = MemoryStore()
    crowd.fill(store, compile_catalog(world.catalog_message()), LOG_ID, 2_000)
    with store.read() as snapshot:
        found = {repository.find(snapshot, [identity_key(Identity(namespace=world.NAMESPACE, value=world.account(i)))])
                 for i in range(2_000)}  # fmt: skip
        assert len(found - {None}) == 2_000
        assert sum(1 for _ in snapshot.scan(Table.PROFILES)) == 2_000
