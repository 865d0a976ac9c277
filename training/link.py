"""Batch matching: who else may be one person, and how much agreement says here: ``python -m training link``.

Handed the data directory of a server, it reads what the state knows of each identity. What comes of it are weights for
the catalog's ``matching.fields``, trained on these very people (``linkage.py``), which somebody has to paste and push;
and proposals, which go to the running server as anybody's would. It writes nothing else.

Cost sketch: 50 µs to read a part, and a group commit a proposal.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as Shown
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq

from server.catalog.catalog import Catalog
from server.catalog.profile_terms import ProfileTerms
from server.config import Settings
from server.decisioning.live import CATALOG_HEAD, load_catalog
from server.files import Files
from server.profiles import golden, matching, survivorship
from server.profiles.comparables import MEANINGS
from server.profiles.identity import joins
from server.profiles.matching import Comparable, MatchFields, levels
from server.registry.blobs import BlobError, Blobs
from server.storage.generations import is_made
from server.storage.lmdb_log import LmdbLog
from server.storage.lmdb_store import LmdbStore
from server.storage.store import Snapshot, Store, Table
from training.linkage import Level, Linkage, Part, Told, bits_of, says_anything, silent
from tsugi.client import CallError, Client
from tsugi.log.v1.record_pb2 import CatalogChange
from tsugi.log.v1.state_pb2 import StoredNode
from tsugi.v1.profile_pb2 import LinkReason
from tsugi.v1.profile_service_pb2 import LinkVerdict

STATED_BY: Final = "splink"
PROPOSALS_MAX: Final = 10_000
WEIGHT_DECIMALS: Final = 3  # of a proposal, as lists of reviews tell pairs apart
PAGE_NODES: Final = 1_000  # read from one snapshot, in some 20 ms

CALL_S_MAX: Final = 20.0

_GONE: Final = frozenset({"ERROR_REASON_RESOURCE_NOT_FOUND", "ERROR_REASON_IDENTITIES_CONFLICT"})


class LinkError(Exception):
    """There is nothing to match, or nothing to match by; says what to do."""


class Known(NamedTuple):
    """What a state says about who is who."""

    parts: list[Part]  # that say something to compare, by key ascending; of identities that may be linked
    judged: frozenset[tuple[bytes, bytes]]  # two profiles, the lesser key first: somebody said whether they are one
    waiting: dict[tuple[bytes, bytes], float]  # two parts, the lesser key first, and the bits they wait with


class Proposal(NamedTuple):
    """Two parts that may be of one person."""

    weight: float  # bits
    one: Part
    other: Part

    @property
    def request_id(self) -> str:
        """The same for the same two at the same weight."""
        weight = f"{self.weight:.{WEIGHT_DECIMALS}f}".encode()
        digest = hashlib.blake2b(self.one.key + self.other.key + weight, digest_size=16, person=b"tsugi.link")
        return f"{STATED_BY}-{digest.hexdigest()}"


def read_known(store: Store, terms: ProfileTerms, told: Told = silent) -> Known:
    """Read from a state what can be matched, in short reads, so that nobody else is held up.

    Args:
        store: the state.
        terms: of the catalog in force.
        told: progress.
    """
    fields, parts = matching.fields_of(terms), list[Part]()
    profiles: dict[bytes, bytes] = {}
    judged: list[tuple[bytes, bytes]] = []
    sides: dict[tuple[int, bool], set[bytes]] = defaultdict(set)  # by split and side, profiles
    waiting: dict[tuple[bytes, bytes], float] = {}
    start = b""
    while True:
        with store.read() as snapshot:
            page = list(itertools.islice(snapshot.scan(Table.NODES, start=start), PAGE_NODES))
            for key, value in page:
                node = StoredNode.FromString(value)
                profiles[key] = node.profile_key
                for split in node.splits:
                    sides[split.lsn, split.left].add(node.profile_key)
                for edge in node.edges:
                    pair = (min(key, edge.other_key), max(key, edge.other_key))
                    if edge.verdict in _JUDGED:
                        judged.append(pair)
                    elif edge.reason != LinkReason.LINK_REASON_SHARED_RECORD:
                        waiting[pair] = max(edge.weight, waiting.get(pair, 0.0))
                if joins(node, terms):
                    comparable = matching.comparable(fields, _texts(snapshot, key, terms))
                    if says_anything(comparable):
                        parts.append(Part(key, node.identity, node.profile_key, comparable))
        told("read", len(profiles), 0)
        if len(page) < PAGE_NODES:
            break
        start = page[-1][0] + b"\0"
    apart = {_ordered(profiles[one], profiles[other]) for one, other in judged if {one, other} <= profiles.keys()}
    for (lsn, is_left), keys in sides.items():
        if is_left:
            apart |= {_ordered(*pair) for pair in itertools.product(keys, sides.get((lsn, False), ()))}
    return Known(parts, frozenset(apart), waiting)


_JUDGED: Final = frozenset({LinkVerdict.LINK_VERDICT_SAME, LinkVerdict.LINK_VERDICT_DIFFERENT})


def _ordered(one: bytes, other: bytes) -> tuple[bytes, bytes]:
    return (one, other) if one < other else (other, one)


def _texts(snapshot: Snapshot, key: bytes, terms: ProfileTerms) -> dict[str, str]:
    """Return what a part says in clean texts that have a meaning, as the projector compares it."""
    trust = golden.trust_of(terms)
    ((_, part),) = golden.read_parts(snapshot, [key])
    texts: dict[str, str] = {}
    for name, claims in golden.claims_by_attribute([part]).items():
        row = terms.attribute_rows.get(name)
        if row is None or not terms.attributes[row].meaning:
            continue
        ranked = survivorship.standing(claims, terms.attributes[row], trust, 0)
        if ranked and not ranked[0].uncleansed:
            texts[name] = ranked[0].value.text_value
    return texts


def weights_of(terms: ProfileTerms, trained: Mapping[int, Sequence[Level]]) -> dict[str, list[float]]:
    """Return the weights for a catalog, by attribute as declared: trained ones, or as they were.

    Args:
        terms: of the catalog in force.
        trained: by meaning; of several attributes of one meaning the first gets the weights, or the one that has some.
    """
    weights = {name: list(bits) for name, bits in terms.matching.weights.items()}
    for i, names in enumerate(matching.fields_of(terms).attributes):
        if names and i in trained:
            name = next((each for each in names if each in weights), names[0])
            weights[name] = bits_of(levels(MEANINGS[i]), trained[i])
    return dict(sorted(weights.items(), key=lambda each: terms.attribute_rows[each[0]]))


def proposals_of(
    known: Known, pairs: Sequence[tuple[int, int]], fields: MatchFields, weight_min: float
) -> list[Proposal]:
    """Return what is worth proposing of pairs of parts, the heaviest first: one proposal for two people.

    Its weight is that of the parts or, if less, of the people as wholes. People of whom somebody said whether they are
    one are left out, and what waits already with as much weight.

    Args:
        known: of the state.
        pairs: rows of its parts.
        fields: with the weights to go by.
        weight_min: bits.
    """
    best: dict[tuple[bytes, bytes], Proposal] = {}
    for one, other in (tuple(known.parts[row] for row in pair) for pair in pairs):
        people = _ordered(one.profile_key, other.profile_key)
        if people in known.judged:
            continue
        weight = matching.weight(fields, one.comparable, other.comparable)
        if weight >= weight_min and (people not in best or weight > best[people].weight):
            best[people] = Proposal(weight, one, other)
    wholes: dict[bytes, list[Comparable]] = defaultdict(list)
    for part in known.parts:
        wholes[part.profile_key].append(part.comparable)
    found = []
    for people, (weight, one, other) in best.items():
        as_wholes = matching.weight_between(fields, wholes[people[0]], wholes[people[1]])
        least = round(min(weight, as_wholes), WEIGHT_DECIMALS)
        waits = round(known.waiting.get(_ordered(one.key, other.key), 0.0), WEIGHT_DECIMALS)
        if least >= weight_min and least > waits:
            found.append(Proposal(least, one, other))
    return sorted(found, key=lambda each: (-each.weight, each.one.key, each.other.key))


def propose(client: Client, proposals: Sequence[Proposal], told: Told = silent) -> int:
    """Send proposals and return how many the server took; those about people who are gone by now are left out.

    Raises:
        CallError: the server cannot be reached, or takes no statements.
    """
    n_taken = 0
    for n_sent, each in enumerate(proposals, start=1):
        one, other = ((part.identity.namespace, part.identity.value) for part in (each.one, each.other))
        try:
            client.link_identities(
                one, other, LinkVerdict.LINK_VERDICT_PROPOSED, weight=each.weight, stated_by=STATED_BY,
                request_id=each.request_id,
            )  # fmt: skip
            n_taken += 1
        except CallError as error:
            if error.reason not in _GONE:
                raise
        told("proposing", n_sent, len(proposals))
    return n_taken


def catalog_fragment(weights: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return weights as they stand in a catalog."""
    fields = []
    for attribute, bits in weights.items():
        line = CommentedSeq(bits)
        line.fa.set_flow_style()
        fields.append({"attribute": attribute, "weights": line})
    return {"matching": {"fields": fields}}


