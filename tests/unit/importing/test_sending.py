"""Batches on their way: what may pass is waited for, as long as the server asks and not for ever."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from server.importing.faults import ImportStopped
from server.importing.sending import PAUSE_S_MAX, REPEATED_S_MAX, Sender
from tests.unit.importing.support import Kept
from tsugi.client import CallError
from tsugi.v1.profile_service_pb2 import SourceRecord

RECORDS = [SourceRecord(record_id="r1", source="crm")]


def failing(code: grpc.StatusCode, times: int, retry_delay_s: float = 0.0) -> Callable[[int], None]:
    def before(number: int) -> None:
        if number < times:
            raise CallError(code, "not now", retry_delay_s=retry_delay_s)

    return before


def sent(before: Callable[[int], None], *, is_stopping: bool = False) -> tuple[Kept, list[float]]:
    kept = Kept(before)
    pauses: list[float] = []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        return is_stopping

    sender = Sender(kept, 1, pause)
    try:
        sender.send(RECORDS).result()
    finally:
        sender.stop()
    return kept, pauses


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"])
def test_what_may_pass_is_tried_again_with_growing_pauses(code: str) -> None:
    kept, pauses = sent(failing(grpc.StatusCode[code], 8))
    assert list(kept.records) == ["r1"]
    assert pauses == sorted(pauses) and pauses[-1] == PAUSE_S_MAX


def test_server_that_says_how_long_to_wait_is_waited_for() -> None:
    assert sent(failing(grpc.StatusCode.RESOURCE_EXHAUSTED, 2, retry_delay_s=3.0))[1] == [3.0, 3.0]


def test_refusal_for_good_is_not_tried_again() -> None:
    with pytest.raises(ImportStopped):
        sent(failing(grpc.StatusCode.FAILED_PRECONDITION, 1))


def test_trying_again_ends() -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> bool:
        pauses.append(seconds)
        return False

    sender = Sender(Kept(failing(grpc.StatusCode.UNAVAILABLE, 1_000_000)), 1, pause)
    with pytest.raises(ImportStopped):
        sender.send(RECORDS).result()
    sender.stop()
    assert sum(pauses) <= REPEATED_S_MAX + PAUSE_S_MAX


def test_pause_ends_when_sending_is_to_stop() -> None:
    with pytest.raises(ImportStopped):
        sent(failing(grpc.StatusCode.UNAVAILABLE, 1), is_stopping=True)
