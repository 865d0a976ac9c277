"""Everything that changes a golden record: what the projector does to profiles, inside one of its transactions.

Handed log records with their meaning already parsed, it keeps nodes, parts, timelines and the flat records that
decisions read. Time comes from the records, so that a rebuild comes to the same bytes. What a record says is kept under
one of its identities; who that is together with others, the identity graph says; what is known of that person is folded
anew whenever either changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Final, NamedTuple

from server.catalog.catalog import Catalog, Goal
from server.catalog.history_terms import UNITS
from server.catalog.profile_terms import Source
from server.profiles import golden, history, holds, matching, parts, repository, survivorship
from server.profiles.audit import SourceCounts
from server.profiles.graph import Graph, Regrouped, Said
from server.profiles.identity import (
    Named,
    anchor_of,
    edge_to,
    identity_key,
    leader_of,
    link_rule,
    named_all,
    review_key,
)
from server.profiles.series import SeriesSet, entries_of, outcome_entries
from server.profiles.standing import Standing
from server.storage.record import Record
from server.storage.store import Table, Transaction
from tsugi.log.v1.record_pb2 import (
    DecisionRecord,
    ErasureAccepted,
    LinkStated,
    OutcomeRecord,
    ProfileSplit,
    RecordKind,
    SlotRecord,
)
from tsugi.log.v1.state_pb2 import StoredChance, StoredContact, StoredNode, StoredPart, StoredReaction, StoredTouch
from tsugi.v1 import catalog_pb2
from tsugi.v1.decision_service_pb2 import DecideRequest
from tsugi.v1.profile_pb2 import DecisionTouchpoint, LinkReason, OutcomeTouchpoint, SourceEvent, Touchpoint
from tsugi.v1.profile_service_pb2 import SourceRecord

DAY_US: Final = 86_400 * 1_000_000
RETENTION_US: Final = 400 * DAY_US  # of what is no event
FORGOTTEN_GOAL_US: Final = 90 * DAY_US  # the window of a goal that the catalog has dropped since: the longest there is
TIMERS_AT_A_TICK: Final = 512  # when nothing else is to be done; the others at the next record
TIMERS_AT_A_RECORD: Final = 2
REPEATS_MAX: Final = 64  # events of one instant that another one is compared with, the last that came
BLOCK_PARTS_MAX: Final = matching.BLOCK_PARTS_MAX

_STATED: Final = LinkReason.LINK_REASON_STATED
_MATCHED: Final = LinkReason.LINK_REASON_MATCHED


class NotApplicableError(Exception):
    """One record cannot have an effect; the others can."""


class Forgotten(NamedTuple):
    """What the state knew of a person it has forgotten."""

    nodes: list[bytes]  # keys of their identities
    profiles: list[bytes]  # keys of their profile and of those it was made of
    lsns: list[int]  # log records that stood on their timeline


class ProfileWriter:
    """Changes profiles within one transaction, under one catalog; nothing is whole before flush().

    Args:
        txn: the projector's.
        catalog: in force.
        fields: what its attributes are matched by; made once a catalog.
        log_id: of the log.
    """

    def __init__(self, txn: Transaction, catalog: Catalog, fields: matching.MatchFields, log_id: bytes) -> None:
        self._txn = txn
        self._catalog = catalog
        self._terms = catalog.profiles
        self._graph = Graph(txn, self._terms, log_id)
        self._parts: dict[bytes, StoredPart] = {}
        self._changed_parts: set[bytes] = set()
        self._series: dict[bytes, SeriesSet] = {}
        self._fields = fields
        self._comparables: dict[bytes, matching.Comparable] = {}
        self._counts = SourceCounts(txn)
        self._standing = Standing(txn, catalog)
        self._next_timer_us = 0  # no timer is due before; it may be too early, never too late

    def apply_source_record(self, record: Record, said: SourceRecord) -> None:
        """Take in what a source says about one person.

        Raises:
            NotApplicableError: the source is not declared any more.
        """
        source = self._terms.sources.get(said.source)
        if source is None:
            raise NotApplicableError("its source is not declared")
        ids = named_all(said.identities, self._terms, source.default_country_code)
        anchor = ids[anchor_of(ids, self._terms)].key
        touched = self._name(ids, anchor, Said(record.lsn, record.time_us, source.name))
        observed_us = said.observation_time.ToMicroseconds() if said.HasField("observation_time") else record.time_us
        part = self._part(anchor)
        added = parts.add_claims(part, said, self._terms, source, record.lsn, observed_us)
        is_news = parts.add_consents(part, said, record.lsn, observed_us, record.time_us) or added.is_news
        if said.HasField("event"):
            is_news |= self._add_event(anchor, part, said, source, record)
        part.lsn = record.lsn
        self._changed_parts.add(anchor)
        if added.is_text_changed and self._terms.matching.is_on:
            touched += self._match(anchor, Said(record.lsn, record.time_us, ""))
        self._refold(touched, [anchor], record)
        self._counts.applied(said, added.uncleansed, record, is_news=is_news)
        self._count_conflicts(anchor, said, source)

    def quarantined(self, said: SourceRecord) -> None:
        """Count a record of a source that had no effect."""
        self._counts.quarantined(said.source)

    def apply_link(self, record: Record, link: LinkStated) -> None:
        """Take in what somebody stated about two identities.

        Raises:
            NotApplicableError: one of them is not known.
        """
        one, other = identity_key(link.identity), identity_key(link.other_identity)
        node = self._graph.node(one)
        if node is None or self._graph.node(other) is None:
            raise NotApplicableError("an identity of the link is not known")
        before = edge_to(node, other, _STATED)
        if before is not None and before.weight:
            self._txn.delete(Table.REVIEWS, review_key(before.weight, one, other))
        said = Said(record.lsn, record.time_us, link.stated_by)
        touched = self._graph.state(one, other, link.verdict, link.weight, said)
        stands = edge_to(node, other, _STATED)
        if stands is not None and stands.weight and stands.weight >= self._terms.matching.review_weight_min:
            self._txn.put(Table.REVIEWS, review_key(stands.weight, one, other), b"\0")
        self._refold(touched, [], record)

    def apply_split(self, record: Record, split: ProfileSplit) -> None:
        """Take identities out of a profile and keep the two sides apart."""
        leaving, staying = (list(map(identity_key, side)) for side in (split.leaving, split.staying))
        self._refold(self._graph.split(leaving, staying, record.lsn), [], record)

    def apply_decision(self, record: Record, decision: DecisionRecord) -> None:
        """Note what was said to a person, and whom it counts for."""
        request = DecideRequest.FromString(decision.request)
        node = self._meant(request, decision, record)
        if node is None:
            return
        slots = [slot for slot in decision.slots if slot.action]
        placements = dict(enumerate(each.placement for each in request.placements))
        counting = [slot for slot in slots if not slot.on_impression]
        is_shown = False
        for slot in counting:
            self._count_contact(node, slot, placements, record.lsn, record.time_us)
            is_shown |= self._begin_chance(node, slot, record.lsn, record.lsn, record.time_us)
        if counting:
            self._tell(node, record, is_shown=is_shown)
        if slots:
            told = DecisionTouchpoint(
                actions=[slot.action for slot in slots],
                placements=[placements.get(slot.placement_index, "") for slot in slots],
            )
            channel = self._channel_of(told.placements[0])
            self._add_touchpoint(node, decision.now_us, channel, record.lsn, Touchpoint(decision=told), RETENTION_US)

    def apply_outcome(
        self, record: Record, outcome: OutcomeRecord, decision: DecisionRecord, decided: Record, *, is_contact: bool
    ) -> None:
        """Note what came of something we said.

        Args:
            record: the outcome's.
            outcome: what happened.
            decision: what it came of.
            decided: the decision's record.
            is_contact: true when by this outcome the action counts as put before the person. Never where it takes
                another one back: that is noted in the timeline, and leaves contacts and the journey as they are.
        """
        decision_lsn = decided.lsn
        request = DecideRequest.FromString(decision.request)
        node = self._meant(request, decision, None)
        if node is None:
            return
        slot = next(slot for slot in decision.slots if slot.action == outcome.action)
        if is_contact:
            placements = dict(enumerate(each.placement for each in request.placements))
            self._count_contact(node, slot, placements, decision_lsn, record.time_us)
        revokes, holder, is_shown = bool(outcome.revoked_key), None, False
        if is_contact and self._is_seen(slot, record, decided):
            now_us = max(record.time_us, decided.time_us)
            is_shown = self._begin_chance(node, slot, decision_lsn, max(record.lsn, decision_lsn), now_us)
        if not revokes:
            holder = self._settle_chance(node, slot, outcome, request, decision, record, decided)
            is_noted = self._note_reaction(node, outcome, decision_lsn, record.time_us)
            if is_noted or is_contact or holder == node:
                self._tell(node, record, is_shown=is_shown or holder == node)
        if holder is not None and holder != node:
            self._tell(holder, record, is_shown=True)
        told = OutcomeTouchpoint(
            type=outcome.type, action=outcome.action, value=outcome.value, decision_lsn=decision_lsn, revokes=revokes
        )
        instant_us = outcome.occurrence_time_us
        self._add_touchpoint(node, instant_us, "", record.lsn, Touchpoint(outcome=told), RETENTION_US)
        entries = outcome_entries(outcome.type, instant_us, self._terms) if not revokes else []
        if entries:
            self._insert(node, entries, record.time_us)
            self._refold([], [node], record)

    def erase(self, record: Record, accepted: ErasureAccepted) -> Forgotten:
        """Forget a person: everything under the identities named, and under those that are one person with them."""
        nodes: set[bytes] = set()
        for key in accepted.identity_keys:
            node = self._graph.node(key)
            if node is not None:
                nodes |= {key, *repository.members(self._txn, node.profile_key)}
        known = [self._graph.known(key) for key in sorted(nodes)]
        profiles = {node.own_profile_key for node in known} | set(accepted.profile_keys)
        lsns = {touchpoint.lsn for key in nodes for touchpoint in parts.touchpoints(self._txn, key)}
        for profile_key in sorted({node.profile_key for node in known}):
            self._drop_profile(profile_key)
        said = Said(record.lsn, record.time_us, "")
        touched = {other for key in sorted(nodes) for other in self._drop_part(key, said)} - nodes
        neighbours = self._graph.forget(nodes)
        strangers = [key for key in neighbours if not self._graph.known(key).edges and not self._is_recorded(key)]
        for key in strangers:  # nobody but the person ever named them
            self._drop_profile(self._graph.known(key).profile_key)
            self._drop_part(key, said)
        self._graph.forget(strangers)
        self._refold(sorted(touched.union(neighbours) - set(strangers)), [], record)
        return Forgotten(sorted(nodes), sorted(profiles), sorted(lsns))

    def pass_time(self, record: Record) -> None:
        """Look after profiles in which something changes by the passing of time, up to a record's log time.

        Cost: nothing to speak of while no timer is due.
        """
        if record.time_us < self._next_timer_us:
            return
        due: list[bytes] = []
        due_max = TIMERS_AT_A_TICK if record.kind == RecordKind.RECORD_KIND_TICK else TIMERS_AT_A_RECORD
        self._next_timer_us = survivorship.NEVER_US
        for key, _ in self._txn.scan(Table.TIMERS):
            due_us = int.from_bytes(key[:8], "big")
            if due_us > record.time_us or len(due) == due_max:
                self._next_timer_us = due_us
                break
            due.append(key[8:])
        for profile_key in due:
            keys = repository.members(self._txn, profile_key)
            for key in keys:
                self._forget_old(key, record)
            self._refold([], keys[:1], record)

    def sweep(self, profile_key: bytes, record: Record) -> None:
        """Look anew at who one person is and fold them anew, because the catalog is another."""
        keys = repository.members(self._txn, profile_key)
        self._refold(keys, keys[:1], record)

    def flush(self) -> None:
        """Write back what changed."""
        for key in sorted(self._changed_parts):
            part = self._parts[key]
            series = self._series.get(key)
            if series is not None:
                parts.keep_series(part, series, self._terms)
            self._txn.put(Table.PARTS, key, part.SerializeToString(deterministic=True))
        self._changed_parts.clear()
        self._graph.flush()
        self._counts.flush()
        self._standing.flush()

    # Nodes and parts.

    def _name(self, ids: Sequence[Named], anchor: bytes, said: Said) -> list[bytes]:
        """Make nodes and edges of a record's identities; return the nodes whose people may differ now.

        A value that links nobody by its rule, or could not be cleansed, stays with the record alone, unless the record
        has no other.
        """
        touched: list[bytes] = []
        for position, one in enumerate(ids):
            is_kept = one.key == anchor or (
                one.is_clean and link_rule(one.identity.namespace, self._terms) != catalog_pb2.LINK_RULE_NEVER
            )
            if is_kept and self._graph.meet(one, said.lsn, position):
                touched.append(one.key)
        for one in ids:
            if one.key != anchor and self._graph.node(one.key) is not None:
                touched += self._graph.name_together(anchor, one.key, said)
        return touched

    def _meant(self, request: DecideRequest, decision: DecisionRecord, record: Record | None) -> bytes | None:
        """Return the node that a decision counts for; None when it was about nobody.

        A stranger who named an identity becomes known by it, so that what was said to them is not forgotten when they
        say who they are.
        """
        ids = named_all(request.identities, self._terms)
        known = [one for one in ids if self._graph.node(one.key) is not None]
        if known:
            return known[anchor_of(known, self._terms)].key
        if decision.profile_key:
            owner = self._txn.get(Table.OWNERS, decision.profile_key)
            return bytes(owner) if owner is not None else None
        if record is None or not ids:
            return None
        one = ids[anchor_of(ids, self._terms)]
        self._graph.meet(one, record.lsn, ids.index(one))
        self._refold([one.key], [], record)
        return one.key

    def _channel_of(self, placement: str) -> str:
        row = self._catalog.placement_rows.get(placement)
        return self._catalog.message.channels[self._catalog.placements[row].channel_row].name if row is not None else ""

    def _part(self, key: bytes) -> StoredPart:
        if key not in self._parts:
            ((_, self._parts[key]),) = golden.read_parts(self._txn, [key])
        return self._parts[key]

    def _is_recorded(self, key: bytes) -> bool:
        """Say whether anything is recorded under a node."""
        return key in self._changed_parts or self._txn.get(Table.PARTS, key) is not None

    def _series_of(self, key: bytes) -> SeriesSet:
        if key not in self._series:
            part = self._part(key)
            self._series[key] = parts.series_of(self._txn, key, part, self._terms)
            if part.series_layout not in {b"", self._terms.series_layout}:
                self._changed_parts.add(key)  # what they were made from may be gone before anything else changes
        return self._series[key]

    def _insert(self, key: bytes, entries: list[tuple[int, int, float]], now_us: int) -> None:
        series = self._series_of(key).insert(entries, self._terms.journey)
        self._series[key] = series.prune(self._terms.series, now_us)
        self._changed_parts.add(key)

    def _add_event(self, key: bytes, part: StoredPart, said: SourceRecord, source: Source, record: Record) -> bool:
        """Put a record's event on the timeline and into series; say whether it is news."""
        declared = self._terms.events.get(said.event.type)
        if declared is None:
            return False
        event = SourceEvent(event=said.event, source=source.name)
        if not event.event.HasField("occurrence_time"):
            event.event.occurrence_time.FromMicroseconds(record.time_us)
        instant_us = event.event.occurrence_time.ToMicroseconds()
        if instant_us + declared.retention_us <= record.time_us:
            return False
        at_that_instant = parts.touchpoint_key(key, instant_us, 0)[:24]
        others = islice(self._txn.scan(Table.TIMELINE, at_that_instant, reverse=True), REPEATS_MAX)
        is_repeated = any(Touchpoint.FromString(value).event == event for _, value in others)
        channel = declared.channel or source.channel
        self._add_touchpoint(key, instant_us, channel, record.lsn, Touchpoint(event=event), declared.retention_us)
        entries = entries_of(said.event.type, instant_us, said.event.properties, self._terms)
        if entries:
            self._insert(key, entries, record.time_us)
        return not is_repeated

    def _add_touchpoint(
        self, key: bytes, instant_us: int, channel: str, lsn: int, touchpoint: Touchpoint, retention_us: int
    ) -> None:
        self._series_of(key)  # before the timeline changes: they may have to be made from it
        touchpoint.occurrence_time.FromMicroseconds(instant_us)
        touchpoint.channel, touchpoint.lsn = channel, lsn
        place = parts.touchpoint_key(key, instant_us, lsn)
        self._txn.put(Table.TIMELINE, place, touchpoint.SerializeToString(deterministic=True))
        part = self._part(key)
        forget_us = -(-(instant_us + retention_us) // DAY_US) * DAY_US
        if not part.forget_us or forget_us < part.forget_us:
            part.forget_us = forget_us
            self._changed_parts.add(key)

    def _count_contact(
        self, key: bytes, slot: SlotRecord, placements: Mapping[int, str], decision_lsn: int, time_us: int
    ) -> None:
        """Add one contact of a person with a slot's action."""
        goal = self._catalog.goal_rows.get(slot.goal)
        window_us = self._catalog.goals[goal].window_us if goal is not None else FORGOTTEN_GOAL_US
        contact = self._contact(key, slot.action)
        channel = self._channel_of(placements.get(slot.placement_index, ""))
        touch = StoredTouch(time_us=time_us, channel=channel, decision_lsn=decision_lsn, ignored_us=time_us + window_us)
        holds.add_touch(contact, touch)
        self._put_contact(key, contact)

    def _note_reaction(self, key: bytes, outcome: OutcomeRecord, decision_lsn: int, time_us: int) -> bool:
        """Note what came of a contact, and say whether it is remembered."""
        declared = self._catalog.outcome_types.get(outcome.type)
        is_response = declared is None or declared.kind != catalog_pb2.OUTCOME_KIND_IMPRESSION
        contact = self._contact(key, outcome.action)
        reaction = StoredReaction(type=outcome.type, time_us=time_us, is_response=is_response)
        if not holds.add_reaction(contact, decision_lsn, reaction):
            return False
        self._put_contact(key, contact)
        return True

    def _contact(self, key: bytes, action: str) -> StoredContact:
        stored = self._txn.get(Table.CONTACTS, key + action.encode())
        return StoredContact.FromString(bytes(stored)) if stored is not None else StoredContact(action=action)

    def _put_contact(self, key: bytes, contact: StoredContact) -> None:
        self._txn.put(Table.CONTACTS, key + contact.action.encode(), contact.SerializeToString(deterministic=True))

    def _begin_chance(self, key: bytes, slot: SlotRecord, decision_lsn: int, lsn: int, time_us: int) -> bool:
        """Note that something may come of a slot now; say whether history changed. See history.begin."""
        goal = self._goal_of(slot)
        expected = round(slot.general_propensity * UNITS) if goal is not None else 0
        if goal is None or expected <= 0:
            return False
        chance = StoredChance(
            decision_lsn=decision_lsn,
            close_us=time_us + goal.window_us,
            expected=expected,
            silence=round(goal.default_reward * UNITS),
        )
        part = self._part(key)
        if not history.begin(part, goal.name, slot.action, chance, lsn, time_us):
            return False
        self._changed_parts.add(key)
        return True

    def _is_seen(self, slot: SlotRecord, record: Record, decided: Record) -> bool:
        """Say whether a first outcome came before the slot was given up as never seen."""
        goal = self._goal_of(slot)
        waited_us = record.time_us - decided.time_us
        return goal is not None and waited_us < max(goal.window_us, history.UNSEEN_WAIT_US_MIN)

    def _settle_chance(
        self,
        key: bytes,
        slot: SlotRecord,
        outcome: OutcomeRecord,
        request: DecideRequest,
        decision: DecisionRecord,
        record: Record,
        decided: Record,
    ) -> bytes | None:
        """Credit an outcome to the chance it came of, and return under which node that was kept; None: nowhere.

        That may be another node than the outcome is told of: somebody else named with it became known meanwhile.
        """
        goal = self._goal_of(slot)
        reward = goal.rewards.get(outcome.type) if goal is not None else None
        if goal is None or reward is None or not slot.general_propensity:
            return None
        lsn, now_us = max(record.lsn, decided.lsn), max(record.time_us, decided.time_us)
        for holder in self._holders(key, request, decision):
            if self._graph.node(holder) is None:
                continue
            if history.settle(self._part(holder), goal.name, slot.action, decided.lsn, reward, lsn, now_us):
                self._changed_parts.add(holder)
                return holder
        return None

    def _holders(self, key: bytes, request: DecideRequest, decision: DecisionRecord) -> Iterator[bytes]:
        """Yield under which nodes something that was shown may be kept, the likeliest first."""
        yield key
        yield from (one.key for one in named_all(request.identities, self._terms))
        if decision.profile_key:
            owner = self._txn.get(Table.OWNERS, decision.profile_key)
            if owner is not None:
                yield bytes(owner)

    def _goal_of(self, slot: SlotRecord) -> Goal | None:
        """Return the goal of a slot if it keeps a history."""
        row = self._catalog.goal_rows.get(slot.goal)
        goal = self._catalog.goals[row] if row is not None else None
        return goal if goal is not None and goal.keeps_history else None

    def _tell(self, key: bytes, record: Record, *, is_shown: bool) -> None:
        """Say anew from when until when the person of a node is left in peace, and what came of what was shown.

        Args:
            key: of the node.
            record: that changed it.
            is_shown: their history is another.
        """
        if not self._terms.contacts.counting and not is_shown:
            return
        profile_key = self._graph.known(key).profile_key
        stored = repository.load(self._txn, profile_key)
        if stored is None or stored.layout != self._catalog.space.profile_layout:
            self._refold([], [key], record)
            return
        contacts = holds.read_contacts(self._txn, stored.parts, self._terms.contacts)
        held = holds.fold_holds(contacts, self._terms.contacts, record.time_us)
        shown = history.fold(map(self._part, stored.parts))
        self._txn.put(Table.PROFILES, profile_key, stored.with_told(held, shown))

    def _forget_old(self, key: bytes, record: Record) -> None:
        """Drop claims and touchpoints whose time is over."""
        part = self._part(key)
        kept = [claim for claim in part.claims if not self._is_over(claim.attribute, claim.time_us, record.time_us)]
        if len(kept) != len(part.claims):
            del part.claims[:]
            part.claims.extend(kept)
            self._comparables.pop(key, None)
            self._changed_parts.add(key)
        if not part.forget_us or part.forget_us > record.time_us:
            return
        part.forget_us = 0
        series = self._series_of(key)  # before the timeline changes, as above
        for place, value in list(self._txn.scan(Table.TIMELINE, key)):
            touchpoint = Touchpoint.FromString(value)
            declared = self._terms.events.get(touchpoint.event.event.type)
            retention_us = declared.retention_us if declared is not None else RETENTION_US
            forget_us = -(-(parts.instant_of(place) + retention_us) // DAY_US) * DAY_US
            if forget_us <= record.time_us:
                self._txn.delete(Table.TIMELINE, place)
            elif not part.forget_us or forget_us < part.forget_us:
                part.forget_us = forget_us
        self._series[key] = series.prune(self._terms.series, record.time_us)
        self._changed_parts.add(key)

    def _is_over(self, attribute: str, time_us: int, now_us: int) -> bool:
        row = self._terms.attribute_rows.get(attribute)
        time_to_live_us = self._terms.attributes[row].time_to_live_us if row is not None else 0
        return bool(time_to_live_us) and time_us + time_to_live_us <= now_us

    # Matching.

    def _match(self, key: bytes, said: Said) -> list[bytes]:
        """Look for others whose attributes agree with a part's; return the nodes whose people may differ now."""
        node = self._graph.touch(key)
        self._comparables.pop(key, None)
        mine = self._comparable(key)
        blocks = sorted(set(matching.blocking_keys(self._fields, mine)))
        left, entered = set(node.blocks) - set(blocks), set(blocks) - set(node.blocks)
        del node.blocks[:]
        node.blocks.extend(blocks)
        touched = self._move(key, left, entered, said)
        candidates = {other for members in map(self._block, blocks) if _says(members) for other in members}
        candidates.discard(key)
        weights = {}
        for other in sorted(candidates):
            weight = matching.weight(self._fields, mine, self._comparable(other))
            if weight >= self._terms.matching.review_weight_min:
                weights[other] = weight
        self._review(key, node, weights)
        return touched + self._graph.match(key, weights, said)

    def _move(self, key: bytes, left: Iterable[bytes], entered: Iterable[bytes], said: Said) -> list[bytes]:
        """Take a part out of blocks and put it into others; return the nodes whose people may differ now.

        Whoever stands in a block that has become small enough is compared, and what rests on none but blocks that have
        become too large is taken back: who came first is without effect.
        """
        for block in left:
            self._txn.delete(Table.BLOCKS, block + key)
        for block in entered:
            self._txn.put(Table.BLOCKS, block + key, b"\0")
        opened = [members for members in map(self._block, left) if len(members) == BLOCK_PARTS_MAX]
        closed = [members for members in map(self._block, entered) if len(members) == BLOCK_PARTS_MAX + 1]
        return self._compare(opened, said) + self._take_back(set().union(*closed), said)

    def _compare(self, blocks: Iterable[Sequence[bytes]], said: Said) -> list[bytes]:
        """Match all who stand in one of some blocks together. Cost: up to 30 ms a block."""
        touched: list[bytes] = []
        for one, other in sorted({pair for block in blocks for pair in combinations(block, 2)}):
            if edge_to(self._graph.known(one), other, _MATCHED) is None:
                weight = matching.weight(self._fields, self._comparable(one), self._comparable(other))
                if weight >= self._terms.matching.review_weight_min:
                    self._txn.put(Table.REVIEWS, review_key(weight, one, other), b"\0")
                    self._graph.match_one(one, other, weight, said)
                    touched += [one, other]
        return touched

    def _take_back(self, keys: set[bytes], said: Said) -> list[bytes]:
        """Take back matches among some parts that share no block any more that says anything."""
        touched: list[bytes] = []
        says: dict[bytes, bool] = {}
        for one in sorted(keys):
            node = self._graph.known(one)
            weights = {edge.other_key: edge.weight for edge in node.edges if edge.reason == _MATCHED}
            blocks = set(node.blocks)
            for other in sorted(weights.keys() & keys):
                shared = blocks.intersection(self._graph.known(other).blocks)
                says |= {block: _says(self._block(block)) for block in shared - says.keys()}
                if not any(says[block] for block in shared):
                    self._txn.delete(Table.REVIEWS, review_key(weights[other], one, other))
                    self._graph.match_one(one, other, None, said)
                    touched += [one, other]
        return touched

    def _block(self, block: bytes) -> list[bytes]:
        """Return who stands in a block; of more than BLOCK_PARTS_MAX two more, to see when it gets there."""
        places = islice(self._txn.scan(Table.BLOCKS, block), BLOCK_PARTS_MAX + 2)
        return [place[len(block) :] for place, _ in places]

    def _review(self, key: bytes, node: StoredNode, weights: dict[bytes, float]) -> None:
        """Keep the list of pairs to review in step with a node's matches."""
        for edge in node.edges:
            if edge.weight and not edge.verdict:
                self._txn.delete(Table.REVIEWS, review_key(edge.weight, key, edge.other_key))
        for other, weight in weights.items():
            self._txn.put(Table.REVIEWS, review_key(weight, key, other), b"\0")

    def _comparable(self, key: bytes) -> matching.Comparable:
        if key not in self._comparables:
            self._comparables[key] = matching.comparable(self._fields, self._texts(key))
        return self._comparables[key]

    def _texts(self, key: bytes) -> dict[str, str]:
        """Return what a part says in clean texts that have a meaning."""
        trust = golden.trust_of(self._terms)
        texts: dict[str, str] = {}
        for name, claims in golden.claims_by_attribute([self._part(key)]).items():
            row = self._terms.attribute_rows.get(name)
            if row is None or not self._terms.attributes[row].meaning:
                continue
            ranked = survivorship.standing(claims, self._terms.attributes[row], trust, -survivorship.NEVER_US)
            if ranked and not ranked[0].uncleansed:
                texts[name] = ranked[0].value.text_value
        return texts

    # People.

    def _refold(self, touched: Sequence[bytes], keys: Iterable[bytes], record: Record) -> None:
        """Fold anew the people of nodes that were touched, and those that nodes belong to."""
        regrouped = self._graph.regroup(touched, self._fields, self._comparable) if touched else Regrouped({}, [])
        inherited: dict[str, int] = {}
        for profile_key in regrouped.gone:
            inherited |= self._drop_profile(profile_key)
        people = dict(regrouped.people)
        for key in keys:
            profile_key = self._graph.known(key).profile_key
            if profile_key not in people:
                people[profile_key] = list(repository.members(self._txn, profile_key)) or [key]
        for profile_key in sorted(people):
            self._fold(profile_key, people[profile_key], record, inherited)

    def _fold(self, profile_key: bytes, keys: Sequence[bytes], record: Record, inherited: dict[str, int]) -> None:
        leader = identity_key(leader_of(map(self._graph.known, keys)).identity)
        content = [(key, self._part(key), self._series_of(key)) for key in keys]
        contacts = holds.read_contacts(self._txn, keys, self._terms.contacts)
        folded = golden.fold(leader, content, contacts, self._terms, record.time_us)
        if self._txn.get(Table.PROFILES, profile_key) is None:
            self._standing.count_people(1)
        facts, change_us = repository.save(self._txn, profile_key, folded, self._catalog, record.lsn, record.time_us)
        self._standing.update(profile_key, leader, facts, record, inherited)
        dues = [part.forget_us for _, part, _ in content if part.forget_us]
        if self._standing.is_declared:
            dues.append(change_us)
        dues.append(folded.refold_us)
        # Not before the next microsecond: whatever is due by now has just been seen to.
        self._set_timer(profile_key, max(min(dues), record.time_us + 1))

    def _set_timer(self, profile_key: bytes, due_us: int) -> None:
        before = self._txn.get(Table.DUE, profile_key)
        due = due_us.to_bytes(8, "big") if due_us < survivorship.NEVER_US else None
        if (bytes(before) if before is not None else None) == due:
            return
        if before is not None:
            self._txn.delete(Table.TIMERS, bytes(before) + profile_key)
        if due is None:
            self._txn.delete(Table.DUE, profile_key)
        else:
            self._txn.put(Table.DUE, profile_key, due)
            self._txn.put(Table.TIMERS, due + profile_key, b"\0")
            self._next_timer_us = min(self._next_timer_us, due_us)

    def _drop_profile(self, profile_key: bytes) -> dict[str, int]:
        """Remove a flat record and what hangs on it; return the segments it was in, with the instants entered."""
        if self._txn.get(Table.PROFILES, profile_key) is not None:
            self._standing.count_people(-1)
        self._txn.delete(Table.PROFILES, profile_key)
        self._set_timer(profile_key, survivorship.NEVER_US)
        return self._standing.drop(profile_key)

    def _drop_part(self, key: bytes, said: Said) -> list[bytes]:
        """Remove everything recorded under a node; return the nodes whose people may differ now."""
        node = self._graph.known(key)
        for edge in node.edges:
            if edge.weight:
                self._txn.delete(Table.REVIEWS, review_key(edge.weight, key, edge.other_key))
        touched = self._move(key, node.blocks, (), said)
        for table in (Table.TIMELINE, Table.CONTACTS):
            for place, _ in list(self._txn.scan(table, key)):
                self._txn.delete(table, place)
        self._txn.delete(Table.PARTS, key)
        for cache in (self._parts, self._series, self._comparables):
            cache.pop(key, None)
        self._changed_parts.discard(key)
        return touched

    def _count_conflicts(self, key: bytes, said: SourceRecord, source: Source) -> None:
        """Count the attributes in which a record differs from what stands from other sources."""
        if not said.attributes:
            return
        members = repository.members(self._txn, self._graph.known(key).profile_key)
        content = [self._part(each) for each in members]
        if all(claim.source == source.name for part in content for claim in part.claims):
            return
        claims = golden.claims_by_attribute(content)
        trust = golden.trust_of(self._terms)
        for name in sorted(said.attributes):
            row = self._terms.attribute_rows.get(name)
            if row is None:
                continue
            others = [claim for claim in claims.get(name, ()) if claim.source != source.name]
            ranked = survivorship.standing(others, self._terms.attributes[row], trust, -survivorship.NEVER_US)
            if not ranked:
                continue
            mine = [claim for claim in claims[name] if claim.source == source.name]
            latest = max(mine, key=lambda claim: (claim.time_us, claim.lsn))
            if latest.value != ranked[0].value:
                self._counts.conflict(source.name, name)


def _says(block: Sequence[bytes]) -> bool:
    """Say whether what the members of a block share is rare enough to compare them."""
    return len(block) <= BLOCK_PARTS_MAX
