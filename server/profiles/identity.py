"""Who is who: identities in the form they are compared in, and which of them are one person.

Handed identities and the nodes of a neighbourhood of the identity graph, with what speaks for and against their being
one person, it says under which identity a record is kept and how the nodes fall into people. Everything here is a pure
function of what is known, never of the order in which it came to be known.

*People* are found by taking what speaks for a union, the strongest first, and refusing each union that a rule forbids:
statements of people, then records that name two identities, then matches. A statement that two are different, a split,
and the namespaces' limits forbid. Devices come last: one goes to the person who is known on it, when that is one alone.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Final, NamedTuple

from server.catalog.profile_terms import SHARED_DEFAULT, ProfileTerms
from server.profiles.cleansing import cleanse
from server.profiles.matching import BETWEEN_BITS_MIN, Comparable, MatchFields, together, weight_between
from tsugi.log.v1.state_pb2 import StoredEdge, StoredNode
from tsugi.v1 import catalog_pb2
from tsugi.v1.identity_pb2 import Identity
from tsugi.v1.profile_pb2 import LinkReason
from tsugi.v1.profile_service_pb2 import LinkVerdict

KEY_BYTES: Final = 16
IDENTITIES_MAX: Final = 64  # of one person

_UNIQUE: Final = catalog_pb2.LINK_RULE_UNIQUE
_SHARED_DEVICE: Final = catalog_pb2.LINK_RULE_SHARED_DEVICE
_SHARED_RECORD: Final = LinkReason.LINK_REASON_SHARED_RECORD
_STATED: Final = LinkReason.LINK_REASON_STATED
_MATCHED: Final = LinkReason.LINK_REASON_MATCHED
_SAME: Final = LinkVerdict.LINK_VERDICT_SAME
_DIFFERENT: Final = LinkVerdict.LINK_VERDICT_DIFFERENT
_PROPOSED: Final = LinkVerdict.LINK_VERDICT_PROPOSED


class Named(NamedTuple):
    """One identity as a record names it."""

    key: bytes
    identity: Identity  # in the form it is compared in
    raw_value: str  # as it came, where cleansing changed it
    is_clean: bool


def identity_key(identity: Identity) -> bytes:
    """Return the 16 bytes an identity in its compared form is found by."""
    text = f"{identity.namespace}\0{identity.value}".encode()
    return hashlib.blake2b(text, digest_size=KEY_BYTES, person=b"tsugi.identity").digest()


def named(identity: Identity, terms: ProfileTerms, country_code: str = "") -> Named:
    """Bring one identity into the form it is compared in.

    Args:
        identity: of any namespace; one that is not declared is taken as it came.
        terms: of the catalog in force.
        country_code: where a telephone number without a country is from, unless the namespace says so itself.

    Cost: 1 µs; some 30 where its namespace has a meaning.
    """
    namespace = terms.namespaces.get(identity.namespace)
    if namespace is None or not namespace.meaning:
        return Named(identity_key(identity), identity, "", is_clean=True)
    clean = cleanse(namespace.meaning, identity.value, namespace.default_country_code or country_code)
    if clean.text == identity.value:
        return Named(identity_key(identity), identity, "", clean.is_clean)
    compared = Identity(namespace=identity.namespace, value=clean.text)
    return Named(identity_key(compared), compared, identity.value, clean.is_clean)


def lookup_key(identity: Identity, terms: ProfileTerms) -> bytes:
    """Return the key an identity is found by. Cost: 0.9 µs; some 30 where its namespace has a meaning."""
    namespace = terms.namespaces.get(identity.namespace)
    return identity_key(identity) if namespace is None or not namespace.meaning else named(identity, terms).key


def named_all(identities: Iterable[Identity], terms: ProfileTerms, country_code: str = "") -> list[Named]:
    """Bring a record's identities into their compared forms, each once, in order."""
    return list({one.key: one for one in (named(each, terms, country_code) for each in identities)}.values())


