"""The background's command line: learn, fit, replay, and the demonstration.

Commands are loaded when they are called, so that the learner process starts without a plotting library.
"""

from __future__ import annotations

import importlib
from typing import Final

import click

_COMMANDS: Final = {
    "learn": ("training.learn", "learn_command"),
    "fit": ("training.fit", "fit_command"),
    "replay": ("training.replay", "replay_command"),
    "demo": ("training.demo", "demo_command"),
    "link": ("training.link", "link_command"),
    "replay-decision": ("training.replay_decision", "replay_decision_command"),
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        try:
            command = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"{error.name} is missing; install the extra: pip install 'tsugi[training]'"
            ) from error
        assert isinstance(command, click.Command), "the table names commands"
        return command


@click.group(cls=_Lazy)
def main() -> None:
    """Tsugi in the background: learning, fitting, replaying."""


if __name__ == "__main__":
    main()
