"""The committed results of the benchmarks fit their schema, tables and README."""

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


def test_the_schema_rejects_invalid_readings() -> None:
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
def test_tables_match_the_committed_results(path: Path) -> None:
    results = json.loads(path.read_text())
    assert report.document(results, path.stem) == path.with_suffix(".md").read_text()
    if path.stem == "cpu":
        assert report.readme(results) in (ROOT / "README.md").read_text()


def test_the_schema_knows_every_extent() -> None:
    extents = pytest.importorskip("benchmarks.__main__").Extent
    assert {extent.value for extent in extents} == set(SCHEMA["properties"]["extent"]["enum"])


def test_targets_of_a_gpu_name_rows_that_are_measured() -> None:
    """A shape that is spelled differently would silently leave its target unmeasured."""
    suite = pytest.importorskip("benchmarks.suite")
    calls = {"ours": 20, "ours, out=": 12, "fill": 10, "copy": 15, "read the tokens": 2, "GEMM": 60}
    ops = {"measure_views": "shift", "measure_mean": "mean", "measure_median": "median"}
    rows = [
        {
            "op": f"{ops.get(step.func.__name__)}, bilinear",
            "dtype": suite.name_of(step.keywords["dtype"]),
            "shape": step.keywords["case"].text(),
            "calls": {name: {"median": us} for name, us in {**calls, "published": 4000}.items()},
        }
        for extent in ("core", "rest")
        for step in suite.plan(extent)
        if step.keywords.get("upsample", "bilinear") == "bilinear" and "case" in step.keywords
    ]
    targets = report.cuda_targets({"rows": rows, "end_to_end": []})
    assert [target.text for target in targets if target.measured is None] == []
    assert [target.measured for target in targets if "fill + read" in target.text] == [1.0] * 16


def test_the_limit_of_a_row() -> None:
    def row(op: str, **us: float) -> dict[str, object]:
        return {
            "op": op,
            "calls": {name.replace("_", " "): {"median": m} for name, m in us.items()},
        }

    mean = row("mean, bilinear", ours=60, fill=10, copy=15, read_the_tokens=5)
    assert report.over_limit(mean) == 60 / 15
    mean["calls"]["ours, out="] = {"median": 30}
    assert report.over_limit(mean) == 30 / 15
    assert report.over_limit(row("shift, bilinear", ours=30, fill=10, copy=15)) == 30 / 15
    assert report.over_limit(row("median, bilinear", ours=30, fill=10, copy=15)) is None
