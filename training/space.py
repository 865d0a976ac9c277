"""What are rows made of? The names of features and of actions, in order of first sight.

All learners lay their arrays out by it: a feature's column and an action's row never change, and are part of the
fleet's state. It never reads a clock, a log or a disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from server.catalog.validation import LEARNED_COLUMNS_FEW_MAX

# Five catalogs' worth of columns, or the widest one's. Names beyond it are not learned from, so that a feature space
# renamed with every catalog cannot grow the matrices for ever.
FEATURES_MAX: Final = LEARNED_COLUMNS_FEW_MAX
ACTIONS_MAX: Final = 20_000  # twice a catalog's; likewise


class Space:
    """Names and their places.

    Attributes:
        columns: of each feature.
        rows: of each action.
        tokens: by action row, what it has in common with others, such as its group: what is learned about them says
            something about it too.
    """

    @property
    def is_full(self) -> bool:
        """Whether names were turned away, or the next one would be: nothing is learned of those."""
        return len(self.columns) >= FEATURES_MAX or len(self.rows) >= ACTIONS_MAX

    def __init__(self) -> None:
        self.columns: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.tokens: list[tuple[str, ...]] = []

    def admit_features(self, names: Iterable[str]) -> None:
        """Give columns to features not seen before, as long as there are some left."""
        for name in names:
            if name not in self.columns and len(self.columns) < FEATURES_MAX:
                self.columns[name] = len(self.columns)

    def admit_action(self, name: str, tokens: tuple[str, ...] | None = None) -> int | None:
        """Return the row of an action, a new one when it was not seen before; None when there is none left.

        Args:
            name: of the action.
            tokens: as now known; None: nothing is said about them.
        """
        row = self.rows.get(name)
        if row is None:
            if len(self.rows) >= ACTIONS_MAX:
                return None
            row = self.rows[name] = len(self.rows)
            self.tokens.append(())
        if tokens is not None:
            self.tokens[row] = tokens
        return row
