"""Object discovery, retrieval and classification: metrics on hand-written cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks.common import MODEL, load, machine
from research.quality import __main__ as command
from research.quality import classification, data, discovery, report, retrieval
from research.quality.fields import Fields, Network
from research.quality.settings import Setting, settings

PLAIN = Setting("plain", "grid:0", 1, 16, upsample="nearest")
# Outside of the checkout, on machines that have it.
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def trained() -> Network:
    """A ViT-Ti/16 of twelve blocks with published weights."""
    found = list((SHARED / "weights").glob("vit_tiny_patch16_224.*.safetensors"))
    if not found:
        pytest.skip("no weights")
    return Network(MODEL, found[0], [7, 11], "cpu")


def write(path: Path, array: np.ndarray) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# ---- discovery ----------------------------------------------------------------------------------


def two_parts(mask: np.ndarray, channels: int = 16) -> torch.Tensor:
    """A field [C, h, w] with one direction on the mask, another around it, and noise."""
    generator = torch.Generator().manual_seed(0)
    field = 0.05 * torch.randn(channels, *mask.shape, generator=generator)
    field[0] += torch.from_numpy(mask)
    field[1] += ~torch.from_numpy(mask)
    return field


def rectangle(shape: tuple[int, int], top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_a_cut_separates_two_parts_and_the_smaller_is_the_foreground(threshold: float) -> None:
    mask = rectangle((15, 20), 4, 6, 9, 13)
    vector = discovery.cut(discovery.cosines(two_parts(mask)), threshold, 1e-5).reshape(15, 20)
    assert np.array_equal(vector > vector.mean(), mask)
    assert vector[mask].min() > vector[~mask].max() + 10 * vector[~mask].std()


def test_a_cut_is_the_second_generalised_eigenvector() -> None:
    from scipy.linalg import eigh

    field = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(0))
    likeness = discovery.cosines(field)
    vector = discovery.cut(likeness, 0.2, 1e-5)
    edges = np.where(likeness > 0.2, 1.0, 1e-5)
    degree = np.diag(edges.sum(1))
    expected = eigh(degree - edges, degree, subset_by_index=[1, 1])[1][:, 0]
    expected *= np.sign(expected @ vector)
    np.testing.assert_allclose(vector, expected, atol=1e-8)
    assert np.abs(vector).argmax() == vector.argmax()


def test_f_curve_equals_the_f_at_each_threshold() -> None:
    generator = np.random.default_rng(0)
    truth = rectangle((20, 30), 5, 5, 15, 20)
    shown = generator.random(truth.shape) + 0.5 * truth
    curve = discovery.f_curve(shown, truth, 0.3)
    edges = np.histogram_bin_edges(shown, discovery.LEVELS)[:-1]
    for level in (0, 77, 200, 255):
        marked = shown >= edges[level]
        precision, recall = (marked & truth).sum() / marked.sum(), marked[truth].mean()
        expected = 1.3 * precision * recall / (0.3 * precision + recall) if recall else 0
        assert curve[level] == pytest.approx(expected)
    assert discovery.f_curve(truth - 0.5, truth, 0.3).max() == 1


def test_the_box_encloses_the_most_salient_region() -> None:
    truth = rectangle((40, 60), 10, 10, 30, 30)
    mask = truth.copy()
    mask[35:, 50:] = True  # another region
    saliency = np.where(truth, 1.0, 0.5)
    assert discovery.box(truth) == (10, 10, 30, 30)
    assert discovery.located(discovery.Found(mask, saliency), truth)
    saliency[36, 55] = 2
    assert not discovery.located(discovery.Found(mask, saliency), truth)
    saliency[0, 0] = 3  # in neither
    assert not discovery.located(discovery.Found(mask, saliency), truth)
    assert not discovery.located(discovery.Found(np.zeros_like(mask), saliency), truth)
    for right, expected in ((50, True), (51, False)):  # 20 x 20 pixels in 20 x 40, 20 x 41
        wide = rectangle((40, 60), 10, 10, 30, right)
        assert discovery.located(discovery.Found(wide, saliency), truth) is expected


def test_masks_are_grey_levels_or_indices(tmp_path: Path) -> None:
    grey = np.array([[0, 100], [200, 255]], dtype=np.uint8)
    assert discovery.foreground(write(tmp_path / "grey.png", grey)).tolist() == [
        [False, False],
        [True, True],
    ]
    indices = np.array([[0, 1], [2, 0]], dtype=np.uint8)
    assert discovery.foreground(write(tmp_path / "indices.png", indices)).tolist() == [
        [False, True],
        [True, False],
    ]


def test_discovery_of_a_field_that_shows_the_object(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object covers whole cells, so only its corners are missed; one mask is empty."""
    mask = rectangle((9, 12), 3, 4, 6, 8)
    enlarged = np.kron(mask, np.ones((16, 16))).astype(np.uint8) * 255
    picture = write(tmp_path / "picture.png", noise(144, 192, 3))
    shown = write(tmp_path / "mask.png", enlarged)
    empty = write(tmp_path / "empty.png", np.zeros_like(enlarged))
    monkeypatch.setattr(Fields, "of", lambda self, pixels: [two_parts(mask), two_parts(~mask)])
    protocol = discovery.Protocol(0, 0)
    right, same = discovery.run(
        network,
        [PLAIN, PLAIN],
        [(picture, shown), (picture, empty)],
        protocol,
        lambda: None,
    )
    assert right == same  # only its size distinguishes the object from the background
    assert right["CorLoc"] == 1
    for name in ("IoU", "IoU_more", "IoU_published", "accuracy", "F"):
        assert right[name] > 0.95


