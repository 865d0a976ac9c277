"""Anything at all to every method: a reply or a refusal of ours, never an accident, and no role dies of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.rpc.status import CODES
from tests.support.fuzzing import messages, mutated
from tests.support.refusing import OTHER_BROWSER, PERSON, SHARED, World, catalog, make_world, request
from tests.support.running import Server, serving, told
from tests.support.wire import ITEM_STREAMS, METHODS, Refusal, Wire, request_class, response_class
from tsugi.requests import catalog_upload, model_upload
from tsugi.v1 import catalog_pb2
from tsugi.v1.error_reason_pb2 import ErrorReason

pytestmark = pytest.mark.slow

ALONE: Final = [name for name in METHODS if name not in {"PushCatalog", "PushModel"}]  # one message is a whole call
EXAMPLES: Final = {"fast": 25, "long": 2_000}
RUNS: Final = pytest.mark.parametrize("run", ["fast", pytest.param("long", marks=pytest.mark.long)])
WORDS: Final = (
    "greedy", "mail", "thompson", "action_0", "action_3", PERSON["namespace"], PERSON["value"], "browser_id", "hour",
    OTHER_BROWSER["value"], "email", SHARED["value"], "marketing", "sports", "ski", "spend", "EUR", "taste", "narrow",
    "device", "member", "note", "since", "phone", "crm", "visit", "click", "order", "impression", "web", "only",
    "members", "event.hour > 5.0 && profile.member", "event.note == 'x' || profile.note == 'y'",
)  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        roles = server.roles()
        yield server
        assert server.roles() == roles, "a role died of what it was sent"


@pytest.fixture(scope="module")
def world(running: Server) -> World:
    with running.client() as client:
        return make_world(client)


@pytest.fixture
def wire(running: Server) -> Iterator[Wire]:
    for server in told(running):
        with Wire(server.address) as wire:
            yield wire


def check(method: str, replies: list[bytes], refusal: Refusal | None) -> None:
    """Hold an answer to what is promised of every one."""
    if refusal is not None:
        assert refusal.domain == "tsugi", refusal
        check_reason(ErrorReason.Value(refusal.reason))
        assert refusal.code is CODES[ErrorReason.Value(refusal.reason)]  # type: ignore[index]  # its stub gives an int
        assert refusal.message
    for data in replies:
        reply: Any = response_class(method).FromString(data)
        for result in [reply] if method in ITEM_STREAMS else getattr(reply, "results", ()):
            (either,) = result.DESCRIPTOR.oneofs
            assert result.WhichOneof(either.name) is not None
            if result.HasField("error"):
                check_reason(result.error.reason)
                assert result.error.message


def check_reason(reason: int) -> None:
    assert reason not in {ErrorReason.ERROR_REASON_UNSPECIFIED, ErrorReason.ERROR_REASON_INTERNAL_ERROR}
    assert reason != ErrorReason.ERROR_REASON_RECORD_CHECKSUM


def explored(run: str) -> settings:
    return settings(max_examples=EXAMPLES[run], suppress_health_check=list(HealthCheck), database=None)


@RUNS
@pytest.mark.parametrize("method", sorted(METHODS))
def test_any_message_is_answered_or_refused(wire: Wire, world: World, method: str, run: str) -> None:
    vocabulary = [*WORDS, world.decision_id, world.action, world.profile_id, world.erasure_id]
    one = messages(request_class(method), vocabulary)

    @explored(run)
    @given(st.lists(one, max_size=4) if METHODS[method].client_streaming else one.map(lambda message: [message]))
    def send(parts: list[Message]) -> None:
        check(method, *wire.exchange(method, [part.SerializeToString() for part in parts]))

    send()


@RUNS
@pytest.mark.parametrize("method", ALONE)
def test_any_bytes_are_answered_or_refused(wire: Wire, world: World, method: str, run: str) -> None:
    good = request(method, world).SerializeToString()

    @explored(run)
    @given(st.one_of(st.binary(max_size=300), mutated(good)))
    def send(data: bytes) -> None:
        check(method, *wire.exchange(method, [data]))

    send()


@RUNS
@pytest.mark.parametrize("method", ["PushCatalog", "PushModel"])
def test_any_parts_of_an_upload_are_answered_or_refused(wire: Wire, method: str, run: str) -> None:
    upload = catalog_upload(catalog(), validate_only=True) if method == "PushCatalog" else model_upload(b"x" * 99, "x")
    good = [part.SerializeToString() for part in upload]

    @explored(run)
    @given(st.lists(st.one_of(st.binary(max_size=300), *map(st.just, good), *map(mutated, good)), max_size=4))
    def send(parts: list[bytes]) -> None:
        check(method, *wire.exchange(method, parts))

    send()


@RUNS
def test_any_catalog_is_accepted_or_refused_with_its_faults(wire: Wire, run: str) -> None:
    vocabulary = [*WORDS, "profile.hour > 5.0", "!(context.device == 'phone') && has(profile.note)", "now > 5"]

    @explored(run)
    @given(messages(catalog_pb2.Catalog, vocabulary), st.booleans())
    def push(odd: catalog_pb2.Catalog, is_alone: bool) -> None:
        whole = odd
        if not is_alone:  # faults beside much that is right reach further than faults alone
            whole = catalog()
            whole.MergeFrom(odd)
        parts = catalog_upload(whole, validate_only=True)
        replies, refusal = wire.exchange("PushCatalog", [part.SerializeToString() for part in parts])
        check("PushCatalog", replies, refusal)
        if refusal is not None:
            assert refusal.reason == "ERROR_REASON_CATALOG_INVALID"
            assert refusal.fields

    push()
