"""What two parts must say to be taken for one person, and what is not enough."""

from __future__ import annotations

import pytest

from server.profiles import ladders, matching, similarity
from server.profiles.matching import MatchFields, blocking_keys, comparable, explain, match_fields, weight
from tsugi.v1 import catalog_pb2

ATTRIBUTES = [
    ("given", catalog_pb2.MEANING_GIVEN_NAME),
    ("family", catalog_pb2.MEANING_FAMILY_NAME),
    ("full", catalog_pb2.MEANING_FULL_NAME),
    ("born", catalog_pb2.MEANING_BIRTH_DATE),
    ("tax_number", catalog_pb2.MEANING_NATIONAL_ID),
    ("email", catalog_pb2.MEANING_EMAIL),
    ("phone", catalog_pb2.MEANING_PHONE),
    ("mobile", catalog_pb2.MEANING_PHONE),
    ("street", catalog_pb2.MEANING_STREET_ADDRESS),
    ("postcode", catalog_pb2.MEANING_POSTCODE),
    ("city", catalog_pb2.MEANING_CITY),
    ("region", catalog_pb2.MEANING_REGION),
    ("country", catalog_pb2.MEANING_COUNTRY),
    ("note", catalog_pb2.MEANING_UNSPECIFIED),
]
FIELDS = match_fields(ATTRIBUTES, {})
LINK, REVIEW = 12.0, 6.0
HOME = {"street": "12 Mill Lane", "postcode": "4011", "city": "Westbrook", "phone": "+61399990001"}

Texts = dict[str, str]


def bits(one: Texts, other: Texts, fields: MatchFields = FIELDS) -> float:
    return weight(fields, comparable(fields, one), comparable(fields, other))


def level(attribute: str, one: str, other: str) -> str:
    found = explain(FIELDS, comparable(FIELDS, {attribute: one}), comparable(FIELDS, {attribute: other}))
    return next(each.level for each in found if each.attribute)


@pytest.mark.parametrize(
    "same",
    [
        {"given": "Anna", "family": "Berger"},
        {"given": "Anna", "family": "Berger", "city": "Westbrook", "country": "AU"},
        {"full": "Anna Berger"},
        {"born": "1980-05-17"},
        {"email": "a.berger77@mail.example"},
        {"phone": "+61399990001"},
        {"street": "12 Mill Lane", "postcode": "4011", "city": "Westbrook", "region": "QLD", "country": "AU"},
        {"family": "Berger", **HOME},
    ],
)
def test_one_kind_of_fact_alone_never_links(same: Texts) -> None:
    assert 0.0 < bits(same, same) < LINK


@pytest.mark.parametrize(
    "same",
    [
        {"given": "Anna", "family": "Berger", "born": "1980-05-17"},
        {"family": "Berger", "born": "1980-05-17"},
        {"given": "Anna", "family": "Berger", "phone": "+61399990001"},
        {"given": "Anna", "family": "Berger", "email": "anna@mail.example"},
        {"given": "Anna", "family": "Berger", "street": "12 Mill Lane"},
        {"full": "Anna Berger", "born": "1980-05-17"},
        {"tax_number": "84 112 377"},
    ],
)
def test_name_and_another_fact_link(same: Texts) -> None:
    assert bits(same, same) >= LINK


def test_typing_errors_in_every_field_still_link() -> None:
    one = {"given": "Katherine", "family": "Sondergeld", "born": "1980-05-17", "email": "k.sonder@mail.example", **HOME}
    other = {
        "given": "Kathreine",
        "family": "Sondergelt",
        "born": "1980-05-71",
        "email": "k.sonder@mail.exampel",
        **HOME,
    }
    assert bits(one, other) >= LINK


def test_swapped_names_link_with_a_birth_date() -> None:
    one = {"given": "Anna", "family": "Berger", "born": "1980-05-17"}
    assert bits(one, {"given": "Berger", "family": "Anna", "born": "1980-05-17"}) >= LINK
    assert bits(one, {"given": "Bergre", "family": "Anna", "born": "1980-05-17"}) >= LINK


def test_full_name_matches_given_and_family_name() -> None:
    apart = {"given": "Anna Maria", "family": "van der Berg", "born": "1980-05-17"}
    assert bits(apart, {"full": "Anna Maria van der Berg", "born": "1980-05-17"}) >= LINK
    assert bits(apart, {"full": "Van der Berg Anna Maria", "born": "1980-05-17"}) >= LINK
    assert bits({"full": "Maria Garcia Lopez"}, {"full": "Maria Garcia"}) >= REVIEW


