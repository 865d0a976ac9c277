"""What every typed value must be: bounded, no control characters, finite, of a currency, instants that exist."""

from __future__ import annotations

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from server.catalog.values import check_instant, check_value
from server.errors import TsugiError
from tsugi.v1.error_reason_pb2 import ErrorReason
from tsugi.v1.value_pb2 import Money, TextSet, Value, Vector

YEAR_1_S, YEAR_9999_S = -62_135_596_800, 253_402_300_799


@pytest.mark.parametrize("text", ["a\x00b", "\n", "\x7f", "\x9f"])
def test_control_characters_are_in_no_value(text: str) -> None:
    with pytest.raises(TsugiError) as refusal:
        check_value("here", Value(text_value=text))
    assert refusal.value.reason == ErrorReason.ERROR_REASON_FIELD_INVALID
    assert refusal.value.metadata == {"field": "here"}


def test_text_has_at_most_1024_bytes() -> None:
    check_value("here", Value(text_value="é" * 512))
    with pytest.raises(TsugiError) as refusal:
        check_value("here", Value(text_value="é" * 512 + "x"))
    assert refusal.value.reason == ErrorReason.ERROR_REASON_LIMIT_EXCEEDED
    assert refusal.value.metadata == {"field": "here", "limit": "1024", "got": "1025"}


def test_set_has_at_most_52_bounded_values() -> None:
    check_value("here", Value(set_value=TextSet(values=[str(i) for i in range(52)])))
    check_value("here", Value(set_value=TextSet()))
    with pytest.raises(TsugiError) as refusal:
        check_value("here", Value(set_value=TextSet(values=[str(i) for i in range(53)])))
    assert refusal.value.metadata == {"field": "here", "limit": "52", "got": "53"}
    for text in ("é" * 513, "a\x00"):
        with pytest.raises(TsugiError) as refusal:
            check_value("here", Value(set_value=TextSet(values=["fine", text])))
        assert refusal.value.metadata["field"] == "here"


def test_vector_has_at_most_256_finite_numbers() -> None:
    check_value("here", Value(vector_value=Vector(numbers=[0.5] * 256)))
    with pytest.raises(TsugiError) as refusal:
        check_value("here", Value(vector_value=Vector(numbers=[0.5] * 257)))
    assert refusal.value.metadata == {"field": "here", "limit": "256", "got": "257"}
    for number in (float("nan"), float("inf")):
        with pytest.raises(TsugiError) as refusal:
            check_value("here", Value(vector_value=Vector(numbers=[1.0, number])))
        assert refusal.value.reason == ErrorReason.ERROR_REASON_FIELD_INVALID


@pytest.mark.parametrize("currency_code", ["", "eur", "EURO", "€"])
def test_amount_has_a_currency(currency_code: str) -> None:
    check_value("here", Value(money_value=Money(currency_code="JPY", amount_micros=-1)))
    with pytest.raises(TsugiError) as refusal:
        check_value("here", Value(money_value=Money(currency_code=currency_code, amount_micros=1)))
    assert refusal.value.reason == ErrorReason.ERROR_REASON_FIELD_INVALID


def test_every_other_value_passes() -> None:
    check_value("here", Value(text_value="👩\u200d🔬 says “hello”"))
    check_value("here", Value(number_value=1e308))
    check_value("here", Value(bool_value=True))
    check_value("here", Value())


@pytest.mark.parametrize(
    ("seconds", "nanos", "passes"),
    [
        (YEAR_1_S, 0, True),
        (YEAR_1_S - 1, 999_999_999, False),
        (YEAR_9999_S, 999_999_999, True),
        (YEAR_9999_S + 1, 0, False),
        (0, -1, False),
        (0, 1_000_000_000, False),
        (1 << 62, 0, False),
    ],
)
def test_instant_lies_within_years_1_to_9999(seconds: int, nanos: int, passes: bool) -> None:
    instant = Timestamp(seconds=seconds, nanos=nanos)
    if passes:
        check_instant("here", instant)
        return
    for check in (check_instant, lambda path, each: check_value(path, Value(time_value=each))):
        with pytest.raises(TsugiError) as refusal:
            check("here", instant)
        assert refusal.value.metadata == {"field": "here"}