def anchor_of(identities: Sequence[Named], terms: ProfileTerms) -> int:
    """Return which of a record's identities the record is kept under.

    The one that says most about who the person is: of a unique namespace before a device's before any other, of a
    namespace declared earlier before a later one, and the first of those. What is known so far plays no part.
    """
    ranks = {name: row for row, name in enumerate(terms.namespaces)}

    def rank(i: int) -> tuple[int, int, int]:
        one = identities[i]
        rule = link_rule(one.identity.namespace, terms)
        strength = 0 if rule == _UNIQUE else 1 if rule == _SHARED_DEVICE else 2
        return (strength if one.is_clean else 3, ranks.get(one.identity.namespace, len(ranks)), i)

    return min(range(len(identities)), key=rank)


def link_rule(namespace: str, terms: ProfileTerms) -> catalog_pb2.LinkRule:
    """Return what sharing a value of a namespace means; one that is not declared any more links nobody."""
    declared = terms.namespaces.get(namespace)
    return declared.link_rule if declared is not None else catalog_pb2.LINK_RULE_NEVER


def joins(node: StoredNode, terms: ProfileTerms) -> bool:
    """Say whether a node may hold others together."""
    return not (node.too_shared or node.uncleansed) and link_rule(node.identity.namespace, terms) == _UNIQUE


def is_device(node: StoredNode, terms: ProfileTerms) -> bool:
    """Say whether a node is a device that may go to a person."""
    return not (node.too_shared or node.uncleansed) and link_rule(node.identity.namespace, terms) == _SHARED_DEVICE


def leads(node: StoredNode, terms: ProfileTerms) -> bool:
    """Say whether looking a node's identity up leads to a profile."""
    rule = link_rule(node.identity.namespace, terms)
    if node.too_shared or rule in {catalog_pb2.LINK_RULE_HOUSEHOLD, catalog_pb2.LINK_RULE_NEVER}:
        return not node.edges  # unless nobody but itself is meant
    return True


def partition(
    keys: Sequence[bytes],
    nodes: Sequence[StoredNode],
    terms: ProfileTerms,
    fields: MatchFields,
    comparable: Callable[[bytes], Comparable],
) -> list[int]:
    """Say which nodes of a neighbourhood are one person.

    Args:
        keys: of the nodes, distinct.
        nodes: in the same order, any. Edges to nodes outside count for nothing.
        terms: of the catalog in force.
        fields: what people are matched by.
        comparable: what is recorded under a node, by key; asked for where people are matched.

    Returns:
        A label a node; equal labels are one person. Cost: 5 µs an edge, and some 50 for each two people who match,
        once for what they are by then.
    """
    rows = {key: row for row, key in enumerate(keys)}
    edges = sorted(_edges(rows, nodes, terms), key=itemgetter(0))
    agreement = _Agreement(fields, lambda row: comparable(keys[row]))
    people = _People(nodes, terms, edges)
    for edge in edges:
        if edge.reason == _MATCHED:
            people.unite_matched(edge, agreement)
        elif edge.verdict != _DIFFERENT:
            people.unite(edge.a, edge.b)
    for row in sorted(range(len(nodes)), key=lambda row: keys[row]):
        if is_device(nodes[row], terms):
            people.give_device(row, [rows[e.other_key] for e in nodes[row].edges if e.other_key in rows])
    return people.labels()


class _Edge(NamedTuple):
    rank: tuple[int, float, int, int]  # the least goes first
    a: int
    b: int
    reason: int
    verdict: int
    lsn: int


