"""What an attribution came to, as tables for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.audit_tables import PIPED_WIDTH
from server.catalog.catalog import Doubles
from server.outcomes.attribution import Attributed, Model

_TITLES: Final = {Model.TIME_DECAY: "time decay", Model.MARKOV: "Markov"}


def as_json(channels: Sequence[str], attributed: dict[Model, Attributed], effects: Doubles) -> dict[str, Any]:
    """Return the parts of every channel and their sums, each by model; channels in the order of the tables."""
    return {
        "channels": [
            {
                "channel": channels[i],
                "removal_effect": float(effects[i]),
                "models": {
                    model: {"outcomes": float(each.outcomes[i]), "value": float(each.values[i])}
                    for model, each in attributed.items()
                },
            }
            for i in _most_first(channels, attributed)
        ],
        "totals": {
            model: {"outcomes": float(each.outcomes.sum()), "value": float(each.values.sum())}
            for model, each in attributed.items()
        },
    }


def print_attribution(channels: Sequence[str], attributed: dict[Model, Attributed], effects: Doubles) -> None:
    """Print one table of outcomes and one of their value: a row a channel, a column a model, sums below."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    order = _most_first(channels, attributed)
    for title, column in (("outcomes", 0), ("value", 1)):
        table = Table(title=title, show_footer=True)
        table.add_column("channel", "all channels")
        for model, each in attributed.items():
            table.add_column(_TITLES.get(model, str(model)), f"{each[column].sum():,.2f}", justify="right")
        if column == 0:
            table.add_column("removal effect", justify="right")
        for i in order:
            parts = [f"{each[column][i]:,.2f}" for each in attributed.values()]
            table.add_row(Text(channels[i]), *parts, *([f"{effects[i]:.2%}"] if column == 0 else []))
        console.print(table)


def _most_first(channels: Sequence[str], attributed: dict[Model, Attributed]) -> list[int]:
    """Return the channels in the order of what they earned by the last touchpoint, then by name."""
    last = attributed[Model.LAST].outcomes
    return sorted(range(len(channels)), key=lambda i: (-last[i], channels[i]))
