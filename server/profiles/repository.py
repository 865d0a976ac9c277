"""Golden records in the state store: found by identity, read as columns, written whole.

A stored profile begins with what decisions read, as plain float64 columns encoded for one catalog's fact space, and
ends with a message that is parsed only when somebody asks for more. The columns carry a stamp of the layout they were
encoded for; where the catalog in force has another, the reader encodes afresh from the message.

Layout, little-endian: u32 CRC32C of the rest, u16 version, u16 number of facts, u64 LSN of the last change, 8s layout
stamp, float64 × facts, StoredProfile.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable
from typing import NamedTuple

import google_crc32c
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from server.catalog.catalog import Doubles, FactSpace
from server.storage.store import Snapshot, Table, Transaction
from tsugi.log.v1.state_pb2 import StoredContact, StoredProfile
from tsugi.v1 import profile_pb2
from tsugi.v1.identity_pb2 import Identity

PROFILE_KEY_BYTES = 16
IDENTITIES_MAX = 64
EVENTS_MAX = 64

_VERSION = 1
_HEADER = struct.Struct("<IHHQ8s")


class CorruptProfileError(Exception):
    """A stored profile is not what was written; it can be rebuilt from the log."""


class StoredRecord(NamedTuple):
    """One stored profile, its message still unparsed."""

    lsn: int
    layout: bytes
    facts: Doubles  # float64[n_profile] under that layout; a view, valid while the snapshot is open
    message: memoryview | bytes


def identity_key(identity: Identity) -> bytes:
    """Return the 16 bytes an identity is found by."""
    text = f"{identity.namespace}\0{identity.value}".encode()
    return hashlib.blake2b(text, digest_size=16, person=b"tsugi.identity").digest()


def new_profile_key(log_id: bytes, lsn: int) -> bytes:
    """Return the key of the profile that the record at lsn begins; the same at every rebuild."""
    return hashlib.blake2b(log_id + lsn.to_bytes(8, "big"), digest_size=16, person=b"tsugi.profile").digest()


def find(snapshot: Snapshot, identities: Iterable[Identity]) -> bytes | None:
    """Return the key of the profile the first known identity leads to. Cost: 2 µs an identity."""
    for identity in identities:
        found = snapshot.get(Table.IDENTITIES, identity_key(identity))
        if found is not None:
            return bytes(found)
    return None


def find_all(snapshot: Snapshot, identities: Iterable[Identity]) -> list[bytes]:
    """Return the distinct keys that identities lead to, in order."""
    keys = dict.fromkeys(
        bytes(found)
        for identity in identities
        if (found := snapshot.get(Table.IDENTITIES, identity_key(identity))) is not None
    )
    return list(keys)


def load(snapshot: Snapshot, profile_key: bytes) -> StoredRecord | None:
    """Read one profile, verified; views into the store.

    Raises:
        CorruptProfileError: checksum or version do not fit.
    """
    data = snapshot.get(Table.PROFILES, profile_key)
    if data is None:
        return None
    if len(data) < _HEADER.size:
        raise CorruptProfileError("profile record is cut short")
    crc, version, n_facts, lsn, layout = _HEADER.unpack_from(data)
    if version != _VERSION or google_crc32c.value(bytes(data[4:])) != crc:
        raise CorruptProfileError(f"profile record of version {version} fails its checksum")
    facts = np.frombuffer(data, np.float64, n_facts, _HEADER.size)
    return StoredRecord(lsn, layout, facts, data[_HEADER.size + 8 * n_facts :])


def parse(record: StoredRecord) -> StoredProfile:
    """Parse the message of a stored profile."""
    return StoredProfile.FromString(bytes(record.message))


def facts_under(record: StoredRecord, space: FactSpace) -> Doubles:
    """Return the profile's facts for a fact space, as stored or encoded afresh: float64[n_profile]."""
    return record.facts if record.layout == space.profile_layout else encode(parse(record), space)


def encode(profile: StoredProfile, space: FactSpace) -> Doubles:
    """Encode a profile's attributes for a fact space: float64[n_profile], NaN where unknown or ill-typed."""
    values = {attribute.name: attribute.attribute_value.value for attribute in profile.attributes}
    facts = np.full(space.n_profile, math.nan)
    for position, fact in enumerate(space.facts[space.profile_slice]):
        value = values.get(fact.name.removeprefix("profile."))
        if value is not None:
            facts[position] = fact.encode(value)
    return facts


def save(txn: Transaction, profile_key: bytes, profile: StoredProfile, space: FactSpace, lsn: int) -> None:
    """Write one profile whole and the links of its identities to it."""
    assert len(profile.identities) <= IDENTITIES_MAX, "the projector quarantines what would exceed it"
    facts = encode(profile, space)
    rest = b"".join(
        (
            _HEADER.pack(0, _VERSION, facts.size, lsn, space.profile_layout)[4:],
            facts.tobytes(),
            profile.SerializeToString(deterministic=True),
        )
    )
    txn.put(Table.PROFILES, profile_key, struct.pack("<I", google_crc32c.value(rest)) + rest)
    for identity in profile.identities:
        txn.put(Table.IDENTITIES, identity_key(identity), profile_key)


def count_contact(txn: Transaction, profile_key: bytes, action: str, time_us: int) -> None:
    """Add one contact of a person with an action."""
    key = profile_key + action.encode()
    stored = txn.get(Table.CONTACTS, key)
    contact = StoredContact.FromString(bytes(stored)) if stored is not None else StoredContact(action=action)
    contact.count += 1
    contact.last_contact_time_us = max(contact.last_contact_time_us, time_us)
    txn.put(Table.CONTACTS, key, contact.SerializeToString(deterministic=True))


def describe(snapshot: Snapshot, profile_key: bytes, record: StoredRecord) -> profile_pb2.Profile:
    """Build the public message of one profile."""
    stored = parse(record)
    contacts = [StoredContact.FromString(value) for _, value in snapshot.scan(Table.CONTACTS, profile_key)]
    return profile_pb2.Profile(
        profile_id=profile_key.hex(),
        identities=stored.identities,
        attributes={attribute.name: attribute.attribute_value for attribute in stored.attributes},
        events=reversed(stored.events),
        contacts=[
            profile_pb2.Contact(
                action=contact.action,
                count=contact.count,
                last_contact_time=timestamp(contact.last_contact_time_us),
            )
            for contact in contacts
        ],
        lsn=record.lsn,
    )


def timestamp(instant_us: int) -> Timestamp:
    """Return microseconds since the epoch as a Timestamp."""
    return Timestamp(seconds=instant_us // 1_000_000, nanos=instant_us % 1_000_000 * 1_000)