def catalog_in_force(files: Files, log: LmdbLog) -> Catalog:
    """Return the catalog in force, compiled.

    Raises:
        LinkError: none is, or it matches nothing.
    """
    record = log.get(log.head(CATALOG_HEAD))
    if record is None:
        raise LinkError("no catalog is in force; push one first")
    catalog = load_catalog(Blobs(files.registry), CatalogChange.FromString(record.payload).catalog_sha256)
    if not catalog.profiles.matching.is_on:
        raise LinkError("matching is off in the catalog in force, or no attribute of it has a meaning")
    return catalog


@click.command("link")
@click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The server's data directory; read only.",
)
@click.option(
    "--address", envvar="TSUGI_ADDRESS", default="127.0.0.1:7410", show_default=True, help="Where the server is."
)
@click.option(
    "--weights",
    "weights_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the trained weights, as the part of a catalog they are.",
)
@click.option("--dry-run", is_flag=True, help="Propose nothing; say how much there would be.")
@click.option(
    "--proposals-max",
    type=click.IntRange(min=0),
    default=PROPOSALS_MAX,
    show_default=True,
    help="At most so many, the heaviest first.",
)
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of the pairs that are drawn.")
def link_command(
    data: Path, address: str, weights_path: Path | None, dry_run: bool, proposals_max: int, seed: int
) -> None:
    """Train the weights of matching on the people there are, and propose links between them."""
    console = Console()
    try:
        with _told() as told, Client(address, timeout_s=CALL_S_MAX) as client:
            if not dry_run:
                client.list_match_reviews(page_size=1)  # rather now than after minutes of work
            known, terms = _read(Files.below(data), told)
            linkage = Linkage(known.parts, matching.fields_of(terms), seed)
            try:
                weights = weights_of(terms, linkage.train(told))
                fields = matching.match_fields([(each.name, each.meaning) for each in terms.attributes], weights)
                told("comparing", 0, 0)
                pairs = linkage.predict(fields, terms.matching.review_weight_min)
            finally:
                linkage.close()
            proposals = proposals_of(known, pairs, fields, terms.matching.review_weight_min)
            n_found, proposals = len(proposals), proposals[:proposals_max]
            if weights_path is not None:
                with weights_path.open("w", encoding="utf-8") as file:
                    YAML().dump(catalog_fragment(weights), file)
            n_taken = 0 if dry_run else propose(client, proposals, told)
    except (LinkError, BlobError) as error:
        raise click.ClickException(str(error)) from error
    except CallError as error:
        raise click.ClickException(f"the server at {address} does not answer as it should: {error}") from error
    console.print(_shown(terms, weights))
    console.print(f"{len(known.parts):,} parts, {n_found:,} pairs of people that may be one, by {STATED_BY}")
    console.print("nothing was proposed: a dry run" if dry_run else f"{n_taken:,} of {len(proposals):,} proposed")


