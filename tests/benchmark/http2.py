"""As much HTTP/2 as a caller of unary gRPC methods needs, without sockets: bytes in, bytes out.

The load generator must not be what limits a run: gRPC's own client costs some 150 µs a call in Python, as much as the
server it would measure, one connection here 20 to 40. It is a caller only, on loopback, without TLS, and never part of
the product. Source: RFC 9113 (frames), RFC 7541 (header compression), gRPC over HTTP2.
"""

from __future__ import annotations

import struct
from typing import Final

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
_PADDED, _PRIORITY = 0x8, 0x20

MESSAGE_BYTES_MAX: Final = 16_384 - 5  # one frame of the size every peer takes
_FRAME: Final = struct.Struct(">BHBBL")  # length (24 bits), type, flags, stream
_STREAM: Final = struct.Struct(">L")
_SETTING: Final = struct.Struct(">HL")
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _STREAMS_MAX, _INITIAL_WINDOW_SIZE = 0x1, 0x2, 0x3, 0x4
_WINDOW_MAX: Final = 2**31 - 1
_WINDOW_DEFAULT: Final = 65_535
_STREAMS_DEFAULT: Final = 100  # where the server names no number
REFUSED: Final = "reset 7"  # the server has not looked at the call; every gRPC client sends it again
_STATIC_ENTRIES: Final = 61


class ProtocolError(Exception):
    """The peer did what our server never does; the run is worthless."""