def test_data_sets_of_saliency(tmp_path: Path) -> None:
    assert list(discovery.cases(tmp_path, 240, 0, 2, 3)) == []
    for i in range(5):
        write(tmp_path / f"davis/JPEGImages/480p/one/{i:05d}.jpg", noise(16, 16, 3))
        write(tmp_path / f"ecssd/images/{i:04d}.jpg", noise(16, 16, 3))
    davis, ecssd = discovery.cases(tmp_path, 240, 0, 2, 3)
    assert (davis.task, davis.item) == ("discovery", "one")
    assert [path.name for path, _ in davis.examples] == ["00000.jpg", "00003.jpg"]
    assert davis.examples[1][1] == tmp_path / "davis/Annotations/480p/one/00003.png"
    assert (ecssd.task, ecssd.item) == ("ecssd", "")
    assert [path.name for path, _ in ecssd.examples] == ["0000.jpg", "0002.jpg", "0004.jpg"]
    assert ecssd.examples[2][1] == tmp_path / "ecssd/ground_truth_mask/0004.png"
    assert "2 pictures" in davis.protocol.words()
    assert "3 pictures" in ecssd.protocol.words()


# ---- retrieval ----------------------------------------------------------------------------------


def test_regions_are_connected_and_large_enough() -> None:
    truth = np.full((20, 30), 11)  # void
    truth[:5] = 0
    truth[10:14, 2:6] = truth[10:14, 20:25] = 8  # two cars
    truth[18, 28] = 8  # one pixel
    labels, classes = retrieval.regions(truth, 0.01)
    assert classes.tolist() == [0, 8, 8]
    assert [(labels == i).sum() for i in range(4)] == [600 - 150 - 16 - 20, 150, 16, 20]
    assert labels[18, 28] == 0
    assert len(retrieval.regions(truth, 0.001)[1]) == 4


