"""Where the faults of a catalog are gathered, and the checks that all its parts share: names, references, bounds."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.timestamp_pb2 import Timestamp

from server.errors import Violation

MINUTE_US: Final = 60 * 1_000_000
HOUR_US: Final = 60 * MINUTE_US
DAY_US: Final = 24 * HOUR_US
YEAR_US: Final = 365 * DAY_US

SUGGESTIONS_MAX: Final = 16  # of one catalog: to look for one among 10,000 names takes 25 ms
NAME_WANTED: Final = "a to z, 0 to 9 and _, a letter first, at most 64 of them"

VIOLATIONS_MAX: Final = 1_000  # of one catalog; megabytes of faults would take gigabytes to tell

_NANOS: Final = 1_000_000_000
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}\Z")


def duration_us(duration: Duration) -> int:
    """Return a span in microseconds."""
    return duration.seconds * 1_000_000 + duration.nanos // 1_000


def instant_us(instant: Timestamp) -> int:
    """Return an instant in microseconds since the epoch."""
    return instant.seconds * 1_000_000 + instant.nanos // 1_000


class Faults:
    """Gathers what is wrong, each with its path.

    Attributes:
        violations: in the order in which they were found, the first VIOLATIONS_MAX.
    """

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self._n_suggestions = 0

    def add(self, path: str, description: str) -> None:
        """Note one fault."""
        if len(self.violations) < VIOLATIONS_MAX:
            self.violations.append(Violation(path, description))

    def check(self, holds: bool, path: str, description: str) -> bool:
        """Note a fault unless the condition holds, and return whether it does."""
        if not holds:
            self.add(path, description)
        return holds

    def count(self, path: str, n: int, least: int, most: int) -> bool:
        """Check the length of a list, and return whether it is right."""
        return self.check(least <= n <= most, path, f"{least} to {most} entries, got {n}")

    def names(self, path: str, names: Iterable[str]) -> None:
        """Check that the names of a list's entries are names, and none stands twice."""
        seen: dict[str, int] = {}
        for i, name in enumerate(names):
            if not _NAME.match(name):
                self.add(f"{path}[{i}].name", f"{NAME_WANTED}, got {name[:80]!r}")
            elif seen.setdefault(name, i) != i:
                self.add(f"{path}[{i}].name", f"{name!r} stands at {path}[{seen[name]}] already")

    def refers(self, path: str, name: str, known: Collection[str], what: str) -> bool:
        """Check that something of this name is declared, and return whether it is."""
        if name in known:
            return True
        if len(self.violations) >= VIOLATIONS_MAX:
            return False  # an example of ten thousand names, a million times, would take minutes
        if not name:
            example = f", such as {min(known)[:64]!r}" if known else ""
            return self.check(False, path, f"the name of one {what} is required{example}")
        close = []
        if self._n_suggestions < SUGGESTIONS_MAX:
            self._n_suggestions += 1
            close = difflib.get_close_matches(name[:64], known, n=1)
        self.add(path, f"no {what} is named {name[:64]!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        return False

    def refer(self, path: str, names: Collection[str], known: Collection[str], what: str) -> None:
        """Check a list of references, in which none stands twice."""
        for i, name in enumerate(names):
            self.refers(f"{path}[{i}]", name, known, what)
        self.check(len(set(names)) == len(names), path, f"the same {what} stands twice; name it once")

    def enum(self, path: str, value: int, kind: EnumTypeWrapper) -> None:
        """Check that a number is one of an enum's."""
        names = ", ".join(name for name, number in kind.items() if number)
        self.check(value in kind.values(), path, f"one of {names}, got {value}")

    def share(self, path: str, share: float) -> None:
        """Check that a number lies within 0 and 1."""
        self.check(0.0 <= share <= 1.0, path, f"0 to 1, got {share}")

    def finite(self, path: str, number: float) -> bool:
        """Check that a number is finite, and return whether it is."""
        return self.check(math.isfinite(number), path, "a finite number is required")

    def span(self, path: str, duration: Duration, least_us: int, most_us: int) -> None:
        """Check that a span is one, and lies within bounds."""
        # Protobuf itself writes a span of other nanoseconds as no JSON: nobody could look at the catalog.
        if abs(duration.nanos) >= _NANOS or duration.seconds * duration.nanos < 0:
            self.add(path, "less than a second of nanoseconds, of the same sign as the seconds")
            return
        self.check(
            least_us <= duration_us(duration) <= most_us,
            path,
            f"{in_words(least_us)} to {in_words(most_us)}, got {_seconds(duration_us(duration))}",
        )


def in_words(span_us: int) -> str:
    """Return a span as it is written in a catalog, and what that is in days where it is whole ones."""
    is_days = span_us > DAY_US and span_us % DAY_US == 0
    return f"{_seconds(span_us)} ({span_us // DAY_US} days)" if is_days else _seconds(span_us)


def _seconds(span_us: int) -> str:
    return f"{span_us / 1e6:.15g}s"