class Connection:
    """One connection's state: streams, windows and what is left of the last frame.

    Args:
        path: the method, "/package.Service/Method".
        authority: host and port, as sent to the server.

    Attributes:
        is_ready: the server has said what it takes; before that it takes nothing.
        n_open: calls without their reply.
        data_bytes: of all replies so far, five bytes of gRPC's prefix each included.
    """

    def __init__(self, path: str, authority: str) -> None:
        self.is_ready = False
        self.n_open = 0
        self.data_bytes = 0
        self._calls: dict[int, int] = {}  # by stream
        self._next_stream = 1
        self._window = _WINDOW_DEFAULT
        self._streams_max = _STREAMS_DEFAULT
        self._rest = b""
        self._statuses: dict[bytes, str] = {}  # replies repeat a handful of trailers
        self._headers, self._headers_again = _header_blocks(path, authority)

    def opening(self) -> bytes:
        """Return what a connection begins with: no header table, no push, windows that are never full."""
        settings = b"".join(
            _SETTING.pack(name, value)
            for name, value in ((_HEADER_TABLE_SIZE, 0), (_ENABLE_PUSH, 0), (_INITIAL_WINDOW_SIZE, _WINDOW_MAX))
        )
        return b"".join(
            (
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                frame(SETTINGS, 0, 0, settings),
                frame(WINDOW_UPDATE, 0, 0, _STREAM.pack(_WINDOW_MAX - _WINDOW_DEFAULT)),
            )
        )

    def has_room(self, message: bytes) -> bool:
        """Say whether the peer takes one more call now."""
        return self.is_ready and self.n_open < self._streams_max and self._window >= len(message) + 5

    def request(self, call: int, message: bytes) -> bytes:
        """Return the frames of one call; receive() will name it by this number."""
        assert len(message) <= MESSAGE_BYTES_MAX, "a message of several frames is not what is measured here"
        stream = self._next_stream
        self._next_stream += 2
        self._calls[stream] = call
        self.n_open += 1
        size = len(message)
        self._window -= size + 5
        headers = self._headers if stream == 1 else self._headers_again
        return b"".join(
            (
                _FRAME.pack(0, len(headers), HEADERS, END_HEADERS, stream),
                headers,
                _FRAME.pack(0, size + 5, DATA, END_STREAM, stream),
                b"\0",
                _STREAM.pack(size),
                message,
            )
        )

    def receive(self, data: bytes) -> tuple[list[tuple[int, str]], bytes]:
        """Take in bytes; return the calls that ended, each with its status, and what must be sent back.

        Raises:
            ProtocolError: the connection is being closed, or the peer uses what a caller like this does not know.
        """
        buffer = self._rest + data if self._rest else data
        ended: list[tuple[int, str]] = []
        answer = b""
        at, end = 0, len(buffer)
        while end - at >= _FRAME.size:
            high, low, kind, flags, stream = _FRAME.unpack_from(buffer, at)
            start = at + _FRAME.size
            stop = start + (high << 16 | low)
            if stop > end:
                break
            if kind == DATA:
                self.data_bytes += stop - start
            elif kind == HEADERS:
                if flags & END_STREAM:
                    ended.append((self._close(stream), self._status(flags, buffer[start:stop])))
            elif kind == RST_STREAM:
                if stream in self._calls:
                    (code,) = _STREAM.unpack_from(buffer, start)
                    ended.append((self._close(stream), f"reset {code}"))  # HTTP/2's code; there is no grpc-status
            else:
                answer += self._manage(kind, flags, stream, buffer[start:stop])
            at = stop
        self._rest = buffer[at:]
        return ended, answer

    def _close(self, stream: int) -> int:
        self.n_open -= 1
        return self._calls.pop(stream)

    def _status(self, flags: int, block: bytes) -> str:
        status = self._statuses.get(block)
        if status is None:
            if flags & (_PADDED | _PRIORITY) or not flags & END_HEADERS:
                raise ProtocolError(f"trailers with flags {flags:#x}")
            status = self._statuses[block] = grpc_status(block)
        return status

    def _manage(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        if kind == WINDOW_UPDATE:
            if stream == 0:
                self._window += _STREAM.unpack(payload)[0]
            return b""
        if kind == PING and not flags & ACK:
            return frame(PING, ACK, 0, payload)
        if kind == SETTINGS and not flags & ACK:
            for name, value in _SETTING.iter_unpack(payload):
                if name == _STREAMS_MAX:
                    self._streams_max = value
            self.is_ready = True
            return frame(SETTINGS, ACK, 0)
        if kind == GOAWAY:
            raise ProtocolError(f"the server closes the connection: {payload[8:].decode(errors='replace')}")
        return b""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Build one frame."""
    return _FRAME.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def grpc_status(block: bytes) -> str:
    """Read grpc-status from a block of trailers that refers to no header table, as we asked the peer to write it.

    Raises:
        ProtocolError: the block refers to a table, is compressed by Huffman's code, or has no grpc-status.
    """
    at = 0
    while at < len(block):
        first = block[at]
        if first & 0x80:
            index, at = _integer(block, at, 7)
            if index > _STATIC_ENTRIES:
                raise ProtocolError("trailers refer to a header table that we declined")
            continue
        if first & 0xE0 == 0x20:  # a change of table size: to the 0 we asked for
            _, at = _integer(block, at, 5)
            continue
        index, at = _integer(block, at, 6 if first & 0x40 else 4)
        name = b""
        if index == 0:
            name, at = _string(block, at)
        value, at = _string(block, at)
        if name == b"grpc-status":
            return value.decode("ascii")
    raise ProtocolError("trailers without grpc-status")


def _header_blocks(path: str, authority: str) -> tuple[bytes, bytes]:
    """Return the headers of a connection's first call, which fill the server's table, and of all others."""
    fields = (  # static name index (0: spelled out), name, value
        (4, b"", path),
        (1, b"", authority),
        (31, b"", "application/grpc"),
        (0, b"te", "trailers"),
        (58, b"", "tsugi-benchmark"),
    )
    fixed = bytes((0x83, 0x86))  # :method POST, :scheme http
    first, again = fixed, fixed
    for i, (index, name, value) in enumerate(fields):
        spelled = bytes((len(name),)) + name if index == 0 else b""
        first += bytes((0x40 | index,)) + spelled + bytes((len(value),)) + value.encode("ascii")
        again += bytes((0x80 | (_STATIC_ENTRIES + len(fields) - i),))  # the newest entry has the lowest number
    return first, again


def _integer(block: bytes, at: int, prefix_bits: int) -> tuple[int, int]:
    """Read an integer (RFC 7541, 5.1): its value and where it ends."""
    limit = (1 << prefix_bits) - 1
    value = block[at] & limit
    at += 1
    if value < limit:
        return value, at
    shift = 0
    while True:
        value += (block[at] & 0x7F) << shift
        at += 1
        if not block[at - 1] & 0x80:
            return value, at
        shift += 7


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    if block[at] & 0x80:
        raise ProtocolError("trailers in Huffman's code")
    length, at = _integer(block, at, 7)
    return block[at : at + length], at + length
