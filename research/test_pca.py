"""The study of stored fields: basis, storage and tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks.common import load
from research import RESULTS, pca
from research.quality import davis, discovery
from research.quality.fields import Fields

if TYPE_CHECKING:
    from research.quality.fields import Network

CELLS = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) + 5
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_the_components_are_singular_vectors_about_the_origin() -> None:
    basis = pca.fit(CELLS)
    _, values, vectors = np.linalg.svd(CELLS.double().numpy(), full_matrices=False)
    assert not basis.mean.any()
    assert_same_lines(basis.components, vectors)
    shares = (values**2).cumsum() / (values**2).sum()
    assert basis.kept(CELLS) == pytest.approx({8: shares[7]}, abs=1e-4)


def test_the_centered_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    basis = pca.fit(CELLS, centered=True)
    expected = PCA(12, svd_solver="full").fit(CELLS.double())
    np.testing.assert_allclose(basis.mean, expected.mean_, rtol=1e-5)
    assert_same_lines(basis.components, expected.components_)


def assert_same_lines(components: torch.Tensor, expected: np.ndarray) -> None:
    """Rows, except for their signs."""
    products = np.abs(components.double().numpy() @ expected.T)
    np.testing.assert_allclose(products, np.eye(len(expected)), rtol=0, atol=1e-4)


def test_the_cells_of_a_field_are_stored_as_their_projections(network: Network) -> None:
    """On real fields of the preset: restoring changes no inner product, hence no cosine."""
    channels = network.model.num_features
    cells = pca.sample(network, [PIXELS, PIXELS[::-1].copy(), PIXELS[:, ::-1].copy()])
    plain, *others = Fields(network, wanted := pca.storages(network, cells)).of(PIXELS)
    found = {pca.words(pca.Key(**s.row())): f for s, f in zip(wanted[1:], others, strict=True)}
    assert torch.equal(found["all channels, float16"], plain.half().float())
    assert torch.equal(found["all channels, bfloat16"], plain.bfloat16().float())
    assert len(found) == 2 + len(pca.counts(channels)) + sum(k < channels for k in pca.CENTERED)
    basis, x = pca.fit(cells), plain.flatten(1).T
    for k in pca.counts(channels):
        z = found[f"{k} components"].flatten(1).T
        projections = z @ basis.components[:k]
        torch.testing.assert_close(z @ z.T, projections @ x.T, rtol=1e-4, atol=1e-3)
    z = found["16 components, centered"].flatten(1).T
    centered = pca.fit(cells, centered=True)
    torch.testing.assert_close(z, (x - cells.mean(0)) @ centered.components[:16].T)


def test_a_sequence_is_measured_on_the_basis_of_the_others(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        for name in ("ant", "bee", "cat"):
            folder = tmp_path / "davis" / kind / "480p" / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(PIXELS[:, :, 0]).save(folder / f"{i}.{suffix}")
    channels = network.model.num_features
    cells = iter(torch.full((channels, channels), float(i)) for i in (0, 10, 20))
    monkeypatch.setattr(pca, "sample", lambda *_: next(cells))
    means = {}

    def run(_: Any, wanted: Any, folder: Path, name: str, *__: Any) -> list[dict[str, float]]:
        means[name] = float(wanted[-1].basis.mean[0])
        return [{"J": 1.0, "F": 0.5}] * len(wanted)

    monkeypatch.setattr(davis, "run", run)
    monkeypatch.setattr(discovery, "run", lambda _, wanted, *__: [{"IoU": 0.2}] * len(wanted))
    rows, _ = pca.on_davis(network, tmp_path, 48, 1)
    assert means == {"ant": 15, "bee": 10, "cat": 5}
    assert {(row["task"], row["item"]) for row in rows} == {
        (task, name) for task in ("davis", "discovery") for name in means
    }


def test_the_tables_are_made_of_the_committed_results() -> None:
    results = load(RESULTS / "pca.json")
    text = pca.document(results)
    assert text == (RESULTS / "pca.md").read_text()
    found = pca.gathered(results)
    assert {len(found[key]["davis", "J"]) for key in found} == {8}
    section = (
        (RESULTS.parent / "README.md").read_text().split("## Stored fields")[1].split("\n## ")[0]
    )
    shown = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(shown) > 20
    assert not set(shown) - set(text.splitlines())
