"""From cells to typed values: one reading or a refusal that quotes nothing."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from server.importing.conversion import setter
from server.importing.faults import RowFault
from server.importing.mapping import FactColumn, Form
from server.importing.texts import instant, micros, number
from tests.unit.importing.support import catalog
from tsugi.v1.value_pb2 import Value

ATTRIBUTES = {each.name: each for each in catalog().profile_attributes}


def value(name: str, cell: Any, *, day_first: bool | None = None, decimal: str = "", **column: Any) -> Any:
    """Convert a cell and return the one value as JSON has it."""
    made = Value()
    form = Form(delimiter=",", encoding="utf-8", day_first=day_first, currency="", decimal=decimal)
    setter(ATTRIBUTES[name], FactColumn("attributes", name, name, **column), form, "EUR")(made, cell)
    ((_, single),) = json_format.MessageToDict(made).items()
    return single


@pytest.mark.parametrize(
    ("name", "cell", "wanted"),
    [
        ("age", "31", 31.0),
        ("age", " 31.5 ", 31.5),
        ("age", "3e1", 30.0),
        ("age", 31, 31.0),
        ("age", Decimal("31.5"), 31.5),
        ("member", "TRUE", True),
        ("member", "0", False),
        ("member", False, False),
        ("member", 1, True),
        ("tier", " gold ", "gold"),
        ("tags", "vip; new;vip;", {"values": ["vip", "new"]}),
        ("tags", ["new"], {"values": ["new"]}),
        ("tags", [], {}),
        ("spend", "12.5", {"currencyCode": "EUR", "amountMicros": "12500000"}),
        ("spend", "EUR 12", {"currencyCode": "EUR", "amountMicros": "12000000"}),
        ("spend", "-3.50 €", {"currencyCode": "EUR", "amountMicros": "-3500000"}),
        ("spend", 0.1, {"currencyCode": "EUR", "amountMicros": "100000"}),
        ("taste", "[0.5, -1]", {"numbers": [0.5, -1.0]}),
        ("taste", [1, 2], {"numbers": [1.0, 2.0]}),
        ("joined", "2026-03-01", "2026-03-01T00:00:00Z"),
        ("joined", "2026-03-01 10:00:00+02:00", "2026-03-01T08:00:00Z"),
        ("joined", "2026-03-01T10:00:00.25Z", "2026-03-01T10:00:00.250Z"),
        ("joined", "20260301", "2026-03-01T00:00:00Z"),
        ("joined", "1.3.2026 9:30", "2026-03-01T09:30:00Z"),
        ("joined", "13/04/2026", "2026-04-13T00:00:00Z"),
        ("joined", datetime(2026, 3, 1, tzinfo=UTC), "2026-03-01T00:00:00Z"),
        ("joined", date(2026, 3, 1), "2026-03-01T00:00:00Z"),
        ("surname", " O'Neil ", " O'Neil "),
        ("surname", "Müller", "Müller"),
        ("surname", 4711, "4711"),
        ("birth_date", "12/04/1987", "12/04/1987"),
    ],
)
def test_cell_is_read_as_the_catalog_declares_it(name: str, cell: Any, wanted: Any) -> None:
    assert value(name, cell) == wanted


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("age", "1,234.5"),
        ("age", "12 years"),
        ("age", "nan"),
        ("age", "1e999"),
        ("age", "1_0"),
        ("age", "٣"),
        ("age", "121"),
        ("age", True),
        ("age", [1]),
        ("age", 10**400),
        ("member", "maybe"),
        ("member", 2),
        ("tier", "Gold"),
        ("tier", 1.5),
        ("tags", "vip,new"),
        ("tags", 3),
        ("spend", "USD 3"),
        ("spend", "$3"),
        ("spend", "3.4.5"),
        ("spend", "9" * 20),
        ("spend", float("inf")),
        ("taste", "[1]"),
        ("taste", "1,x"),
        ("taste", [1e39, 0]),
        ("joined", "2026-02-30"),
        ("joined", "2026-03-01T25:00:00Z"),
        ("joined", "05/04/2026"),
        ("joined", "31.04.2026"),
        ("joined", "yesterday"),
        ("joined", 1772438400),
        ("surname", "x" * 1025),
        ("surname", "ü" * 513),
        ("surname", "a\nb"),
        ("surname", "\ud800"),
        ("surname", {"a": 1}),
        ("surname", True),
    ],
)
def test_cell_with_no_reading_or_two_is_refused_and_not_quoted(name: str, cell: Any) -> None:
    with pytest.raises(RowFault) as refusal:
        value(name, cell)
    assert not isinstance(cell, str) or len(cell) < 3 or cell not in str(refusal.value)


def test_mapping_settles_what_has_two_readings() -> None:
    assert value("joined", "03/04/2026", day_first=True) == "2026-04-03T00:00:00Z"
    assert value("joined", "03/04/2026", day_first=False) == "2026-03-04T00:00:00Z"
    assert value("birth_date", "12/04/1987", day_first=True) == "1987-04-12"
    with pytest.raises(RowFault):
        value("birth_date", "31/04/1987", day_first=True)
    assert value("age", "1.2", decimal=".") == 1.2
    assert value("spend", "1.234,50 EUR", decimal=",")["amountMicros"] == "1234500000"
    assert value("spend", "1,234.50", decimal=".")["amountMicros"] == "1234500000"
    assert value("member", "Y", true_texts=("Y",), false_texts=("N",)) is True
    assert value("tier", "G", values=(("G", "gold"),)) == "gold"
    assert value("tags", "vip|new", split="|") == {"values": ["vip", "new"]}


@given(st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)), st.integers(-720, 720))
def test_every_instant_in_iso_form_comes_back(moment: datetime, minutes: int) -> None:
    us = instant(moment.isoformat() + "Z", None)
    assert us is not None
    assert datetime(1970, 1, 1) + timedelta(microseconds=us) == moment
    sign, (hours, rest) = "+" if minutes >= 0 else "-", divmod(abs(minutes), 60)
    shifted = instant(f"{moment.isoformat()}{sign}{hours:02}:{rest:02}", None)
    assert shifted == us - minutes * 60_000_000


@given(st.dates(date(1, 1, 1)))
def test_every_day_is_read_in_both_orders_when_the_order_is_stated(day: date) -> None:
    wanted = instant(day.isoformat(), None)
    assert instant(f"{day:%d/%m}/{day.year:04}", True) == wanted
    assert instant(f"{day:%m/%d}/{day.year:04}", False) == wanted
    assert instant(f"{day:%d/%m}/{day.year:04}", None) in {wanted, None}


@given(st.integers(-(10**12), 10**12))
def test_amounts_come_back_to_the_last_millionth(amount: int) -> None:
    text = f"{Decimal(amount) / 1_000_000:f}"
    assert micros(text, "EUR", "") == amount
    assert micros(f"{text.replace('.', ',')} EUR", "EUR", ",") == amount


@given(st.text(max_size=80), st.sampled_from(["", ".", ","]))
def test_any_text_has_one_reading_or_none(text: str, decimal: str) -> None:
    for read in (number(text, decimal), micros(text, "EUR", decimal), instant(text, None)):
        assert read is None or isinstance(read, int | float)


@pytest.mark.parametrize(
    ("name", "cell", "how", "wanted"),
    [
        ("birth_date", "31.12.80", {"day_first": True}, "a day such as 31.12.1987 is expected, one that exists"),
        ("birth_date", "12/31/80", {"day_first": False}, "a day such as 12/31/1987 is expected, one that exists"),
        ("joined", "31.12.80", {"day_first": True}, "an instant such as 31.12.1987 is expected, of a day that exists"),
        ("age", "thirty", {}, "a number such as 1234.5 is expected"),
        ("age", "1e400", {}, "a number such as 1234.5 is expected"),
        ("age", "thirty", {"decimal": ","}, "a number such as 1234,5 is expected"),
        (
            "age", "1,5", {},
            "a number such as 1234.5 is expected; state csv.decimal for thousands separators or a decimal comma",
        ),
    ],
)  # fmt: skip
def test_refusal_shows_what_the_mapping_expects(name: str, cell: str, how: dict[str, Any], wanted: str) -> None:
    with pytest.raises(RowFault) as refusal:
        value(name, cell, **how)
    assert str(refusal.value) == wanted
