"""The benchmark of quality: metrics on hand-written cases, propagation, fields, bookkeeping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from benchmarks.common import load
from research import RESULTS
from research.quality import __main__ as command
from research.quality import data, davis, frontier, metrics, probes, report
from research.quality.cost import operations, seconds
from research.quality.fields import Fields, Network, overlapping, read, unit
from research.quality.settings import IDENTITY, Setting, settings
from srt_ext.backbones import describe
from srt_ext.srt import PRESETS

# ---- measures -----------------------------------------------------------------------------------


def square(size: int, y: int, x: int, side: int) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_region_is_intersection_over_union() -> None:
    truth = square(32, 8, 8, 8)
    assert metrics.region(truth, truth) == 1
    assert metrics.region(square(32, 8, 12, 8), truth) == pytest.approx(32 / 96)
    assert metrics.region(np.zeros_like(truth), np.zeros_like(truth)) == 1


def test_boundary_ignores_errors_within_the_tolerance() -> None:
    truth = square(100, 30, 30, 40)  # 0.008 of the diagonal of 141 pixels, rounded up: 2
    assert metrics.boundary(truth, truth) == 1
    assert metrics.boundary(square(100, 32, 30, 40), truth) == 1
    assert metrics.boundary(square(100, 50, 50, 40), truth) < 0.2
    assert metrics.boundary(np.zeros_like(truth), truth) == 0
    empty = np.zeros_like(truth)
    assert metrics.boundary(empty, empty) == 1


def test_matching_equals_dilation_by_a_disk() -> None:
    from scipy.ndimage import binary_dilation
    from skimage.morphology import disk

    generator = np.random.default_rng(0)
    lines, truth = generator.random((2, 40, 40)) > 0.98
    for radius in (1, 3):
        near = [binary_dilation(of, disk(radius)) for of in (truth, lines)]
        expected = ((lines & near[0]).sum(), lines.sum(), (truth & near[1]).sum(), truth.sum())
        assert metrics.matched(lines, truth, radius) == expected


def test_mean_iou_ignores_void() -> None:
    truth = np.array([[0, 0, 1, 11], [1, 1, 2, 11]])
    labels = np.array([[0, 1, 1, 0], [1, 1, 2, 2]])
    counts = metrics.confusion(labels, truth, 11)
    assert counts.sum() == 6
    assert metrics.mean_iou(counts) == pytest.approx((1 / 2 + 3 / 4 + 1) / 3)


def test_edges_of_a_step_lie_on_it() -> None:
    field = torch.zeros(2, 16, 16)
    field[0, :, :8], field[1, :, 8:] = 1, 1
    truth = np.zeros((64, 64), dtype=bool)
    truth[:, 31] = True
    strength = probes.edge_strength(field, (64, 64))
    assert metrics.best_f(metrics.edge_counts(strength, truth, [0.05, 0.1], 0.03)) > 0.9
    assert metrics.best_f(metrics.edge_counts(strength, truth.T, [0.05, 0.1], 0.03)) < 0.3


def test_errors_of_depth() -> None:
    truth = np.array([1.0, 2.0, 4.0])
    assert metrics.depth_errors(truth, truth) == {"rmse": 0, "abs_rel": 0, "delta": 1}
    errors = metrics.depth_errors(truth * [1, 1, 2], truth)
    assert errors["rmse"] == pytest.approx(4 / 3**0.5)
    assert errors["delta"] == pytest.approx(2 / 3)


# ---- propagation --------------------------------------------------------------------------------


def propagate_slowly(
    target: torch.Tensor,
    sources: list[torch.Tensor],
    labels: list[torch.Tensor],
    reach: int,
    k: int,
    temperature: float,
) -> torch.Tensor:
    """As :func:`davis.propagate`, cell by cell."""
    _, h, w = target.shape
    found = torch.zeros_like(labels[0])
    for y in range(h):
        for x in range(w):
            near = [
                (float(target[:, y, x] @ source[:, j, i]), label[:, j, i])
                for source, label in zip(sources, labels, strict=True)
                for j in range(max(0, y - reach), min(h, y + reach + 1))
                for i in range(max(0, x - reach), min(w, x + reach + 1))
            ]
            near = sorted(near, key=lambda pair: -pair[0])[:k]
            shares = torch.tensor([value for value, _ in near]).div(temperature).softmax(0)
            found[:, y, x] = sum(s * label for s, (_, label) in zip(shares, near, strict=True))
    return found


def test_propagation_equals_a_loop_over_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = [unit(torch.randn(6, 17, 25, generator=generator)) for _ in range(3)]
    labels = [torch.rand(3, 17, 25, generator=generator) for _ in range(2)]
    arguments: Any = (frames[0], frames[1:], labels, 3, 4, 0.1)
    torch.testing.assert_close(davis.propagate(*arguments), propagate_slowly(*arguments))


def test_propagation_onto_itself_keeps_the_labels() -> None:
    frame = unit(torch.randn(64, 20, 30, generator=torch.Generator().manual_seed(0)))
    labels = torch.rand(2, 20, 30)
    torch.testing.assert_close(davis.propagate(frame, [frame], [labels], 4, 1, 0.1), labels)


def test_propagation_follows_a_shift_within_its_reach() -> None:
    frame = unit(torch.randn(64, 20, 30, generator=torch.Generator().manual_seed(0)))
    labels = torch.rand(2, 20, 30)
    moved = frame.roll((2, -3), (1, 2))
    found = davis.propagate(moved, [frame], [labels], 3, 1, 0.1)
    torch.testing.assert_close(found[:, 2:, :-3], labels.roll((2, -3), (1, 2))[:, 2:, :-3])
    assert not torch.allclose(davis.propagate(moved, [frame], [labels], 2, 1, 0.1), found)


def test_ground_truth_labels_bound_the_score_of_a_grid(
    network: Network, davis_folder: Path
) -> None:
    wanted = [
        Setting("labels", "grid:0", 1, stride, upsample="nearest")
        for stride in (network.patch, network.patch // 4)
    ]
    (coarse, fine) = davis.run(
        network, wanted, davis_folder, "one", davis.Protocol(0, 0), lambda: None
    )
    assert coarse["J"] < fine["J"]
    assert fine["J"] > 0.95  # the square lies on whole cells; its corners are cut


def test_labels_are_shares_of_cells() -> None:
    labels = np.zeros((8, 8), dtype=np.int64)
    labels[:, :3] = 255
    shares = davis.one_hot(labels, [255], torch.Size([2, 2]))
    assert shares[1].tolist() == [[0.75, 0], [0.75, 0]]
    assert torch.equal(shares.sum(0), torch.ones(2, 2))


# ---- fields and heads ---------------------------------------------------------------------------


PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def test_fields_equal_srt(network: Network) -> None:
    chosen = settings([0, 1], network.patch, "main")
    assert len(set(chosen)) == len(chosen)
    for setting in {(s.family, s.reduce, s.stride): s for s in chosen}.values():
        assert seconds(network, setting, PIXELS)  # compares them


class Places(Network):
    """A network whose token is the centre of its patch, encoded in the channels of the image.

    They hold y and x in pixels; its own tokens, and those of overlapping patches, are their means.
    """

    def __init__(self) -> None:
        self.patch, self.layers, self.device = 16, [0], "cpu"

        def mean(images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(images, 16)

        def mean_of_overlapping(images: torch.Tensor) -> torch.Tensor:
            padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="replicate")
            return torch.nn.functional.avg_pool2d(padded, 16, stride=8)

        self._backbones = {
            "model": describe(mean, patch=16),
            "overlap": describe(mean_of_overlapping, patch=8),
        }

    def image(self, pixels: np.ndarray) -> torch.Tensor:
        axes = [torch.arange(n) + 0.5 for n in pixels.shape[:2]]
        y, x = torch.meshgrid(*axes, indexing="ij")
        return torch.stack([y, x, x])[None]


RIVALS = [s for s in settings([0], 16, "rivals") if s.family not in ("windows", "published")]


@pytest.mark.parametrize("pixels", [(128, 160), (144, 112)])
def test_cells_have_the_right_position(pixels: tuple[int, int]) -> None:
    """Except near the border, where tokens and bicubic samples repeat the edge."""
    found = Fields(Places(), RIVALS).of(np.zeros((*pixels, 3), dtype=np.uint8))
    for setting, field in zip(RIVALS, found, strict=True):
        assert field.shape[1:] == tuple(n // setting.stride for n in pixels), setting
        y, x = ((torch.arange(n) + 0.5) * setting.stride for n in field.shape[1:])
        expected = torch.stack([*torch.meshgrid(y, x, indexing="ij")])
        wrong = (field[:2] - expected).abs()
        edge = 32 // setting.stride
        assert wrong[:, edge:-edge, edge:-edge].max() < 0.02, setting


def test_two_scales_are_the_mean_of_both(network: Network) -> None:
    one, other, both = (
        Setting("enlarged", IDENTITY, 1, 8, scale=scale, second=second)
        for scale, second in ((1.0, 0.0), (1.5, 0.0), (1.0, 1.5))
    )
    a, b, mean = Fields(network, [one, other, both]).of(PIXELS)
    torch.testing.assert_close(mean, (a + b) / 2)


def test_a_mirrored_view_is_the_field_of_the_mirrored_picture(network: Network) -> None:
    """One symmetric view: the field of the mirrored image, mirrored back."""
    plain, flips = (Setting("flips", words, 1, 8) for words in (IDENTITY, IDENTITY + "+flip"))
    (view,) = Fields(network, [plain]).of(PIXELS)
    (mirrored,) = Fields(network, [plain]).of(PIXELS[:, ::-1].copy())
    (both,) = Fields(network, [flips]).of(PIXELS)
    torch.testing.assert_close(both, (view + mirrored.flip(2)) / 2, rtol=1e-4, atol=1e-4)


def test_overlapping_patches_have_a_token_in_the_middle_of_every_half_patch(
    network: Network,
) -> None:
    image = network.image(PIXELS)
    embed = overlapping(network.model).patch_embed
    tokens = embed(image)  # [1, h, w, C]
    assert tokens.shape[1:3] == (48 // 8, 64 // 8)
    # Token (1, 2) covers pixels from (8 - 4, 16 - 4).
    patch = image[:, :, 4:20, 12:28]
    torch.testing.assert_close(tokens[0, 1, 2], network.model.patch_embed(patch)[0, 0, 0])


def test_windows_of_the_trained_size_are_the_model_on_each(network: Network) -> None:
    """The test model has 160 x 160 pixels: two windows over 192 pixels share 8 of 12 rows."""
    image = torch.randn(1, 3, 160, 192, generator=torch.Generator().manual_seed(0))
    (found,) = (
        f.tokens.unflatten(1, f.grid) for f in network.backbone("windows").features(image)[1:]
    )
    left, right = (
        network.backbone("model").features(part)[1].tokens.unflatten(1, (10, 10))
        for part in (image[..., :160], image[..., 32:])
    )
    torch.testing.assert_close(found[:, :, :2], left[:, :, :2])
    torch.testing.assert_close(found[:, :, 10:], right[:, :, 8:])
    torch.testing.assert_close(found[:, :, 2:10], (left[:, :, 2:] + right[:, :, :8]) / 2)


def test_operations_equal_the_closed_form(network: Network) -> None:
    """A ViT has 24 d^2 per token and block, 4 N^2 d for attention, and the patch embedding."""
    model, setting = network.model, Setting("enlarged", IDENTITY, 1, 8, scale=2.0)
    d, n = model.embed_dim, 6 * 8 * 4
    prefix = model.num_prefix_tokens
    hidden = model.blocks[0].mlp.fc1.out_features
    layer = 2 * (n + prefix) * (4 * d * d + 2 * d * hidden) + 4 * (n + prefix) ** 2 * d
    expected = 2 * layer + 2 * n * 3 * 16 * 16 * d
    assert operations(network, setting, 96, 128) == expected
    two = Setting("both", "best:2:6", 1, 8, scale=2.0)
    assert operations(network, two, 96, 128) == 2 * operations(network, setting, 96, 128)


def test_the_middle_of_a_cell_is_the_token(network: Network) -> None:
    """One view, bilinear: the centre of a cell equals the token; the mean over it does not."""
    ways = [
        Setting("plain", "grid:0", 1, network.patch, upsample="nearest"),
        Setting("study", "grid:0", 1, network.patch, centre=True),
        Setting("study", "grid:0", 1, network.patch),
    ]
    plain, centre, blurred = Fields(network, ways).of(PIXELS)
    # Four pixels, half a pixel from the centre, so nearly equal.
    assert (centre - plain).norm() < 0.2 * (blurred - plain).norm()


def test_read_samples_the_field() -> None:
    field = torch.arange(12.0).reshape(1, 3, 4)
    points = torch.tensor([[0.5 / 3, 0.5 / 4], [2.5 / 3, 1.5 / 4], [0.5 / 3, 1 / 4]])
    assert read(field, points)[:, 0].tolist() == pytest.approx([0, 9, 0.5], abs=1e-5)


def test_a_head_that_can_see_the_class_finds_it(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fields equal to the truth give mIoU 1 and no error of disparity."""
    pictures = []
    for seed in range(3):
        truth = np.random.default_rng(seed).integers(0, 3, (4, 4)).repeat(12, 0).repeat(16, 1)
        pictures.append(data.Picture(str(seed), PIXELS, truth))
    shown = iter([*pictures, *pictures] * 2)

    def of(self: Fields, pixels: np.ndarray) -> list[torch.Tensor]:
        truth = torch.from_numpy(next(shown).truth)
        return [torch.stack([truth == i for i in range(3)]).float()]

    monkeypatch.setattr(Fields, "of", of)
    plain = [Setting("plain", "grid:0", 1, network.patch)]
    protocol = probes.Protocol(0, 0, 0, 500)
    arguments: Any = (network, plain, pictures, pictures, protocol, lambda: None)
    (scores,) = probes.segmentation(*arguments)
    assert scores["miou"] == scores["miou_plain_head"] == 1
    deep = [picture._replace(truth=picture.truth + 1.0) for picture in pictures]
    (errors,) = probes.depth(network, plain, deep, [], protocol, lambda: None)
    assert errors["rmse"] < 0.01


