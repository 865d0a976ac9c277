"""What ListLearners tells, as tables for a terminal."""

from __future__ import annotations

from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table

from tsugi.v1.learner_pb2 import GoalLearners, Learner, LearnerChange, LearnerChangeKind
from tsugi.v1.model_pb2 import LearnerRole
from tsugi.v1.model_service_pb2 import ListLearnersResponse

PIPED_WIDTH: Final = 160  # columns: a pipe has no width, and tables are not to be cut


def print_learners(reply: ListLearnersResponse) -> None:
    """Print what is in force, and of each goal one table of its learners and one of what changed lately."""
    console = Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    if reply.in_force == "baseline":
        console.print("The kill switch is on: decisions are made by the baseline, without exploring.")
    if not reply.learned_lsn:
        console.print("No learner has told anything yet.")
        return
    console.print(f"Learned up to record {reply.learned_lsn:,}, of {_time(reply.learned_time)}.")
    for goal in reply.goals:
        console.print(_learners(goal))
        if goal.changes:
            console.print(_changes(goal))
    if reply.next_page_token:
        console.print(f"There are more: --page-token {reply.next_page_token}")


def _learners(goal: GoalLearners) -> Table:
    table = Table(
        "number", "family", "settings", "role", "rows", "loss", "lead", "expected", "observed", "begun at record",
        title=f"{goal.goal}: {goal.rows:,} rows, {goal.promotions} promotions, {goal.demotions} demotions",
    )  # fmt: skip
    for each in sorted(goal.learners, key=lambda learner: learner.number):
        table.add_row(
            str(each.number), each.family, each.settings, ", ".join(_roles(each)), f"{each.rows:,}",
            _within(each.mean_loss if each.HasField("mean_loss") else None, _loss_radius(each)),
            _within(each.lead if each.HasField("lead") else None, _lead_radius(each)),
            f"{each.expected_reward:.4f}" if each.rows else "", f"{each.observed_reward:.4f}" if each.rows else "",
            f"{each.begun_lsn:,}, {_time(each.begin_time)}" if each.begun_lsn else "",
        )  # fmt: skip
    return table


def _changes(goal: GoalLearners) -> Table:
    table = Table("when", "record", "learner", "change", "lead", "over", title=f"{goal.goal}: newest changes")
    for change in goal.changes:
        kind = LearnerChangeKind.Name(change.kind).removeprefix("LEARNER_CHANGE_KIND_").lower()
        lead = _within(change.lead if change.HasField("lead") else None, _lead_radius(change))
        over = str(change.compared_with) if lead else ""
        table.add_row(_time(change.change_time), f"{change.lsn:,}", str(change.number), kind, lead, over)
    return table


def _roles(learner: Learner) -> list[str]:
    return [LearnerRole.Name(role).removeprefix("LEARNER_ROLE_").lower() for role in learner.roles]


def _loss_radius(learner: Learner) -> float | None:
    return learner.loss_radius if learner.HasField("loss_radius") else None


def _lead_radius(told: Learner | LearnerChange) -> float | None:
    return told.lead_radius if told.HasField("lead_radius") else None


def _within(mean: float | None, radius: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.4f} ± {radius:.4f}" if radius is not None else f"{mean:.4f} ± ?"


def _time(time: Timestamp) -> str:
    return time.ToDatetime().isoformat(" ", "seconds")
