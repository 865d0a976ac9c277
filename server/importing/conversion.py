"""From a cell to a typed value, as the catalog declares it: one function an attribute, made once and called a row.

A cell is text (CSV), or what JSON and Parquet hold: text, number, boolean, list, date. A cell that is not what is
declared raises ``RowFault`` with a sentence that says what would be right; it never quotes the cell. Nothing here
guesses: a form that could mean two things is refused unless the mapping says which.

Cost: 0.5 to 2 µs a cell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp

from server.catalog.values import TEXT_BYTES_MAX
from server.importing.faults import RowFault
from server.importing.mapping import FactColumn, Form
from server.importing.texts import instant, micros, number
from tsugi.v1.catalog_pb2 import Attribute, AttributeType, Meaning
from tsugi.v1.value_pb2 import Value

Setter: TypeAlias = Callable[[Value, Any], None]

VECTOR_NUMBERS_MAX: Final = 256
MONEY_MICROS_MAX: Final = (1 << 63) - 1
FLOAT32_MAX: Final = 3.4028234663852886e38

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TRUE: Final = frozenset({"true", "1"})
_DAYS: Final = {True: "31.12.1987", False: "12/31/1987"}  # as a mapping says that days are written
_FALSE: Final = frozenset({"false", "0"})


def setter(attribute: Attribute, column: FactColumn, form: Form, currency: str) -> Setter:
    """Make the function that puts a cell into a value of an attribute's type.

    Args:
        attribute: as declared; of a known type.
        column: what the mapping says of it.
        form: how texts are to be read.
        currency: the catalog's.
    """
    return _MAKERS[attribute.type](attribute, column, form, currency)


def word(cell: Any) -> str:
    """Return a cell as one word, for comparing it with words of the mapping."""
    if isinstance(cell, str):
        return cell.strip()
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, int):
        return str(cell)
    raise RowFault("one text is expected")


def identity_text(cell: Any) -> str:
    """Return a cell as an identity or part of a record id."""
    if isinstance(cell, float):
        raise RowFault("a text or a whole number is expected; a number with a point has lost its digits")
    return plain_text(cell, bytes_max=256).strip()


def plain_text(cell: Any, bytes_max: int = TEXT_BYTES_MAX) -> str:
    """Return a cell as text within the server's bounds."""
    if not isinstance(cell, str):
        if isinstance(cell, date):
            return cell.isoformat()
        if isinstance(cell, bool) or not isinstance(cell, int | float | Decimal):
            raise RowFault("a text is expected")
        return str(cell)
    if len(cell) <= bytes_max and cell.isascii() and cell.isprintable():
        return cell
    try:
        if len(cell.encode()) > bytes_max:
            raise RowFault(f"at most {bytes_max} bytes are taken")
    except UnicodeEncodeError:
        raise RowFault("half a surrogate pair is no character") from None
    if _CONTROL.search(cell):
        raise RowFault("control characters are not taken, nor line breaks")
    return cell


def fill_time(timestamp: Timestamp, cell: Any, form: Form) -> None:
    """Put a cell into an instant. An instant without a zone is taken as UTC, a day as its first instant."""
    if isinstance(cell, str):
        us = instant(cell, form.day_first)
    elif isinstance(cell, datetime):
        us = _us(cell if cell.tzinfo else cell.replace(tzinfo=UTC))
    elif isinstance(cell, date):
        us = _us(datetime(cell.year, cell.month, cell.day, tzinfo=UTC))
    else:
        us = None
    if us is None:
        hint = "; state csv.dayFirst for days like 03/04/2026" if form.day_first is None else ""
        example = "2026-03-01T09:00:00Z" if form.day_first is None else _DAYS[form.day_first]
        raise RowFault(f"an instant such as {example} is expected, of a day that exists{hint}")
    timestamp.seconds, rest_us = divmod(us, 1_000_000)
    timestamp.nanos = rest_us * 1_000


def _us(moment: datetime) -> int:
    span = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (span.days * 86_400 + span.seconds) * 1_000_000 + span.microseconds


def _number_of(attribute: Attribute, _: FactColumn, form: Form, __: str) -> Setter:
    least = attribute.minimum if attribute.HasField("minimum") else -math.inf
    most = attribute.maximum if attribute.HasField("maximum") else math.inf
    decimal = form.decimal
    bounds = f"from {least:g} to {most:g}"
    if math.isinf(least) or math.isinf(most):
        bounds = f"of {least:g} or more" if math.isinf(most) else f"of {most:g} or less"

    def put(value: Value, cell: Any) -> None:
        amount = _plain_number(cell, decimal)
        if not least <= amount <= most:
            raise RowFault(f"a number {bounds} is expected")
        value.number_value = amount

    return put


def _plain_number(cell: Any, decimal: str) -> float:
    if isinstance(cell, str):
        amount = number(cell, decimal)
    elif isinstance(cell, int | float | Decimal) and not isinstance(cell, bool):
        try:
            amount = float(cell)
        except OverflowError:
            amount = None
    else:
        amount = None
    if amount is None or not math.isfinite(amount):
        is_unsettled = isinstance(cell, str) and "," in cell and not decimal
        how = "; state csv.decimal for thousands separators or a decimal comma" if is_unsettled else ""
        example = "1234,5" if decimal == "," else "1234.5"
        raise RowFault(f"a number such as {example} is expected{how}")
    return amount