def _edges(rows: dict[bytes, int], nodes: Sequence[StoredNode], terms: ProfileTerms) -> Iterator[_Edge]:
    """Yield each edge inside the neighbourhood once, with its rank; devices' edges come later by another way."""
    ranks = {name: row for row, name in enumerate(terms.namespaces)}
    strengths = [ranks.get(node.identity.namespace, len(ranks)) for node in nodes]
    may_join = [joins(node, terms) for node in nodes]
    places = {rows[key]: place for place, key in enumerate(sorted(rows))}  # of two equal edges the lesser keys' first
    for a, node in enumerate(nodes):
        for edge in node.edges:
            b = rows.get(edge.other_key, -1)
            if b <= a:
                continue
            reason = edge.reason
            one, other = places[a], places[b]
            pair = (one, other) if one < other else (other, one)
            if reason == _STATED and edge.verdict != _PROPOSED:
                yield _Edge((0, -float(edge.lsn), *pair), a, b, reason, edge.verdict, edge.lsn)
            elif not (may_join[a] and may_join[b]):
                continue
            elif reason == _SHARED_RECORD:
                weaker = float(max(strengths[a], strengths[b]))
                yield _Edge((1, weaker, *pair), a, b, reason, edge.verdict, edge.lsn)
            elif edge.weight >= terms.matching.link_weight_min:
                yield _Edge((2, -edge.weight, *pair), a, b, _MATCHED, edge.verdict, edge.lsn)


class _Agreement:
    """How much people agree while they grow; what one says is put together once."""

    def __init__(self, fields: MatchFields, comparable: Callable[[int], Comparable]) -> None:
        self._fields = fields
        self._comparable = comparable
        self._said: dict[int, tuple[int, list[Comparable]]] = {}  # by label: of how many members, and what

    def weight(self, one: int, members: Sequence[int], other: int, others: Sequence[int]) -> float:
        """Return how much two people agree, in bits; new members of either came behind those it had."""
        return weight_between(self._fields, self._of(one, members), self._of(other, others))

    def _of(self, label: int, members: Sequence[int]) -> list[Comparable]:
        n_known, said = self._said.get(label, (0, []))
        if n_known < len(members):
            said = together([*said, *map(self._comparable, members[n_known:])])
            self._said[label] = len(members), said
        return said


class _People:
    """Clusters in the making; a union that a rule forbids is refused."""

    def __init__(self, nodes: Sequence[StoredNode], terms: ProfileTerms, edges: Sequence[_Edge]) -> None:
        self._nodes = nodes
        self._terms = terms
        self._members = {row: [row] for row in range(len(nodes))}
        self._label = list(range(len(nodes)))
        self._weights: dict[tuple[int, int, int, int], float] = {}  # of two people, by label and size of each
        self._apart = [(edge.a, edge.b) for edge in edges if edge.verdict == _DIFFERENT]
        void = {
            split.lsn
            for edge in edges
            if edge.reason == _STATED and edge.verdict == _SAME
            for split in nodes[edge.a].splits
            if split.lsn < edge.lsn and _side(nodes[edge.b], split.lsn) == (not split.left)
        }
        self._sides = [{(s.lsn, s.left) for s in node.splits if s.lsn not in void} for node in nodes]

    def labels(self) -> list[int]:
        return self._label

    def unite(self, a: int, b: int) -> bool:
        """Make two clusters one, unless that is forbidden; say whether they are one now."""
        one, other = sorted((self._label[a], self._label[b]))
        if one == other:
            return True
        if not self._may_unite(self._members[one], self._members[other]):
            return False
        self._unite(one, other)
        return True

    def unite_matched(self, edge: _Edge, agreement: _Agreement) -> None:
        """Unite by a match, unless the two people as wholes do not agree: chains of look-alikes are not followed.

        Who proposed a match may know more than the people's attributes say, but not the contrary.
        """
        one, other = sorted((self._label[edge.a], self._label[edge.b]))
        if one == other:
            return
        members, others = self._members[one], self._members[other]
        grown = (one, len(members), other, len(others))  # people only grow, so this says who they are by now
        if grown not in self._weights:
            may_unite = self._may_unite(members, others)
            self._weights[grown] = agreement.weight(one, members, other, others) if may_unite else -math.inf
        bits_min = 0.0 if edge.verdict == _PROPOSED else min(BETWEEN_BITS_MIN, self._terms.matching.link_weight_min)
        if self._weights[grown] >= bits_min:
            self._unite(one, other)

    def give_device(self, row: int, neighbours: Sequence[int]) -> None:
        """Give a device to the person who is known on it, if it is one alone and nobody said otherwise."""
        known_on_it = {self._label[each] for each in neighbours if joins(self._nodes[each], self._terms)}
        if len(known_on_it) == 1 and len(self._members[self._label[row]]) == 1:
            self.unite(row, known_on_it.pop())

    def _unite(self, one: int, other: int) -> None:
        for row in self._members[other]:
            self._label[row] = one
        self._members[one] += self._members.pop(other)

    def _may_unite(self, one: Sequence[int], other: Sequence[int]) -> bool:
        if len(one) + len(other) > IDENTITIES_MAX:
            return False
        values = Counter(self._nodes[row].identity.namespace for row in (*one, *other))
        for name, count in values.items():
            declared = self._terms.namespaces.get(name)
            if declared is not None and 0 < declared.values_per_profile_max < count:
                return False
        ones, others = set(one), set(other)
        if any((a in ones and b in others) or (a in others and b in ones) for a, b in self._apart):
            return False
        sides = set().union(*(self._sides[row] for row in one))
        return not any((lsn, not left) in sides for row in other for lsn, left in self._sides[row])


