"""The peer that learning is measured beside: Vowpal Wabbit as a contextual bandit, fed row by row.

One example a decision: what is known of the row in namespace U, and one line an action in namespace A. It draws from
the distribution it predicts, and learns the cost, 0 or 1, of what was drawn with the probability it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import vowpalwabbit

from tests.benchmark.learning_sets import BanditSet, action_name

# Its own settings otherwise: among them adaptive, normalised steps, made for numbers of any scale.
COMMON: Final = "--cb_explore_adf --cb_type mtr -q UA -b 20 --quiet"
VARIANTS: Final = {"vw_epsilon": f"{COMMON} --epsilon 0.05", "vw_squarecb": f"{COMMON} --squarecb"}


def shared_lines(data: BanditSet) -> list[str]:
    """Return the line of each row that all its actions share: numbers as they are, categories by their value's index.

    The index stands in place of the value because blanks, colons and bars mean something else in this format.
    """
    indices = [{value: i for i, value in enumerate(column.values)} for column in data.columns]
    return [
        "shared |U "
        + " ".join(
            f"{column.name}={index[cell]}" if index else f"{column.name}:{cell}"
            for column, index, cell in zip(data.columns, indices, row, strict=True)
        )
        for row in data.cells
    ]


def examples(
    shared_line: str, n_actions: int, chosen: int = -1, cost: float = 0.0, probability: float = 1.0
) -> list[str]:
    """Return one decision's lines, with what the chosen action cost where there is one."""
    lines = [shared_line, *(f"|A {action_name(i)}" for i in range(n_actions))]
    if chosen >= 0:
        lines[1 + chosen] = f"0:{cost:g}:{probability:.6g} {lines[1 + chosen]}"
    return lines


def play(data: BanditSet, rows: Sequence[int], seed: int, settings: str) -> float:
    """Return the mean loss of one run over these rows, in this order."""
    workspace = vowpalwabbit.Workspace(f"{settings} --random_seed {seed + 1}")
    rng = np.random.default_rng([seed, 1])
    shared, n_wrong = shared_lines(data), 0
    for row in rows:
        predicted = np.array(workspace.predict(examples(shared[row], data.n_classes)), np.float64)
        predicted /= predicted.sum()  # float32 there
        chosen = int(rng.choice(data.n_classes, p=predicted))
        cost = float(chosen != data.classes[row])
        n_wrong += chosen != data.classes[row]
        workspace.learn(examples(shared[row], data.n_classes, chosen, cost, float(predicted[chosen])))
    workspace.finish()
    return n_wrong / len(rows)