def _bool_of(_: Attribute, column: FactColumn, __: Form, ___: str) -> Setter:
    known = dict.fromkeys(column.true_texts or _TRUE, True) | dict.fromkeys(column.false_texts or _FALSE, False)
    is_default = not column.true_texts
    expected = f"one of {', '.join(sorted(known))} is expected"

    def put(value: Value, cell: Any) -> None:
        if cell is True or cell is False:
            value.bool_value = cell
            return
        text = word(cell)
        found = known.get(text.lower() if is_default else text)
        if found is None:
            raise RowFault(expected)
        value.bool_value = found

    return put


def _category_of(attribute: Attribute, column: FactColumn, _: Form, __: str) -> Setter:
    known = _renamed(attribute, column)
    expected = f"one of {', '.join(list(known)[:8])}{', …' if len(known) > 8 else ''} is expected"

    def put(value: Value, cell: Any) -> None:
        found = known.get(word(cell))
        if found is None:
            raise RowFault(expected)
        value.text_value = found

    return put


def _renamed(attribute: Attribute, column: FactColumn) -> dict[str, str]:
    """Return the texts that a cell may hold, and what each is called in the catalog."""
    return {name: name for name in attribute.allowed_values} | dict(column.values)


def _text_of(attribute: Attribute, column: FactColumn, form: Form, _: str) -> Setter:
    renamed = dict(column.values)
    if attribute.meaning == Meaning.MEANING_BIRTH_DATE and form.day_first is not None:
        return _birth_date(form.day_first)

    def put(value: Value, cell: Any) -> None:
        text = plain_text(cell)
        value.text_value = renamed.get(text, text) if renamed else text

    return put


def _birth_date(day_first: bool) -> Setter:
    """Bring a day into one form where the mapping says how days are written; else the server cleanses it."""

    def put(value: Value, cell: Any) -> None:
        us = instant(cell, day_first) if isinstance(cell, str) else None
        if us is not None:
            value.text_value = datetime.fromtimestamp(us // 1_000_000, UTC).date().isoformat()
        elif isinstance(cell, date):
            value.text_value = cell.isoformat()[:10]
        else:
            raise RowFault(f"a day such as {_DAYS[day_first]} is expected, one that exists")

    return put


def _time_of(_: Attribute, __: FactColumn, form: Form, ___: str) -> Setter:
    def put(value: Value, cell: Any) -> None:
        fill_time(value.time_value, cell, form)

    return put


def _set_of(attribute: Attribute, column: FactColumn, _: Form, __: str) -> Setter:
    known = _renamed(attribute, column)
    expected = f"members are expected of {', '.join(list(known)[:8])}{', …' if len(known) > 8 else ''}"
    split = column.split or ";"

    def put(value: Value, cell: Any) -> None:
        members: dict[str, None] = {}
        for member in cell.split(split) if isinstance(cell, str) else cell if isinstance(cell, list) else (None,):
            text = word(member)
            if text:
                found = known.get(text)
                if found is None:
                    raise RowFault(expected)
                members[found] = None
        value.set_value.values.extend(members)
        value.set_value.SetInParent()  # also of no members

    return put


def _money_of(_: Attribute, __: FactColumn, form: Form, currency: str) -> Setter:
    stated = form.currency or currency

    def put(value: Value, cell: Any) -> None:
        if isinstance(cell, str):
            amount = micros(cell, stated, form.decimal)
        elif isinstance(cell, int | float | Decimal) and not isinstance(cell, bool) and math.isfinite(cell):
            amount = round(Decimal(str(cell)) * 1_000_000)
        else:
            amount = None
        if amount is None or abs(amount) > MONEY_MICROS_MAX:
            raise RowFault(f"an amount of {stated} such as 1234.50 is expected")
        value.money_value.currency_code = stated
        value.money_value.amount_micros = amount

    return put


def _vector_of(attribute: Attribute, column: FactColumn, form: Form, _: str) -> Setter:
    dimensions = attribute.dimensions
    split = column.split or ","

    def put(value: Value, cell: Any) -> None:
        if isinstance(cell, str):
            text = cell.strip()
            cells: list[Any] = (text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text).split(split)
        else:
            cells = cell if isinstance(cell, list) else []
        if len(cells) != dimensions or dimensions > VECTOR_NUMBERS_MAX:
            raise RowFault(f"{dimensions} numbers are expected, such as [0.1, 0.2]")
        numbers = [_plain_number(each, form.decimal) for each in cells]
        if any(abs(each) > FLOAT32_MAX for each in numbers):
            raise RowFault("numbers of 32 bits are expected")
        value.vector_value.numbers.extend(numbers)

    return put


_MAKERS: Final[dict[int, Callable[[Attribute, FactColumn, Form, str], Setter]]] = {
    AttributeType.ATTRIBUTE_TYPE_NUMBER: _number_of,
    AttributeType.ATTRIBUTE_TYPE_BOOL: _bool_of,
    AttributeType.ATTRIBUTE_TYPE_CATEGORY: _category_of,
    AttributeType.ATTRIBUTE_TYPE_TEXT: _text_of,
    AttributeType.ATTRIBUTE_TYPE_TIME: _time_of,
    AttributeType.ATTRIBUTE_TYPE_SET: _set_of,
    AttributeType.ATTRIBUTE_TYPE_MONEY: _money_of,
    AttributeType.ATTRIBUTE_TYPE_VECTOR: _vector_of,
}
