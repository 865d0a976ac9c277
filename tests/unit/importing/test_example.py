"""The example files of the README: every row of them goes in, and says what the text around them says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from server.importing.checking import check_mapping
from server.importing.mapping import load_mapping
from server.importing.run import Plan, import_file, open_all
from tests.unit.importing.support import EXAMPLE, Clock, Kept, shop_catalog


@pytest.mark.parametrize(
    ("source", "name", "n_rows"),
    [("crm", "crm.csv", 3), ("shop", "shop_events.jsonl", 4), ("loyalty", "loyalty.csv", 2)],
)
def test_every_example_row_goes_in(tmp_path: Path, source: str, name: str, n_rows: int) -> None:
    mapping = load_mapping((EXAMPLE / name).with_suffix(".yaml").read_text())
    catalog = shop_catalog()
    check_mapping(mapping, catalog, source)
    shutil.copy(EXAMPLE / name, tmp_path)
    (opened,) = open_all([tmp_path / name], mapping, None)
    kept = Kept()
    outcome = import_file(opened, Plan(mapping, catalog, source), kept, lambda *_: None, Clock())
    assert (outcome.tally.accepted, outcome.tally.rejected) == (n_rows, 0), outcome.tally.faults
    assert all(record.HasField("observation_time") for record in kept.records.values())
