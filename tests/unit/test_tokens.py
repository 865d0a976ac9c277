from __future__ import annotations

import base64
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import TsugiError
from server.tokens import TOKEN_CHARS, TokenKey
from tsugi.v1.error_reason_pb2 import ErrorReason

KEY = TokenKey(bytes(range(32)))
OTHER_INSTALLATION = TokenKey(bytes(range(1, 33)))
DECISION_KEY = bytes.fromhex("fb0ff1ce" * 4)  # its text holds both characters that differ between the alphabets
PERSON = bytes(range(16))
TOKEN = KEY.mint(DECISION_KEY, PERSON).decode()
NAMES = st.binary(min_size=16, max_size=16)


def is_refused(decision_id: str, key: TokenKey = KEY) -> bool:
    """Say whether an id is refused; every refusal is the same, so that it tells a forger nothing."""
    try:
        key.verify(decision_id)
    except TsugiError as error:
        assert error.reason == ErrorReason.ERROR_REASON_DECISION_ID_INVALID
        assert error.message.startswith("decision_id: not issued by this installation, or altered")
        assert error.metadata == {"field": "decision_id"}
        return True
    return False


@given(NAMES, st.one_of(st.just(b""), NAMES))
def test_minted_id_says_which_decision_and_whose(decision_key: bytes, profile_key: bytes) -> None:
    decision_id = KEY.mint(decision_key, profile_key).decode("ascii")
    assert len(decision_id) == TOKEN_CHARS
    token = KEY.verify(decision_id)
    assert token.decision_key == decision_key
    assert token.person == KEY.verify(KEY.mint(bytes(16), profile_key).decode()).person
    assert (token.person == bytes(8)) == (profile_key == b"")


def test_two_people_have_two_references_and_neither_is_the_profile_key() -> None:
    other = KEY.mint(DECISION_KEY, bytes(16)).decode()
    assert KEY.verify(TOKEN).person != KEY.verify(other).person
    assert PERSON[:8] not in base64.urlsafe_b64decode(TOKEN)


def test_every_flipped_bit_is_refused() -> None:
    data = base64.urlsafe_b64decode(TOKEN)
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        assert is_refused(base64.urlsafe_b64encode(flipped).decode())


def test_every_other_character_at_every_place_is_refused() -> None:
    assert {"-", "_"} <= set(TOKEN), "both characters that differ between the alphabets are tried"
    for place, own in enumerate(TOKEN):
        for character in (*string.printable, "\x00", "é", "\ud800", "\U0001f600"):
            if character != own:
                assert is_refused(TOKEN[:place] + character + TOKEN[place + 1 :])


def test_the_other_alphabet_is_refused() -> None:
    assert is_refused(TOKEN.replace("-", "+").replace("_", "/"))


def test_cut_text_is_refused() -> None:
    for size in range(TOKEN_CHARS):
        assert is_refused(TOKEN[:size])
        assert is_refused(TOKEN[size + 1 :])


@pytest.mark.parametrize(
    "decision_id",
    [
        *(TOKEN + more for more in ("A", "=", "\n", TOKEN)),
        *(" " + TOKEN, TOKEN[:-1] + "=", TOKEN[:-2] + "==", TOKEN[:-4]),
        *(character * TOKEN_CHARS for character in ("=", "A", "é", "\ud800", "\x00")),
        "A" * 1_000_000,
    ],
    ids=lambda decision_id: ascii(decision_id[-60:]),
)
def test_foreign_text_is_refused(decision_id: str) -> None:
    assert is_refused(decision_id)


def test_id_of_another_installation_is_refused() -> None:
    assert not is_refused(TOKEN)
    assert is_refused(TOKEN, OTHER_INSTALLATION)


@given(st.text(max_size=80))
def test_any_text_is_refused(text: str) -> None:
    assert is_refused(text)


def forgeries(n: int) -> int:
    """Forge n ids, half of them with the right version and key id, and return how many are accepted."""
    rng = random.Random(20_261_122)
    accepted = 0
    for _ in range(n // 1_000):
        text = base64.urlsafe_b64encode(rng.randbytes(42 * 1_000)).decode()
        for i in range(1_000):
            forged = text[TOKEN_CHARS * i : TOKEN_CHARS * (i + 1)]
            accepted += not is_refused(TOKEN[:2] + forged[2:] if i % 2 else forged)
    return accepted


def test_ten_thousand_forgeries_are_refused() -> None:
    assert forgeries(10_000) == 0


@pytest.mark.long
def test_ten_million_forgeries_are_refused() -> None:
    assert forgeries(10_000_000) == 0


def test_same_request_id_is_the_same_decision_for_ever_and_another_is_another() -> None:
    assert (
        KEY.decision_key("order-1") == KEY.decision_key("order-1") == TokenKey(bytes(range(32))).decision_key("order-1")
    )
    assert (
        len({KEY.decision_key("order-1"), KEY.decision_key("order-2"), OTHER_INSTALLATION.decision_key("order-1")}) == 3
    )


def test_seeds_and_keys_differ_by_purpose_and_installation() -> None:
    names = [
        made
        for key in (KEY, OTHER_INSTALLATION)
        for made in (
            key.decision_key("x"),
            key.record_key(b"outcome", b"", "x"),
            key.record_key(b"source_record", b"", "x"),
            key.record_key(b"outcome", b"scope", "x"),
            key.seed(DECISION_KEY).to_bytes(8, "little"),
            key.seed(key.decision_key("x")).to_bytes(8, "little"),
        )
    ]
    assert len(set(names)) == len(names)
    assert DECISION_KEY[:8] not in names
    assert 0 <= KEY.seed(DECISION_KEY) < 2**64


@given(
    *(
        st.tuples(st.sampled_from([b"outcome", b"source_record"]), NAMES, st.text("ab\u00e9", max_size=4))
        for _ in range(2)
    )
)
def test_record_keys_are_equal_only_for_equal_names(
    one: tuple[bytes, bytes, str], other: tuple[bytes, bytes, str]
) -> None:
    assert (KEY.record_key(*one) == KEY.record_key(*other)) == (one == other)
    assert len(KEY.record_key(*one)) == 16


@pytest.mark.parametrize("size", [0, 31, 33])
def test_secret_of_another_size_is_the_programmers_fault(size: int) -> None:
    with pytest.raises(AssertionError, match="32 bytes"):
        TokenKey(bytes(size))
