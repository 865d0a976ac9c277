"""An import from beginning to end: every row is answered for once, whenever it is killed, and no row is lost."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import TsugiError
from server.importing import run
from server.importing.faults import Fault, ImportRunning, ImportStopped
from server.importing.journal import KINDS_MAX, Journal, Tally, journal_path, load
from server.importing.rows import SEARCH_BYTES_MAX
from server.importing.run import Outcome, import_file, open_all
from tests.unit.importing.support import BY_LINE, Clock, Kept, imported, plan
from tsugi.client import CallError

HEADER = "cust_no,age\n"


class KilledError(BaseException):
    """Stands for the end of the process: nothing of ours handles it."""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def ages(n: int, bad: tuple[int, ...] = ()) -> str:
    """Return a file of n rows, of which some say no age."""
    return HEADER + "".join(f"c{i},{'old' if i in bad else i % 100}\n" for i in range(n))


def rejected(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_go_in_and_the_rest_is_told_with_line_column_and_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", ages(5, bad=(1, 3)) + "c5\n")
    kept = Kept()
    outcome = imported(path, kept, BY_LINE)
    tally = outcome.tally
    assert (tally.rows, tally.accepted, tally.duplicates, tally.rejected, tally.lsn) == (6, 3, 0, 3, 3)
    assert [(f.reason, f.column, f.count, f.example_line) for f in tally.faults] == [
        ("VALUE_INVALID", "age", 2, 3),
        ("ROW_MALFORMED", "", 1, 7),
    ]
    assert outcome.rejects == tmp_path / "crm.csv.rejects.csv"
    rows = rejected(outcome.rejects)
    assert [(row["cust_no"], row["age"], row["_line"], row["_row"]) for row in rows] == [
        ("c1", "old", "3", ""),
        ("c3", "old", "5", ""),
        ("", "", "7", "c5"),
    ]
    assert all(record_id.endswith(f":{row}") for record_id, row in zip(kept.records, (2, 4, 6), strict=True))


def test_corrected_rejects_go_in_once_under_the_ids_they_had(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", ages(3, bad=(1,)) + "c3\n")
    kept = Kept()
    rejects = imported(path, kept, BY_LINE).rejects
    assert rejects is not None
    told_ids = [row["_record_id"] for row in rejected(rejects)]
    rejects.write_text(rejects.read_text().replace("old", "33").replace(",c3\n", ',"c3,44"\n'))
    again = imported(rejects, kept, BY_LINE)
    assert (again.tally.accepted, again.tally.rejected) == (2, 0)
    assert {kept.records[told].identities[0].value for told in told_ids} == {"c1", "c3"}
    rejects.write_text(rejects.read_text().replace("33", "34").replace("34", "33") + "\n")  # another file, same rows
    assert imported(rejects, kept, BY_LINE).tally.duplicates == 2


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_rejects_left_as_they_are_are_rejected_again_and_kept_whole(tmp_path: Path, ending: str) -> None:
    data = {
        "csv": b'cust_no,age\nc0,old\nc1,1,1\nM\xfcller,3\n"c3,4\nc4,5\n',
        "jsonl": b'{"cust_no":"c0","age":"old"}\n{"cust_no":\n{"cust_no":"M\xfcller"}\n[3]\n{"cust_no":"c4","age":5}\n',
    }
    path = tmp_path / f"crm.{ending}"
    path.write_bytes(data[ending])
    kept = Kept()
    first = imported(path, kept, BY_LINE)
    assert first.rejects is not None
    second = imported(first.rejects, kept, BY_LINE)
    assert second.rejects is not None
    third = imported(second.rejects, kept, BY_LINE)
    assert third.rejects is not None
    assert [outcome.tally.rejected for outcome in (first, second, third)] == [4, 4, 4]
    assert len(kept.records) == 1

    def told(path: Path) -> list[Any]:
        if ending == "csv":
            return [(row["cust_no"], row["age"], row["_row"], row["_record_id"]) for row in rejected(path)]
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [(line.get("cust_no"), line.get("age"), line.get("_row"), line["_record_id"]) for line in lines]

    assert told(first.rejects) == told(second.rejects) == told(third.rejects)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_row_too_long_to_be_kept_is_said_to_be_so_however_often_its_rejects_are_sent(
    tmp_path: Path, ending: str
) -> None:
    big = "x" * (SEARCH_BYTES_MAX // 2)
    text = {"csv": f'{HEADER}"{big}",3\nc1,4\n', "jsonl": f'{{"cust_no": "{big}"}}\n{{"cust_no": "c1"}}\n'}
    path = write(tmp_path / f"big.{ending}", text[ending])
    line = 2 if ending == "csv" else 1
    for _ in range(3):
        outcome = imported(path, Kept(), BY_LINE)
        assert outcome.rejects is not None
        assert [fault.reason for fault in outcome.tally.faults] == ["ROW_TOO_LONG"]
        assert f"line {line} is too long to be kept here; correct it in big.{ending}" in outcome.rejects.read_text()
        path = outcome.rejects


def test_every_fault_of_a_row_is_told_and_the_row_is_counted_by_the_first(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", "cust_no,age,club\nc1,old,perhaps\n")
    mapping = BY_LINE.replace("{age:", "{member: {column: club}, age:")
    outcome = imported(path, Kept(), mapping)
    assert outcome.rejects is not None
    (row,) = rejected(outcome.rejects)
    assert (row["_column"], row["_reason"]) == ("club, age", "VALUE_INVALID")
    assert row["_message"].startswith("club: one of ") and "; age: a number such as" in row["_message"]
    assert [(fault.column, fault.count) for fault in outcome.tally.faults] == [("club", 1)]


def test_what_an_import_writes_is_its_owners_alone(tmp_path: Path) -> None:
    imported(write(tmp_path / "crm.csv", ages(3, bad=(1,))), Kept(), BY_LINE)
    written = [path for path in tmp_path.iterdir() if path.name != "crm.csv"]
    assert [path.stat().st_mode & 0o777 for path in written] == [0o600, 0o600]


def test_rejected_json_keeps_its_own_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"cust_no": "c1", "age": 1.50e3, "note": "caf\\u00e9"}\n{}\n')
    rejects = imported(path, Kept(), BY_LINE).rejects
    assert rejects is not None
    first, second = rejects.read_text().splitlines()
    assert first.startswith('{"cust_no": "c1", "age": 1.50e3, "note": "caf\\u00e9", "_line": 1, "_column": "age"')
    assert json.loads(second)["_reason"] == "IDENTITY_MISSING"


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "windows-1252"])
def test_rejects_are_written_as_the_file_is_and_can_be_sent(tmp_path: Path, encoding: str) -> None:
    mapping = f"{BY_LINE}\ncsv: {{encoding: {encoding}, delimiter: ;}}"
    path = tmp_path / "crm.csv"
    path.write_bytes("cust_no;age\nMüller;alt\n".encode("cp1252" if encoding == "windows-1252" else encoding))
    kept = Kept()
    rejects = imported(path, kept, mapping).rejects
    assert rejects is not None
    codec = "utf-16" if encoding == "utf-16" else "latin-1"
    rejects.write_bytes(rejects.read_bytes().decode(codec).replace("alt", "40").encode(codec))
    assert imported(rejects, kept, mapping).tally.accepted == 1
    assert next(iter(kept.records.values())).identities[0].value == "Müller"


def test_refusals_of_the_server_are_rejects_like_others(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", ages(4))
    mapping = f'recordId: "{{cust_no}}"\n{BY_LINE}'
    outcome = imported(path, Kept(refuse=["c2"]), mapping)
    assert outcome.rejects is not None
    (row,) = rejected(outcome.rejects)
    assert (row["cust_no"], row["_column"], row["_reason"], row["_record_id"]) == ("c2", "age", "FIELD_INVALID", "c2")
    assert outcome.tally.accepted == 3


def test_batches_keep_to_the_bounds_and_to_the_order_of_the_file(tmp_path: Path) -> None:
    kept = Kept()
    imported(write(tmp_path / "crm.csv", ages(1_100)), kept, BY_LINE)
    assert kept.batches == [500, 500, 100]
    assert [record.identities[0].value for record in kept.records.values()] == [f"c{i}" for i in range(1_100)]


def test_dry_run_counts_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", ages(5, bad=(1,)))
    outcome = imported(path, None, BY_LINE)
    assert (outcome.tally.accepted, outcome.tally.rejected, outcome.rejects) == (4, 1, None)
    assert list(tmp_path.iterdir()) == [path]


def test_dry_run_finds_what_the_server_refuses_without_looking_at_its_state(tmp_path: Path) -> None:
    header = "order_no,cust_no,browser,age,club,kind,ordered_at,updated_at,total,optin\n"
    row = "o{},{},b1,31,y,order,2026-02-03,{},9.5,yes\n"
    rows = row.format(1, "c1", "9999-01-01") + row.format(2, "c\u200b2", "2026-02-03") + row.format(3, "c3", "")
    outcome = imported(write(tmp_path / "orders.csv", header + rows), None)
    assert [(fault.reason, fault.column) for fault in outcome.tally.faults] == [
        ("TIME_OUT_OF_RANGE", "updated_at"),
        ("FIELD_INVALID", "cust_no"),
    ]
    assert outcome.tally.accepted == 1


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 2 if settings.default else 50)
@given(
    n_rows=st.integers(0, 60),
    bad=st.sets(st.integers(0, 59)),
    kills=st.lists(st.tuples(st.sampled_from(["call", "told", "clock"]), st.integers(0, 12)), max_size=4),
    tail=st.binary(max_size=30),
)
def test_killed_at_any_moment_it_finishes_with_every_row_once(
    tmp_path_factory: pytest.TempPathFactory, n_rows: int, bad: set[int], kills: list[tuple[str, int]], tail: bytes
) -> None:
    folder = tmp_path_factory.mktemp("import")
    rows = "".join(f"c{i},{'old' if i in bad else i}," + ('"two\nlines"\n' if i % 3 else "\n\n") for i in range(n_rows))
    path = write(folder / "crm.csv", f"cust_no,age,note\n{rows}")
    kept = Kept()
    n_bad = len([i for i in bad if i < n_rows])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "BATCH_RECORDS_MAX", 5)
        for where, when in kills:
            before = len(kept.records)
            try:
                _import_until(path, kept, where, when)
            except KilledError:
                assert len(kept.records) >= before
                rejects = folder / "crm.csv.rejects.csv"
                journal = load(journal_path(path, None))
                if journal is not None and rejects.exists() and not journal.is_finished:
                    with rejects.open("ab") as file:  # what a buffer had brought to disk
                        file.write(tail)
        outcome = imported(path, kept, BY_LINE)
    tally = outcome.tally
    assert (tally.rows, tally.rejected) == (n_rows, n_bad)
    assert tally.accepted + tally.duplicates == n_rows - n_bad
    assert sorted(record.identities[0].value for record in kept.records.values()) == sorted(
        f"c{i}" for i in range(n_rows) if i not in bad
    )
    assert (
        [row["cust_no"] for row in rejected(outcome.rejects)] == [f"c{i}" for i in range(n_rows) if i in bad]
        if outcome.rejects is not None
        else n_bad == 0
    )


def _import_until(path: Path, kept: Kept, where: str, when: int) -> None:
    """Import, and be killed at the n-th call, progress or look at the clock."""
    left = {where: when}

    def kill(point: str) -> None:
        left[point] = left.get(point, 1_000_000) - 1
        if left[point] < 0:
            raise KilledError

    class Killing(Clock):
        def __call__(self) -> float:
            kill("clock")
            return super().__call__()

    def answer(records: Any, **options: Any) -> Any:
        response = kept.ingest_records(records, **options)  # it is on the server's disk, and nobody hears of it
        kill("call")
        return response

    destination = Kept()
    destination.ingest_records = answer  # type: ignore[method-assign]  # the same records, another fate
    chosen = plan(BY_LINE)
    (opened,) = open_all([path], chosen.mapping, None)
    import_file(opened, chosen, destination, lambda *_: kill("told"), Killing())


def test_resumed_import_reads_on_behind_what_was_answered(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", ages(3_000))
    kept = Kept()
    with pytest.raises(KilledError):
        _import_until(path, kept, "told", 4)
    journal = load(journal_path(path, None))
    assert journal is not None and 0 < journal.tally.rows < 3_000
    outcome = imported(path, kept, BY_LINE)
    assert (outcome.tally.rows, outcome.tally.accepted + outcome.tally.duplicates) == (3_000, 3_000)
    assert outcome.tally.accepted >= journal.tally.accepted
    assert outcome.tally.duplicates <= 3_000 - journal.tally.rows
    assert len(kept.records) == 3_000


def test_finished_import_sends_nothing_again_unless_it_is_told_to(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", ages(5, bad=(1,)))
    kept = Kept()
    first = imported(path, kept, BY_LINE)
    again = imported(path, kept, BY_LINE)
    assert again == Outcome(first.tally, first.rejects, True)
    assert kept.batches == [4]
    assert imported(path, kept, BY_LINE, is_restart=True).tally.duplicates == 4


def test_rejects_of_an_earlier_import_are_set_aside_and_not_written_over(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", ages(3, bad=(1,)))
    first = imported(path, Kept(), BY_LINE)
    assert first.rejects is not None
    kept_text = first.rejects.read_text() + "corrected,1\n"
    first.rejects.write_text(kept_text)
    write(path, ages(3, bad=(2,)))  # the next day's file has the same name
    second = imported(path, Kept(), BY_LINE)
    assert second.rejects is not None
    assert [row["cust_no"] for row in rejected(second.rejects)] == ["c2"]
    assert (tmp_path / "crm.csv.rejects.1.csv").read_text() == kept_text


@pytest.mark.parametrize("change", ["file", "mapping"])
def test_journal_of_something_else_is_not_gone_on_with(tmp_path: Path, change: str) -> None:
    path = write(tmp_path / "crm.csv", ages(3_000))
    kept = Kept()
    with pytest.raises(KilledError):
        _import_until(path, kept, "told", 4)
    if change == "file":
        write(path, ages(3_000).replace("c2999", "x2999"))
    outcome = imported(path, Kept(), BY_LINE + ("\n# said otherwise" if change == "mapping" else ""))
    assert outcome.tally.accepted == 3_000


def test_unreachable_server_stops_the_import_where_it_can_go_on(tmp_path: Path) -> None:
    def fails_from_the_third_call(number: int) -> None:
        if number >= 2:
            raise CallError(grpc.StatusCode.UNAVAILABLE, "nobody there")

    path = write(tmp_path / "crm.csv", ages(3_000, bad=(1,)))
    kept = Kept(fails_from_the_third_call)
    with pytest.raises(ImportStopped) as stopped:
        imported(path, kept, BY_LINE, pause=lambda _: False)
    assert stopped.value.is_unanswered
    assert len(kept.records) == 999
    healthy = Kept()
    healthy.records = kept.records
    outcome = imported(path, healthy, BY_LINE)
    assert (outcome.tally.accepted, outcome.tally.duplicates, outcome.tally.rejected) == (2_999, 0, 1)


def test_damaged_packing_stops_the_import_and_what_was_read_goes_in(tmp_path: Path) -> None:
    path = tmp_path / "crm.csv.gz"
    data = gzip.compress(ages(30_000).encode(), 1)
    path.write_bytes(data[: len(data) // 2])
    kept = Kept()
    with pytest.raises(ImportStopped):
        imported(path, kept, BY_LINE)
    journal = load(journal_path(path, None))
    assert journal is not None
    assert len(kept.records) == journal.tally.accepted > 1_000


def test_same_file_is_not_imported_twice_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", ages(3))
    seen = []

    def import_it_again(number: int) -> None:
        if number == 0:
            with pytest.raises(ImportRunning, match="already"):
                imported(path, Kept(), BY_LINE)
            seen.append(number)

    assert imported(path, Kept(import_it_again), BY_LINE).tally.accepted == 3
    assert seen == [0]


@pytest.mark.parametrize("name", ["crm.xls", "crm", "crm.cvs", "crm.parquet.gz", "crm.csv.gz"])
def test_file_of_no_known_format_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ages(3))
    with pytest.raises(TsugiError):
        open_all([path], plan(BY_LINE).mapping, None)


def test_two_files_of_one_name_are_refused_where_they_would_share_a_journal(tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "crm.csv", ages(3)))
    mapping = plan(BY_LINE).mapping
    with pytest.raises(TsugiError) as refusal:
        open_all(paths, mapping, tmp_path)
    assert "journal" in refusal.value.violations[0].description
    for opened in open_all(paths, mapping, None):
        opened.rows.close()


def test_kinds_of_faults_are_bounded_and_none_is_uncounted() -> None:
    tally = Tally()
    for line in range(3 * KINDS_MAX):
        tally.reject(line, Fault("FIELD_INVALID", "", f"message {line}"))
    assert len(tally.faults) == KINDS_MAX + 1
    assert sum(fault.count for fault in tally.faults) == tally.rejected == 3 * KINDS_MAX


def test_journal_that_is_none_begins_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "crm.csv", ages(3))
    journal_path(path, None).write_text('{"file_bytes": "many"}')
    assert imported(path, Kept(), BY_LINE).tally.accepted == 3
    journal = load(journal_path(path, None))
    assert isinstance(journal, Journal) and journal.is_finished


LINES = st.lists(
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from(
            [b"c1,3", b'"c2",4', b'c3,"5', b'"', b'{"cust_no": "c4", "age": 6}', b'{"cust_no": "\\ud800"}', b"{}"]
        ),
        st.sampled_from([b'{"_row": "{", "_record_id": "\\ud800"}', b'{"cust_no": "c5", "_record_id": "\\ud800"}']),
    ),
    max_size=10,
)


@given(LINES, st.sampled_from(["csv", "jsonl"]), st.sampled_from(["utf-8", "utf-16", "windows-1252"]))
def test_any_bytes_are_answered_for_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ending: str, encoding: str
) -> None:
    path = tmp_path_factory.mktemp("import") / f"crm.{ending}"
    header = HEADER.encode(encoding) if ending == "csv" else b""
    path.write_bytes(header + b"\n".join(lines))
    mapping = f"{BY_LINE}\ncsv: {{encoding: {encoding}}}"
    kept = Kept()
    first = imported(path, kept, mapping)
    assert first.tally.rows == first.tally.accepted + first.tally.rejected
    assert len(kept.records) == first.tally.accepted
    if first.rejects is not None:  # sent as they are, they are rejected again, and as many as they were
        again = imported(first.rejects, kept, mapping)
        assert (again.tally.rows, again.tally.rejected) == (first.tally.rejected, first.tally.rejected)
