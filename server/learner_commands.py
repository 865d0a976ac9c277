"""The caller's commands about learners: who learns and how they do, have them begin anew, and the kill switch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from server.commands import _ADDRESS, _FIELD, _VALIDATE_ONLY, _calling, _show

if TYPE_CHECKING:
    from tsugi.v1.model_pb2 import LearnerRole

_ETAG = click.option("--etag", default="", help="Refuse unless this is the present etag.")
_REQUEST_ID = click.option("--request-id", default="", help="Makes the call idempotent.")


@click.command()
@_ADDRESS
@_FIELD
@click.option("--goal", default="", help="Of this goal alone.")
@click.option("--json", "as_json", is_flag=True, help="The reply as JSON in place of tables.")
@click.option("--page-size", type=click.IntRange(1, 500), default=50, show_default=True)
@click.option("--page-token", default="", help="The nextPageToken of the page before.")
def learners(address: str, field: str, goal: str, as_json: bool, page_size: int, page_token: str) -> None:
    """Show of each goal who learns, how each does, and what changed lately."""
    with _calling(address) as client:
        reply = client.list_learners(goal, page_size=page_size, page_token=page_token)
    if as_json or field:
        _show(field, reply)
        return
    from server.learner_tables import print_learners

    print_learners(reply)


@click.command("reset-learner")
@_ADDRESS
@_FIELD
@click.argument("role", type=click.Choice(["serving", "challengers", "all"]))
@click.option("--goal", "goals", multiple=True, help="Of this goal; may be given several times. By default of all.")
@_ETAG
@_REQUEST_ID
@_VALIDATE_ONLY
def reset_learner(
    address: str, field: str, role: str, goals: tuple[str, ...], etag: str, request_id: str, validate_only: bool
) -> None:
    """Have learners forget what they learned and begin anew."""
    with _calling(address) as client:
        reply = client.reset_learner(_role(role), goals, etag=etag, request_id=request_id, validate_only=validate_only)
        _show(field, reply)


@click.command("kill-switch")
@_ADDRESS
@_FIELD
@click.argument("state", type=click.Choice(["on", "off"]))
@_ETAG
@_REQUEST_ID
@_VALIDATE_ONLY
def kill_switch(address: str, field: str, state: str, etag: str, request_id: str, validate_only: bool) -> None:
    """Decide by the baseline alone (on), or by what was learned again (off); learning goes on either way."""
    from tsugi.v1.model_pb2 import ModelRole

    with _calling(address) as client:
        reply = client.assign_model_role(
            "baseline" if state == "on" else "fleet", role=ModelRole.MODEL_ROLE_LEARNER,
            etag=etag, request_id=request_id, validate_only=validate_only,
        )  # fmt: skip
        _show(field, reply)


ALL: tuple[click.Command, ...] = (learners, reset_learner, kill_switch)


def _role(name: str) -> LearnerRole:
    from tsugi.v1.model_pb2 import LearnerRole

    return {
        "serving": LearnerRole.LEARNER_ROLE_SERVING,
        "challengers": LearnerRole.LEARNER_ROLE_CHALLENGER,
        "all": LearnerRole.LEARNER_ROLE_ALL,
    }[name]
