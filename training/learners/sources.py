"""What do weights belong to that actions share? To the action itself, and to each of its tokens, such as its group.

Named, so that what is learned about them depends on no order of first sight.
"""

from __future__ import annotations

from typing import Final

from training.space import Space

TOKENS_MAX: Final = 8  # of an action, the first: each costs a row as much as the action itself does


class Sources:
    """The names of the sources of each action of a space, as its tokens are now known."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._actions: list[str] = []
        self._known: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {}  # tokens, names

    def names(self, action: int) -> tuple[str, ...]:
        """Return the action's own, then those of its tokens; the same object until they change."""
        tokens = self._space.tokens[action]
        known = self._known.get(action)
        if known is not None and known[0] == tokens:
            return known[1]
        if len(self._actions) != len(self._space.rows):
            self._actions = list(self._space.rows)
        distinct = list(dict.fromkeys(tokens))[:TOKENS_MAX]
        names = (f"action {self._actions[action]}", *(f"token {token}" for token in distinct))
        self._known[action] = (tokens, names)
        return names
