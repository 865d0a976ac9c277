"""The generator's HTTP/2: what it sends, and what it makes of what comes back however it is cut."""

from __future__ import annotations

import struct

import pytest

from tests.benchmark.http2 import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    REFUSED,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Connection,
    ProtocolError,
    frame,
    grpc_status,
)

PATH = "/package.Service/Method"


def _connection() -> Connection:
    return Connection(PATH, "127.0.0.1:1")


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


def _trailers(status: bytes = b"0") -> bytes:
    return b"\x20" + _literal(b"grpc-message", b"") + _literal(b"grpc-status", status)


def _reply(stream: int, message: bytes = b"abc", status: bytes = b"0") -> bytes:
    return (
        frame(HEADERS, END_HEADERS, stream, b"\x88")
        + frame(DATA, 0, stream, b"\0" + struct.pack(">L", len(message)) + message)
        + frame(HEADERS, END_HEADERS | END_STREAM, stream, _trailers(status))
    )


def test_replies_are_told_to_their_calls_with_their_status_wherever_the_bytes_are_cut() -> None:
    whole = _reply(1) + _reply(3, b"", b"5")
    for cut in range(len(whole) + 1):
        connection = _connection()
        connection.request(10, b"x")
        connection.request(11, b"y")
        first, _ = connection.receive(whole[:cut])
        second, _ = connection.receive(whole[cut:])
        assert first + second == [(10, "0"), (11, "5")], cut
        assert connection.n_open == 0
        assert connection.data_bytes == 5 + 3 + 5


def test_a_reset_stream_ends_its_call_without_a_status() -> None:
    connection = _connection()
    connection.request(10, b"x")
    refused = frame(RST_STREAM, 0, 1, struct.pack(">L", 7))
    assert connection.receive(refused)[0] == [(10, REFUSED)]
    assert connection.receive(refused)[0] == []


def test_pings_and_settings_are_answered_and_answers_are_not() -> None:
    connection = _connection()
    _, answer = connection.receive(frame(PING, 0, 0, b"12345678") + frame(SETTINGS, 0, 0))
    assert answer == frame(PING, ACK, 0, b"12345678") + frame(SETTINGS, ACK, 0)
    assert connection.receive(frame(PING, ACK, 0, b"12345678") + frame(SETTINGS, ACK, 0))[1] == b""


def test_no_more_calls_are_sent_than_the_server_takes_at_once() -> None:
    connection = _connection()
    connection.receive(frame(SETTINGS, 0, 0, struct.pack(">HL", 0x3, 1)))
    connection.request(0, b"x")
    assert not connection.has_room(b"x")
    connection.receive(_reply(1))
    assert connection.has_room(b"x")


def test_nothing_is_sent_before_the_server_has_said_what_it_takes() -> None:
    connection = _connection()
    assert not connection.has_room(b"x")
    connection.receive(frame(SETTINGS, 0, 0))
    assert connection.has_room(b"x")


def test_no_more_bytes_are_sent_than_the_window_has() -> None:
    connection = _connection()
    connection.receive(frame(SETTINGS, 0, 0))
    message = bytes(16_000)
    for call in range(4):
        connection.request(call, message)
    assert not connection.has_room(message)
    connection.receive(frame(WINDOW_UPDATE, 0, 0, struct.pack(">L", 16_005)))
    assert connection.has_room(message)


def test_headers_are_spelled_out_once_a_connection() -> None:
    connection = _connection()
    first, again = connection.request(0, b"x"), connection.request(1, b"x")
    assert PATH.encode() in first
    assert PATH.encode() not in again
    assert len(again) == 9 + 7 + 9 + 5 + 1  # two known fields, five from the table


def test_a_server_that_goes_away_ends_the_run() -> None:
    with pytest.raises(ProtocolError, match="max_age"):
        _connection().receive(frame(GOAWAY, 0, 0, bytes(8) + b"max_age"))


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (b"\xbe", "header table"),
        (b"\x00\x8b" + bytes(11), "Huffman"),
        (_literal(b"grpc-message", b"no"), "without grpc-status"),
    ],
)
def test_trailers_that_cannot_be_read_end_the_run(block: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        grpc_status(block)


def test_long_lengths_are_read() -> None:
    assert grpc_status(b"\x00\x0cgrpc-message\x7f\x80\x01" + bytes(255) + _literal(b"grpc-status", b"13")) == "13"
