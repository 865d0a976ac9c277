"""A simulated sports retailer: who comes, what they see, what they would do. Nothing in it is about real people.

The world is built on the example catalog. People differ only in declared profile attributes, visits only in declared
context, and the true propensity of every (person, visit, action) is a fixed logistic function of the very columns that
the online learners read, plus a slight bend that no such learner can follow. What is best depends on the person; it
is known here and never told to a server.

The world exists in two eras. In the past, which the seed bundle was fitted on, most people kept to their own sport and
cared less about price; today they turn to another. A champion of the past helps, and learning from today helps more.

Pure: randomness is a generator handed in, the instant is one constant, nothing is read or written.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, NamedTuple

import numpy as np

from server.catalog.catalog import NOW_FACT, Catalog, Doubles, Fact, Mask
from server.decisioning import eligibility
from server.decisioning.features import encode_rows
from tsugi.v1 import catalog_pb2

NOW_US: Final = 1_772_528_400_000_000  # 2026-03-03T09:00:00Z; the world's catalog holds for years around it
UNKNOWN_SHARE: Final = 0.05  # of all profile facts: no shop knows everything about everybody
LOST_SHARE: Final = 0.05  # of all outcomes: they happen, and nobody reports them
DELAY_MIN_S: Final = 0.1
DELAY_MAX_S: Final = 3.0

_SPORTS: Final = {"running": 0.28, "cycling": 0.20, "football": 0.20, "outdoor": 0.18, "yoga": 0.14}
_CITY_SIZES: Final = {"village": 0.25, "town": 0.35, "city": 0.40}
_DEVICES: Final = {"phone": 0.6, "tablet": 0.1, "desktop": 0.3}
_PAGES: Final = {"home": 0.75, "product": 0.1, "basket": 0.15}
_PLACEMENTS: Final = {"home": "home_banner", "product": "product_sidebar", "basket": "basket_footer"}

_Pulls = Mapping[str, float]  # by learned column: what a 1 there adds to the log-odds


class Era(Enum):
    """When people lived: the seed bundle was fitted on the past, the traffic is of today."""

    PAST = "past"
    TODAY = "today"


# The sport whose actions people respond to, by their favourite one, and how strongly.
_TURNS_TO: Final[dict[Era, dict[str, tuple[str, float]]]] = {
    Era.PAST: {
        "running": ("outdoor", 2.4),
        "cycling": ("outdoor", 2.4),
        "football": ("football", 1.2),
        "outdoor": ("outdoor", 1.2),
        "yoga": ("yoga", 1.2),
    },
    Era.TODAY: {
        "running": ("outdoor", 2.4),
        "cycling": ("outdoor", 2.4),
        "football": ("running", 2.4),
        "outdoor": ("yoga", 2.4),
        "yoga": ("cycling", 2.4),
    },
}
_FAVOURITE_PULL: Final = 0.3
_OTHER_SPORT_PULL: Final = -0.5
# How much stronger the dear actions pull those who spend, and the cheap ones those who do not.
_PRICE_PULL: Final = {Era.PAST: 0.6, Era.TODAY: 0.9}
# What draws people to each kind of action: always, and in one era only.
_KIND_PULLS: Final[dict[str, _Pulls]] = {
    "new_arrival": {"profile.age": -0.4, "context.device=phone": 0.3},
    "discount": {"profile.days_since_purchase": 0.5},
    "service": {"profile.age": 0.6, "context.page=basket": 1.0, "context.device=desktop": 0.3},
    "loyalty": {"profile.spend_12m": 0.4, "profile.days_since_purchase": -0.6, "context.page=basket": 0.6},
}
_ERA_KIND_PULLS: Final[dict[Era, dict[str, _Pulls]]] = {
    Era.PAST: {
        "new_arrival": {"profile.member": -0.2},
        "discount": {"profile.member": 0.3},
        "event": {"profile.city_size=city": 0.1, "profile.age": 0.3},
    },
    Era.TODAY: {
        "new_arrival": {"profile.member": 0.6},
        "discount": {"profile.member": -0.5},
        "event": {"profile.city_size=city": 0.9, "profile.city_size=village": -0.6, "profile.age": -0.6},
    },
}
_GOAL_BASES: Final = {"click": -3.3, "upsell": -2.3}  # a voice persuades more than a banner
_CHARACTER_DEVIATION: Final = 0.1  # of each action's own weights, in both eras the same
_BEND_DEVIATION: Final = 0.15  # of the part that is not linear in the columns


class Person(NamedTuple):
    """One simulated person.

    Attributes:
        identities: value by namespace.
        attributes: what a source would say about the person, by profile attribute name; unknown ones are absent.
        facts: float64[m], the profile part of the fact vector, NaN elsewhere.
    """

    identities: dict[str, str]
    attributes: dict[str, str | float | bool]
    facts: Doubles


class Visit(NamedTuple):
    """One opportunity to say something: a page view or a call.

    Attributes:
        placement: what is to be filled.
        n_slots: how many slots of it.
        context: facts of the visit, by context attribute name.
        facts: float64[m], the context part of the fact vector, NaN elsewhere.
    """

    placement: str
    n_slots: int
    context: dict[str, str | float | bool]
    facts: Doubles


class Happening(NamedTuple):
    """What truly happened after an action was shown, and what is told of it.

    Attributes:
        reward: 1.0 for success, else 0.0; true even when nothing is told.
        outcome_type: the outcome to report; empty for silence.
        delay_s: how long after the decision it is reported.
    """

    reward: float
    outcome_type: str
    delay_s: float


class World:
    """The simulated world of one catalog.

    Args:
        catalog: the compiled example catalog; its attribute names and action attributes are the world's.
        seed: of the people and of each action's own character.
        era: whose preferences hold.
    """

    def __init__(self, catalog: Catalog, seed: int, *, era: Era = Era.TODAY) -> None:
        self.catalog = catalog
        self.seed = seed
        character = np.random.default_rng([seed, 1])
        n, d = len(catalog.actions.names), len(catalog.learned.names)
        self._weights = _story(catalog, era) + character.normal(0.0, _CHARACTER_DEVIATION, (n, d))
        self._intercepts = character.normal(0.0, 2.0 * _CHARACTER_DEVIATION, n)
        self._bends = character.normal(0.0, _BEND_DEVIATION, n)
        self._member_column = catalog.learned.names.index("profile.member")
        self._spend_column = catalog.learned.names.index("profile.spend_12m")

    def people(self, n: int) -> list[Person]:
        """Return n people; the same seed and n give the same people, in either era."""
        facts = self.person_facts(np.random.default_rng([self.seed, 2]), n)
        return [
            Person(
                {"customer_number": f"c{number:06}", "browser_id": f"b{number:06}"},
                self._decode(row, "profile."),
                row,
            )
            for number, row in enumerate(facts)
        ]

    def page_view(self, rng: np.random.Generator) -> Visit:
        """Draw a page view; it fills all slots of the page's placement."""
        facts = self.page_view_facts(rng, 1)[0]
        context = self._decode(facts, "context.")
        placement = _PLACEMENTS[str(context["page"])]
        n_slots = self.catalog.placements[self.catalog.placement_rows[placement]].count_max
        return Visit(placement, n_slots, context, facts)

    def call(self, rng: np.random.Generator) -> Visit:
        """Draw a call: an agent may say one thing, and knows the hour alone."""
        facts = self._no_facts(1)
        facts[:, self._position("context.hour")] = _hours(rng, 1)
        return Visit("agent_upsell", 1, self._decode(facts[0], "context."), facts[0])

    def truth(self, person: Person, visit: Visit) -> dict[str, float]:
        """Return the true propensity of every eligible action, by name. Never for a server's ears.

        Cost: about 25 µs.
        """
        facts = np.where(np.isnan(visit.facts), person.facts, visit.facts)[None, :]
        placement = self.catalog.placements[self.catalog.placement_rows[visit.placement]]
        propensities = self.propensities(facts, self.catalog.goals[placement.goal_row].name)[0]
        eligible = self.eligible(facts, self.catalog.message.channels[placement.channel_row].name)[0]
        return {
            name: float(propensity)
            for name, propensity, passed in zip(self.catalog.actions.names, propensities, eligible, strict=True)
            if passed
        }

    def happening(self, visit: Visit, propensity: float, rng: np.random.Generator) -> Happening:
        """Draw what follows one shown action of a visit, given its true propensity."""
        success, told, talkative = rng.random(3)
        reward = float(success < propensity)
        is_call = visit.placement == "agent_upsell"
        if reward:
            outcome_type = "upsell_accepted" if is_call else "click"
        elif talkative < (0.7 if is_call else 0.05):  # agents note a refusal more often than people close a banner
            outcome_type = "upsell_declined" if is_call else "dismiss"
        else:
            outcome_type = ""
        delay_s = min(DELAY_MIN_S + rng.exponential(0.6), DELAY_MAX_S)
        return Happening(reward, outcome_type if told >= LOST_SHARE else "", delay_s)

    def propensities(self, facts: Doubles, goal: str) -> Doubles:
        """Return the true propensities of all actions, eligible or not, for rows of facts.

        Args:
            facts: float64[r, m], in the catalog's fact space.
            goal: a goal of the catalog.

        Returns:
            float64[r, n], actions in the catalog's order.
        """
        columns = encode_rows(facts, self.catalog.learned).astype(np.float64)
        bend = columns[:, self._spend_column] * (columns[:, self._member_column] - 0.5)
        log_odds = _GOAL_BASES[goal] + columns @ self._weights.T + self._intercepts + np.outer(bend, self._bends)
        propensities: Doubles = 1.0 / (1.0 + np.exp(-log_odds))
        return propensities

    def eligible(self, facts: Doubles, channel: str) -> Mask:
        """Say which actions may be said on a channel, given rows of facts: bool[r, n]."""
        actions, rules = self.catalog.actions, self.catalog.rules.columns()
        treated = ~np.isnan(actions.weights[:, self.catalog.channel_rows[channel]])
        valid_from_us, valid_until_us = actions.valid_from_us, actions.valid_until_us
        passed = [
            eligibility.gate(row, NOW_US, valid_from_us, valid_until_us, actions.rules, *rules)[0] for row in facts
        ]
        return np.array(passed) & treated

    def page_view_facts(self, rng: np.random.Generator, n: int) -> Doubles:
        """Draw the context facts of n page views: float64[n, m], NaN elsewhere."""
        facts = self._no_facts(n)
        self._draw_categories(rng, facts, "context.device", _DEVICES)
        self._draw_categories(rng, facts, "context.page", _PAGES)
        facts[:, self._position("context.hour")] = _hours(rng, n)
        at_basket = facts[:, self._position("context.page")] == self._fact("context.page").codes["basket"]
        filled = at_basket | (rng.random(n) < 0.3)
        facts[:, self._position("context.basket_total")] = np.where(filled, rng.gamma(2.0, 40.0, n).round(2), 0.0)
        return facts

    def person_facts(self, rng: np.random.Generator, n: int) -> Doubles:
        """Draw the profile facts of n people: float64[n, m], NaN where unknown and elsewhere."""
        facts = self._no_facts(n)
        self._draw_categories(rng, facts, "profile.favourite_sport", _SPORTS)
        self._draw_categories(rng, facts, "profile.city_size", _CITY_SIZES)
        facts[:, self._position("profile.age")] = rng.normal(40.0, 14.0, n).clip(14.0, 90.0).round()
        member = rng.random(n) < 0.45
        facts[:, self._position("profile.member")] = member
        spend = rng.gamma(1.6, np.where(member, 160.0, 90.0))
        facts[:, self._position("profile.spend_12m")] = spend.round(2)
        days = rng.exponential(np.where(member, 45.0, 90.0))
        facts[:, self._position("profile.days_since_purchase")] = days.round()
        profile = facts[:, 1 : 1 + len(self.catalog.profiles.attributes)]  # what follows from events is nobody's to say
        profile[rng.random(profile.shape) < UNKNOWN_SHARE] = np.nan
        return facts

    def _no_facts(self, n: int) -> Doubles:
        facts = np.full((n, len(self.catalog.space.facts)), np.nan)
        facts[:, NOW_FACT] = NOW_US
        return facts

    def _position(self, name: str) -> int:
        return self.catalog.space.index[name]

    def _fact(self, name: str) -> Fact:
        return self.catalog.space.facts[self._position(name)]

    def _draw_categories(
        self, rng: np.random.Generator, facts: Doubles, name: str, shares: Mapping[str, float]
    ) -> None:
        codes = np.array([self._fact(name).codes[value] for value in shares], np.float64)
        facts[:, self._position(name)] = codes[rng.choice(len(codes), len(facts), p=list(shares.values()))]

    def _decode(self, row: Doubles, prefix: str) -> dict[str, str | float | bool]:
        """Turn the known facts of one row back into the values a caller would send."""
        return {
            fact.name.removeprefix(prefix): _value(fact, float(number))
            for fact, number in zip(self.catalog.space.facts, row, strict=True)
            if fact.name.startswith(prefix) and not np.isnan(number)
        }


