"""What each fact did to a propensity: the champion's part by reading facts as zero, the learners' part exactly.

Handed a record, the catalog it was decided under and what is still at hand of what it was scored with, it says for some
of the survivors which fact raised or lowered the log-odds, and by how much. It loads nothing and decides nothing; what
is not at hand any more is told as one sum or not at all.

Cost sketch: the champion scores 1 + its facts rows for each survivor, some 0.3 µs a row for an MLP 64-64-64 and, for
the slowest model that a push lets through, 50; and some 50 µs a survivor and placement to put it into messages.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from server.catalog.catalog import Catalog, Doubles, Floats, Mask, Rows
from server.decisioning.features import encode_rows
from server.decisioning.models import Champion, Models
from server.decisioning.recall import row_type_of
from tsugi.log.v1.record_pb2 import DecisionRecord, Provenance
from tsugi.v1.decision_pb2 import Degradation
from tsugi.v1.decision_service_pb2 import Contribution, DecideRequest

ARRAYS_BYTES_MAX: Final = 32 * 1024 * 1024  # correction weights of former arrays, in each worker
CONTRIBUTIONS_MAX: Final = 64  # of one survivor in one placement
REPLY_CONTRIBUTIONS_MAX: Final = 32_768  # of one explanation, some 2 MB
SCORED_ROWS_MAX: Final = 16_384  # for one explanation; 0.8 s of the slowest model that a push lets through
CALL_ROWS_MAX: Final = 1_024  # in one call of the scorer: 2 MB of the widest input
LOG_ODDS_MIN: Final = 1e-6  # what is smaller is left out: float32 tells no more of a prior

HISTORY: Final = "history"
LEARNED: Final = "learned"
LEARNED_FOR_ACTION: Final = "learned for the action"

_WORDS: Final = {
    HISTORY: "what came of it before",
    LEARNED: f"what was {LEARNED}",
    LEARNED_FOR_ACTION: f"what was {LEARNED_FOR_ACTION}",
}
_NAMED_LOG_ODDS_MIN: Final = 0.1  # a tenth of the odds; what did less is no reason worth saying
_CLEARLY: Final = 2.0  # times the next
_PROPENSITY_MIN: Final = float(np.finfo(np.float32).tiny)  # recorded float32 may have been rounded to 0 or 1
_PROPENSITY_MAX: Final = 1.0 - 2.0**-25

Contributions = Mapping[tuple[int, int], list[Contribution]]  # by placement asked for, and place among the survivors
Contributing = Callable[[Sequence[int]], Contributions]  # for some of the survivors, those in front that matter most


class Correction(NamedTuple):
    """What the learners add to the prior's log-odds, aligned with one catalog."""

    weights: Doubles  # float64[goals, n, d]
    intercepts: Doubles  # float64[goals, n]
    slopes: Doubles  # float64[goals], factors on the prior
    sum_goals: frozenset[int] = frozenset()  # rows of goals that trees serve: what they add is told as one sum

    @property
    def n_bytes(self) -> int:
        """The memory that both take."""
        return self.weights.nbytes + self.intercepts.nbytes


