"""What a mapping may say: everything wrong is found at once, with its path and what was probably meant."""

from __future__ import annotations

import pytest

from server.errors import TsugiError
from server.importing.checking import check_columns, check_mapping
from server.importing.mapping import Form, load_mapping
from tests.unit.importing.support import BY_LINE, MAPPING, catalog


def faults(mapping: str) -> dict[str, str]:
    with pytest.raises(TsugiError) as refusal:
        load_mapping(mapping)
    return dict(refusal.value.violations)


def faults_of_catalog(mapping: str, source: str = "crm") -> dict[str, str]:
    with pytest.raises(TsugiError) as refusal:
        check_mapping(load_mapping(mapping), catalog(), source)
    return dict(refusal.value.violations)


def test_mapping_of_every_kind_is_read() -> None:
    mapping = load_mapping(MAPPING)
    assert mapping.record_id == (("", "order_no"),)
    assert mapping.attributes[1].true_texts == ("y", "yes", "1")
    assert mapping.event is not None and mapping.event.when_equals == ("order",)
    assert set(mapping.columns()) == {
        "order_no", "updated_at", "cust_no", "browser", "age", "club", "kind", "ordered_at", "total", "optin",
    }  # fmt: skip
    assert mapping.form == Form(delimiter="", encoding="utf-8", day_first=None, currency="", decimal="")
    check_mapping(mapping, catalog(), "crm")


def test_words_stay_as_they_are_written() -> None:
    mapping = load_mapping(
        """
identities: [{namespace: customer_number, column: 007}]
attributes: {member: {column: yes, true: [01, true, 1.0], false: [no, 0x0]}}
"""
    )
    assert mapping.identities[0].column == "007"
    assert mapping.attributes[0].column == "yes"
    assert mapping.attributes[0].true_texts == ("01", "true", "1.0")


def test_template_has_texts_and_columns() -> None:
    mapping = load_mapping(f'recordId: "{{{{shop}}}}-{{shop}}/{{no}}"\n{BY_LINE}')
    assert mapping.record_id == (("{", ""), ("shop}", ""), ("-", "shop"), ("/", "no"))


def test_unknown_keys_are_named_with_the_one_that_was_meant() -> None:
    found = faults(
        """
identites: [{namespace: customer_number, column: a}]
identities: [{namspace: customer_number, column: a}]
attributes: {age: {colum: age}}
csv: {dayfirst: true, encoding: utf-9}
"""
    )
    assert "did you mean identities?" in found["identites"]
    assert "did you mean namespace?" in found["identities[0].namspace"]
    assert found["identities[0].namespace"] == "is required"
    assert "did you mean column?" in found["attributes.age.colum"]
    assert "did you mean dayFirst?" in found["csv.dayfirst"]
    assert "did you mean utf-" in found["csv.encoding"]


@pytest.mark.parametrize(
    ("document", "path"),
    [
        ("", "identities"),
        ("[1, 2]", ""),
        ("identities: {a: b}", "identities"),
        ("a: [", ""),
        ("identities: [a]", "identities[0]"),
        (f"{BY_LINE}\nrecordId: '{{a'", "recordId"),
        (f"{BY_LINE}\nrecordId: '{{a!r}}'", "recordId"),
        (f"{BY_LINE}\nrecordId: constant", "recordId"),
        (f"{BY_LINE}\nrecordId: '{{}}'", "recordId"),
        (f"{BY_LINE}\nattributes: {{}}", "attributes"),
        (f"{BY_LINE}\nevent: {{}}", "event.type"),
        (f"{BY_LINE}\nevent: {{type: a, when: {{column: b}}}}", "event.when.equals"),
        (f"{BY_LINE}\nconsents: [{{purpose: p, column: c}}]", "consents[0].granted"),
        (f"{BY_LINE}\nconsents: [{{purpose: p, column: c, granted: [a], withdrawn: [a]}}]", "consents[0].withdrawn"),
        (f"{BY_LINE}\ncsv: {{delimiter: ab}}", "csv.delimiter"),
        (f"{BY_LINE}\ncsv: {{decimal: ;}}", "csv.decimal"),
        (f"{BY_LINE}\ncsv: {{dayFirst: yes}}", "csv.dayFirst"),
        (f"{BY_LINE}\ncsv: {{currency: euro}}", "csv.currency"),
        ("identities: [{namespace: a, column: b}]\nattributes: {a: {column: b, true: [x]}}", "attributes.a.false"),
        (
            "identities: [{namespace: a, column: b}]\nattributes: {a: {column: b, true: [x], false: [x]}}",
            "attributes.a.false",
        ),
        ("a: &a [*a, *a]", "a" + 16 * "[0]"),
    ],
)
def test_mapping_that_says_nothing_sensible_is_refused_at_its_path(document: str, path: str) -> None:
    assert path in faults(document)


