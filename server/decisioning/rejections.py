"""What is out at once because the request itself reports it: "no, the next please" in one call.

The report is in the log when the request is gathered, and the projector makes holds of it as of any other. It may be a
moment behind; what is certain without the person's history is therefore taken from the request. What must count that
history, or know the channel of the earlier decision, waits for the projector.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.catalog.catalog import Catalog
from server.catalog.contact_terms import COOL_OFF, UNLIMITED, ContactPolicyTerms, target_key
from tsugi.v1 import catalog_pb2
from tsugi.v1.outcome_service_pb2 import ReportOutcomeRequest


def rejected_rows(outcomes: Iterable[ReportOutcomeRequest], catalog: Catalog) -> list[int]:
    """Return the rows of the actions reported with an outcome type that some cool-off names."""
    return [
        row
        for outcome in outcomes
        if (row := catalog.actions.rows.get(outcome.action)) is not None and _cool_offs(outcome, catalog)
    ]


def silenced_targets(outcomes: Iterable[ReportOutcomeRequest], catalog: Catalog, now_us: int) -> list[tuple[int, int]]:
    """Return the contact targets that a single such outcome silences on every channel, as Asked.holds has them."""
    contacts = catalog.profiles.contacts
    silenced: list[tuple[int, int]] = []
    for outcome in outcomes:
        group = contacts.groups.get(outcome.action, "")
        for policy in _cool_offs(outcome, catalog):
            is_certain = policy.count == 1 and not policy.channels
            if not is_certain or policy.scope == catalog_pb2.CONTACT_SCOPE_EACH_CHANNEL:
                continue
            member = policy.member(outcome.action, group, "")
            target = None if member is None else contacts.target_rows.get(target_key(policy.name, member))
            if target is not None and _occurrence_us(outcome, now_us) + policy.span_us > now_us:
                silenced.append((target, UNLIMITED))
    return silenced


def _cool_offs(outcome: ReportOutcomeRequest, catalog: Catalog) -> list[ContactPolicyTerms]:
    policies = catalog.profiles.contacts.policies
    return [policy for policy in policies if policy.kind == COOL_OFF and outcome.type in policy.outcome_types]


def _occurrence_us(outcome: ReportOutcomeRequest, now_us: int) -> int:
    if not outcome.HasField("occurrence_time"):
        return now_us
    instant = outcome.occurrence_time
    return int(instant.seconds * 1_000_000 + instant.nanos // 1_000)
