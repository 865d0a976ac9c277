"""The invented sources that feed the benchmark: a catalog in which everything about profiles occurs, and records.

People and what is written down about them are those of ``people.py``. Of a hundred records, 25 are of a customer
database with its own customer number, 15 of a loyalty scheme that shares no identity with anybody, so that only names,
dates and addresses can say whose they are, and 60 are events of a shop: half page views and half purchases, by a
browser, a fifth of them beside the customer number. Everything but the
instants of the events follows from a seed.
"""

from __future__ import annotations

import csv
import datetime
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from google.protobuf import json_format

from tests.benchmark import people
from tsugi.requests import event, source_record
from tsugi.v1 import catalog_pb2
from tsugi.v1.profile_service_pb2 import IngestRecordsRequest, SourceRecord

CUSTOMERS, LOYALTY, SHOP = "customers", "loyalty", "shop"
BATCH_RECORDS: Final = 500
PLACEMENT: Final = "home_banner"
STAMP: Final = "stamp"  # an attribute by which a probe sees how fresh a profile is
WANTED: Final = "stamp_wanted"
PROBE: Final = ("customer_number", "probe")

_LOYALTY_SHARE, _SHOP_SHARE = 0.15, 0.6
_SIGNED_IN_SHARE: Final = 0.2
_PAGES: Final = ("home", "product", "basket")
_EVENTS_S: Final = 30 * 86_400  # events happened within this time before now, so that windows are full
_COLUMNS: Final = tuple(name for name, _ in people.MEANINGS)


def catalog_message() -> catalog_pb2.Catalog:
    """Build the catalog: eight attributes with a meaning, windows, segments, a journey, and one action to probe by."""
    window = {"eventType": "purchase", "span": "2592000s"}
    return json_format.ParseDict(
        {
            "name": "sources",
            "currencyCode": "EUR",
            "identityNamespaces": [
                {"name": "customer_number"},
                {"name": "loyalty_number"},
                {"name": "browser_id", "linkRule": "LINK_RULE_SHARED_DEVICE"},
            ],
            "sources": [
                {"name": CUSTOMERS, "party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH", "trust": 90,
                 "defaultCountryCode": "AU"},
                {"name": LOYALTY, "party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH", "trust": 70,
                 "defaultCountryCode": "AU"},
                {"name": SHOP, "party": "PARTY_FIRST", "delivery": "DELIVERY_STREAM", "trust": 60, "channel": "web"},
            ],
            "consentPurposes": [{"name": "marketing"}, {"name": "service", "consentExempt": True}],
            "profileAttributes": [
                *(
                    {"name": name, "type": "ATTRIBUTE_TYPE_TEXT", "personalData": True,
                     "meaning": catalog_pb2.Meaning.Name(meaning)}
                    for name, meaning in people.MEANINGS
                ),
                {"name": "member", "type": "ATTRIBUTE_TYPE_BOOL", "survivorship": "SURVIVORSHIP_MOST_TRUSTED"},
                {"name": STAMP, "type": "ATTRIBUTE_TYPE_NUMBER", "minimum": 0},
            ],
            "contextAttributes": [{"name": WANTED, "type": "ATTRIBUTE_TYPE_NUMBER", "minimum": 0}],
            "eventTypes": [
                {"name": "page_view", "properties": [
                    {"name": "page", "type": "ATTRIBUTE_TYPE_CATEGORY", "allowedValues": _PAGES}]},
                {"name": "purchase", "properties": [{"name": "total", "type": "ATTRIBUTE_TYPE_NUMBER", "minimum": 0}]},
            ],
            "windows": [
                {"name": "basket_views_visit", "kind": "WINDOW_KIND_COUNT", "eventType": "page_view", "session": True,
                 "filter": 'event.page == "basket"'},
                {"name": "purchases_visit", "kind": "WINDOW_KIND_COUNT", "eventType": "purchase", "session": True},
                {"name": "purchases_30d", "kind": "WINDOW_KIND_COUNT", **window},
                {"name": "spent_30d", "kind": "WINDOW_KIND_SUM", "property": "total", **window},
                {"name": "last_total", "kind": "WINDOW_KIND_LAST", "property": "total", **window},
            ],
            "recencyFrequencyMonetary": [{"name": "spend", "eventType": "purchase", "property": "total"}],
            "segments": [
                {"name": "frequent_buyer", "expression": "profile.purchases_30d >= 3.0"},
                {"name": "abandons_basket",
                 "expression": "profile.basket_views_visit > 0.0 && profile.purchases_visit == 0.0"},
            ],
            "journey": {
                "stages": [{"name": name} for name in ("awareness", "acquisition", "retention")],
                "transitions": [
                    {"fromStages": ["awareness"], "eventType": "page_view", "toStage": "acquisition"},
                    {"fromStages": ["acquisition"], "eventType": "purchase", "toStage": "retention"},
                ],
            },
            "outcomeTypes": [{"name": "click"}],
            "goals": [{"name": "click", "outcomes": [{"type": "click", "reward": 1}], "attributionWindow": "86400s",
                       "baseRate": 0.1}],
            "channels": [{"name": "web"}],
            "placements": [{"name": PLACEMENT, "channel": "web", "goal": "click", "purpose": "service"}],
            "actions": [
                {"name": "fresh", "eligibility": f"profile.{STAMP} >= context.{WANTED}",
                 "treatments": [{"name": "banner", "channel": "web"}]},
            ],
        },
        catalog_pb2.Catalog(),
    )  # fmt: skip