# ---- data sets and resumption -------------------------------------------------------------------


def write(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def davis_folder(tmp_path: Path) -> Path:
    """Two sequences of four frames with a moving square."""
    folder = tmp_path / "davis"
    generator = np.random.default_rng(0)
    for name in ("one", "two"):
        ground = generator.integers(0, 100, (48, 64, 3), dtype=np.uint8)
        for i in range(4):
            frame, mask = ground.copy(), np.zeros((48, 64), dtype=np.uint8)
            frame[16:32, 8 + 4 * i : 24 + 4 * i], mask[16:32, 8 + 4 * i : 24 + 4 * i] = 250, 255
            write(folder / f"JPEGImages/480p/{name}/{i:05d}.jpg", frame)
            write(folder / f"Annotations/480p/{name}/{i:05d}.png", mask)
    return folder


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("two\none\n", ["two", "one"]),
        ("/JPEGImages/480p/two/00000.jpg /Annotations/480p/two/00000.png\n" * 2, ["two"]),
        (None, ["one", "two"]),
    ],
)
def test_sequences_of_davis(davis_folder: Path, text: str | None, names: list[str]) -> None:
    if text is not None:
        listed = davis_folder / "ImageSets/480p/val.txt"
        listed.parent.mkdir(parents=True)
        listed.write_text(text)
    assert data.davis_sequences(davis_folder) == names
    # The first frame is given, the last one is not scored.
    assert [f.stem for f, _ in data.davis_frames(davis_folder, "one", 0)] == [
        f"{i:05d}" for i in range(3)
    ]
    assert len(data.davis_frames(davis_folder, "one", 1)) == 2


