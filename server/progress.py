"""How far a long command has come, shown on a terminal; nothing anywhere else."""

from __future__ import annotations

from collections.abc import Callable


class Progress:
    """Bars on a terminal, one a piece of work."""

    def __init__(self) -> None:
        # Heavy, and every other command would pay for it.
        from rich import progress  # noqa: PLC0415
        from rich.console import Console  # noqa: PLC0415

        console = Console(stderr=True)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[told]}"), progress.TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Show a line above the bars; nothing where there are none."""
        if not self._bars.disable:
            self._bars.console.print(text)

    def begin(self, name: str, size: int, what: str) -> Callable[[int, int], None]:
        """Show another bar, and return what moves it.

        Args:
            name: of the work.
            size: how much of it there is, in any unit.
            what: what is counted beside the bar, such as rows.

        Returns:
            A function of how much is done, in the unit of size, and of how many are done.
        """
        task = self._bars.add_task(name, total=size or 1, told="")
        shown = self._bars.tasks[-1]
        before: list[int] = []

        def told(done: int, n_done: int) -> None:
            before[:] = before or [n_done]
            rate = (n_done - before[0]) / max(shown.elapsed or 0.0, 0.001)
            self._bars.update(task, completed=done, told=f"{n_done:,} {what}, {rate:,.0f} a second")

        return told
