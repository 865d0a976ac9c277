"""One word, one meaning: words the glossary gives up stand in no proto identifier and no public Python name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# What a thing must not be called; the glossary of the README has what it is called.
GIVEN_UP = {
    "offer": "action", "arm": "action", "creative": "treatment", "variant": "treatment", "widget": "placement",
    "zone": "placement", "customer": "profile", "user": "profile", "trait": "attribute", "cohort": "segment",
    "audience": "segment", "pscore": "selection_probability", "boost": "lever", "multiplier": "lever", "bid": "lever",
    "utility": "priority", "kpi": "goal", "recommendation": "decision", "exposure": "impression",
    "feedback": "outcome", "conversion": "outcome", "artefact": "bundle", "artifact": "bundle",
    "checkpoint": "snapshot", "offset": "LSN", "watermark": "LSN", "adapter": "engine", "driver": "engine",
    "timeout": "silence", "fallback": "degradation", "unlink": "split", "alias": "identity", "identifier": "identity",
    "precedence": "survivorship", "subject": "profile", "aggregate": "window", "permission": "consent",
    "materialisation": "projection", "cursor": "LSN",
}  # fmt: skip

# Where such a word means something else: (file, name), with the reason.
ALLOWED = {
    ("server/storage/committer.py", "offer"): "a verb: a draft is offered to the queue",
    ("server/storage/record.py", "offsets"): "byte positions within a block, not places in the log",
}


def words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def public_names() -> Iterator[tuple[str, str]]:
    for package in ("server", "training"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith(
                    "_"
                ):
                    yield str(path.relative_to(ROOT)), node.name


def proto_names() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "protos").rglob("*.proto")):
        text = re.sub(r"//.*", "", path.read_text())
        for name in re.findall(r"(?:message|enum|service|rpc)\s+(\w+)|\s(\w+)\s*=\s*\d+\s*;", text):
            yield str(path.relative_to(ROOT)), name[0] or name[1]


def test_names_keep_to_the_glossary() -> None:
    found = [
        f"{path}: {name} ({word}: say {GIVEN_UP[word]})"
        for path, name in [*public_names(), *proto_names()]
        for word in words(name) & GIVEN_UP.keys()
        if (path, name) not in ALLOWED
    ]
    assert not found, "\n".join(found)


def test_the_check_notices_a_word_that_was_given_up() -> None:
    assert words("best_offer_rate") & GIVEN_UP.keys() == {"offer"}
    assert words("FeedbackRecord") & GIVEN_UP.keys() == {"feedback"}
