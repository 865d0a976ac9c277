"""Which events stand where in the log: read once, for all who look for some.

Handed the log, it gives the places of events up to an LSN, block by block. What was said stays in the log: who decides
on an event reads its record then, because it may have become a tombstone meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from server.storage.log import Log
from server.storage.record import Record
from tsugi.log.v1.record_pb2 import RecordKind, SourceRecordAccepted

BLOCK_RECORDS: Final = 256  # read in one go: 1 ms on a thread
BLOCKS_KEPT: Final = 64


class Place(NamedTuple):
    """Where one event stands."""

    lsn: int
    time_us: int  # log time
    event_type: str


class _Block(NamedTuple):
    """What is known of the records after start_lsn, up to read_lsn."""

    places: tuple[Place, ...]
    read_lsn: int


class Happened:
    """The events of one log, for one worker. Called on the event loop.

    Args:
        log: read on a thread.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._blocks: OrderedDict[int, _Block] = OrderedDict()  # by number; the one used last is the last
        self._reading = asyncio.Lock()

    async def after(self, lsn: int, until_lsn: int) -> tuple[list[Place], int]:
        """Return the next events after an LSN in its order, and how far they reach: at most BLOCK_RECORDS further.

        Args:
            lsn: where to begin.
            until_lsn: of a record in the log, above lsn; nothing after it is looked at.

        Raises:
            CorruptRecordError: a record cannot be read.

        Cost: 4 µs a record, once for all who look at about the same time; 1 µs an event.
        """
        number = lsn // BLOCK_RECORDS
        end_lsn = min(until_lsn, (number + 1) * BLOCK_RECORDS)
        block = self._block(number)
        if block.read_lsn < end_lsn:
            async with self._reading:
                block = self._block(number)  # somebody may have read it meanwhile
                if block.read_lsn < end_lsn:
                    block = await asyncio.to_thread(self._read_on, block, end_lsn)
                    self._blocks[number] = block
        if number in self._blocks:
            self._blocks.move_to_end(number)
        if len(self._blocks) > BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return [place for place in block.places if lsn < place.lsn <= end_lsn], end_lsn

    def _block(self, number: int) -> _Block:
        return self._blocks.get(number) or _Block((), number * BLOCK_RECORDS)

    def _read_on(self, block: _Block, end_lsn: int) -> _Block:
        records = self._log.read(block.read_lsn + 1, end_lsn - block.read_lsn)
        found = [place for record in records if (place := _place(record)) is not None]
        return _Block((*block.places, *found), end_lsn)


def said_in(record: Record) -> SourceRecordAccepted | None:
    """Return what a record says of a person; None for a tombstone, another kind, or what cannot be read."""
    if record.is_tombstone or record.kind != RecordKind.RECORD_KIND_SOURCE_RECORD:
        return None
    try:
        return SourceRecordAccepted.FromString(record.payload)
    except DecodeError:  # the projector has set it aside
        return None


def _place(record: Record) -> Place | None:
    said = said_in(record)
    if said is None or not said.record.HasField("event"):
        return None
    return Place(record.lsn, record.time_us, said.record.event.type)