def _read(files: Files, told: Told) -> tuple[Known, ProfileTerms]:
    if not (is_made(files.log) and is_made(files.state)):
        raise LinkError(f"{files.root} is not the data directory of a server that has run")
    settings = Settings().data
    log = LmdbLog(files.log, settings.log_map_bytes, writable=False)
    try:
        terms = catalog_in_force(files, log).profiles
    finally:
        log.close()
    store = LmdbStore(files.state, settings.state_map_bytes)
    try:
        known = read_known(store, terms, told)
    finally:
        store.close()
    if len(known.parts) < 2:
        raise LinkError("fewer than two identities have texts to compare; import some records first")
    return known, terms


def _shown(terms: ProfileTerms, weights: Mapping[str, Sequence[float]]) -> Shown:
    """Return the weights for people to read, those in force beside the new ones."""
    shown = Shown("attribute", "level", "bits in force", "bits now")
    before = matching.fields_of(terms)
    for i, names in enumerate(before.attributes):
        name = next((each for each in names if each in weights), "")
        for row, level in enumerate(levels(MEANINGS[i]) if name else ()):
            bits = weights[name][min(row, len(weights[name]) - 1)]
            shown.add_row("" if row else name, level.name, f"{before.against_strangers[i][row]:.2f}", f"{bits:.2f}")
    return shown


@contextmanager
def _told() -> Iterator[Told]:
    """Show progress on standard error, when somebody looks."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def told(what: str, n_done: int, n_all: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what)
            progress.update(tasks[what], completed=n_done, total=n_all or None)

        yield told
