"""Which bytes may a file hold after a power cut? Rebuilt from a system call trace of the program that wrote it.

A write is pending until the next sync of its file; at a cut any part of what is pending may have reached the disk, in
pages of 4 KiB, and of the last page any part in sectors of 512 bytes. A write through a descriptor opened with O_DSYNC
is on disk when the call returns. Only calls on the one data file and acknowledgements on standard output are looked at.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

PAGE = 4096
SECTOR = 512
TRACED = "openat,lseek,write,writev,pwrite64,pwritev,fsync,fdatasync,ftruncate"

_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)", re.DOTALL)
_UNFINISHED = re.compile(r"^(\d+) +(.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. \w+ resumed>(.*)$")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


class Written(NamedTuple):
    """Bytes written to the data file."""

    offset: int
    data: bytes
    is_synced: bool  # by the call itself


class Synced(NamedTuple):
    """Everything written before is on disk."""


class Acknowledged(NamedTuple):
    """The program told its caller that the record with this key is recorded."""

    key: str


Event = Written | Synced | Acknowledged


class State(NamedTuple):
    """One possible content of the file after a cut, and what was acknowledged by then."""

    data: bytes
    acknowledged: tuple[str, ...]


def events_of(trace: Path, data_file: Path) -> list[Event]:
    """Read what a traced program did to its data file and what it acknowledged, in order."""
    events: list[Event] = []
    is_synced: dict[str, bool] = {}  # the data file's descriptors; whether their writes wait for the disk
    positions: dict[str, int] = {}
    for name, arguments, result in _calls(trace):
        descriptor = arguments.split(",", 1)[0]
        if name == "openat" and _decoded(arguments) == str(data_file).encode():
            is_synced[str(result)] = "O_DSYNC" in arguments
            positions[str(result)] = 0
        elif name == "write" and descriptor == "1":
            events.extend(
                Acknowledged(line.split()[1])
                for line in _decoded(arguments).decode().splitlines()
                if line.startswith("acknowledged")
            )
        elif descriptor not in is_synced or result < 0:
            continue
        elif name == "lseek":
            positions[descriptor] = result
        elif name in {"write", "writev"}:
            events.append(Written(positions[descriptor], _decoded(arguments)[:result], is_synced[descriptor]))
            positions[descriptor] += result
        elif name in {"pwrite64", "pwritev"}:
            offset = int(arguments.rsplit(",", 1)[1])
            events.append(Written(offset, _decoded(arguments)[:result], is_synced[descriptor]))
        elif name in {"fsync", "fdatasync"}:
            events.append(Synced())
        else:
            raise AssertionError(f"{name} on the data file is not modelled")
    return events


def states(start: bytes, events: Sequence[Event], n_random: int, seed: int) -> Iterator[State]:
    """Yield files that a power cut may leave: after each event, none, all and random parts of what is pending."""
    rng = random.Random(seed)
    disk = start
    pending: list[Written] = []
    acknowledged: list[str] = []
    for event in events:
        match event:
            case Acknowledged(key):
                acknowledged.append(key)
            case Synced():
                disk, pending = _applied(disk, pending), []
            case Written(is_synced=True):
                disk = _applied(disk, [event])
            case Written():
                pending.extend(_pages(event))
        told = tuple(acknowledged)
        yield State(disk, told)
        if pending:
            yield State(_applied(disk, pending), told)
        for _ in range(n_random if pending else 0):
            some = rng.sample(pending, rng.randint(0, len(pending)))
            if some and rng.random() < 0.5:
                some[-1] = _torn(some[-1], rng)
            yield State(_applied(disk, some), told)


def _calls(trace: Path) -> Iterator[tuple[str, str, int]]:
    """Yield name, arguments and result of each finished call."""
    begun: dict[str, str] = {}
    for line in trace.read_text().splitlines():
        if unfinished := _UNFINISHED.match(line):
            begun[unfinished[1]] = line.removesuffix(" <unfinished ...>")
            continue
        whole = begun.pop(resumed[1]) + resumed[2] if (resumed := _RESUMED.match(line)) else line
        if call := _CALL.match(whole):
            yield call[1], call[2], int(call[3])


def _decoded(arguments: str) -> bytes:
    """Return all texts among a call's arguments, which strace writes in hexadecimal."""
    return b"".join(bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(arguments))


def _pages(written: Written) -> Iterator[Written]:
    offset, end = written.offset, written.offset + len(written.data)
    while offset < end:
        until = min(end, (offset // PAGE + 1) * PAGE)
        yield Written(offset, written.data[offset - written.offset : until - written.offset], is_synced=False)
        offset = until


def _torn(page: Written, rng: random.Random) -> Written:
    """Keep the first sectors of a page, as when the power goes while it is written."""
    return page._replace(data=page.data[: rng.randrange(0, len(page.data), SECTOR)])


def _applied(disk: bytes, writes: Sequence[Written]) -> bytes:
    data = bytearray(disk)
    for offset, part, _ in writes:
        data.extend(bytes(max(0, offset + len(part) - len(data))))
        data[offset : offset + len(part)] = part
    return bytes(data)