def test_aliases_that_repeat_without_end_are_refused() -> None:
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9))
    assert faults(f"l0: &l0 [a]\n{levels}")


def test_names_the_catalog_lacks_are_all_found_with_what_was_meant() -> None:
    found = faults_of_catalog(
        """
identities: [{namespace: customer_numbr, column: a}]
attributes: {agee: {column: a}, member: {column: a, split: ";"}, tier: {column: a, values: {g: goldd}}}
event: {type: purchas, properties: {totl: {column: a}}}
consents: [{purpose: marketin, channel: mial, column: a, granted: [b]}]
csv: {currency: USD}
""",
        "crmm",
    )
    assert "did you mean crm?" in found["--source"]
    assert "did you mean customer_number?" in found["identities[0].namespace"]
    assert "did you mean age?" in found["attributes.agee"]
    assert "sets and vectors" in found["attributes.member.split"]
    assert "did you mean gold?" in found["attributes.tier.values.g"]
    assert "did you mean purchase?" in found["event.type"]
    assert "did you mean total?" in found["event.properties.totl"]
    assert "did you mean marketing?" in found["consents[0].purpose"]
    assert "did you mean mail?" in found["consents[0].channel"]
    assert "EUR" in found["csv.currency"]
    assert len(found) == 10


def test_property_of_another_event_type_is_refused() -> None:
    mapping = f"{BY_LINE}\nevent: {{type: page_view, properties: {{total: {{column: t}}}}}}"
    assert "event.properties.total" in faults_of_catalog(mapping)


def test_source_may_write_only_what_the_catalog_lets_it() -> None:
    found = faults_of_catalog(MAPPING, "narrow")
    assert set(found) == {"attributes.member", "event.type"}


def test_columns_that_a_file_lacks_or_has_twice_are_refused_where_the_mapping_reads_them() -> None:
    mapping = load_mapping(BY_LINE)
    check_columns(mapping, ["cust_no", "age", "note", "note"], "crm.csv")
    check_columns(mapping, None, "crm.jsonl")
    with pytest.raises(TsugiError) as refusal:
        check_columns(mapping, ["custno", "age", "age"], "crm.csv")
    found = dict(refusal.value.violations)
    assert "did you mean custno?" in found["identities[0].column"]
    assert "2 columns" in found["attributes.age.column"]


@pytest.mark.parametrize(("header", "what"), [("cust_no;age", "semicolons"), ("cust_no\tage", "tabs"), ("a|b", "bars")])
def test_header_of_one_cell_is_asked_for_its_delimiter(header: str, what: str) -> None:
    with pytest.raises(TsugiError) as refusal:
        check_columns(load_mapping(BY_LINE), [header], "crm.csv")
    ((path, told),) = refusal.value.violations
    assert path == "csv.delimiter"
    assert what in told and "state csv.delimiter" in told


@pytest.mark.parametrize(
    "first_row",
    [["c1", "agee", "31"], ["agee", "a@example.com"], ['{"age": 31', '"cust_no": "c1"}'], ['{"age": 31, "agee": 1}']],
)
def test_first_row_that_may_be_about_somebody_is_not_repeated(first_row: list[str]) -> None:
    with pytest.raises(TsugiError) as refusal:
        check_columns(load_mapping(BY_LINE), first_row, "crm.csv")
    ((path, told),) = refusal.value.violations
    assert path == "crm.csv:1"
    assert "does not look like a header" in told and "agee" not in told