def records(n: int, n_people: int, seed: int) -> Iterator[SourceRecord]:
    """Yield n records, ids unique to this seed, about some people who are the same for every seed.

    Args:
        n: how many.
        n_people: who they are about, about that many.
        seed: of their order, their events and their ids.
    """
    written = people.write_down(n_people, seed=1)
    rng, now = random.Random(seed), datetime.datetime.now(datetime.UTC)
    for i in range(n):
        one = rng.choice(written)
        record_id, kind = f"{seed}-{i}", rng.random()
        if kind < _SHOP_SHARE:
            yield _shop_event(record_id, one.person, now, rng)
        elif kind < _SHOP_SHARE + _LOYALTY_SHARE:
            ids = [("loyalty_number", f"l-{one.person}-{rng.randrange(2)}")]
            yield source_record(record_id, LOYALTY, ids, attributes={**one.texts, "member": True})
        else:
            ids = [("customer_number", f"c-{one.person}")]
            yield source_record(record_id, CUSTOMERS, ids, attributes={**one.texts, "member": rng.random() < 0.5})


def messages(n: int, n_people: int, seed: int, together: int = BATCH_RECORDS) -> list[bytes]:
    """Serialise n records as requests of so many each, for IngestRecords and, the same bytes, for a stream of them."""
    said = records(n, n_people, seed)
    return [
        IngestRecordsRequest(records=batch).SerializeToString()
        for batch in iter(lambda: list(itertools.islice(said, together)), [])
    ]


def probe(number: int) -> SourceRecord:
    """Build the record after which the probe's stamp is this number."""
    return source_record(f"probe-{number}", CUSTOMERS, [PROBE], attributes={STAMP: float(number)})


def write_csv(path: Path, n: int, seed: int) -> None:
    """Write n rows of the customer database, each of a customer of this seed alone."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, ("number", *_COLUMNS, "news"), restval="")
        rows.writeheader()
        for i, one in enumerate(_some(people.write_down(n, seed), n)):
            rows.writerow({"number": f"c-{seed}-{i}", "news": ("yes", "no", "")[i % 3], **one.texts})


def write_mapping(path: Path) -> None:
    """Write what the columns of write_csv become."""
    lines = [
        'recordId: "row-{number}"',
        "identities: [{namespace: customer_number, column: number}]",
        "attributes:",
        *(f"  {column}: {{column: {column}}}" for column in _COLUMNS),
        "consents: [{purpose: marketing, column: news, granted: ['yes'], withdrawn: ['no']}]",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _some(written: Sequence[people.Written], n: int) -> Sequence[people.Written]:
    assert len(written) >= n, "each person is written down at least once"
    return written[:n]


def _shop_event(record_id: str, person: str, now: datetime.datetime, rng: random.Random) -> SourceRecord:
    ids = [("browser_id", f"b-{person}")]
    if rng.random() < _SIGNED_IN_SHARE:
        ids.append(("customer_number", f"c-{person}"))
    instant = now - datetime.timedelta(seconds=rng.randrange(_EVENTS_S))
    if rng.random() < 0.5:
        happened = event("page_view", {"page": rng.choice(_PAGES)}, occurrence_time=instant)
    else:
        happened = event("purchase", {"total": rng.randrange(500, 20_000) / 100}, occurrence_time=instant)
    return source_record(record_id, SHOP, ids, event=happened)