def are_split(one: StoredNode, other: StoredNode) -> bool:
    """Say whether some split set two nodes apart."""
    return any(_side(other, split.lsn) == (not split.left) for split in one.splits)


def _side(node: StoredNode, split_lsn: int) -> bool | None:
    """Return whether a node left at a split; None when it took no part."""
    return next((split.left for split in node.splits if split.lsn == split_lsn), None)


def is_too_shared(node: StoredNode, beside: Iterable[StoredNode], terms: ProfileTerms) -> bool:
    """Say whether a value stands beside more others than its namespace allows.

    Others that say as much or more about who somebody is count: a customer may have any number of browsers, a browser
    only so many customers. So does whatever else means one person, as far as one may have so much of it: a number that
    stands beside everybody's e-mail address is no number at all.

    Args:
        node: the value's.
        beside: nodes that one record named together with it.
        terms: of the catalog in force.
    """
    declared = terms.namespaces.get(node.identity.namespace)
    if declared is None:
        return False
    ranks = {name: row for row, name in enumerate(terms.namespaces)}
    own = ranks[node.identity.namespace]
    n_stronger = n_weaker = 0
    for other in beside:
        is_stronger = ranks.get(other.identity.namespace, len(ranks)) <= own
        n_stronger += is_stronger
        n_weaker += not is_stronger and link_rule(other.identity.namespace, terms) == _UNIQUE
    return n_stronger > declared.shared_max or n_stronger + n_weaker > max(declared.shared_max, SHARED_DEFAULT)


def edge_to(node: StoredNode, other_key: bytes, reason: int) -> StoredEdge | None:
    """Return what is known for one reason between a node and another; None when nothing is."""
    return next((edge for edge in node.edges if edge.other_key == other_key and edge.reason == reason), None)


def leader_of(members: Iterable[StoredNode]) -> StoredNode:
    """Return the node that was known first: its profile stands."""
    return min(members, key=lambda node: (node.first_lsn, node.position))


def review_key(weight: float, one: bytes, other: bytes) -> bytes:
    """Return where a pair to review stands: by falling weight."""
    fallen = (1 << 32) - 1 - min(max(round(weight * 1_000), 0), (1 << 32) - 1)
    return fallen.to_bytes(4, "big") + min(one, other) + max(one, other)


def own_profile_key(log_id: bytes, lsn: int, position: int) -> bytes:
    """Return the key of the profile that an identity begins; the same at every rebuild."""
    place = lsn.to_bytes(8, "big") + (position.to_bytes(2, "big") if position else b"")
    return hashlib.blake2b(log_id + place, digest_size=KEY_BYTES, person=b"tsugi.profile").digest()