def test_family_of_one_household_stays_apart() -> None:
    mother = {"given": "Anna", "family": "Berger", "born": "1980-05-17", **HOME}
    child = {"given": "Felix", "family": "Berger", **HOME}
    assert bits(mother, child) < REVIEW
    assert bits(mother, child | {"born": "2009-11-02"}) < REVIEW
    shared = {"email": "berger@mail.example"}
    assert bits(mother | shared, child | {"born": "2009-11-02"} | shared) < REVIEW
    assert bits(mother | shared, child | shared) < LINK


def test_twins_are_reviewed_at_most() -> None:
    one = {"given": "Felix", "family": "Berger", "born": "2009-11-02", "email": "berger@mail.example", **HOME}
    assert bits(one, one | {"given": "Paul"}) < LINK
    assert bits(one | {"tax_number": "84112377"}, one | {"given": "Paul", "tax_number": "84112378"}) < LINK
    assert bits(one, {**one, "given": "Paul", "born": "2009-11-02"}) >= REVIEW  # somebody should look


def test_father_and_son_of_one_name_stay_apart_by_birth_date() -> None:
    father = {"given": "Felix", "family": "Berger", "born": "1970-03-21", **HOME}
    assert bits(father, father | {"born": "2001-08-09"}) < LINK


def test_contradicting_birth_date_outweighs_a_common_name_and_town() -> None:
    one = {"given": "Anna", "family": "Berger", "born": "1980-05-17", "city": "Westbrook"}
    assert bits(one, one | {"born": "1953-10-28"}) < REVIEW + 2.0


def test_missing_facts_add_nothing() -> None:
    one, other = {"given": "Anna", "born": "1980-05-17"}, {"given": "Anna", "family": "Berger", "city": "Westbrook"}
    assert bits(one, other) == bits({"given": "Anna"}, {"given": "Anna"})
    assert bits({"given": "Anna"}, {"family": "Berger", "born": "1980-05-17"}) == 0.0
    assert bits({}, {}) == 0.0


def test_texts_without_a_meaning_are_left_out() -> None:
    assert comparable(FIELDS, {"note": "x", "unheard_of": "y"}) == comparable(FIELDS, {})


def test_texts_of_which_nothing_is_left_agree_with_nothing() -> None:
    nothing = {"tax_number": "-", "postcode": "--", "phone": "+", "given": "'", "street": "."}
    assert bits(nothing, nothing) == 0.0


def test_places_do_not_count_three_times() -> None:
    street, town = {"street": "12 Mill Lane"}, {"postcode": "4011", "city": "Westbrook"}
    assert bits(street | town, street | town) < bits(street, street) + bits(town, town)
    moved = {"street": "7 Oak Road", "postcode": "9022", "city": "Eastham"}
    apart = sum(bits({name: HOME[name]}, {name: text}) for name, text in moved.items())
    assert bits(street | town, moved) > apart


def test_the_two_telephones_that_agree_best_count() -> None:
    one = {"phone": "+61399990001", "mobile": "+61400000007"}
    assert level("phone", "+61400000007", "+61400000007") == "exact"
    assert bits(one, {"phone": "+61400000007"}) == bits({"phone": "+61400000007"}, {"phone": "+61400000007"})


def test_dates_entered_for_want_of_a_better_one_say_little() -> None:
    assert bits({"born": "1970-01-01"}, {"born": "1970-01-01"}) == 0.0
    assert bits({"born": "1984-01-01"}, {"born": "1984-01-01"}) < bits({"born": "1984-05-17"}, {"born": "1984-05-17"})


