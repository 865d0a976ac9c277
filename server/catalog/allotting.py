"""Who is in which branch of an experiment, and that only those move who must.

People are spread over buckets by a salted hash, and each bucket belongs to a branch or to none. When shares change,
buckets of what shrinks are given to what grows and no other bucket moves, which no fixed rule over a hash can do for
more than two groups; so the buckets are recorded with the catalog change (``CatalogChange.allotments``), each made from
the one before.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

from server.catalog.catalog import BUCKETS, Catalog, Experiment
from tsugi.log.v1.record_pb2 import Allotment
from tsugi.v1 import catalog_pb2

NO_BRANCH: Final = 0


def allot(
    experiment: catalog_pb2.Experiment, before: Allotment | None = None, towards: Allotment | None = None
) -> Allotment:
    """Give each branch as many buckets as its share, moving as few as can be.

    Args:
        experiment: without faults.
        before: who had what until now; None, or one of another salt: nobody had anything.
        towards: of those that must move, as many as can be go to where they are in it; None: where the lot says.

    Returns:
        One that follows from the arguments alone. Cost: some 10 ms.
    """
    branches = [branch.name for branch in experiment.branches]
    salt = experiment.salt or experiment.name
    owners, wanted = (_carried(branches, each, salt) for each in (before, towards if towards is not None else before))
    due = _due([branch.share for branch in experiment.branches])
    # Which buckets a branch gives up or takes is drawn by lot, in the order of a hash of salt and bucket; but first it
    # keeps those that are to be its own.
    order = sorted(range(BUCKETS), key=lambda bucket: (owners[bucket] != wanted[bucket], _lot(salt, bucket)))
    held = [0] * len(due)
    freed = []
    for bucket in order:
        owner = owners[bucket]
        if held[owner] < due[owner]:
            held[owner] += 1
        else:
            freed.append(bucket)
    left = []
    for bucket in freed:
        if held[wanted[bucket]] < due[wanted[bucket]]:
            owners[bucket] = wanted[bucket]
            held[wanted[bucket]] += 1
        else:
            left.append(bucket)
    growing = [owner for owner, n in enumerate(due) for _ in range(n - held[owner])]
    for bucket, owner in zip(left, reversed(growing), strict=True):
        owners[bucket] = owner
    return Allotment(experiment=experiment.name, salt=salt, branches=branches, buckets=bytes(owners))


def allot_all(
    message: catalog_pb2.Catalog, before: Iterable[Allotment], towards: Iterable[Allotment] = ()
) -> list[Allotment]:
    """Allot every experiment of a catalog, each from its own allotment before.

    Args:
        message: the catalog.
        before: in force until now.
        towards: where people are to come back to, see allot; an experiment that was not in force begins with it.
    """
    earlier = {allotment.experiment: allotment for allotment in before}
    restored = {allotment.experiment: allotment for allotment in towards}
    return [
        allot(each, earlier.get(each.name, restored.get(each.name)), restored.get(each.name))
        for each in message.experiments
    ]


def with_allotments(catalog: Catalog, allotments: Iterable[Allotment]) -> Catalog:
    """Return the catalog with people assigned as recorded; experiments that are not recorded keep their own."""
    recorded = {allotment.experiment: allotment.buckets for allotment in allotments}
    if not recorded:
        return catalog
    experiments = tuple(
        dataclasses.replace(each, buckets=recorded.get(each.name, each.buckets)) for each in catalog.experiments
    )
    return dataclasses.replace(catalog, experiments=experiments)


def blend_of(experiments: Sequence[Experiment], subject: bytes) -> int:
    """Return the blend that decides for a person.

    Args:
        experiments: of the catalog in force.
        subject: the key of the identity that begins the profile, or for a person not known yet of the first one
            named; empty: nobody, who is in no experiment.

    Cost: some 1 µs an experiment.
    """
    if not subject:
        return 0
    return sum([each.buckets[bucket_of(each.salt, subject)] * each.stride for each in experiments])


def bucket_of(salt: str, subject: bytes) -> int:
    """Return the bucket of an experiment that a person is in, for ever."""
    return place_of(salt.encode(), b"experiment", subject) * BUCKETS >> 64


def place_of(salt: bytes, use: bytes, subject: bytes) -> int:
    """Return a person's place among all people for a salt and a use, 0 to 2**64 - 1, for ever. Cost: 0.8 µs."""
    hasher = _hasher(salt, use).copy()
    hasher.update(subject)
    return int.from_bytes(hasher.digest(), "little")


@functools.lru_cache(256)
def _hasher(salt: bytes, use: bytes) -> hashlib.blake2b:
    """Return a hash keyed by salt and use; to make one anew for each person would cost twice as much."""
    return hashlib.blake2b(key=salt, digest_size=8, person=use)


def _carried(branches: Sequence[str], before: Allotment | None, salt: str) -> list[int]:
    """Return who owns each bucket, in the numbers of the branches there are now; nobody by another salt."""
    if before is None or before.salt != salt:
        return [NO_BRANCH] * BUCKETS
    numbers = {name: number for number, name in enumerate(branches, start=1)}
    renumbered = bytes([NO_BRANCH, *(numbers.get(name, NO_BRANCH) for name in before.branches)])
    return [renumbered[owner] for owner in before.buckets]


def _due(shares: Sequence[float]) -> list[int]:
    """Return how many buckets each branch is due; before them how many are nobody's."""
    due = [round(share * BUCKETS) for share in shares]
    return [BUCKETS - sum(due), *due]


def _lot(salt: str, bucket: int) -> bytes:
    return hashlib.blake2b(bucket.to_bytes(4, "little"), key=salt.encode(), digest_size=8, person=b"lot").digest()