def test_descriptors_are_means_over_the_covered_shares() -> None:
    field = torch.tensor([[[1.0, 0], [0, 3]], [[0, 2], [1, 0]]])  # directions; not all of length 1
    labels = np.zeros((8, 8), dtype=np.int64)
    labels[:4, :4] = 1  # one cell
    labels[:4, 6:] = labels[4:6, 4:] = 2  # half of two cells
    labels[7, 0] = 3  # a sixteenth of a cell
    found = retrieval.descriptors(field, labels, 3)
    np.testing.assert_allclose(found, [[1, 0], [0.5**0.5, 0.5**0.5], [0, 1]], atol=1e-6)


def test_average_precision_of_a_ranking() -> None:
    """The query is ranked against: relevant, other, relevant. (1 + 2/3) / 2."""
    angles = np.array([0, 0.1, 0.2, 0.3, 0.05])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    classes = np.array([1, 1, 2, 1, 1])
    sources = np.array(["a", "b", "b", "b", "a"])  # the last is of the query's own sequence
    found = retrieval.precisions(vectors, classes, sources)
    assert found[0] == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(found[2])  # no other sequence has its class


def street(name: str, seed: int) -> data.Picture:
    truth = np.full((48, 64), 11)
    truth[:16], truth[32:, :32] = 0, 3
    if seed == 0:
        truth[32:, 48:] = 10  # a bicyclist in one sequence only
    return data.Picture(name, noise(48, 64, 3), truth)