@pytest.mark.parametrize(
    ("attribute", "one", "other", "expected"),
    [
        ("given", "Anna", "anna", "exact"),
        ("given", "Zoë", "Zoe", "exact"),
        ("given", "Robert", "Rboert", "close"),
        ("given", "Robert", "Bob", "short"),
        ("given", "Robert", "Rob", "short"),
        ("given", "Robert", "Robbie", "short"),
        ("given", "Marie", "Martin", "similar"),
        ("given", "Mary Ann", "Mary", "short"),
        ("given", "Daniel", "Daniela", "short"),
        ("given", "Robert", "R", "initial"),
        ("given", "Robert", "T", "different"),
        ("given", "Ann", "Tom", "different"),
        ("family", "Sondergeld", "Sondregelt", "close"),
        ("family", "Berger-Huber", "Huber", "part"),
        ("family", "Meyer", "Maier", "similar"),
        ("family", "Meyer", "Okafor", "different"),
        ("born", "1980-05-17", "1980-05-18", "typo"),
        ("born", "1980-05-07", "1980-07-05", "typo"),
        ("born", "1980-05-17", "1980-05-30", "near"),
        ("born", "1980-12-17", "1981-10-04", "around"),
        ("born", "1980-05-17", "1953-10-28", "different"),
        ("tax_number", "84-112-377", "84112377", "exact"),
        ("tax_number", "84112377", "84112737", "close"),
        ("tax_number", "84112377", "10293847", "different"),
        ("email", "k.sonder@mail.example", "k.sonder@mail.exampel", "close"),
        ("email", "k.sonder1@mail.example", "k.sonder2@mail.example", "different"),
        ("email", "blue.heron@gmail.com", "blue.heron@ymail.com", "local"),
        ("email", "info@one.example", "info@other-house.example", "name"),
        ("phone", "+61399990001", "+61299990001", "ending"),
        ("phone", "+61399990001", "+61399990010", "close"),
        ("street", "12 Mill Lane", "12 mill lane", "exact"),
        ("street", "12 Mill Lane", "12 Mil Lane", "close"),
        ("street", "12 Mill Lane Rosedale", "Rosedale 12 Mill Lane", "exact"),
        ("street", "12 Mill Lane", "Mill Lane", "street alone"),
        ("street", "12 Mill Lane", "77 Mill Lane", "neighbour"),
        ("street", "12 Mill Lane", "12 Harbour Lane", "different"),
        ("postcode", "SW1A 1AA", "sw1a1aa", "fine"),
        ("postcode", "4011", "4011", "exact"),
        ("postcode", "4011", "4101", "close"),
        ("city", "Frankfurt am Main", "Frankfurt", "part"),
        ("region", "NSW", "NWS", "close"),
        ("country", "AU", "NZ", "different"),
    ],
)
def test_levels_are_what_a_clerk_would_say(attribute: str, one: str, other: str, expected: str) -> None:
    assert level(attribute, one, other) == expected
    assert level(attribute, other, one) == expected


def test_namesakes_with_addresses_made_of_their_name_do_not_link() -> None:
    one = {"given": "Anna", "family": "Berger", "email": "anna.berger@mail.example"}
    assert bits(one, one | {"email": "anna.berger@other-post.example"}) < LINK


def test_catalog_weights_stand_in_place_of_the_built_in_ones() -> None:
    own = match_fields(ATTRIBUTES, {"city": (3.5, 0.0, 0.0, -9.0)})
    assert bits({"city": "Westbrook"}, {"city": "Westbrook"}, own) == 3.5
    assert bits({"city": "Westbrook"}, {"city": "Eastham"}, own) == -9.0
    short = match_fields(ATTRIBUTES, {"city": (3.5, -1.0)})
    assert bits({"city": "Westbrook"}, {"city": "Eastham"}, short) == -1.0


@pytest.mark.parametrize("meaning", ladders.LADDERS)
def test_built_in_weights_given_as_ones_own_change_nothing(meaning: catalog_pb2.Meaning) -> None:
    ladder = ladders.LADDERS[meaning]
    built_in = ladders.weights(ladder)
    for got, wanted in zip(ladders.weights(ladder, built_in[0]), built_in, strict=True):
        assert got == pytest.approx(wanted)


def test_catalog_weights_do_not_merge_a_household() -> None:
    own = match_fields(ATTRIBUTES, {"street": (40.0,) * 5 + (-4.0,), "phone": (40.0, 40.0, 40.0, -1.0)})
    mother = {"given": "Anna", "family": "Berger", "born": "1980-05-17", **HOME}
    assert bits(mother, {"given": "Felix", "family": "Berger", "born": "2009-11-02", **HOME}, own) < REVIEW


