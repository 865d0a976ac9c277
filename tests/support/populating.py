"""People put straight into a state, as the projector would have put them after one record of theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from server.catalog.catalog import Catalog
from server.profiles import golden, repository
from server.profiles.identity import identity_key
from server.profiles.series import SeriesSet
from server.storage.store import Table, Transaction
from tsugi.log.v1.state_pb2 import StoredClaim, StoredConsent, StoredContact, StoredHistory, StoredNode, StoredPart
from tsugi.requests import PyValue, to_value
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_pb2 import Consent


class Person(NamedTuple):
    """Somebody, in plain values."""

    attributes: Mapping[str, PyValue]
    identities: Mapping[str, str]
    consents: Sequence[Consent] = ()
    contacts: Sequence[StoredContact] = ()
    histories: Sequence[StoredHistory] = ()  # by goal, then action


def put(txn: Transaction, profile_key: bytes, person: Person, catalog: Catalog, lsn: int = 1, now_us: int = 0) -> None:
    """Write one person, all recorded under their first identity; without one, under the profile's own key."""
    named = [Identity(namespace=namespace, value=value) for namespace, value in person.identities.items()]
    keys = [identity_key(identity) for identity in named] or [profile_key]
    claims = [
        StoredClaim(attribute=name, value=to_value(value), source="crm", lsn=lsn, count=1)
        for name, value in sorted(person.attributes.items())
    ]
    series = SeriesSet.empty(len(catalog.profiles.series))
    consents = [StoredConsent(consent=each, source="crm", lsn=lsn) for each in person.consents]
    part = StoredPart(
        claims=claims,
        consents=consents,
        lsn=lsn,
        series=series.to_bytes(),
        series_layout=catalog.profiles.series_layout,
        histories=person.histories,
    )
    txn.put(Table.PARTS, keys[0], part.SerializeToString(deterministic=True))
    txn.put(Table.OWNERS, profile_key, keys[0])
    for position, (key, identity) in enumerate(zip(keys, named, strict=False)):
        node = StoredNode(
            identity=identity,
            first_lsn=lsn,
            position=position,
            profile_key=profile_key,
            own_profile_key=profile_key if position == 0 else key,
        )
        txn.put(Table.NODES, key, node.SerializeToString(deterministic=True))
        txn.put(Table.IDENTITIES, key, profile_key)
    empty = SeriesSet.empty(len(catalog.profiles.series))
    content = [(keys[0], part, series), *((key, StoredPart(), empty) for key in keys[1:])]
    for contact in person.contacts:
        txn.put(Table.CONTACTS, keys[0] + contact.action.encode(), contact.SerializeToString(deterministic=True))
    folded = golden.fold(keys[0], content, person.contacts, catalog.profiles, now_us)
    repository.save(txn, profile_key, folded, catalog, lsn, now_us)
