"""What an outbound run asks: which people, on which channel, in which placements; checked against a catalog."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from tsugi.v1.catalog_pb2 import Catalog

PLACEMENTS_MAX: Final = 16  # of one decision


class OutboundRefused(Exception):  # noqa: N818  # what was asked for is not there or not to be done; nothing was begun
    """The run was not begun, and its command is to be called otherwise; the text says how."""


class Plan(NamedTuple):
    """What is asked of everybody in a segment."""

    segment: str
    channel: str
    asked: tuple[str, ...]  # placements as the caller named them; empty: all of the channel
    placements: tuple[tuple[str, int], ...]  # with how many slots of each


def plan_of(catalog: Catalog, segment: str, channel: str, asked: Sequence[str]) -> Plan:
    """Find what is asked for in a catalog.

    Args:
        catalog: in force.
        segment: its name.
        channel: its name.
        asked: placements of the channel, each with ``:COUNT`` where more than one slot is to be filled; empty: one
            slot of each of them.

    Raises:
        OutboundRefused: something is not declared; the text says what is.
    """
    _require("segment", segment, [each.name for each in catalog.segments])
    _require("channel", channel, [each.name for each in catalog.channels])
    slots_max = {each.name: each.count_max or 1 for each in catalog.placements if each.channel == channel}
    counts: dict[str, int] = {}
    for text in asked or slots_max:
        name, _, count = text.partition(":")
        _require(f"placement of channel {channel}", name, slots_max)
        if name in counts:
            raise OutboundRefused(f"placement {name} is named twice")
        if count and not (count.isascii() and count.isdecimal() and 1 <= int(count[:9]) <= slots_max[name]):
            raise OutboundRefused(f"placement {name} has {slots_max[name]} slots at most, got {count[:20]!r}")
        counts[name] = int(count or 1)
    if not counts:
        raise OutboundRefused(f"channel {channel} has no placement")
    if len(counts) > PLACEMENTS_MAX:
        raise OutboundRefused(
            f"a decision fills {PLACEMENTS_MAX} placements at most, and there are {len(counts)}: name them with "
            f"--placement; there are {_listed(slots_max)}"
        )
    return Plan(segment, channel, tuple(asked), tuple(counts.items()))


def _require(what: str, name: str, declared: Iterable[str]) -> None:
    names = list(declared)
    if name not in names:
        there_are = f"there are {_listed(names)}" if names else "it declares none"
        raise OutboundRefused(f"the catalog in force declares no {what} named {name[:64]!r}; {there_are}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
