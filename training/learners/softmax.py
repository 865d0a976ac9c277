"""Learns whom to tell what, not what comes of it: a softmax policy, improved by what it would have earned.

The policy prefers action a by f_a(x) = w_a·x, and would choose it with chance π_a(x) = exp f_a(x) / Σ_b exp f_b(x),
over the actions it has met. What it would have earned on logged rows is, by inverse propensity weighting, the mean of
reward · π_a(x) / p, where p is the selection probability that was logged; each row is a step up the gradient of that
(Swaminathan and Joachims, Batch learning from logged bandit feedback through counterfactual risk minimization, JMLR 16,
2015, whose policies and objective these are; their penalty is on variance). Three things keep it from running away:

- the reward is counted beyond what the policy itself is expected to earn there, which changes no gradient in the mean
  and takes most of its variance (Williams, Machine Learning 8, 1992; as in doubly robust estimation: Dudík, Langford
  and Li, ICML 2011), and keeps clipped weights from favouring what is chosen often;
- the entropy of the policy counts for something: temperature × the spread of rewards. Then preferences stay finite,
  and where nothing binds they are rewards in that unit, f_a = reward_a / (temperature × spread), up to what all actions
  share (O'Donoghue et al., Combining policy gradient and Q-learning, ICLR 2017, section 3);
- a step is the shorter, the more was learned of an action (Duchi, Hazan and Singer, Adaptive subgradient methods, JMLR
  12, 2011).

A goal's learners are judged and served as chances, times value. So preferences are read as log-odds: prior + level +
slope · f_a(x), two numbers a goal, learned as in the logistic correction from rows weighted likewise (Platt, in
Advances in large margin classifiers, 1999); they begin with the slope that the above says, and it stays above 0: which
action comes first is the policy's to say. Because the prior is added, the policy is learned for what is earned beyond
it.

Beside it ``weighted.py`` is the regression of the same weights; its table has both. A regression fits how likely
success is, everywhere; the policy only has to be right about which action is better. So it wins where a line can tell
the one and not the other, and where a line tells both the regression knows more from as many rows. Of temperatures and
rates those below did best on the worlds of that table; a rate above 1 does much worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Final, Self

import numpy as np

from server.kernel import kernel
from training.learners.base import Arrays, Constants, Doubles, Prediction, Row, Settings, sigmoid
from training.learners.bayesian import spread_of_rewards
from training.learners.logistic import learn_logistic
from training.learners.regression import chance_of
from training.space import Space
from tsugi.log.v1.learner_pb2 import MemberState

ACTIONS_MAX: Final = 128  # those met first; of others nothing but the level is learned: a row costs by the action
SLOPE_MIN: Final = 0.05  # of what it begins with

_PRIOR: Final = 3.0 * np.eye(2)  # precision of level and slope


class SoftmaxPolicy:
    """See Learner. A row costs some 5 µs at 40 features and 4 to 128 actions; memory is 8 (d + 2) bytes an action.

    Settings:
        temperature: what the policy's entropy counts for, in spreads of the reward.
        rate: of the steps.
        weight_max: what a row counts for at most beside one that was chosen for certain.
        memory_rows: after so many rows half of what steps and calibration rest on is forgotten, and so on.
    """

    family: ClassVar[str] = "softmax"
    choices: ClassVar[tuple[Settings, ...]] = (
        {"temperature": 0.3, "rate": 0.3, "weight_max": 20.0, "memory_rows": 10_000},
        {"temperature": 0.1, "rate": 0.3, "weight_max": 20.0, "memory_rows": 10_000},
        {"temperature": 1.0, "rate": 0.1, "weight_max": 20.0, "memory_rows": 10_000},
    )
    arithmetic: ClassVar[str] = f"actions_max={ACTIONS_MAX} slope_min={SLOPE_MIN} prior={_PRIOR[0, 0]}"
    is_posterior: ClassVar[bool] = False
    is_shared: ClassVar[bool] = True

    def __init__(self, space: Space, base_rate: float, settings: Settings) -> None:
        """See Learner."""
        self.settings = settings
        self._space = space
        self._base_rate = base_rate
        self._spread = spread_of_rewards(base_rate)
        self._places: dict[int, int] = {}  # of the actions met, in that order
        self._preferences = np.zeros((1, 0))  # float64[d + 1, places], the intercept first
        self._squares = np.zeros(0)  # float64[places]: of what each was moved by
        self._precision: Doubles = _PRIOR.copy()  # of level and slope
        self._covariance: Doubles = np.asarray(np.linalg.inv(_PRIOR), np.float64)
        self._mean = np.array([0.0, settings["temperature"] / self._spread])
        self._natural = self._precision @ self._mean
        self._sum, self._sum_of_squares = 0.0, 0.0  # of the weights of rows
        self._n_rows = 0

    @property
    def seen(self) -> Sequence[int]:
        """See Learner."""
        return range(len(self._space.rows)) if self._n_rows else ()

    def learn_one(self, row: Row, reward: float) -> float:
        """See Learner."""
        place, settings = self._meet(row.action), self.settings
        weight = min(row.weight, settings["weight_max"])
        self._sum += weight
        self._sum_of_squares += weight * weight
        expected = _learn(
            row.x, place, row.prior_log_odds, reward, weight, self._importance(weight), self._spread,
            settings["temperature"], settings["rate"], self._preferences, self._squares,
            self._precision, self._covariance, self._natural, self._mean,
        )  # fmt: skip
        self._n_rows += 1
        if self._n_rows % settings["memory_rows"] == 0:
            self._forget()
        return expected

    def correct_one(self, row: Row, change: float) -> float:
        """See Learner: gradients are linear in the reward. The row weighs what it would if it were learned now."""
        place = self._meet(row.action)
        weight = min(row.weight, self.settings["weight_max"])
        return _correct(
            row.x, place, row.prior_log_odds, weight * change / self._spread, self._importance(weight) * change,
            self.settings["rate"], SLOPE_MIN * self.settings["temperature"] / self._spread,
            self._preferences, self._squares, self._precision, self._covariance, self._natural, self._mean,
        )  # fmt: skip

    def predict_one(self, row: Row) -> Prediction:
        """See Learner; River has no such policy, so this is its own definition, sum by sum."""
        preference, place = 0.0, self._places.get(row.action)
        if place is not None:
            for weight, value in zip(self._preferences[:, place].tolist(), row.x.tolist(), strict=False):
                preference += weight * value
        level, slope = self._mean.tolist()
        return Prediction(sigmoid(row.prior_log_odds + level + slope * preference), 0.0)

    def export(self, actions: Sequence[int]) -> Arrays:
        """See Learner. Who was never met is not preferred, and has the level of all."""
        weights = np.zeros((len(actions), 1 + len(self._space.columns)))
        for row, action in enumerate(actions):
            if action in self._places:
                preferences = self._preferences[:, self._places[action]]
                weights[row, : preferences.size] = self._mean[1] * preferences
        return {"correction_weights": weights[:, 1:], "correction_intercepts": weights[:, 0] + self._mean[0]}

    def heir(self, settings: Settings) -> Self:
        """See Learner. It prefers what was preferred, and says the same of it."""
        successor, state = type(self)(self._space, self._base_rate, settings), MemberState()
        self.save(state)
        successor.load(state)
        return successor

    def save(self, state: MemberState) -> None:
        """See Learner."""
        self._grow()
        saved = state.softmax
        for action, place in self._places.items():
            weights = self._preferences[:, place].tobytes()
            saved.actions.add(action=action, weights=weights, squares=self._squares[place])
        parts = (self._precision, self._covariance, self._natural, self._mean)
        saved.calibration = b"".join(part.tobytes() for part in parts)
        saved.weight, saved.weight_squares, saved.n_rows = self._sum, self._sum_of_squares, self._n_rows

    def load(self, state: MemberState) -> None:
        """See Learner."""
        saved = state.softmax
        self._places = {each.action: place for place, each in enumerate(saved.actions)}
        self._grow()
        for place, each in enumerate(saved.actions):
            weights = np.frombuffer(each.weights)
            self._preferences[: weights.size, place], self._squares[place] = weights, each.squares
        numbers = np.frombuffer(saved.calibration)
        self._precision, self._covariance = numbers[:4].reshape(2, 2).copy(), numbers[4:8].reshape(2, 2).copy()
        self._natural, self._mean = numbers[8:10].copy(), numbers[10:].copy()
        self._sum, self._sum_of_squares, self._n_rows = saved.weight, saved.weight_squares, saved.n_rows

    @classmethod
    def constants(cls, base_rate: float) -> Constants:
        """See Learner."""
        del base_rate
        return {}

    @classmethod
    def size_bytes(cls, n_actions: int, width: int) -> int:
        """See Learner."""
        return n_actions * 8 * (width + 2)

    @staticmethod
    def score(arrays: Arrays, constants: Constants, features: Doubles, prior_log_odds: float) -> Prediction:
        """See Learner: sigmoid(prior + w·x + b), as of the logistic correction."""
        del constants
        correction = float(arrays["correction_weights"] @ features + arrays["correction_intercepts"])
        return Prediction(sigmoid(prior_log_odds + correction), 0.0)

    def _grow(self) -> None:
        """Have a column for every action met, and a row for every column of the space."""
        width, n = self._preferences.shape
        n_wider, n_more = 1 + len(self._space.columns) - width, len(self._places) - n
        if n_more or n_wider:
            self._preferences = np.pad(self._preferences, ((0, n_wider), (0, n_more)))
            self._squares = np.pad(self._squares, (0, n_more))

    def _meet(self, action: int) -> int:
        """Return the place of an action whose row has come; -1: there was none left."""
        if action not in self._places and len(self._places) < ACTIONS_MAX:
            self._places[action] = len(self._places)
        self._grow()
        return self._places.get(action, -1)

    def _importance(self, weight: float) -> float:
        """Return how many rows a row counts for, see weighted.py."""
        return weight * self._sum / self._sum_of_squares if self._sum else 1.0

    def _forget(self) -> None:
        """Let what comes count for more; what is expected stays as it is."""
        self._squares *= 0.5
        self._precision = 0.5 * (self._precision + _PRIOR)
        self._covariance = np.asarray(np.linalg.inv(self._precision), np.float64)
        self._natural = self._precision @ self._mean


@kernel
def _learn(
    x: Doubles,
    place: int,
    prior_log_odds: float,
    reward: float,
    weight: float,
    importance: float,
    spread: float,
    temperature: float,
    rate: float,
    preferences: Doubles,
    squares: Doubles,
    precision: Doubles,
    covariance: Doubles,
    natural: Doubles,
    mean: Doubles,
) -> float:
    """Learn one row, and return the chance expected before."""
    read, chances, logarithms = np.ones(2), np.empty_like(squares), np.zeros_like(squares)
    of_policy = _prefer(x, place, preferences, read, chances, logarithms)
    earned = 1.0 / (1.0 + math.exp(-prior_log_odds - mean[0] - mean[1] * of_policy))  # by the policy itself
    expected = learn_logistic(
        read, 1.0, prior_log_odds, reward, importance, precision, covariance, natural, mean
    )  # fmt: skip
    _keep_order(SLOPE_MIN * temperature / spread, precision, covariance, natural, mean)
    if place >= 0:
        gain = weight * (reward - earned) / spread
        _step(x, place, gain, temperature, rate, chances, logarithms, preferences, squares)
    return expected


@kernel
def _correct(
    x: Doubles,
    place: int,
    prior_log_odds: float,
    gain: float,
    change: float,
    rate: float,
    slope_min: float,
    preferences: Doubles,
    squares: Doubles,
    precision: Doubles,
    covariance: Doubles,
    natural: Doubles,
    mean: Doubles,
) -> float:
    """Take note that an earlier row's reward was another by a change, weighted; gain is what it is to the policy.

    Returns the chance expected before.
    """
    read, chances, logarithms = np.ones(2), np.empty_like(squares), np.zeros_like(squares)
    _prefer(x, place, preferences, read, chances, logarithms)
    expected = chance_of(prior_log_odds + mean[0] + mean[1] * read[1])
    natural += change * read
    mean[:] = covariance @ natural
    _keep_order(slope_min, precision, covariance, natural, mean)
    if place >= 0:
        _step(x, place, gain, 0.0, rate, chances, logarithms, preferences, squares)
    return expected


@kernel
def _prefer(
    x: Doubles, place: int, preferences: Doubles, read: Doubles, chances: Doubles, logarithms: Doubles
) -> float:
    """Say with which chance each action would be chosen, and return the mean preference.

    Args:
        x: float64[at most d + 1].
        place: of the row's action; -1: it has none.
        preferences: float64[d + 1, places].
        read: float64[2]; the second is written: how much the row's action is preferred, 0 where it has no place.
        chances: float64[places], written, together 1.
        logarithms: float64[places], zeros; written, of the chances.
    """
    for j in range(x.size):
        if x[j] != 0.0:
            for k in range(chances.size):
                logarithms[k] += preferences[j, k] * x[j]
    read[1] = logarithms[place] if place >= 0 else 0.0
    best, total, mean = logarithms.max(), 0.0, 0.0
    for k in range(chances.size):
        chances[k] = math.exp(logarithms[k] - best)
        mean += chances[k] * logarithms[k]
        total += chances[k]
    for k in range(chances.size):
        chances[k] /= total
        logarithms[k] -= best + math.log(total)
    return mean / total


@kernel
def _keep_order(slope_min: float, precision: Doubles, covariance: Doubles, natural: Doubles, mean: Doubles) -> None:
    """Let the slope be no less than this: level and slope become the most likely ones of those that are allowed.

    Otherwise a policy that is right where it decides, and wrong about how likely success is elsewhere, would be turned
    round.
    """
    missing = slope_min - mean[1]
    if missing > 0.0:
        mean += missing * covariance[:, 1] / covariance[1, 1]
        natural[:] = precision @ mean


@kernel
def _step(
    x: Doubles,
    place: int,
    gain: float,
    temperature: float,
    rate: float,
    chances: Doubles,
    logarithms: Doubles,
    preferences: Doubles,
    squares: Doubles,
) -> None:
    """Move preferences along the gradient of gain · π_place + temperature · entropy(π); see SoftmaxPolicy for rate.

    With respect to how much action k is preferred, the first has π_place (1[k is place] - π_k), the second
    -π_k (log π_k + entropy).
    """
    entropy, length = 0.0, 0.0
    for k in range(chances.size):
        entropy -= chances[k] * logarithms[k]
    for j in range(x.size):
        length += x[j] * x[j]
    steps = np.empty_like(chances)
    for k in range(chances.size):
        slope = -gain * chances[place] * chances[k] - temperature * chances[k] * (logarithms[k] + entropy)
        if k == place:
            slope += gain * chances[place]
        squares[k] += slope * slope
        steps[k] = rate * slope / math.sqrt(length * (1.0 + squares[k]))
    for j in range(x.size):
        if x[j] != 0.0:
            for k in range(chances.size):
                preferences[j, k] += steps[k] * x[j]
