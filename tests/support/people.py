"""A catalog in which everything about profiles occurs, and what anybody could see of the people in a state."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from server.catalog.catalog import Catalog
from server.outcomes.projector import Projector
from server.profiles import describe, golden, repository
from server.profiles.identity import identity_key
from server.storage.log import Log
from server.storage.memory import MemoryLog, MemoryStore
from server.storage.store import Snapshot, Store, Table
from tests.support.catalogs import compiled
from tests.support.histories import START_US, History
from tsugi.log.v1.state_pb2 import StoredNode
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_pb2 import Profile
from tsugi.v1.profile_service_pb2 import SourceRecord

LOG_ID = b"log-id-16-bytes."


def people_catalog(**parts: Any) -> Catalog:
    """Compile a catalog with every link rule, survivorship, windows, segments, a journey and matching."""
    whole: dict[str, Any] = {
        "identityNamespaces": [
            {"name": "customer_number", "valuesPerProfileMax": 2},
            {"name": "email", "meaning": "MEANING_EMAIL", "sharedMax": 3},
            {"name": "browser_id", "linkRule": "LINK_RULE_SHARED_DEVICE"},
            {"name": "family_account", "linkRule": "LINK_RULE_HOUSEHOLD"},
            {"name": "order_number", "linkRule": "LINK_RULE_NEVER"},
        ],
        "sources": [
            {"name": "crm", "owner": "sales", "party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH", "trust": 80},
            {"name": "shop", "party": "PARTY_FIRST", "delivery": "DELIVERY_STREAM", "channel": "web", "trust": 40},
            {"name": "bought", "party": "PARTY_THIRD", "delivery": "DELIVERY_BATCH", "trust": 10,
             "attributes": ["age", "phone"]},
        ],
        "consentPurposes": [{"name": "marketing"}, {"name": "service"}],
        "profileAttributes": [
            {"name": "age", "type": "ATTRIBUTE_TYPE_NUMBER", "survivorship": "SURVIVORSHIP_MOST_TRUSTED"},
            {"name": "tier", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": ["silver", "gold"]},
            {"name": "nickname", "type": "ATTRIBUTE_TYPE_TEXT", "survivorship": "SURVIVORSHIP_LONGEST"},
            {"name": "city", "type": "ATTRIBUTE_TYPE_TEXT", "survivorship": "SURVIVORSHIP_MOST_FREQUENT",
             "meaning": "MEANING_CITY"},
            {"name": "spend", "type": "ATTRIBUTE_TYPE_MONEY", "survivorship": "SURVIVORSHIP_MAXIMUM"},
            {"name": "tags", "type": "ATTRIBUTE_TYPE_SET", "allowedValues": ["a", "b", "c"],
             "survivorship": "SURVIVORSHIP_KEEP_ALL"},
            {"name": "mood", "type": "ATTRIBUTE_TYPE_TEXT", "timeToLive": "3600s"},
            {"name": "phone", "type": "ATTRIBUTE_TYPE_TEXT", "meaning": "MEANING_PHONE", "personalData": True},
        ],
        "eventTypes": [
            {"name": "view"},
            {"name": "purchase", "properties": [
                {"name": "total", "type": "ATTRIBUTE_TYPE_NUMBER"},
                {"name": "item", "type": "ATTRIBUTE_TYPE_TEXT"},
            ]},
            {"name": "complaint", "properties": [{"name": "ticket", "type": "ATTRIBUTE_TYPE_TEXT"}]},
            {"name": "solved", "properties": [{"name": "ticket", "type": "ATTRIBUTE_TYPE_TEXT"}]},
        ],
        "windows": [
            {"name": "purchases_hour", "kind": "WINDOW_KIND_COUNT", "eventType": "purchase", "span": "3600s"},
            {"name": "spent_day", "kind": "WINDOW_KIND_SUM", "eventType": "purchase", "property": "total",
             "span": "86400s"},
            {"name": "items_day", "kind": "WINDOW_KIND_DISTINCT", "eventType": "purchase", "property": "item",
             "span": "86400s"},
            {"name": "views_visit", "kind": "WINDOW_KIND_COUNT", "eventType": "view", "session": True},
            {"name": "large_day", "kind": "WINDOW_KIND_COUNT", "eventType": "purchase",
             "filter": "event.total >= 50.0", "span": "86400s"},
            {"name": "open_complaints", "kind": "WINDOW_KIND_OPEN", "eventType": "complaint", "property": "ticket",
             "closingEventType": "solved", "span": "86400s"},
        ],
        "recencyFrequencyMonetary": [{"name": "rfm", "eventType": "purchase", "property": "total"}],
        "segments": [
            {"name": "spender", "expression": "profile.spent_day > 100.0"},
            {"name": "adult", "expression": "profile.age >= 18.0"},
            {"name": "just_bought", "expression": "profile.rfm_recency < 600.0"},
        ],
        "journey": {
            "stages": [{"name": name} for name in ("awareness", "acquisition", "retention")],
            "transitions": [
                {"fromStages": ["awareness"], "eventType": "purchase", "toStage": "acquisition"},
                {"fromStages": ["acquisition"], "eventType": "purchase", "toStage": "retention"},
                {"eventType": "complaint", "toStage": "awareness"},
                {"fromStages": ["awareness"], "outcomeType": "order", "toStage": "acquisition"},
            ],
        },
        "channels": [{"name": "web"}, {"name": "call"}],
    }  # fmt: skip
    return compiled(**(whole | parts))


CATALOG = people_catalog()


class View(NamedTuple):
    """One person as anybody could see them; nothing of it depends on log positions."""

    identities: frozenset[tuple[str, str]]
    attributes: tuple[tuple[str, str], ...]
    other_claims: tuple[tuple[str, str, str, int], ...]
    windows: tuple[tuple[str, str], ...]
    segments: frozenset[str]
    stage: str
    consents: tuple[str, ...]
    contacts: tuple[tuple[str, int], ...]
    touchpoints: tuple[str, ...]


class People:
    """A log, the state projected from it, and questions about the people in it."""

    def __init__(self, catalog: Catalog = CATALOG, *catalogs: Catalog, log: Log | None = None) -> None:
        self.catalog = catalog
        self.log = log if log is not None else MemoryLog(LOG_ID)
        self.store: Store = MemoryStore()
        self.history = History(self.log)
        self._catalogs = {each.sha256: each for each in (catalog, *catalogs)}
        self.projector = Projector(self.log, self.store, self._catalogs.__getitem__)
        self.history.put_in_force(catalog)

    def say(self, *records: SourceRecord) -> int:
        """Record what sources say; returns the last LSN."""
        return max(self.history.say(record) for record in records)

    def project(self, now_us: int | None = None) -> None:
        """Project all there is; with an instant, let log time come to it first."""
        if now_us is not None:
            self.history.now_us = now_us
            self.history.tick()
        while self.projector.step():
            pass

    def key_of(self, namespace: str, value: str) -> bytes | None:
        with self.store.read() as snapshot:
            return repository.find(snapshot, [identity_key(Identity(namespace=namespace, value=value))])

    def profile(self, namespace: str, value: str, now_us: int | None = None) -> Profile:
        """Return the golden record that an identity leads to."""
        key = self.key_of(namespace, value)
        assert key is not None, "nobody has this identity"
        with self.store.read() as snapshot:
            stored = repository.load(snapshot, key)
            assert stored is not None, "identities lead to profiles"
            instant_us = self.history.now_us if now_us is None else now_us
            return describe.describe(snapshot, key, stored, self.catalog, instant_us)

    def nodes(self) -> dict[bytes, StoredNode]:
        with self.store.read() as snapshot:
            return {key: StoredNode.FromString(value) for key, value in snapshot.scan(Table.NODES)}

    def groups(self) -> frozenset[frozenset[tuple[str, str]]]:
        """Return who is one person: sets of identities."""
        groups: dict[bytes, set[tuple[str, str]]] = {}
        for node in self.nodes().values():
            groups.setdefault(node.profile_key, set()).add((node.identity.namespace, node.identity.value))
        return frozenset(map(frozenset, groups.values()))

    def views(self) -> frozenset[View]:
        """Return every person as anybody could see them now."""
        with self.store.read() as snapshot:
            keys = [key for key, _ in snapshot.scan(Table.PROFILES)]
            return frozenset(self._view(snapshot, key) for key in keys)

    def _view(self, snapshot: Snapshot, key: bytes) -> View:
        stored = repository.load(snapshot, key)
        assert stored is not None
        profile = describe.describe(snapshot, key, stored, self.catalog, self.history.now_us)
        nodes = [golden.node_of(snapshot, part) for part in stored.parts]
        touchpoints = describe.timeline(snapshot, stored.parts, 1_000).touchpoints
        return View(
            identities=frozenset((node.identity.namespace, node.identity.value) for node in nodes if node is not None),
            attributes=tuple(sorted((name, str(value.value)) for name, value in profile.attributes.items())),
            other_claims=tuple(
                sorted(
                    (name, claim.source, str(claim.value), claim.count)
                    for name, value in profile.attributes.items()
                    for claim in value.other_claims
                )
            ),
            windows=tuple(sorted((name, str(value)) for name, value in profile.windows.items())),
            segments=frozenset(each.segment for each in profile.segments),
            stage=profile.journey_stage,
            consents=tuple(str(each.consent) + each.source for each in profile.consents),
            contacts=tuple((each.action, each.count) for each in profile.contacts),
            touchpoints=tuple(sorted(str(each.event) for each in touchpoints if each.HasField("event"))),
        )


def at(seconds: float) -> datetime:
    """Return an instant so many seconds after the tests' beginning."""
    return datetime.fromtimestamp(START_US / 1e6, UTC) + timedelta(seconds=seconds)
