"""CSV is read in blocks, yet as if record by record."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mail_pipelines.contacts import files
from mail_pipelines.contacts.files import Reject

TEXT = st.lists(st.sampled_from(['"', ",", "\n", "\r\n", "\r", "a", "é", "\x00", " ", '""', '",', '"\n', "a,b\n", '"a,\n",b\n']), max_size=20).map("".join)


def read(path: Path, block: int) -> tuple[list[tuple[int, tuple[str, ...]]], list[Reject]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK_LINES", block)
        with files.open_file(path) as file:
            batches = list(file.batches)
    rows = [row for batch in batches for row in zip(batch.lines, zip(*(column.to_pylist() for column in batch.columns), strict=True), strict=True)]
    return rows, [reject for batch in batches for reject in batch.rejects]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(TEXT, st.integers(2, 6))
def test_blocks_make_no_difference(tmp_path: Path, text: str, block: int) -> None:
    path = tmp_path / "people.csv"
    path.write_bytes(f"email,name\n{text}".encode())
    rows, rejects = read(path, block)
    assert (rows, rejects) == read(path, 1)
    lines = [line for line, _ in rows] + [reject.line for reject in rejects]
    assert len(set(lines)) == len(lines)
    try:
        records = [tuple(record) for record in csv.reader(io.StringIO(text, newline=""), strict=True) if record]
    except csv.Error:
        return
    if "\x00" not in text:
        assert [row for _, row in rows] == [record for record in records if len(record) == 2]
        assert len(rejects) == len([record for record in records if len(record) != 2])


def test_a_quote_left_open_costs_one_line_not_the_rest_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    lines = [f"user{number}@example.test,name" for number in range(20_000)]
    lines[5] = 'user5@example.test,"name'
    path.write_text("email,name\n" + "\n".join(lines))
    rows, rejects = read(path, 2_000)
    assert len(rows) == 19_999
    assert rejects == [Reject(7, "a quote is opened that never closes properly")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_header_tells_the_delimiter(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "people.csv"
    path.write_text(f"email{delimiter}name{delimiter}\na@x.test{delimiter}A:B{delimiter}\n")
    with files.open_file(path) as file:
        assert file.columns == ["email", "name", ""]
        assert [[column.to_pylist() for column in batch.columns] for batch in file.batches] == [[["a@x.test"], ["A:B"], [""]]]
