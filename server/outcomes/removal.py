"""What outcomes would be lost without a channel: the removal effects of a Markov chain over paths.

Handed paths in columns, it counts how people went on from each touchpoint, to the next, to an outcome, or to silence,
and solves that absorbing chain. Nothing is simulated, so the same paths give the same effects.

A state of order m is the channels of the last m touchpoints, of fewer at a path's beginning, and of none at its start:

    Q[i, j]  share of those in state i who went on to state j
    r[i]     share of those who came to an outcome next
    v        chance of an outcome from each state, v = r + Q v, that is v = N r with N = (I - Q)^-1

Removing a channel sends everybody who would come to it into silence. Outcomes without it are those on whose way it
does not lie, so its removal effect is the chance that a path which comes to an outcome passes it:

    effect(c) = 1 - v_without_c[start] / v[start] = h v[S] / v[start],     h = N[start, S] N[S, S]^-1

with S the states whose newest touchpoint is on c, and h[j] the chance that the first of them to be reached is j
(Kemeny and Snell, "Finite Markov chains", 1960, chapter 3: N[i, j] is the chance to come from i to j times N[j, j]; the
same for a set). One inverse serves all channels.

Sources: Archak, Mirrokni and Muthukrishnan, "Mining advertiser-specific user behavior using adfactors", WWW 2010, for
the graph and the effect of removal; Anderl et al., "Mapping the customer journey", 2016, for chains of higher order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from server.catalog.catalog import Amounts, Doubles, Mask, Rows
from server.errors import limit_exceeded

if TYPE_CHECKING:
    from server.outcomes.attribution import Paths

ORDER_MAX: Final = 3
STATES_MAX: Final = 2_048  # 12 channels have 1,884 of order 3; the inverse then takes some 3 s and 150 MB


class _Chain(NamedTuple):
    """Counts of a chain. State 0 is the start."""

    channels: Rows  # int32[s]: of the newest touchpoint; -1 for the start
    sources: Amounts  # int64[e]: state before each distinct step
    targets: Amounts  # int64[e]: state after it
    steps: Doubles  # float64[e]: how many took it
    outcomes: Doubles  # float64[s]: how many came to an outcome next
    visits: Doubles  # float64[s]: how many were there


def removal_effects(paths: Paths, n_channels: int, order: int) -> Doubles:
    """Return which share of the outcomes would be lost without each channel.

    Args:
        paths: checked; read only. A path counts as often as it came to an outcome or to silence.
        n_channels: above every code.
        order: of the chain, 1 to 3.

    Returns:
        float64[n_channels], 0..1, a new array. Exactly 0 for a channel from which nobody can come to an outcome and
        for one on no path; all 0 where there is no outcome. The sum may be above 1, as several channels may be needed
        at once.

    Raises:
        TsugiError: LIMIT_EXCEEDED: more than 2,048 states; a lower order has fewer.

    Cost: for s states one inverse, 2 s³ operations, and for each channel's states a small system: 0.2 s for
    256 channels at order 1; 0.3 µs a touchpoint before that.
    """
    effects = np.zeros(n_channels)
    if not paths.outcomes.any():
        return effects
    chain = _hopeful(_count(paths, n_channels, order))
    n_states = chain.channels.size
    if n_states > STATES_MAX:
        raise limit_exceeded("order", n_states, STATES_MAX, f"Markov states of order {order}; a lower order has fewer")
    ways = np.zeros((n_states, n_states))
    ways[chain.sources, chain.targets] = chain.steps / chain.visits[chain.sources]
    expected = np.linalg.inv(np.eye(n_states) - ways)
    chances = expected @ (chain.outcomes / chain.visits)
    for channel in np.unique(chain.channels[1:]).tolist():
        states = np.flatnonzero(chain.channels == channel)
        firsts = np.linalg.solve(expected[np.ix_(states, states)].T, expected[0, states])
        effects[channel] = firsts @ chances[states] / chances[0]
    return np.clip(effects, 0.0, 1.0, out=effects)  # what rounding put outside


def _count(paths: Paths, n_channels: int, order: int) -> _Chain:
    """Count the steps of all paths that happened at all."""
    weights = (paths.outcomes + paths.silences).astype(np.float64)
    lengths = np.diff(paths.starts)
    happened = weights > 0.0
    codes = paths.codes[np.repeat(happened, lengths)].astype(np.int64)
    lengths, weights = lengths[happened], weights[happened]
    ends = np.cumsum(lengths)
    places = np.arange(codes.size) - np.repeat(ends - lengths, lengths)  # within the path, from 0
    names = codes + 1  # of states: digits to the base n_channels + 1, the newest touchpoint the lowest, 0 for none
    for back in range(1, order):
        names[back:] += np.where(places[back:] >= back, codes[: codes.size - back] + 1, 0) * (n_channels + 1) ** back
    distinct, states = np.unique(names, return_inverse=True)
    states = states.astype(np.int64) + 1
    n_states = distinct.size + 1
    before = np.where(places == 0, 0, np.roll(states, 1))
    times = np.repeat(weights, lengths)
    edges, edge_of = np.unique(before * n_states + states, return_inverse=True)
    visits = _sums(states, times, n_states)
    visits[0] = weights.sum()
    return _Chain(
        channels=np.concatenate(([-1], distinct % (n_channels + 1) - 1)).astype(np.int32),
        sources=edges // n_states,
        targets=edges % n_states,
        steps=_sums(edge_of, times, edges.size),
        outcomes=_sums(states[ends - 1], paths.outcomes[happened].astype(np.float64), n_states),
        visits=visits,
    )


def _hopeful(chain: _Chain) -> _Chain:
    """Leave out the states from which nobody comes to an outcome: they are as good as silence, and exactly 0."""
    hopeful: Mask = chain.outcomes > 0.0
    while True:
        found = chain.sources[hopeful[chain.targets] & ~hopeful[chain.sources]]
        if not found.size:
            break
        hopeful[found] = True
    rows = np.cumsum(hopeful) - 1
    kept = hopeful[chain.sources] & hopeful[chain.targets]
    return _Chain(
        channels=chain.channels[hopeful],
        sources=rows[chain.sources[kept]],
        targets=rows[chain.targets[kept]],
        steps=chain.steps[kept],
        outcomes=chain.outcomes[hopeful],
        visits=chain.visits[hopeful],
    )


def _sums(places: Amounts, weights: Doubles, size: int) -> Doubles:
    return np.bincount(places, weights, size).astype(np.float64)