def test_a_palette_is_read_by_its_indices(tmp_path: Path) -> None:
    from PIL import Image

    labels = np.arange(4, dtype=np.uint8).reshape(2, 2)
    picture = Image.fromarray(labels)
    picture.putpalette([200] * 768)
    picture.save(tmp_path / "labels.png")
    assert np.array_equal(data.labels_of(tmp_path / "labels.png"), labels)


def test_finished_rows_are_not_measured_again(
    network: Network, davis_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings([1], network.patch, "quick")
    protocol = davis.Protocol(0, 0)
    path = tmp_path / "quality.json"
    real, asked = davis.run, []

    def run(network: Network, settings: list[Setting], folder: Path, name: str, *rest: Any) -> Any:
        if len(asked) == 1 and not path.with_suffix(".ended").exists():
            path.with_suffix(".ended").touch()
            raise KeyboardInterrupt
        asked.append((name, len(settings)))
        return real(network, settings, folder, name, *rest)

    monkeypatch.setattr(davis, "run", run)

    def attempt(wanted: list[Setting], protocol: davis.Protocol) -> None:
        table = command.Table(path, command.machine())
        command.run_davis(table, network, wanted, davis_folder, protocol, 0)

    with pytest.raises(KeyboardInterrupt):
        attempt(wanted, protocol)
    attempt(wanted, protocol)
    assert asked == [("one", len(wanted)), ("two", len(wanted))]
    attempt([*wanted, Setting("ours", "best:4:3", 1, network.patch)], protocol)
    assert asked[2:] == [("one", 1), ("two", 1)]  # the new one alone
    attempt(wanted, davis.Protocol(0, 0, k=3))  # settings of the protocol are part of the key
    assert asked[4:] == [("one", len(wanted)), ("two", len(wanted))]
    rows = load(path)["rows"]
    assert len(rows) == 4 * len(wanted) + 2
    assert all(0 <= row["scores"]["J"] <= 1 for row in rows)


# ---- the frontier -------------------------------------------------------------------------------


def point(
    cost: float, j: float, rmse: float, family: str = "ours", later: float | None = None
) -> frontier.Point:
    setting = Setting(family, f"best:{round(cost)}:6", 11, 8)
    scores = {("davis", "J"): j, ("motorcycle", "rmse"): rmse}
    return frontier.Point(setting, [cost, later or cost], scores)


def test_the_frontier() -> None:
    costs = [1, 2, 2, 3, 4, 4]
    values = [0.5, 0.7, 0.6, 0.7, 0.8, 0.8]
    assert frontier.frontier(costs, values) == [True, True, False, False, True, True]


def test_presets_lose_on_nothing_and_keep_to_the_budget_at_every_size() -> None:
    plain = point(1, 0.5, 10.0, "bilinear")
    worse = point(2, 0.8, 11.0)  # loses on disparity
    good = point(4, 0.7, 9.0)
    larger = point(8, 0.9, 8.0, later=20)  # exceeds the budget at a larger image
    rival = point(3, 1.0, 8.0, "overlap")
    points = [plain, worse, good, larger, rival]
    frontier.share_of_best(points, plain)
    assert good.tasks == pytest.approx({"davis": 0.4, "motorcycle": 0.5})
    assert good.gain == pytest.approx(0.45)
    assert frontier.preset(points, 16) is good
    assert frontier.preset(points, 20) is larger
    assert frontier.preset(points, 3) is plain
    assert frontier.preset(points, 0.5) is None
    assert frontier.preset(points, 16, ["davis"]) is worse


def test_the_table_of_the_readme_matches_the_committed_results() -> None:
    text = (RESULTS.parents[1] / "README.md").read_text()
    assert report.readme(load(RESULTS / "quality.json")) in text


def test_the_presets_of_the_library_match_the_committed_results() -> None:
    points = report.points(load(RESULTS / "quality.json"), 8)
    for name, (budget, tasks) in frontier.PRESETS.items():
        chosen = frontier.preset(points, budget, tasks)
        assert chosen is not None
        assert PRESETS[name] == (chosen.setting.scale, chosen.setting.forwards)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("quality*.json")), ids=lambda path: path.stem)
def test_tables_match_the_committed_results(path: Path) -> None:
    assert report.document(load(path)) == path.with_suffix(".md").read_text()


def test_means_are_over_the_items_that_all_settings_have() -> None:
    """An interrupted run: the second sequence has only one of two settings."""
    plain = Setting("plain", "grid:0", 1, 16, upsample="nearest")
    ours = Setting("ours", "best:4:3", 1, 16)
    about = {"task": "davis", "protocol": "short", "model": "a model"}
    rows = [
        {**about, "item": item, **setting.row(), "scores": {"J": score, "F": score}}
        for item, setting, score in (("a", plain, 0.5), ("a", ours, 0.6), ("b", plain, 0.1))
    ]
    (run,) = report.runs({"rows": rows})
    text = report.table({"rows": rows}, run, 1)
    assert "| plain tokens | 16 | 1 | - | 0.500 | 0.500 |  |" in text
    assert "| `best:4:3` | 16 | 4 | - | **0.600** | **0.600** | +0.100, 1 of 1 |" in text