class Corrections:
    """The corrections that one worker took into use lately, so that decisions made with them can be told apart by fact.

    When full, the oldest goes. The newest always stays, whatever its size: it is in use, so keeping it takes no memory.

    Args:
        bytes_max: of all of them.
    """

    def __init__(self, bytes_max: int = ARRAYS_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._kept: OrderedDict[tuple[bytes, bytes], Correction] = OrderedDict()
        self._n_bytes = 0
        self._erased_lsn = 0

    def keep(self, catalog: Catalog, models: Models) -> None:
        """Take in what is in use from now on. Cost: microseconds, nothing is copied."""
        if models.erased_lsn > self._erased_lsn:  # all before rests on people who are forgotten since
            self._kept.clear()
            self._n_bytes = 0
            self._erased_lsn = models.erased_lsn
        key = (models.arrays_sha256, catalog.sha256)
        if not models.arrays_sha256 or models.erased_lsn < self._erased_lsn:
            return
        before = self._kept.pop(key, None)
        self._n_bytes -= before.n_bytes if before is not None else 0
        self._kept[key] = Correction(
            models.correction_weights,
            models.correction_intercepts,
            models.prior_slopes,
            frozenset(forest.goal_row for forest in models.forests),
        )
        self._n_bytes += self._kept[key].n_bytes
        while self._n_bytes > self._bytes_max and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._n_bytes -= oldest.n_bytes

    def of(self, provenance: Provenance) -> Correction | None:
        """Return what a decision was corrected by; None where it is not at hand any more."""
        return self._kept.get((provenance.arrays_sha256, provenance.catalog_sha256))


class _Effects(NamedTuple):
    """What some facts did, as columns."""

    names: tuple[str, ...]
    log_odds: Doubles  # float64[k, names], a row for each survivor asked about
    is_learned: bool


def contribute(
    record: DecisionRecord,
    catalog: Catalog,
    champion: Champion | None,
    correction: Correction | None,
    places: Sequence[int],
) -> Contributions:
    """Say of survivors what each fact did to their propensity of each placement's first goal.

    Args:
        record: as the log keeps it.
        catalog: the revision it was decided under.
        champion: what its prior came from, made for that catalog; None: not at hand, and nothing is told of the prior.
        correction: what the learners added, aligned with that catalog; None: not at hand, and told as one sum.
        places: among the survivors, those that matter most in front. Those after the first
            REPLY_CONTRIBUTIONS_MAX / (CONTRIBUTIONS_MAX × placements) or SCORED_ROWS_MAX / (1 + facts) are left out.

    Returns:
        The contributions by placement asked for and place, the greatest in size in front, at most CONTRIBUTIONS_MAX,
        none below LOG_ODDS_MIN; the champion's, the learners' and the person's own history's apart.
    """
    named = DecideRequest.FromString(record.request).placements
    goals = [catalog.placements[catalog.placement_rows[each.placement]].goal_row for each in named]
    n_facts = len(set(champion.facts)) if champion is not None else 0
    most = min(REPLY_CONTRIBUTIONS_MAX // (CONTRIBUTIONS_MAX * len(goals)), SCORED_ROWS_MAX // (1 + n_facts))
    picked = np.array(places[:most], np.intp)
    survivors = np.frombuffer(record.rows, row_type_of(catalog)).astype(np.int32)
    rows = survivors[picked]
    shape = (len(goals), survivors.size)
    priors = np.frombuffer(record.prior_log_odds, np.float32).reshape(shape)
    propensities = np.frombuffer(record.propensities, np.float32).reshape(shape)
    general = np.frombuffer(record.general_propensities or record.propensities, np.float32).reshape(shape)
    told: dict[tuple[int, int], list[Contribution]] = {}
    from_champion: _Effects | None = None
    for ask, goal in enumerate(goals):
        parts = []
        if champion is not None and goal == champion.goal_row and not _is_base_rate(record, catalog, goal, priors[ask]):
            if from_champion is None:  # the same for every placement of this goal
                from_champion = _occluded(record, champion, rows)
            parts.append(from_champion)
        if correction is not None and goal not in correction.sum_goals:
            parts.append(_added(record, catalog, correction, goal, rows, priors[ask, picked]))
        elif record.provenance.arrays_sha256:
            parts.append(_added_in_all(priors[ask, picked], general[ask, picked]))
        if record.general_propensities:
            parts.append(_told_by_history(general[ask, picked], propensities[ask, picked]))
        if parts:
            for i, contributions in zip(picked.tolist(), _messages(parts), strict=True):
                told[ask, i] = contributions
    return told


def mostly(contributions: Sequence[Contribution]) -> str:
    """Say what speaks for a candidate in words to put behind its chance; empty unless one fact or two clearly lead."""
    totals: dict[str, float] = {}
    for each in contributions:
        totals[each.feature] = totals.get(each.feature, 0.0) + each.log_odds
    ordered = sorted(totals.items(), key=lambda total: -abs(total[1]))
    for n in (1, 2):
        if len(ordered) < n or ordered[n - 1][1] < _NAMED_LOG_ODDS_MIN:
            return ""
        following = abs(ordered[n][1]) if len(ordered) > n else 0.0
        if ordered[n - 1][1] >= _CLEARLY * following:
            words = [_WORDS.get(name, name) for name, _ in ordered[:n]]
            return f", mostly because of {' and '.join(words)}"
    return ""


def _is_base_rate(record: DecisionRecord, catalog: Catalog, goal: int, priors: Floats) -> bool:
    """Say whether the champion failed and the base rate stood in for it.

    The degradation alone does not tell: it is also there when the champion stood in for a challenger.
    """
    is_degraded = Degradation.DEGRADATION_MODEL_UNAVAILABLE in record.degradations
    return is_degraded and bool((priors == catalog.goal_base_log_odds[goal]).all())


def _occluded(record: DecisionRecord, champion: Champion, rows: Rows) -> _Effects:
    """Score every row as it is and with each fact read as zero, all columns that read it together."""
    names, is_of = _by_fact(champion.facts)
    inputs = champion.template[rows]
    facts = np.frombuffer(record.facts, np.float64).copy().reshape(1, -1)  # its own, as the kernel is compiled for
    inputs[:, champion.shared_positions] = encode_rows(facts, champion.shared)
    is_hidden = np.vstack([np.zeros_like(is_of[:1]), is_of])  # bool[1 + facts, d]; in the first row none is
    log_odds = np.empty((rows.size, 1 + len(names)))
    step = max(1, CALL_ROWS_MAX // (1 + len(names)))
    for first in range(0, rows.size if names else 0, step):
        block = np.where(is_hidden, np.float32(0.0), inputs[first : first + step, np.newaxis])
        scored, _ = champion.score(block.reshape(-1, inputs.shape[1]))
        if not scored.size:  # it fails on an input that nobody has; then there is nothing to compare with
            return _Effects((), np.empty((rows.size, 0)), is_learned=False)
        log_odds[first : first + step] = scored.reshape(-1, 1 + len(names))
    return _Effects(names, log_odds[:, :1] - log_odds[:, 1:], is_learned=False)


def _added(
    record: DecisionRecord, catalog: Catalog, correction: Correction, goal: int, rows: Rows, priors: Floats
) -> _Effects:
    """Return weight × column, summed over the columns of each fact, and the intercept with the prior's stretching."""
    names, is_of = _by_fact([catalog.space.facts[source].name for source in catalog.learned.sources.tolist()])
    learned = np.frombuffer(record.learned_features, np.float32).astype(np.float64)
    by_fact = (correction.weights[goal, rows] * learned) @ is_of.T.astype(np.float64)
    stretched = (correction.slopes[goal] - 1.0) * priors.astype(np.float64)
    for_action = (correction.intercepts[goal, rows] + stretched)[:, np.newaxis]
    return _Effects((*names, LEARNED_FOR_ACTION), np.hstack([by_fact, for_action]), is_learned=True)


def _by_fact(facts: Sequence[str]) -> tuple[tuple[str, ...], Mask]:
    """Return each fact that columns read, once, and bool[facts, d]: which columns read it."""
    places = {fact: place for place, fact in enumerate(dict.fromkeys(facts))}
    read = np.array([places[fact] for fact in facts], np.intp)
    return tuple(places), np.arange(len(places))[:, np.newaxis] == read


def _added_in_all(priors: Floats, propensities: Floats) -> _Effects:
    """Return by how much the log-odds of a recorded propensity are above the prior's."""
    log_odds: Doubles = _log_odds(propensities) - priors
    return _Effects((LEARNED,), log_odds[:, np.newaxis], is_learned=True)


def _told_by_history(general: Floats, propensities: Floats) -> _Effects:
    """Return by how much the person's own history raised the log-odds."""
    log_odds: Doubles = _log_odds(propensities) - _log_odds(general)
    return _Effects((HISTORY,), log_odds[:, np.newaxis], is_learned=False)


def _log_odds(propensities: Floats) -> Doubles:
    p = np.clip(propensities.astype(np.float64), _PROPENSITY_MIN, _PROPENSITY_MAX)
    log_odds: Doubles = np.log(p) - np.log1p(-p)
    return log_odds


def _messages(parts: Sequence[_Effects]) -> list[list[Contribution]]:
    """Return of each row the contributions worth telling, the greatest in size in front."""
    names = [(name, part.is_learned) for part in parts for name in part.names]
    log_odds = np.concatenate([part.log_odds for part in parts], axis=1)
    order = np.argsort(-np.abs(log_odds), axis=1, kind="stable")[:, :CONTRIBUTIONS_MAX]
    return [
        [
            Contribution(feature=names[place][0], log_odds=effects[place], learned=names[place][1])
            for place in places
            if abs(effects[place]) >= LOG_ODDS_MIN
        ]
        for effects, places in zip(log_odds.tolist(), order.tolist(), strict=True)
    ]
