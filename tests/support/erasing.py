"""One person with canaries in everything that can be said of anybody, people beside them, and a search of every byte.

``Canary`` tells a running server about the person as their systems would, in texts, numbers and instants that stand
nowhere else; ``files_with`` looks for byte strings in every file below a folder, whatever wrote it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from server.catalog.catalog import Catalog
from server.profiles.identity import named
from tests.support.people import people_catalog
from tests.support.running import until
from tsugi.client import Client, consent, event, source_record
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_service_pb2 import LinkVerdict, SourceRecord

Pair = tuple[str, str]

CHUNK_BYTES: Final = 64 * 1024 * 1024
NEEDLE_BYTES_MAX: Final = 256

_TEXT, _NUMBER = "ATTRIBUTE_TYPE_TEXT", "ATTRIBUTE_TYPE_NUMBER"


def erasure_catalog() -> Catalog:
    """Compile a catalog with every link rule and meaning that the canaries need, and an action that only they get."""
    return people_catalog(
        identityNamespaces=[
            {"name": "customer_number", "valuesPerProfileMax": 2},
            {"name": "email", "meaning": "MEANING_EMAIL"},
            {"name": "phone", "meaning": "MEANING_PHONE", "defaultCountryCode": "DE"},
            {"name": "browser_id", "linkRule": "LINK_RULE_SHARED_DEVICE"},
            {"name": "family_account", "linkRule": "LINK_RULE_HOUSEHOLD"},
            {"name": "order_number", "linkRule": "LINK_RULE_NEVER"},
        ],
        sources=[
            {"name": "crm", "party": "PARTY_FIRST", "delivery": "DELIVERY_BATCH", "trust": 80,
             "defaultCountryCode": "DE"},
            {"name": "shop", "party": "PARTY_FIRST", "delivery": "DELIVERY_STREAM", "channel": "web", "trust": 40},
        ],
        profileAttributes=[
            {"name": "age", "type": _NUMBER},
            {"name": "given_name", "type": _TEXT, "meaning": "MEANING_GIVEN_NAME", "personalData": True},
            {"name": "family_name", "type": _TEXT, "meaning": "MEANING_FAMILY_NAME", "personalData": True},
            {"name": "email_address", "type": _TEXT, "meaning": "MEANING_EMAIL", "personalData": True},
            {"name": "phone", "type": _TEXT, "meaning": "MEANING_PHONE", "personalData": True},
            {"name": "city", "type": _TEXT, "meaning": "MEANING_CITY"},
            {"name": "nickname", "type": _TEXT, "survivorship": "SURVIVORSHIP_LONGEST"},
        ],
        contextAttributes=[{"name": "remark", "type": _TEXT}],
        windows=[
            {"name": "spent_day", "kind": "WINDOW_KIND_SUM", "eventType": "purchase", "property": "total",
             "span": "86400s"},
            {"name": "last_item", "kind": "WINDOW_KIND_LAST", "eventType": "purchase", "property": "item",
             "span": "86400s"},
        ],
        actions=[
            {"name": name, "eligibility": rule, "valueMicros": value,
             "treatments": [{"name": "only", "channel": "web"}]}
            for name, rule, value in (
                ("plain", "", 1_000_000),
                ("other", "", 1_000_000),
                ("theirs", "profile.age > 90.0", 9_000_000),
            )
        ],
    )  # fmt: skip


class Canary:
    """A person whom everything said tells apart from everybody else.

    Attributes:
        identities: those that are the person's alone, as sources send them.
        household: what others of the household might have too.
        texts: what must not be found in any file, in whatever case, each as long as to occur by no accident.
        numbers: bytes of doubles that nobody else has.
    """

    number: Final[Pair] = ("customer_number", "Zwyx-Number-7741")
    email: Final[Pair] = ("email", " Zwyx.Post+Home@Example-Zwyx.COM ")
    phone: Final[Pair] = ("phone", "0151 / 2345 67 89")
    browser: Final[Pair] = ("browser_id", "zwyx-browser-5512")
    household: Final[Pair] = ("family_account", "vmqk-household-31")
    order: Final[Pair] = ("order_number", "zwyx-order-90")
    identities: Final = (number, email, phone, browser, order)
    attributes: Final[dict[str, str | float]] = {
        "given_name": " zWyxgiven ",
        "family_name": "van der ZWYXFAMILY",
        "email_address": "Zwyx.Office@Example-Zwyx.ORG",
        "phone": "(0151) 9876 54 32",
        "city": "zwyxSTADT  am See",
        "nickname": "Zwyx the Ünforgettable",
        "age": 93.718281828,
    }
    total: Final = 271.8281828459
    worth: Final = 314.1592653589
    texts: Final = (
        *(value.strip() for _, value in identities),
        *(value.strip() for value in attributes.values() if isinstance(value, str)),
        "+4915123456789",  # what cleansing makes of some of these
        "+4915198765432",
        "zwyxSTADT am See",
        "zwyx no e-mail",  # what it cannot make anything of
        "zwyx-item-77",
        "zwyx-ticket-78",
        "zwyx-record-1",
        "zwyx-request-1",
        "zwyx-remark-12",
        "zwyx",  # whatever else there may be
    )
    numbers: Final = tuple(struct.pack("<d", value) for value in (93.718281828, total, worth))

    def tell(self, client: Client) -> str:
        """Have everything happen that can: two people become one, are decided for and answer; return a decision id."""
        shop = [
            source_record(
                "zwyx-record-1", "shop", [self.email, self.browser], attributes={"nickname": "Zwyx the Ünforgettable"},
                event=event("purchase", {"total": self.total, "item": "zwyx-item-77"}),
            ),
            source_record(
                "zwyx-record-2", "shop", [self.browser], event=event("complaint", {"ticket": "zwyx-ticket-78"})
            ),
        ]  # fmt: skip
        crm = [
            source_record(
                "zwyx-record-3", "crm", [self.number, self.phone, self.household, self.order],
                attributes=dict(self.attributes),
                consents=[consent("marketing", granted=True), consent("service", granted=False)],
            ),
            source_record("zwyx-record-4", "crm", [self.number], attributes={"email_address": "zwyx no e-mail"}),
        ]  # fmt: skip
        lsn = ingest(client, *shop, *crm)
        applied(client, lsn)
        lsn = client.link_identities(
            self.number, self.email, LinkVerdict.LINK_VERDICT_SAME, stated_by="clerk", request_id="zwyx-link"
        ).lsn
        applied(client, lsn)
        decision = client.decide(
            {"greedy": 1},
            identities=[self.number],
            context={"remark": "zwyx-remark-12"},
            candidate_actions=["theirs"],
            request_id="zwyx-request-1",
            durable=True,
        )
        client.report_outcome(decision.decision_id, "theirs", "zwyx-outcome-1", "order", value=self.worth)
        by_id = client.get_profile(identity=self.number).profile.profile_id
        client.decide({"greedy": 1}, profile_id=by_id, durable=True)
        return decision.decision_id

    def keys(self, catalog: Catalog) -> list[bytes]:
        """Return the keys that the identities are found by."""
        each = (Identity(namespace=namespace, value=value) for namespace, value in self.identities)
        return [named(identity, catalog.profiles, "DE").key for identity in each]


def ingest(client: Client, *records: SourceRecord) -> int:
    """Record what sources say; every record is accepted."""
    reply = client.ingest_records(records)
    assert all(result.HasField("accepted") for result in reply.results), reply
    return reply.lsn


def applied(client: Client, lsn: int) -> None:
    """Wait until the projector has come to an LSN."""
    until(lambda: client.audit_sources(at_least_lsn=lsn).applied_lsn >= lsn, "the projector gets there")


def files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, also behind links."""
    for path, _, names in os.walk(folder, followlinks=True):
        yield from (Path(path) / name for name in names)


