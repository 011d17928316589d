"""The benchmark of srt_ext.jax runs with tiny shapes; its tables match the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("srt_ext.jax", exc_type=ImportError)
import jax.numpy as jnp

from benchmarks import jax as programs
from benchmarks import jax_peers
from benchmarks.common import RESULTS, load


def test_every_program_is_correct_and_timed(tmp_path: Path) -> None:
    programs.main(rounds=2, results=tmp_path, tiny=True)
    rows = load(tmp_path / "jax.json")["rows"]
    others = {"median": jax_peers.MEDIANS, "shift": jax_peers.SHIFTS}
    for row in rows:
        names = {f.__name__ for f in others.get(row["case"]["op"], jax_peers.MEANS)}
        assert row["calls"].keys() == names | {"srt_ext", "fill"}
    assert {row["case"]["op"] for row in rows} == {"mean", "gradient", "median", "shift"}


def test_a_wrong_program_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def einsum(maps: jnp.ndarray, tables: jax_peers.Tables) -> jnp.ndarray:
        return 1.001 * jax_peers.einsum(maps, tables)

    monkeypatch.setattr(jax_peers, "MEANS", (einsum, jax_peers.gather))
    row = programs.measure(programs.tiny_cases()[0], 1)
    assert row["wrong"].keys() == {"einsum"}
    assert row["calls"].keys() == {"srt_ext", "gather", "fill"}


def test_the_tables_match_the_committed_results() -> None:
    rows = load(RESULTS / "jax.json")["rows"]
    assert [row["text"] for row in rows] == [case.text() for case in programs.cases()]
    assert programs.tables(rows) == (RESULTS / "jax.md").read_text()
