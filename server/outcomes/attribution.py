"""Which touchpoints earned an outcome: each model shares what happened over the channels that led to it.

Handed paths in columns (what touched people, in order of time, and what came of it), it gives every channel its part
of the outcomes and of their value. Nothing is made or lost: over all channels the parts sum to what was handed in. It
knows no log, no clock and no names. An outcome here is one that the goal counts as a success; silence is a path that
came to none.

The models of one path, n touchpoints, the newest last; w sums to 1 over them:

    last         w = 1 for the newest
    first        w = 1 for the oldest
    linear       w = 1 / n
    time_decay   w ∝ 2^(-age / half_life), age before the outcome
    position     first_share for the oldest, last_share for the newest, the rest in equal parts to those between; of
                 two touchpoints in the proportion of the two shares, a single one has all
    markov       w ∝ removal effect of its channel; over all paths together see attribute() and removal.py

Cost sketch: some 40 ns a touchpoint and model, no loop over paths; for Markov see removal.py.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, NamedTuple

import numpy as np

from server.catalog.catalog import Amounts, Doubles, Mask, Rows
from server.outcomes.removal import ORDER_MAX, removal_effects

CHANNELS_MAX: Final = 256
TOUCHPOINTS_MAX: Final = 1_000  # of one path; of a longer one the newest count


class Model(StrEnum):
    """How an outcome is shared over the touchpoints before it."""

    LAST = "last"
    FIRST = "first"
    LINEAR = "linear"
    TIME_DECAY = "time_decay"
    POSITION = "position"
    MARKOV = "markov"


class Terms(NamedTuple):
    """What the models are told. The defaults of position are the usual 40/20/40."""

    half_life: float = 7.0  # above 0, in the unit of ages: after so much a touchpoint counts half
    first_share: float = 0.4  # 0..1
    last_share: float = 0.4  # 0..1, at most 1 with the first
    order: int = 1  # how many touchpoints a Markov state remembers, 1 to 3


class Paths(NamedTuple):
    """Paths in columns. Path i is the touchpoints ``starts[i]:starts[i + 1]``, at least one, the oldest first.

    The same sequence may stand there once with its counts or as often as it happened.
    """

    codes: Rows  # int32[t]: channel of each touchpoint, 0 to the number of channels
    starts: Amounts  # int64[p + 1], ascending, from 0 to t
    outcomes: Amounts  # int64[p]: how often the path came to an outcome, >= 0
    values: Doubles  # float64[p]: what these outcomes were worth together, finite; 0 where there were none
    silences: Amounts  # int64[p]: how often it came to none, >= 0; read by Markov alone
    ages: Doubles  # float64[t]: before the path's end, >= 0, never rising within a path; any unit


class Attributed(NamedTuple):
    """What each channel earned."""

    outcomes: Doubles  # float64[c]
    values: Doubles  # float64[c]


def attribute(paths: Paths, n_channels: int, model: Model, terms: Terms) -> Attributed:
    """Share all outcomes and their value over the channels.

    With w of the module's opening, a channel earns Σ over paths and over its touchpoints there of w × outcomes of the
    path, and likewise of the value. Markov shares the totals, each channel's part being its removal effect over the
    sum of all removal effects (Anderl, Becker, von Wangenheim and Schumann, "Mapping the customer journey",
    International Journal of Research in Marketing 33, 2016, section 3.3); value goes by the same parts.

    Args:
        paths: any number; read only.
        n_channels: 1 to 256, above every code.
        model: which.
        terms: see there.

    Returns:
        New arrays. They sum to the outcomes and to the value handed in, within 1e-12 of the sum of their magnitudes;
        all are 0 where there is no outcome.

    Raises:
        TsugiError: LIMIT_EXCEEDED: more Markov states than can be solved.
    """
    _check(paths, n_channels, terms)
    if model is Model.MARKOV:
        return attribute_by(removal_effects(paths, n_channels, terms.order), paths)
    weights = _weights(model, paths.starts, paths.ages, terms)
    lengths = np.diff(paths.starts)
    outcomes = weights * np.repeat(paths.outcomes, lengths)
    values = weights * np.repeat(paths.values, lengths)
    return Attributed(
        np.bincount(paths.codes, outcomes, n_channels).astype(np.float64),
        np.bincount(paths.codes, values, n_channels).astype(np.float64),
    )


def attribute_by(effects: Doubles, paths: Paths) -> Attributed:
    """Share the totals by removal effects, float64[c], at least 0; all 0 when there was no outcome."""
    together = effects.sum()
    parts = effects / together if together > 0.0 else np.zeros_like(effects)
    return Attributed(parts * float(paths.outcomes.sum()), parts * float(paths.values.sum()))


def weigh(
    model: Model, channels: Rows, times_us: Amounts, outcome_us: int, terms: Terms, effects: Doubles | None = None
) -> Doubles:
    """Return how one outcome is shared over the touchpoints before it.

    Args:
        model: which.
        channels: int32[n], n >= 1: channel of each touchpoint.
        times_us: int64[n], ascending, at most outcome_us: when each was.
        outcome_us: when the outcome was.
        terms: its half_life in microseconds; its order is not looked at.
        effects: float64[c], learned removal effects; Markov alone reads them and cannot do without.

    Returns:
        float64[n], a new array: at least 0 each, together 1 within 1e-12. Markov weighs all alike where no channel of
        the path has an effect.
    """
    assert channels.size == times_us.size > 0, "an outcome that nothing led to is shared over nothing"
    if model is Model.MARKOV:
        assert effects is not None, "a Markov model is learned from many paths"
        weights = effects[channels]
        together = float(weights.sum())
        return weights / together if together > 0.0 else np.full(channels.size, 1.0 / channels.size)
    ages = (outcome_us - times_us).astype(np.float64)
    return _weights(model, np.array([0, channels.size], np.int64), ages, terms)


def keep_newest(paths: Paths, touchpoints_max: int = TOUCHPOINTS_MAX) -> tuple[Paths, int]:
    """Cut paths to their newest touchpoints; return them and how many were cut. Within bounds it costs nothing."""
    lengths = np.diff(paths.starts)
    too_long = lengths > touchpoints_max
    if not too_long.any():
        return paths, 0
    left = np.repeat(paths.starts[1:], lengths) - np.arange(paths.codes.size)  # touchpoints from here to the end
    kept: Mask = left <= touchpoints_max
    starts = np.concatenate(([0], np.cumsum(np.minimum(lengths, touchpoints_max))))
    return paths._replace(codes=paths.codes[kept], ages=paths.ages[kept], starts=starts), int(too_long.sum())


def _weights(model: Model, starts: Amounts, ages: Doubles, terms: Terms) -> Doubles:
    """Return the weight of every touchpoint, float64[t]: together 1 within each path."""
    lengths = np.diff(starts)
    firsts, lasts = starts[:-1], starts[1:] - 1
    weights = np.zeros(ages.size)
    match model:
        case Model.LAST:
            weights[lasts] = 1.0
        case Model.FIRST:
            weights[firsts] = 1.0
        case Model.LINEAR:
            weights = np.repeat(1.0 / lengths, lengths)
        case Model.TIME_DECAY:
            # The newest counts 1 before all are divided by their sum, so that no path is too old to be weighed.
            weights = np.exp2((np.repeat(ages[lasts], lengths) - ages) / terms.half_life)
            weights /= np.repeat(np.add.reduceat(weights, firsts), lengths) if lengths.size else 1.0
        case Model.POSITION:
            weights = _position_weights(lengths, firsts, lasts, terms)
        case _:
            raise AssertionError("Markov weighs channels, not positions")
    return weights


def _position_weights(lengths: Amounts, firsts: Amounts, lasts: Amounts, terms: Terms) -> Doubles:
    between = 1.0 - terms.first_share - terms.last_share
    weights = np.repeat(between / np.maximum(lengths - 2, 1), lengths)
    weights[firsts], weights[lasts] = terms.first_share, terms.last_share
    ends = terms.first_share + terms.last_share
    pairs = lengths == 2
    weights[firsts[pairs]] = terms.first_share / ends if ends > 0.0 else 0.5
    weights[lasts[pairs]] = terms.last_share / ends if ends > 0.0 else 0.5
    weights[firsts[lengths == 1]] = 1.0
    return weights


def _check(paths: Paths, n_channels: int, terms: Terms) -> None:
    assert 1 <= n_channels <= CHANNELS_MAX, "who reads paths bounds their channels"
    assert paths.starts[0] == 0, "the first path begins with the first touchpoint"
    assert paths.starts[-1] == paths.codes.size == paths.ages.size, "the last one ends with the last"
    assert (np.diff(paths.starts) >= 1).all(), "no path is empty"
    assert not paths.codes.size or (paths.codes.min() >= 0 and paths.codes.max() < n_channels), "codes are of channels"
    assert (paths.outcomes >= 0).all() and (paths.silences >= 0).all(), "these are counts"
    assert not paths.values[paths.outcomes == 0].any(), "no value without an outcome"
    assert terms.half_life > 0.0 and 1 <= terms.order <= ORDER_MAX, "validated"
    assert min(terms.first_share, terms.last_share, 1.0 - terms.first_share - terms.last_share) > -1e-12, "validated"