def test_retrieval_by_class(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [street("a_1", 0), street("a_2", 0), street("b_1", 1)]
    shown = iter(pictures)

    def of(self: Fields, pixels: np.ndarray) -> list[torch.Tensor]:
        truth = next(shown).truth
        seen = torch.from_numpy(np.stack([truth == c for c in (0, 3, 10)])).float()
        blind = torch.ones(3, 3, 4)
        return [torch.nn.functional.avg_pool2d(seen, 16), blind]

    monkeypatch.setattr(Fields, "of", of)
    found = retrieval.run(network, [PLAIN, PLAIN], pictures, retrieval.Protocol(0, 0), lambda: None)
    assert list(found) == ["sky", "road"]
    for seeing, blind in found.values():
        assert seeing["mAP"] == 1
        # All equal: the share of relevant regions. From a 1 of 2, from b 2 of 6 (twice).
        assert blind["mAP"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)


# ---- classification -----------------------------------------------------------------------------


def test_scores_of_a_head() -> None:
    plain = np.array([[0.6, 0.3, 0.1, 0, 0, 0], [0.1, 0.8, 0.1, 0, 0, 0]])
    other = np.array([[0.3, 0.5, 0.2, 0, 0, 0], [0.1, 0.9, 0.0, 0, 0, 0]])
    assert classification.scores(other, plain, None) == pytest.approx(
        {"agreement": 0.5, "confidence": 0.7}
    )
    found = classification.scores(other, plain, np.array([0, 1]))
    assert (found["top1"], found["top5"]) == (0.5, 1)
    assert classification.scores(plain, plain, np.array([0, 1]))["top1"] == 1


def test_one_unshifted_view_is_the_plain_head(network: Network) -> None:
    wanted = [s for s in classification.settings(network) if s.family == "plain"]
    assert [s.layer for s in wanted] == [0, 2, 3, 5]  # of 6 blocks
    plain, *found = classification.likelihoods(
        network, wanted, [noise(300, 200, 3), noise(180, 240)], lambda: None
    )
    assert plain.shape == (2, 1000)
    for shares in found:
        np.testing.assert_allclose(shares, plain, rtol=1e-5)
        assert classification.scores(shares, plain, None)["agreement"] == 1


def test_folders_of_classes(network: Network, tmp_path: Path) -> None:
    for name in ("n02123045", "285", "n02123159"):
        for i in range(2):
            write(tmp_path / f"val/{name}/{i}.png", noise(32, 32, 3))
    paths, truth = classification.labelled(tmp_path, network, 0)
    assert dict(zip((p.parent.name for p in paths), truth.tolist(), strict=True)) == {
        "n02123045": 281,  # tabby
        "n02123159": 282,
        "285": 285,
    }
    assert len(classification.labelled(tmp_path, network, 3)[0]) == 3
    write(tmp_path / "val/cats/0.png", noise(32, 32, 3))
    with pytest.raises(ValueError, match="named by a class of the model"):
        classification.labelled(tmp_path, network, 0)


@pytest.mark.slow
def test_a_head_names_a_cat(trained: Network, tmp_path: Path) -> None:
    from skimage.data import cat

    write(tmp_path / "val/n02124075/cat.png", cat())  # Egyptian cat, the prediction of ViTs
    paths, truth = classification.labelled(tmp_path, trained, 0)
    wanted = [s for s in classification.settings(trained) if s.layer == 11]
    found = classification.run(trained, wanted, paths, truth, lambda: None)
    for setting, scores in zip(wanted, found, strict=True):
        assert scores["top5"] == 1, setting
    assert found[0]["agreement"] == 1


def test_the_cut_of_a_trained_model_separates_a_cup_from_the_table(trained: Network) -> None:
    """The cut does not know which side is the object: here the cup is the larger side."""
    from skimage.data import coffee

    pixels = data.resized(coffee(), 160, trained.patch)
    (field,) = Fields(trained, [Setting("ours", "best:4:6", 11, 8)]).of(pixels)
    likeness = discovery.cosines(field)
    vector = discovery.cut(likeness, float(np.median(likeness)), 1e-5).reshape(field.shape[1:])
    table = vector > vector.mean()
    assert not table[5:15, 10:20].any()
    assert table[:4, :9].all()
    assert table[:, :3].all()
    assert table[:, -5:].all()


# ---- bookkeeping --------------------------------------------------------------------------------


def test_rows_of_all_tasks_are_kept_and_shown(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        mask = rectangle((48, 64), 16, 16, 32, 48).astype(np.uint8) * 255
        write(tmp_path / f"davis/JPEGImages/480p/one/{i:05d}.jpg", noise(48, 64, 3))
        write(tmp_path / f"davis/Annotations/480p/one/{i:05d}.png", mask)
        write(tmp_path / f"imagenet/val/{281 + i}/0.JPEG", noise(48, 64, 3))
    monkeypatch.setattr(classification, "photographs", lambda: [noise(40, 40, 3)])
    wanted = [s for s in settings([0, 1], network.patch, "quick") if s.family != "labels"][:2]
    heads = [s for s in classification.settings(network) if s.views in ("grid:0", "best:4:6")]
    monkeypatch.setattr(classification, "settings", lambda network: heads)
    asked: list[int] = []
    real = Fields.of

    def of(self: Fields, pixels: np.ndarray) -> list[torch.Tensor]:
        asked.append(1)
        return real(self, pixels)

    monkeypatch.setattr(Fields, "of", of)
    path = tmp_path / "quality.json"

    def attempt() -> None:
        table = command.Table(path, machine())
        for case in discovery.cases(tmp_path, 0, 0, 0, 0):
            command.run_discovery(table, network, wanted, *case)
        streets = [street("a_1", 1), street("b_1", 1)]
        protocol = retrieval.Protocol(0, 0)
        command.run_retrieval(table, network, wanted, protocol, lambda: streets)
        command.run_classification(table, network, tmp_path, 0)

    attempt()
    once, found = len(asked), load(path)
    attempt()
    assert len(asked) == once == 2 + 2
    assert load(path)["rows"] == found["rows"]
    tasks = [row["task"] for row in found["rows"]]
    assert {task: tasks.count(task) for task in tasks} == {
        "discovery": 2,
        "retrieval": 2 * 2,  # sky and road
        "classification": 2 * len(heads),  # DAVIS, scikit-image
        "imagenet": len(heads),
    }
    text = report.document(found)
    for line in (
        "## DAVIS: object discovery by a normalised cut",
        "## CamVid: region retrieval across sequences",
        "### By class",
        "## ImageNet: classification with the model's own head",
    ):
        assert line in text