def test_attribute_weighed_zero_is_as_if_it_were_not_there() -> None:
    none = match_fields(ATTRIBUTES, {"email": (0.0, 0.0)})
    one = {"given": "Anna", "family": "Berger", "born": "1980-05-17"}
    for email in ("anna@mail.example", "otherwise@post.example"):
        with_email = bits(one | {"email": "anna@mail.example"}, one | {"email": email}, none)
        assert with_email == pytest.approx(bits(one, one, none), abs=1e-12)


def test_full_names_with_weights_of_their_own_are_compared_whole() -> None:
    own = match_fields([("full", catalog_pb2.MEANING_FULL_NAME)], {"full": (11.0, 6.0, 2.0, 1.0, -5.0)})
    names = ["Anna Berger", "Anna Bergre", "Anna Okafor", "Felix Berger", "Felix Okafor"]
    assert [bits({"full": "Anna Berger"}, {"full": name}, own) for name in names[:1]] == [11.0]
    found = [explain(own, comparable(own, {"full": names[0]}), comparable(own, {"full": name})) for name in names]
    assert [[each.level for each in one if each.attribute] for one in found] == [
        ["exact"], ["close"], ["given alone"], ["family alone"], ["different"],
    ]  # fmt: skip


def test_third_part_that_is_like_two_people_does_not_join_them() -> None:
    father = comparable(FIELDS, {"given": "Felix", "family": "Berger", "born": "1970-03-21", **HOME})
    son = comparable(FIELDS, {"given": "Felix", "family": "Berger", "born": "2001-08-09", **HOME})
    either = comparable(FIELDS, {"given": "Felix", "family": "Berger", **HOME})
    parts = [father, son, either]
    edges = [(i, j, bits) for i, j in ((0, 1), (0, 2), (1, 2)) if (bits := weight(FIELDS, parts[i], parts[j])) >= LINK]
    assert len(edges) == 2
    labels = matching.cluster(
        3,
        edges,
        lambda ones, others: matching.weight_between(FIELDS, [parts[i] for i in ones], [parts[j] for j in others]),
    )
    assert labels[0] != labels[1]
    assert labels[2] == labels[0]


def test_ladders_are_probabilities_and_fall() -> None:
    for meaning, ladder in ladders.LADDERS.items():
        for column in zip(*(one[1:] for one in ladder), strict=True):
            assert sum(column) == pytest.approx(1.0, abs=1e-9), catalog_pb2.Meaning.Name(meaning)
            assert min(column) > 0.0
        assert ladder[0].bits > 0.0 > ladder[-1].bits
        assert ladder[-1].bits == min(one.bits for one in ladder)
    assert matching.levels(catalog_pb2.MEANING_UNSPECIFIED) == ()
    assert set(ladders.LADDERS) | {catalog_pb2.MEANING_UNSPECIFIED} == set(catalog_pb2.Meaning.values())


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("robert", "r163"),
        ("rupert", "r163"),
        ("ashcraft", "a261"),
        ("pfister", "p236"),
        ("lee", "l000"),
        ("李小龙", "李小龙"),
        ("", ""),
    ],
)
def test_sound_is_soundex(word: str, expected: str) -> None:
    assert similarity.sound(word) == expected


def test_block_keys_are_the_same_in_every_process() -> None:
    keys = blocking_keys(FIELDS, comparable(FIELDS, {"phone": "+61399990001"}))
    assert [key.hex() for key in keys] == ["6eaeb0f2f6048f50"]


def test_who_says_nothing_stands_in_no_block() -> None:
    assert blocking_keys(FIELDS, comparable(FIELDS, {})) == []
    assert blocking_keys(FIELDS, comparable(FIELDS, {"given": "Anna"})) == []


@pytest.mark.parametrize(
    "change",
    [
        {"given": "Berger", "family": "Anna"},
        {"born": "1980-05-18"},
        {"born": "1981-05-17"},
        {"born": "1980-06-17"},
        {"born": "1980-05-17", "family": "Okafor"},
        {"given": ""},
        {"family": "", "born": "1980-05-18"},
        {"born": "", "postcode": "9999"},
    ],
)
def test_one_error_leaves_a_block_in_common(change: Texts) -> None:
    one = {"given": "Anna", "family": "Berger", "born": "1980-05-17", "postcode": "4011"}
    keys = blocking_keys(FIELDS, comparable(FIELDS, one))
    assert set(keys) & set(blocking_keys(FIELDS, comparable(FIELDS, one | change)))
