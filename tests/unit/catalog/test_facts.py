"""How a typed value becomes the number that stands for it: unknown rather than let through."""

from __future__ import annotations

import math

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog.catalog import UNBOUNDED, Fact
from tests.support.rules import BOOL, CATEGORY, MONEY, NUMBER, SET, TEXT, TIME, VECTOR, fact
from tsugi.v1.value_pb2 import Money, TextSet, Value, Vector

SPORTS = ["ski", "bike", "run"]
FACTS = {
    "number": Fact("profile.x", NUMBER, {}, -1.0, 2.0),
    "bool": fact("profile.x", BOOL),
    "category": fact("profile.x", CATEGORY, SPORTS),
    "text": fact("profile.x", TEXT, ["Graz"]),
    "time": fact("profile.x", TIME),
    "set": fact("profile.x", SET, SPORTS),
    "money": Fact("profile.x", MONEY, {}, 0.0, 10.0, "EUR"),
    "vector": fact("profile.x", VECTOR),
}


def euros(amount: float, currency_code: str = "EUR") -> Value:
    return Value(money_value=Money(currency_code=currency_code, amount_micros=round(amount * 1e6)))


def texts(*values: str) -> Value:
    return Value(set_value=TextSet(values=values))


def vector(*numbers: float) -> Value:
    return Value(vector_value=Vector(numbers=numbers))


@pytest.mark.parametrize(
    ("kind", "value", "number"),
    [
        ("number", Value(number_value=2.0), 2.0),
        ("number", Value(number_value=2.5), math.nan),
        ("number", Value(number_value=math.nan), math.nan),
        ("bool", Value(bool_value=True), 1.0),
        ("category", Value(text_value="bike"), 1.0),
        ("category", Value(text_value="golf"), math.nan),
        ("text", Value(text_value="Graz"), 0.0),
        ("text", Value(text_value="Linz"), -1.0),
        ("time", Value(time_value=Timestamp(seconds=-1, nanos=1_999)), -999_999.0),
        ("set", texts(), 0.0),
        ("set", texts("run", "ski"), 5.0),
        ("set", texts("ski", "ski"), math.nan),
        ("set", texts("ski", "golf"), math.nan),
        ("money", euros(2.5), 2.5),
        ("money", euros(10.000001), math.nan),
        ("money", euros(-0.01), math.nan),
        ("money", euros(2.5, "USD"), math.nan),
        ("money", euros(2.5, ""), math.nan),
        ("vector", vector(0.5, -1.0), 1.0),
        ("vector", vector(0.5), math.nan),
        ("vector", vector(0.5, 1.0, 2.0), math.nan),
        ("vector", vector(0.5, math.inf), math.nan),
        ("vector", vector(), math.nan),
    ],
)
def test_value_is_encoded_or_unknown(kind: str, value: Value, number: float) -> None:
    assert FACTS[kind].encode(value) == pytest.approx(number, abs=0.0, nan_ok=True)


@pytest.mark.parametrize("kind", FACTS)
def test_value_of_another_type_is_unknown(kind: str) -> None:
    values = {
        "number": Value(number_value=1.0),
        "bool": Value(bool_value=True),
        "text": Value(text_value="ski"),
        "time": Value(time_value=Timestamp(seconds=1)),
        "set": texts("ski"),
        "money": euros(1.0),
        "vector": vector(1.0, 2.0),
    }
    taken = [name for name, value in values.items() if not math.isnan(FACTS[kind].encode(value))]
    assert taken == ["text" if kind == "category" else kind]
    assert math.isnan(FACTS[kind].encode(Value()))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 51)))
def test_every_set_of_52_values_has_a_number_of_its_own(codes: set[int]) -> None:
    wide = fact("profile.x", SET, [f"v{code}" for code in range(52)])
    mask = int(wide.encode(texts(*(f"v{code}" for code in codes))))
    assert {code for code in range(60) if mask >> code & 1} == codes


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (FACTS["number"], "a finite number within [-1, 2] is required"),
        (Fact("x", NUMBER, {}, -UNBOUNDED, UNBOUNDED), "a finite number is required"),
        (FACTS["category"], "a category value is required, one of ski, bike, run"),
        (FACTS["time"], "a time value is required"),
        (FACTS["set"], "a set value is required, any of ski, bike, run, none twice"),
        (FACTS["money"], "a money value within [0, 10] in EUR is required"),
        (FACTS["vector"], "a vector value of exactly 2 finite numbers is required"),
    ],
)
def test_fact_says_what_it_takes(wanted: Fact, words: str) -> None:
    assert wanted.wanted() == words
