"""What the benchmarks have left in the repository belongs together, and has its form."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

jsonschema = pytest.importorskip("jsonschema")
report = pytest.importorskip("benchmarks.report")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
RUNS = [RESULTS / "cpu.json", *sorted(RESULTS.glob("cuda-*.json"))]
SCHEMA = json.loads((ROOT / "benchmarks/schema.json").read_text())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_committed_results_fit_their_schema(path: Path) -> None:
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)


def test_the_schema_refuses_what_is_no_reading() -> None:
    results = json.loads(RUNS[0].read_text())
    for spoil in (
        lambda r: r["rows"][0]["calls"]["ours"].update(median=0),
        lambda r: r["rows"][0]["calls"]["ours"].pop("q3"),
        lambda r: r["wrong"].append("ours is off by 1"),
        lambda r: r["machine"].pop("commit"),
    ):
        spoiled = copy.deepcopy(results)
        spoil(spoiled)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoiled, SCHEMA)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_tables_are_those_of_the_committed_results(path: Path) -> None:
    results = json.loads(path.read_text())
    assert report.document(results, path.stem) == path.with_suffix(".md").read_text()
    if path.stem == "cpu":
        assert report.readme(results) in (ROOT / "README.md").read_text()