def best_value(truth: Mapping[str, float], n_slots: int) -> float:
    """Return the expected reward a slot when the slots hold the truly best eligible actions."""
    best = sorted(truth.values(), reverse=True)[:n_slots]
    return sum(best) / len(best)


def uniform_value(truth: Mapping[str, float]) -> float:
    """Return the expected reward a slot when slots hold eligible actions at random."""
    return sum(truth.values()) / len(truth)


def _story(catalog: Catalog, era: Era) -> Doubles:
    """Tell the preferences of an era in the learners' columns: float64[n, d]."""
    columns = {name: j for j, name in enumerate(catalog.learned.names)}
    positions = {fact.name: j for j, fact in enumerate(catalog.action_facts)}
    sports = list(catalog.action_facts[positions["action.sport"]].codes)
    kinds = list(catalog.action_facts[positions["action.kind"]].codes)
    weights = np.zeros((len(catalog.actions.names), len(columns)))
    for row, facts in enumerate(catalog.actions.facts):
        sport = sports[int(facts[positions["action.sport"]])]
        for favourite, (turned_to, turned_to_pull) in _TURNS_TO[era].items() if sport in _SPORTS else ():
            pulls = {favourite: _FAVOURITE_PULL, turned_to: turned_to_pull}
            weights[row, columns[f"profile.favourite_sport={favourite}"]] = pulls.get(sport, _OTHER_SPORT_PULL)
        price_level = facts[positions["action.price_level"]] - 2.0
        weights[row, columns["profile.spend_12m"]] = _PRICE_PULL[era] * price_level
        kind = kinds[int(facts[positions["action.kind"]])]
        for pulls_of in (_KIND_PULLS, _ERA_KIND_PULLS[era]):
            for column, pull in pulls_of.get(kind, {}).items():
                weights[row, columns[column]] += pull
    return weights


def _hours(rng: np.random.Generator, n: int) -> Doubles:
    return rng.normal(15.0, 4.0, n).clip(0.0, 23.0).round()


def _value(fact: Fact, number: float) -> str | float | bool:
    if fact.type == catalog_pb2.ATTRIBUTE_TYPE_CATEGORY:
        return next(value for value, code in fact.codes.items() if code == number)
    return bool(number) if fact.type == catalog_pb2.ATTRIBUTE_TYPE_BOOL else number
