"""The identity graph in the state store: nodes, what joins them, and the people they fall into.

Used by the projector alone, inside its transaction. A record's identities become nodes and edges; where that changes
who is one person, the neighbourhood is divided into people anew (``identity.partition``) and every node is told its
profile. The result depends on the edges alone, so it does not matter in which order they came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import Final, NamedTuple

from server.catalog.profile_terms import ProfileTerms
from server.profiles import identity as identities
from server.profiles import repository
from server.profiles.identity import Named
from server.profiles.matching import Comparable, MatchFields
from server.storage.store import Table, Transaction
from tsugi.log.v1.state_pb2 import StoredEdge, StoredNode, StoredSplit
from tsugi.v1.profile_pb2 import LinkReason
from tsugi.v1.profile_service_pb2 import LinkVerdict

NEIGHBOURHOOD_MAX: Final = 192  # nodes looked at together, and whole people; who lies beyond is none of them
EDGES_MAX: Final = 1_024  # of one node; further ones are left out

_SHARED_RECORD: Final = LinkReason.LINK_REASON_SHARED_RECORD
_STATED: Final = LinkReason.LINK_REASON_STATED
_MATCHED: Final = LinkReason.LINK_REASON_MATCHED


class Said(NamedTuple):
    """Where an edge comes from."""

    lsn: int
    time_us: int
    source: str


class Regrouped(NamedTuple):
    """What became of people when a neighbourhood was divided anew."""

    people: dict[bytes, list[bytes]]  # those that changed: profile key → node keys
    gone: list[bytes]  # keys of profiles that are part of others now, or of none


class Graph:
    """Nodes of one transaction, read once and written back by flush().

    Args:
        txn: the projector's.
        terms: of the catalog in force.
        log_id: of the log; part of new profile keys.
    """

    def __init__(self, txn: Transaction, terms: ProfileTerms, log_id: bytes) -> None:
        self._txn = txn
        self._terms = terms
        self._log_id = log_id
        self._nodes: dict[bytes, StoredNode | None] = {}
        self._changed: set[bytes] = set()

    def node(self, key: bytes) -> StoredNode | None:
        """Return a node, None when nobody named it yet; not to be changed but through this class."""
        if key not in self._nodes:
            stored = self._txn.get(Table.NODES, key)
            self._nodes[key] = StoredNode.FromString(bytes(stored)) if stored is not None else None
        return self._nodes[key]

    def known(self, key: bytes) -> StoredNode:
        """Return a node that must be there."""
        node = self.node(key)
        assert node is not None, "edges and profiles name nodes"
        return node

    def touch(self, key: bytes) -> StoredNode:
        """Return a node to be changed."""
        self._changed.add(key)
        return self.known(key)

    def meet(self, one: Named, lsn: int, position: int) -> bool:
        """Make a node for an identity that is named for the first time; say whether it is new."""
        if self.node(one.key) is not None:
            return False
        own_key = identities.own_profile_key(self._log_id, lsn, position)
        self._nodes[one.key] = StoredNode(
            identity=one.identity,
            raw_value=one.raw_value,
            uncleansed=not one.is_clean,
            first_lsn=lsn,
            position=position,
            own_profile_key=own_key,
        )
        self._changed.add(one.key)
        return True

    def name_together(self, anchor: bytes, other: bytes, said: Said) -> list[bytes]:
        """Note that one record named two identities; return the nodes whose people may differ now.

        A value that comes to stand beside more others than its namespace allows is too shared from then on: what it
        held together falls apart. Who else it stands beside is noted all the same, for that counts for the others.
        """
        ends = (self.known(anchor), self.known(other))
        is_known = identities.edge_to(ends[0], other, _SHARED_RECORD) is not None
        if is_known or any(len(end.edges) >= EDGES_MAX for end in ends):
            return []
        changed = [anchor, other]
        for key, neighbour in ((anchor, other), (other, anchor)):
            node = self.touch(key)
            node.edges.add(
                other_key=neighbour, reason=_SHARED_RECORD, lsn=said.lsn, time_us=said.time_us, source=said.source
            )
            if not node.too_shared and self._is_too_shared(node):
                node.too_shared = True
                changed += [edge.other_key for edge in node.edges]
        return changed

    def state(self, one: bytes, other: bytes, verdict: int, weight: float, said: Said) -> list[bytes]:
        """Note what somebody stated about two identities; the latest statement about a pair stands."""
        is_proposal = verdict == LinkVerdict.LINK_VERDICT_PROPOSED
        for key, neighbour in ((one, other), (other, one)):
            node = self.touch(key)
            for edge in [each for each in node.edges if each.other_key == neighbour and each.reason == _STATED]:
                if is_proposal and edge.verdict != LinkVerdict.LINK_VERDICT_PROPOSED:
                    break  # what somebody decided is not proposed anew
                node.edges.remove(edge)
            else:
                node.edges.add(
                    other_key=neighbour, reason=_STATED, verdict=verdict, lsn=said.lsn, time_us=said.time_us,
                    source=said.source, weight=weight if is_proposal else 0.0,
                )  # fmt: skip
        return [one, other]

    def split(self, leaving: Iterable[bytes], staying: Iterable[bytes], lsn: int) -> list[bytes]:
        """Note that nodes on two sides stay apart from now on."""
        changed = []
        for left, keys in ((True, leaving), (False, staying)):
            for key in keys:
                if self.node(key) is not None:
                    self.touch(key).splits.append(StoredSplit(lsn=lsn, left=left))
                    changed.append(key)
        return changed

    def match(self, key: bytes, weights: dict[bytes, float], said: Said) -> list[bytes]:
        """Put a node's matches in the place of those it had; return the nodes whose people may differ now."""
        before = {edge.other_key: edge.weight for edge in self.known(key).edges if edge.reason == _MATCHED}
        changed = [other for other in before.keys() | weights.keys() if before.get(other) != weights.get(other)]
        for other in sorted(changed):
            self.match_one(key, other, weights.get(other), said)
        return [key] if changed else []  # from there the others are found, or they are one person with it already

    def match_one(self, one: bytes, other: bytes, weight: float | None, said: Said) -> None:
        """Put one match in the place of what there was; None: there is none any more."""
        for key, neighbour in ((one, other), (other, one)):
            node = self.touch(key)
            edge = identities.edge_to(node, neighbour, _MATCHED)
            if edge is not None:
                node.edges.remove(edge)
            if weight is not None:
                node.edges.add(other_key=neighbour, reason=_MATCHED, weight=weight, lsn=said.lsn, time_us=said.time_us)

    def regroup(
        self, touched: Iterable[bytes], fields: MatchFields, comparable: Callable[[bytes], Comparable]
    ) -> Regrouped:
        """Divide the neighbourhood of some nodes into people anew, and tell every node its profile.

        Args:
            touched: keys of nodes.
            fields: what people are matched by.
            comparable: what is recorded under a node, by key.

        Returns:
            What changed. Cost: a few µs a node and edge of the neighbourhood.
        """
        core, fringe = self._neighbourhood(touched)
        keys = [*core, *fringe]
        labels = identities.partition(keys, list(map(self.known, keys)), self._terms, fields, comparable)
        groups: dict[int, list[bytes]] = {}
        for key, label in zip(core, labels[: len(core)], strict=True):
            groups.setdefault(label, []).append(key)
        before = {self.known(key).profile_key for key in core} - {b""}
        people: dict[bytes, list[bytes]] = {}
        after: set[bytes] = set()
        moved_from: set[bytes] = set()
        for members in groups.values():
            profile_key = identities.leader_of(map(self.known, members)).own_profile_key
            after.add(profile_key)
            moved = [key for key in members if self.known(key).profile_key != profile_key]
            moved_from |= {self.known(key).profile_key for key in moved}
            for key in moved:
                self.touch(key).profile_key = profile_key
            if moved:
                people[profile_key] = members
            for key in members:
                self._lead(key)
        for members in groups.values():
            profile_key = self.known(members[0]).profile_key
            if profile_key in moved_from:  # some of its nodes left, and it stays
                people[profile_key] = members
        for profile_key, members in people.items():
            leader = identities.leader_of(map(self.known, members))
            self._txn.put(Table.OWNERS, profile_key, identities.identity_key(leader.identity))
        return Regrouped(people, sorted(before - after))

    def forget(self, keys: Iterable[bytes]) -> list[bytes]:
        """Remove nodes, their edges, and what leads to them; return the neighbours that are left.

        Who was too shared because of those who are gone is so no longer.
        """
        gone = set(keys)
        neighbours: set[bytes] = set()
        for key in sorted(gone):
            node = self.known(key)
            neighbours |= {edge.other_key for edge in node.edges} - gone
            self._txn.delete(Table.NODES, key)
            self._txn.delete(Table.IDENTITIES, key)
            self._txn.delete(Table.OWNERS, node.own_profile_key)
            self._nodes[key] = None
            self._changed.discard(key)
        for key in sorted(neighbours):
            node = self.touch(key)
            kept = [edge for edge in node.edges if edge.other_key not in gone]
            del node.edges[:]
            node.edges.extend(kept)
            node.too_shared = node.too_shared and self._is_too_shared(node)
        return sorted(neighbours)

    def flush(self) -> None:
        """Write back what changed."""
        for key in sorted(self._changed):
            self._txn.put(Table.NODES, key, self.known(key).SerializeToString(deterministic=True))
        self._changed.clear()

    def _lead(self, key: bytes) -> None:
        """Let an identity lead to its profile, or to none."""
        node = self.known(key)
        if identities.leads(node, self._terms):
            self._txn.put(Table.IDENTITIES, key, node.profile_key)
        else:
            self._txn.delete(Table.IDENTITIES, key)

    def _is_too_shared(self, node: StoredNode) -> bool:
        beside = [self.known(edge.other_key) for edge in node.edges if edge.reason == _SHARED_RECORD]
        return identities.is_too_shared(node, beside, self._terms)

    def _neighbourhood(self, touched: Iterable[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Return the nodes that may be one person with those touched, and those beside that only devices know.

        A device holds nobody together, so the way does not lead on through it; but whoever else is known on it is
        needed to see that. Where the way ends early it does not end within a person: nobody is left behind with a
        profile that the others have gone from.
        """
        start = sorted(set(touched))
        core: dict[bytes, None] = {}
        fringe: dict[bytes, None] = {}
        waiting: deque[bytes] = deque()

        def take(key: bytes) -> None:
            for each in (key, *repository.members(self._txn, self.known(key).profile_key)):
                if each not in core:
                    core[each] = None
                    waiting.append(each)

        for key in start:
            take(key)
        while waiting:
            key = waiting.popleft()
            node = self.known(key)
            is_device = identities.is_device(node, self._terms)
            holds = is_device or identities.joins(node, self._terms)
            edges = [(edge.other_key, edge) for edge in node.edges if holds or edge.reason == _STATED]
            for other, edge in sorted((each for each in edges if each[0] not in core), key=itemgetter(0)):
                if other in core or not self._conducts(node, edge):
                    continue
                if is_device and key not in start:
                    fringe[other] = None
                elif len(core) < NEIGHBOURHOOD_MAX:
                    take(other)
        return list(core), [key for key in fringe if key not in core]

    def _conducts(self, node: StoredNode, edge: StoredEdge) -> bool:
        """Say whether two nodes may be one person because of an edge."""
        if edge.reason == _STATED and edge.verdict != LinkVerdict.LINK_VERDICT_PROPOSED:
            return edge.verdict == LinkVerdict.LINK_VERDICT_SAME
        ends = (node, self.known(edge.other_key))
        if edge.reason != _SHARED_RECORD and edge.weight < self._terms.matching.link_weight_min:
            return False
        n_joining = sum(identities.joins(end, self._terms) for end in ends)
        n_devices = sum(identities.is_device(end, self._terms) for end in ends)
        return n_joining == 2 or (n_joining == 1 and n_devices == 1 and edge.reason == _SHARED_RECORD)