def files_with(folder: Path, texts: Iterable[str], numbers: Iterable[bytes] = ()) -> dict[bytes, list[str]]:
    """Return which files hold what: texts in UTF-8 in whatever case of ASCII letters, and bytes as they are.

    Files that vanish meanwhile are nobody's any more.
    """
    lowered = [text.encode().lower() for text in texts]
    exact = list(numbers)
    found: dict[bytes, list[str]] = {needle: [] for needle in (*lowered, *exact)}
    assert all(len(needle) <= NEEDLE_BYTES_MAX for needle in found), "or one could lie across two chunks"
    for path in files(folder):
        if not path.is_file():  # a socket, or gone since
            continue
        for chunk in _chunks(path):
            small = chunk.lower()
            for needle, names in found.items():
                if path.name not in names and needle in (chunk if needle in exact else small):
                    names.append(path.name)
    return found


def held(found: dict[bytes, list[str]]) -> dict[bytes, list[str]]:
    """Return what was found at all."""
    return {needle: names for needle, names in found.items() if names}


def _chunks(path: Path) -> Iterator[bytes]:
    """Yield a file in pieces that overlap by the longest needle."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        kept = b""
        while data := file.read(CHUNK_BYTES):
            yield kept + data
            kept = data[-NEEDLE_BYTES_MAX:]
