"""What a decision is about: requests and profiles as rows of columns.

Handed validated requests, the catalog in force and a snapshot of the state; gives the Questions that the core takes.
Whatever the catalog must know about a request (names, types, ranges) is checked here.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import numpy as np

from server.catalog.allotting import blend_of, place_of
from server.catalog.catalog import NOW_FACT, POSTERIOR_POLICIES, Amounts, Bytes, Catalog, Rows
from server.catalog.contact_terms import UNLIMITED
from server.catalog.profile_terms import Instants
from server.catalog.values import check_value
from server.decisioning import holdout
from server.decisioning.candidacy import EXCLUDED, LISTED, NOT_LISTED
from server.decisioning.claims import Claimed, Spent
from server.decisioning.decide import EXPLORE, NO_HISTORIES, NO_STARTS, RANDOM_CONTROL, Questions
from server.decisioning.rejections import rejected_rows, silenced_targets
from server.errors import field_invalid, limit_exceeded, not_found
from server.profiles import repository
from server.profiles.history import ROW_BYTES
from server.profiles.identity import lookup_key
from server.storage.record import NO_KEY
from server.storage.store import Snapshot
from tsugi.v1 import catalog_pb2
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import DecideRequest

# Of these types the declaration bounds nothing.
_UNBOUNDED = frozenset({catalog_pb2.ATTRIBUTE_TYPE_TEXT, catalog_pb2.ATTRIBUTE_TYPE_TIME})


class Asked:
    """One request on its way through a worker."""

    __slots__ = (
        "arrived",
        "asks",
        "at_least_lsn",
        "blend",
        "budgets",
        "claimed",
        "decision_key",
        "degradations",
        "expires",
        "facts",
        "full",
        "history",
        "holdouts",
        "holds",
        "leader",
        "learning_until",
        "listing",
        "marks",
        "mode",
        "n_slots",
        "parts",
        "payload_digest",
        "profile_key",
        "raw",
        "request",
        "seed",
        "spent",
        "stale_until",
        "state_lsn",
        "subjects",
        "waiter",
    )

    def __init__(
        self,
        request: DecideRequest,
        raw: bytes,
        waiter: asyncio.Future[bytes],
        arrived: float,
        stale_until: float,
        expires: float = math.inf,
    ) -> None:
        self.request = request
        self.raw = raw
        self.waiter = waiter
        self.arrived = arrived  # time.monotonic()
        self.stale_until = stale_until  # until when it may wait for at_least_lsn
        self.learning_until = 0.0  # until when it may wait for learner arrays that include it, too
        self.expires = expires  # when its deadline runs out
        self.at_least_lsn = request.at_least_lsn
        self.degradations: list[int] = []
        self.decision_key = NO_KEY
        self.payload_digest = NO_KEY
        self.profile_key = b""
        self.subjects: tuple[bytes, ...] = ()
        self.mode = EXPLORE
        self.blend = 0
        self.asks: list[tuple[int, int]] = []  # (placement row, slots)
        self.marks: list[int] = []  # of each ask, see decide.Questions
        self.holdouts: list[str] = []  # those the person is in that hold in some placement asked for
        self.n_slots = 0
        self.listing: Bytes | None = None
        self.facts: list[tuple[int, float]] = []  # (position, number) of the context
        self.holds: list[tuple[int, int]] = []  # contact targets that are held now, and how often each
        self.history = b""  # rows of what came of what the person was shown, see profiles.history.fold
        self.full: set[int] = set()  # keys of those that others took meanwhile
        self.budgets: list[tuple[int, int]] = []  # contact targets of budgets near their end, and what is left of them
        self.parts: Sequence[bytes] = ()  # keys of the person's identities
        self.leader = b""  # the one of them that contacts are claimed under
        self.claimed: Claimed | None = None
        self.spent: Spent | None = None
        self.seed = 0
        self.state_lsn = 0

    def explores_by_posterior(self, catalog: Catalog) -> bool:
        """Say whether one of its placements explores by what is not yet known."""
        codes = catalog.blends.codes[self.blend]
        return any(codes[row, 2] in POSTERIOR_POLICIES for row, _ in self.asks)

    def answer(self, reply: bytes) -> None:
        """Give the caller the reply, unless the caller has gone."""
        if not self.waiter.done():
            self.waiter.set_result(reply)

    def refuse(self, error: Exception) -> None:
        """Give the caller the error, unless the caller has gone."""
        if not self.waiter.done():
            self.waiter.set_exception(error)


class Batch:
    """Requests that are decided together.

    Args:
        catalog: the revision in force.
        now_us: the instant of all these decisions.
        size_max: how many there can be at most.
    """

    def __init__(self, catalog: Catalog, now_us: int, size_max: int) -> None:
        self.catalog = catalog
        self.now_us = now_us
        self.asked: list[Asked] = []
        self.facts = np.full((size_max, len(catalog.space.facts)), math.nan)
        self.facts[:, NOW_FACT] = now_us

    def add(self, asked: Asked, seed: int, state_lsn: int) -> None:
        """Take in a gathered request; the row it was gathered into is now its own."""
        asked.seed = seed
        asked.state_lsn = state_lsn
        self.asked.append(asked)

    def questions(self) -> Questions:
        """Return the columns the core takes."""
        asked = self.asked
        listings: list[Bytes] = []
        heads: list[tuple[int, int, int, int]] = []
        asks: list[tuple[int, int, int]] = []
        holds: list[int] = []  # flat: rows of tuples would cost an array several times as much
        for q, each in enumerate(asked):
            for target, less in each.holds:
                holds += (q, target, less)
            for target, left in each.budgets:
                holds += (q, target, UNLIMITED - left)
            heads.append((len(each.asks), each.mode, -1 if each.listing is None else len(listings), each.blend))
            asks += [(*ask, mark) for ask, mark in zip(each.asks, each.marks, strict=True)]
            if each.listing is not None:
                listings.append(each.listing)
        histories, history_starts = _histories(asked)
        return Questions(
            facts=self.facts[: len(asked)],
            now_us=self.now_us,
            heads=np.array(heads, np.int32),
            asks=np.array(asks, np.int32),
            seeds=np.array([each.seed for each in asked], np.uint64),
            holds=np.array(holds, np.int64).reshape(len(holds) // 3, 3),
            listings=np.stack(listings) if listings else np.empty((0, len(self.catalog.actions.names)), np.uint8),
            histories=histories,
            history_starts=history_starts,
        )

    def part(self, places: Sequence[int]) -> Batch:
        """Return some of the gathered requests as a batch of their own."""
        part = Batch(self.catalog, self.now_us, len(places))
        part.asked = [self.asked[q] for q in places]
        part.facts[:] = self.facts[places]
        return part

    def discard(self) -> None:
        """Clear the row of a request that is not taken in."""
        self.facts[len(self.asked), NOW_FACT + 1 :] = math.nan


def _histories(asked: Sequence[Asked]) -> tuple[Amounts, Rows]:
    """Return the rows of all histories, and where each request's begin. Cost: 3 µs, nothing where nobody has any."""
    own = [each.history for each in asked]
    if not any(own):
        return NO_HISTORIES, NO_STARTS
    starts = np.zeros(len(own) + 1, np.int32)
    np.cumsum([len(each) // ROW_BYTES for each in own], out=starts[1:])
    rows = np.frombuffer(b"".join(own), np.int64).copy()  # writable, as the kernels are compiled for
    return rows.reshape(-1, ROW_BYTES // 8), starts


def gather_request(asked: Asked, batch: Batch) -> None:
    """Resolve a request's names against the catalog and write its context into the batch's next row.

    Raises:
        TsugiError: an unknown placement, namespace, context attribute or action; a value of the wrong type; too many
            slots.
    """
    catalog, request = batch.catalog, asked.request
    asked.asks = asks_of(request, catalog)
    asked.marks = [0] * len(asked.asks)
    asked.listing = None
    if request.candidate_actions or request.excluded_actions or request.outcomes:
        asked.listing = listing_of(request, catalog)
    asked.n_slots = sum([count for _, count in asked.asks])
    facts = batch.facts[len(batch.asked)]
    for name, value in request.context.items():
        known = catalog.space.context.get(name)
        if known is None:
            raise not_found("context attribute", name, f"context.{name[:64]}")
        position, fact = known
        number = fact.encode(value)
        if math.isnan(number):  # of another type, or out of range
            raise field_invalid(f"context.{name}", fact.wanted())
        if fact.type in _UNBOUNDED:
            check_value(f"context.{name}", value)
        facts[position] = number
    for i, identity in enumerate(request.identities):
        if identity.namespace not in catalog.profiles.namespaces:
            raise not_found("identity namespace", identity.namespace, f"identities[{i}].namespace")


def gather_profile(asked: Asked, batch: Batch, snapshot: Snapshot, erased: frozenset[bytes]) -> None:
    """Find the person and write what is known of them into the batch's next row; say what is missing.

    Args:
        asked: the request.
        batch: its next row is written.
        snapshot: the state.
        erased: keys of identities and profiles that are forgotten, though the state knows them yet.
    """
    catalog, request = batch.catalog, asked.request
    rows = catalog.profiles.contacts.target_rows
    keys = tuple([lookup_key(identity, catalog.profiles) for identity in request.identities])
    profile_key = (
        repository.present_key(snapshot, bytes.fromhex(request.profile_id))
        if request.profile_id
        else repository.find(snapshot, keys)
    )
    if erased and (profile_key in erased or not erased.isdisjoint(keys)):
        profile_key = None
    asked.holds = [(target, UNLIMITED) for key in asked.full if (target := rows.get(key)) is not None]
    if request.outcomes:
        asked.holds += silenced_targets(request.outcomes, catalog, batch.now_us)
    stored: repository.StoredRecord | None = None
    asked.history = b""
    try:
        if profile_key is not None:
            stored = repository.load(snapshot, profile_key)
        if stored is not None:
            asked.history = stored.history
            held = repository.write_facts(stored, catalog, snapshot, batch.now_us, batch.facts[len(batch.asked)])
            if len(held):
                asked.holds += _in_force(held, catalog, batch.now_us)
    except repository.CorruptProfileError:
        asked.degradations.append(Degradation.DEGRADATION_PROFILE_UNAVAILABLE)
    else:
        if stored is None:
            profile_key = None
            asked.degradations.append(Degradation.DEGRADATION_PROFILE_UNKNOWN)
    asked.profile_key = profile_key or b""
    asked.subjects = (asked.profile_key,) if asked.profile_key else keys
    if catalog.profiles.contacts.strict:
        asked.parts = stored.parts if stored is not None else keys
        asked.leader = stored.leader if stored is not None else keys[0] if keys else b""
    # By the identity that begins the profile: a stranger who becomes known by it stays on the same side.
    subject = stored.leader if stored is not None else keys[0] if keys else b""
    assign(asked, catalog, subject)


def _in_force(held: Instants, catalog: Catalog, now_us: int) -> list[tuple[int, int]]:
    """Return the targets of the holds that are in force at an instant, and what each takes of them.

    Targets that the catalog does not know any more are left out.
    """
    taken = catalog.profiles.contacts.taken_by_hold
    return [taken[key] for key, from_us, until_us in held.tolist() if from_us <= now_us < until_us and key in taken]


def assign(asked: Asked, catalog: Catalog, subject: bytes) -> None:
    """Say who is compared with whom: the random control, the holdouts and the blend of the experiments.

    Args:
        asked: the request; its mode, blend, marks and holdouts are set.
        catalog: states shares and salts.
        subject: the key of the identity that begins the profile, or for a person not known yet of the first one
            named; empty: nobody, who is compared with nobody.

    Cost: some 1 µs for each of them.
    """
    control = catalog.random_control_share
    is_control = _is_among(subject, control, catalog.random_control_salt, b"control")
    asked.mode = RANDOM_CONTROL if is_control else EXPLORE
    asked.blend = blend_of(catalog.experiments, subject) if catalog.experiments else 0
    asked.holdouts = []
    for held in catalog.holdouts:
        if _is_among(subject, held.share, held.salt, b"holdout"):
            shut = [i for i, (row, _) in enumerate(asked.asks) if row in held.placements]
            asked.holdouts += [held.name] if shut else []
            for i in shut:
                asked.marks[i] |= holdout.MARK


def _is_among(subject: bytes, share: float, salt: bytes, use: bytes) -> bool:
    """Say whether a person is one of a share of all people; the same for ever, until share or salt change."""
    if not share or not subject:
        return False
    return place_of(salt, use, subject) < share * 2.0**64


def asks_of(request: DecideRequest, catalog: Catalog) -> list[tuple[int, int]]:
    """Return the row of each placement asked for, and how many slots of it.

    Raises:
        TsugiError: an unknown placement, one that stands twice, or too many slots.
    """
    asks: list[tuple[int, int]] = []
    for i, placement in enumerate(request.placements):
        row = catalog.placement_rows.get(placement.placement)
        if row is None:
            raise not_found("placement", placement.placement, f"placements[{i}].placement")
        count = placement.count or 1
        if count > catalog.placements[row].count_max:
            raise limit_exceeded(f"placements[{i}].count", count, catalog.placements[row].count_max, "slots")
        if any(row == earlier for earlier, _ in asks):
            raise field_invalid(f"placements[{i}].placement", "a placement may be asked for once in a request")
        asks.append((row, count))
    return asks


def listing_of(request: DecideRequest, catalog: Catalog) -> Bytes:
    """Return what a request that names actions says of each: uint8[n], see candidacy.gate.

    Raises:
        TsugiError: an unknown action.
    """
    rows = catalog.actions.rows
    listing = np.full(len(rows), NOT_LISTED if request.candidate_actions else LISTED, np.uint8)
    for field, names, mark in (
        ("candidate_actions", request.candidate_actions, LISTED),
        ("excluded_actions", request.excluded_actions, EXCLUDED),
    ):
        for i, name in enumerate(names):
            row = rows.get(name)
            if row is None:
                raise not_found("action", name, f"{field}[{i}]")
            listing[row] = mark
    listing[rejected_rows(request.outcomes, catalog)] = EXCLUDED
    return listing
