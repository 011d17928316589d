"""Placements of sub-pixel tokens, a ViT on them, and the search for their positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("timm")

import timm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import srt_ext
from srt_ext import spot

WEIGHTS = SHARED / "weights/vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
EVERY = {**spot.PLACEMENTS, "grid": lambda n, size, seed: spot.grid(n, size, 1, seed)}
RANDOM = ("uniform", "gauss", "sobol", "edge", "grid")

# ---- placements ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    path = SHARED / "golden/spot_priors.npz"
    if not path.exists():
        pytest.skip("evaluation data, not in the repository: spot_priors.npz")
    return {name: torch.from_numpy(value) for name, value in np.load(path).items()}


def test_even_placements_equal_the_published_ones(golden: dict[str, torch.Tensor]) -> None:
    """For n that the published code supports. Its positions are fractions of the image."""
    rules: dict[str, Callable[..., torch.Tensor]] = {
        "isotropic": spot.isotropic,
        "center_s02": spot.center,
        "center_s03": lambda n, size: spot.center(n, size, 0.3),
    }
    compared = 0
    for name, expected in golden.items():
        rule, _, rest = name.rpartition("_")[0].rpartition("_")
        if rule in rules and len(expected) == int(name.rpartition("_")[2]):
            size = tuple(map(int, rest.split("x")))
            found = rules[rule](len(expected), size) / torch.tensor(size)
            torch.testing.assert_close(found, expected, rtol=0, atol=2.0**-23)
            compared += 1
    assert compared == 12  # those of square images


def test_random_placements_have_the_published_distributions(
    golden: dict[str, torch.Tensor],
) -> None:
    assert torch.equal(spot._normal_to_fraction(golden["draw_normal"]), golden["gauss"])
    assert torch.equal(spot._uniform_to_edge(golden["draw_uniform"]), golden["edge"])


@pytest.mark.parametrize("name", EVERY)
@given(n=st.integers(1, 60), size=st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_a_placement_gives_n_positions_in_the_image(
    name: str, n: int, size: tuple[int, int]
) -> None:
    """Also for more positions than pixels, except for ``grid``, which is limited to patches."""
    if name == "grid" and n > math.prod(size):
        with pytest.raises(ValueError, match="n must be <= "):
            EVERY[name](n, size, 0)
        return
    found = EVERY[name](n, size, 0)
    assert found.shape == (n, 2)
    assert found.dtype == torch.float32
    assert found.device.type == "cpu"
    assert (found >= 0).all()
    assert (found <= torch.tensor(size)).all()
    assert torch.equal(found, EVERY[name](n, size, 0))


@pytest.mark.parametrize("name", RANDOM)
def test_another_seed_gives_other_positions(name: str) -> None:
    torch.manual_seed(1)
    first = EVERY[name](16, (24, 40), 3)
    state = torch.get_rng_state()
    assert torch.equal(EVERY[name](16, (24, 40), 3), first)
    assert not torch.equal(EVERY[name](16, (24, 40), 4), first)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not used


@given(n=st.integers(1, 200), size=st.tuples(st.integers(8, 400), st.integers(8, 400)))
def test_isotropic_has_full_rows_except_the_last(n: int, size: tuple[int, int]) -> None:
    found = spot.isotropic(n, size)
    rows, counts = found[:, 0].unique_consecutive(return_counts=True)
    assert (rows.diff() > 0).all()
    assert (counts[:-1] == counts[0]).all()
    assert 1 <= counts[-1] <= counts[0]
    if math.prod(map(len, spot._published_axes(n, size))) != n:
        wanted = max(1, round(math.sqrt(n * size[0] / size[1])))
        assert counts[0] == math.ceil(n / min(wanted, n))
        torch.testing.assert_close(rows[0] + rows[-1], torch.tensor(float(size[0])))


def test_isotropic_of_small_numbers() -> None:
    assert torch.equal(spot.isotropic(1, (224, 320)), torch.tensor([[112.0, 160.0]]))
    five = torch.tensor([[8.0, 8], [8, 24], [8, 40], [24, 8], [24, 24]])
    torch.testing.assert_close(spot.isotropic(5, (32, 48)), five)
    torch.testing.assert_close(spot.isotropic(16, 2), spot.isotropic(16, 64) / 32)


def test_distributions_of_random_placements() -> None:
    size = torch.tensor([100.0, 300.0])
    at = {name: EVERY[name](4096, (100, 300), 0) / size for name in RANDOM}
    for name in ("uniform", "sobol", "gauss", "edge"):
        torch.testing.assert_close(at[name].mean(0), torch.full((2,), 0.5), rtol=0, atol=0.02)
    for name in ("uniform", "sobol"):
        torch.testing.assert_close(at[name].var(0), torch.full((2,), 1 / 12), rtol=0.05, atol=0)
    inside = (at["gauss"] - 0.5).abs() < 1 / math.pi  # one standard deviation
    assert inside.float().mean().item() == pytest.approx(0.683, abs=0.02)
    assert ((at["edge"] - 0.5).abs() > 0.4).float().mean() > 0.6
    cells = (at["sobol"] * 64).long()  # a net: one of 4096 points in each of 64 x 64 cells
    assert len((cells[:, 0] * 64 + cells[:, 1]).unique()) == 4096


def test_center_draws_positions_to_the_middle_lines() -> None:
    plain, drawn = (f(49, (224, 224)) - 112 for f in (spot.isotropic, spot.center))
    assert (drawn.abs() <= plain.abs()).all()
    assert torch.equal(drawn.sign(), plain.sign())
    assert (drawn[plain.abs() == 32].abs() < 20).all()


def test_salient_draws_a_pixel_by_its_mass() -> None:
    mask = torch.zeros(5, 8, dtype=torch.uint8)
    mask[1, 2], mask[4, 7], mask[0, 0] = 50, 150, 200
    places = spot.salient(mask, 8000).floor().long()
    counts = torch.zeros(5, 8).index_put((places[:, 0], places[:, 1]), torch.ones(8000), True)
    assert torch.equal(counts > 0, mask > 0)
    torch.testing.assert_close(counts / 8000, mask / 400, rtol=0, atol=0.02)
    within = spot.salient(mask, 8000) % 1
    torch.testing.assert_close(within.mean(0), torch.full((2,), 0.5), rtol=0, atol=0.02)
    assert torch.equal(spot.salient(mask > 0, 3, seed=1), spot.salient((mask > 0).double(), 3, 1))
    assert not torch.equal(spot.salient(mask, 3, 1), spot.salient(mask, 3, 2))


def test_grid_has_each_patch_once() -> None:
    every = spot.grid(None, (33, 50), (8, 16))
    rows = torch.cartesian_prod(torch.tensor([4.0, 12, 20, 28]), torch.tensor([8.0, 24, 40]))
    assert torch.equal(every, rows)
    assert torch.equal(spot.grid(12, (33, 50), (8, 16), seed=5), rows)
    some = spot.grid(7, (33, 50), (8, 16))
    assert torch.equal(rows[(rows[:, None] == some).all(2).any(1)], some)


def test_defaults_of_torch_do_not_change_positions() -> None:
    def placed() -> dict[str, torch.Tensor]:
        found = {f"{name} {n}": EVERY[name](n, (224, 224), 0) for name in EVERY for n in (49, 50)}
        return {**found, "salient": spot.salient(mask, 9)}

    mask = torch.rand(32, 48)
    before = placed()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            after = placed()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, positions in before.items():
        assert torch.equal(after[name], positions), name


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: spot.uniform(0, 8), ValueError, "spot.uniform: n must be an integer >= 1; got 0"),
        (lambda: spot.gauss(2.0, 8), TypeError, "spot.gauss: n must be an integer >= 1; got 2.0"),
        (
            lambda: spot.edge(1, (8, 0)),
            ValueError,
            "spot.edge: size must be an integer or",
        ),
        (lambda: spot.sobol(1, 8, -1), ValueError, "spot.sobol: seed must be an integer >= 0"),
        (lambda: spot.uniform(1, 8, 2**63), ValueError, "spot.uniform: seed must be < 2\\^63"),
        (
            lambda: spot.grid(None, (8, 8)),
            ValueError,
            r"spot.grid: size must be at least one patch of \[16, 16\]; got \[8, 8\]",
        ),
        (lambda: spot.center(1, 8, 0), ValueError, "spread must be > 0, and finite; got 0"),
        (lambda: spot.center(1, 8, math.nan), ValueError, "spread must be > 0, and finite"),
        (
            lambda: spot.grid(7, (32, 48), 16),
            ValueError,
            r"spot.grid: n must be <= 6, the number of \[16, 16\] patches in \[32, 48\] .*; got 7",
        ),
        (lambda: spot.grid(0, 32), ValueError, "n must be an integer >= 1, or None; got 0"),
        (lambda: spot.salient(torch.zeros(3, 4), 1), ValueError, "have a value > 0; got none"),
        (lambda: spot.salient(torch.ones(0, 4), 1), ValueError, "have a value > 0; got none"),
        (lambda: spot.salient(torch.ones(3), 1), ValueError, r"mask must be \[H, W\]; got \[3\]"),
        (lambda: spot.salient(-torch.eye(3), 1), ValueError, "must be >= 0, and finite; got val"),
        (lambda: spot.salient(torch.eye(3) / 0, 1), ValueError, "must be >= 0, and finite"),
        (lambda: spot.salient(torch.eye(3) * 1j, 1), TypeError, "integers or floating-point"),
        (lambda: spot.salient([[1]], 1), TypeError, "mask must be a torch.Tensor; got list"),
    ],
)
def test_wrong_arguments_of_placements_raise(
    call: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


# ---- the model ----------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
}
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean of the patches": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 3},
    "registers without a code": {"reg_tokens": 3, "no_embed_class": True, "global_pool": "avg"},
    "pre-norm": {"pre_norm": True},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "largest of the patches": {"global_pool": "max"},
    "dropout": {"pos_drop_rate": 0.3, "patch_drop_rate": 0.5, "drop_rate": 0.2},
    "no table": {"pos_embed": "none"},
    "norm of the embedding": {"embed_norm_layer": torch.nn.LayerNorm},
    "tokens": {"class_token": False, "global_pool": "", "num_classes": 0},
    "oblong": {"img_size": (32, 48), "patch_size": (8, 16), "in_chans": 1},
    "any size": {"dynamic_img_size": True},
    "any size, registers": {"dynamic_img_size": True, "reg_tokens": 2, "no_embed_class": True},
}


def tiny(kind: type[VisionTransformer] = VisionTransformer, **settings: Any) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**{**TINY, **settings}).eval()
        for parameter in model.parameters():  # so that biases and position embeddings matter
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def pictures(count: int = 2, size: tuple[int, int] = (32, 32), channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, channels, *size, generator=generator)


def sizes(name: str) -> list[tuple[int, int]]:
    return {
        "oblong": [(32, 48)],
        "any size": [(32, 32), (24, 48)],
        "any size, registers": [(16, 40)],
    }.get(name, [(32, 32)])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_all_windows_of_the_grid_give_the_output_of_the_model(name: str) -> None:
    model = tiny(**MODELS[name])
    vit = spot.Subpixel(model)
    for size in sizes(name):
        images = pictures(2, size, MODELS[name].get("in_chans", 3))
        centers = spot.grid(None, size, vit.patch)
        for mine, theirs in (
            (vit(images, centers), model(images)),
            (vit.forward_features(images, centers), model.forward_features(images)),
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_models_run_their_own_forward_and_hooks() -> None:
    """A distilled ViT of timm, a subclass, and hooks on the model."""

    class Doubled(VisionTransformer):
        def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            return 2 * super().forward_head(x, pre_logits)

    hooked = tiny()
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    images, centers = pictures(), spot.grid(None, 32, 8)
    for model in (tiny(VisionTransformerDistilled), tiny(Doubled), hooked):
        found = spot.Subpixel(model)(images, centers)
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_windows_of_a_moved_grid_are_the_patches_of_a_shifted_image() -> None:
    """Windows at grid + d are the patches of shift(-d)."""
    model = tiny(pos_embed="none")
    images, d = pictures(), torch.tensor([[1.25, -2.5]])
    moved = srt_ext.shift(images, -d, padding="border")[0]
    found = spot.Subpixel(model)(images, spot.grid(None, 32, 8) + d)
    torch.testing.assert_close(found, model(moved), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_codes_between_patches_are_interpolated() -> None:
    model = tiny(reg_tokens=1)
    vit, images = spot.Subpixel(model), pictures(1)
    table = model.pos_embed[0, 2:].unflatten(0, (4, 4))
    centers = torch.tensor(
        [[4.0, 12], [4, 14], [20, 8], [-9, 40]]
    )  # on, between and beyond the grid
    expected = torch.stack(
        [
            table[0, 1],
            0.75 * table[0, 1] + 0.25 * table[0, 2],
            (table[2, 0] + table[2, 1]) / 2,
            table[0, 3],
        ]
    )
    codes = vit._positions(images, centers[None])
    assert torch.equal(codes[0, :3], torch.cat([model.pos_embed[0, :2], expected[:1]]))
    torch.testing.assert_close(codes[0, 2:], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_each_image_has_its_own_windows() -> None:
    vit, images = spot.Subpixel(tiny()), pictures(3)
    centers = torch.stack([spot.uniform(7, 32, seed) for seed in range(3)])
    together = vit(images, centers)
    for i in range(3):
        torch.testing.assert_close(vit(images[i : i + 1], centers[i]), together[i : i + 1])
    order = torch.randperm(7)  # the tokens are a set
    torch.testing.assert_close(vit(images, centers[:, order]), together, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(vit(images, centers + 0.5), together, atol=1e-3)
    assert vit(images[:0], centers[:0]).shape == (0, 5)
    assert spot.search(vit, images[:0], torch.empty(0).long(), 7, 1).centers.shape == (0, 7, 2)


def test_the_gradient_with_respect_to_the_positions() -> None:
    """Of windows and position embeddings, against finite differences."""
    vit, images = spot.Subpixel(tiny(depth=1).double()), pictures(2).double()
    centers = torch.stack([spot.uniform(3, 32, seed) for seed in range(2)]).double()
    # Where image and position embeddings are smooth: not within 0.05 of the centre of a pixel.
    centers = centers.floor() + 0.05 + 0.4 * (centers % 1)

    def total(at: torch.Tensor) -> torch.Tensor:
        return vit(images, at).sin().sum()

    # The tolerance allows for the curvature of the total along a step of 1e-4.
    assert torch.autograd.gradcheck(total, centers.requires_grad_(), eps=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_is() -> None:
    model = tiny()
    before, state = dict(model.__dict__), {k: v.clone() for k, v in model.state_dict().items()}
    centers = spot.isotropic(5, 32).requires_grad_()
    spot.Subpixel(model)(pictures(), centers).sum().backward()
    assert centers.grad is not None
    assert {k: v is before[k] for k, v in model.__dict__.items()} == dict.fromkeys(before, True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert model.pos_embed.grad is not None  # the model can be trained


def test_a_wrapped_model_is_found() -> None:
    model = tiny()
    vit = spot.Subpixel(torch.nn.DataParallel(model))
    assert vit.model is model
    assert vit.patch == (8, 8)
    assert set(vit.state_dict()) == {f"model.{name}" for name in model.state_dict()}


@torch.no_grad()
def test_a_forward_that_was_set_on_the_model_raises() -> None:
    """It would run on the patches of the grid and ignore the windows."""
    model, images, centers = tiny(), pictures(), spot.isotropic(5, 32)
    vit = spot.Subpixel(model)
    expected = vit(images, centers)
    model.forward = model.forward  # as after accelerate removes its hooks
    assert torch.equal(vit(images, centers), expected)
    model.forward = lambda x: VisionTransformer.forward(model, x) + 1
    with pytest.raises(TypeError, match="the model must use the forward of its class, not one set"):
        vit(images, centers)


def scale(module: torch.nn.Module, inputs: Any, output: Any = None) -> None:
    """A hook."""


@pytest.mark.parametrize("name", ["patch_embed", "patch_embed.proj"])
@pytest.mark.parametrize("way", ["register_forward_hook", "register_forward_pre_hook"])
@torch.no_grad()
def test_hooks_that_would_be_bypassed_raise(name: str, way: str) -> None:
    model, images, centers = tiny(), pictures(), spot.isotropic(5, 32)
    vit = spot.Subpixel(model)
    handle = getattr(model.get_submodule(name), way)(scale)
    with pytest.raises(TypeError, match=f"{name} is not called and must have no hooks; got scale"):
        vit(images, centers)
    handle.remove()
    assert vit(images, centers).shape == (2, 5)


@torch.no_grad()
def test_hooks_of_the_norm_of_the_patch_embedding_run() -> None:
    model, images = tiny(pre_norm=False), pictures()
    model.patch_embed.norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    found = spot.Subpixel(model)(images, spot.grid(None, 32, 8))
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("utils", "weight"),
    [
        (torch.nn.utils.weight_norm, "weight_g"),
        (torch.nn.utils.parametrizations.weight_norm, "parametrizations.weight.original0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@torch.no_grad()
def test_parametrised_weights_are_computed_at_each_call(utils: Any, weight: str) -> None:
    model, images = tiny(), pictures()
    utils(model.patch_embed.proj)
    vit = spot.Subpixel(model)
    model.patch_embed.proj.get_parameter(weight).mul_(3)
    found = vit(images, spot.grid(None, 32, 8))
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)


class Scaled(timm.layers.PatchEmbed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class ScaledConv(torch.nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_forwards_that_would_be_bypassed_raise() -> None:
    with pytest.raises(TypeError, match=r"patch_embed is .* forward of PatchEmbed; got Scaled"):
        spot.Subpixel(tiny(embed_layer=Scaled))
    model = tiny()
    vit = spot.Subpixel(model)
    model.patch_embed.proj = ScaledConv(3, 32, 8, 8)
    with pytest.raises(TypeError, match=r"patch_embed.proj is .* of Conv2d; got ScaledConv"):
        vit(pictures(), spot.isotropic(5, 32))


@torch.no_grad()
def test_images_of_another_dtype() -> None:
    vit, images, centers = spot.Subpixel(tiny()), pictures(), spot.isotropic(5, 32)
    for dtype in (torch.uint8, torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match=f"images must be torch.float32, .*; got {dtype}"):
            vit(images.to(dtype), centers)
    expected = vit(images, centers)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            found = vit(images.to(dtype), centers).float()
            torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
        with pytest.raises(TypeError, match=r"images must be floating-point; got torch\.uint8"):
            vit(images.byte(), centers)


class Overlapping(timm.layers.PatchEmbed):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.proj = torch.nn.Conv2d(3, 32, 9, 8, padding=4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(2, 2), "must be a VisionTransformer of timm, .* got Linear"),
        (lambda x: x, "must be a VisionTransformer of timm, .* got function"),
        (None, "must be a VisionTransformer of timm, .* got NoneType"),
        (timm.create_model("test_convnext"), "must be a VisionTransformer of timm"),
        (
            timm.models.eva.Eva(use_rot_pos_emb=True, depth=1, embed_dim=48, num_heads=2),
            "rotary or relative positions, which need the whole grid; got Eva",
        ),
        (
            tiny(embed_layer=Overlapping),
            "one nn.Conv2d whose stride equals its kernel size; got Over",
        ),
    ],
)
def test_other_models_raise(model: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"spot.Subpixel: .*{message}"):
        spot.Subpixel(model)


@pytest.mark.parametrize(
    ("settings", "images", "centers", "message"),
    [
        ({}, (2, 3, 32, 40), (5, 2), r"images must have \[32, 32\] pixels; timm's .*\[32, 40\]"),
        ({}, (3, 32, 32), (5, 2), r"images must be \[B, 3, H, W\]; got \[3, 32, 32\]"),
        ({}, (2, 1, 32, 32), (5, 2), r"images must be \[B, 3, H, W\]; got \[2, 1, 32, 32\]"),
        ({"dynamic_img_size": True}, (2, 3, 32, 36), (5, 2), r"whole patches of \[8, 8\] pix"),
        ({}, (2, 3, 32, 32), (3, 5, 2), r"\[N, 2\] or \[B, N, 2\] with N >= 1 and B = 2; got"),
        ({}, (2, 3, 32, 32), (5, 3), r"centers must be \[N, 2\] or .*got \[5, 3\]"),
        ({}, (2, 3, 32, 32), (0, 2), r"centers must be \[N, 2\] or .*got \[0, 2\]"),
        ({}, (2, 3, 32, 32), (2,), r"centers must be \[N, 2\] or .*got \[2\]"),
    ],
)
def test_wrong_images_and_centers_raise(
    settings: Any, images: Any, centers: Any, message: str
) -> None:
    vit = spot.Subpixel(tiny(**settings))
    with pytest.raises(ValueError, match=f"spot.Subpixel: .*{message}"):
        vit(torch.zeros(images), torch.zeros(centers))


# ---- search -------------------------------------------------------------------------------------


def task() -> tuple[VisionTransformer, torch.Tensor, torch.Tensor]:
    """A model, images, and the classes that it predicts from all patches."""
    model, images = tiny(), pictures(4)
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def test_search_keeps_the_best_positions_of_each_image() -> None:
    model, images, labels = task()
    vit = spot.Subpixel(model)
    found = spot.search(model, images, labels, 4, steps=6, lr=1.0, path=True)
    assert found.centers.shape == (4, 4, 2)
    assert found.loss.shape == found.agreement.shape == (7, 4)
    assert found.path.shape == (7, 4, 4, 2)
    assert torch.equal(found.path[0], spot.isotropic(4, 32).expand(4, -1, -1))
    assert found.path.diff(dim=0).abs().amax() <= 1.5  # Adam's steps are about lr
    assert (found.path.diff(dim=0).abs().amax((1, 2, 3)) > 0.1).all()
    with torch.no_grad():
        for at, loss, agrees in zip(found.path, found.loss, found.agreement, strict=True):
            logits = vit(images, at)
            expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            torch.testing.assert_close(loss, expected)
            assert torch.equal(agrees, logits.argmax(1) == labels)
    assert torch.equal(found.best, found.loss.argmin(0))
    assert torch.equal(found.centers, found.path[found.best, torch.arange(4)])
    assert (found.loss.amin(0) < found.loss[0]).any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_search_is_reproducible_and_images_are_independent() -> None:
    model, images, labels = task()
    settings: Any = {"n": 3, "steps": 3, "lr": 1.0, "start": "uniform"}
    one, two, other = (spot.search(model, images, labels, seed=s, **settings) for s in (1, 1, 2))
    assert torch.equal(one.centers, two.centers)
    assert torch.equal(one.loss, two.loss)
    assert not torch.equal(one.centers, other.centers)
    assert one.path is None
    with torch.no_grad():  # search enables gradients
        alone = spot.search(model, images[2:3], labels[2:3], seed=1, **settings)
    torch.testing.assert_close(alone.loss[:, 0], one.loss[:, 2], rtol=1e-3, atol=1e-4)


def test_search_accepts_optimisers_and_does_not_decay_positions() -> None:
    """A step with a zero gradient does not change the positions."""
    model, images, labels = task()
    start = spot.uniform(3, 32)

    def constant(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return 0 * output.sum(1)

    for optimizer in (
        torch.optim.AdamW,
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.5, weight_decay=0.1),
    ):
        settings: Any = {"n": 3, "steps": 2, "start": start, "optimizer": optimizer}
        still = spot.search(model, images, labels, loss=constant, path=True, **settings)
        assert (still.path == start).all()
        moved = spot.search(model, images, labels, **settings)
        assert (moved.loss.amin(0) < moved.loss[0]).any()
    lbfgs = spot.search(model, images, labels, 3, 2, 0.1, optimizer=torch.optim.LBFGS)
    assert len(lbfgs.loss) > 3  # several evaluations per step
    assert (lbfgs.loss.amin(0) <= lbfgs.loss[0]).all()


def test_search_by_another_loss_and_within_the_image() -> None:
    model, images, _ = task()
    with torch.no_grad():
        target = model(images)

    def distance(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (output - wanted).square().sum(1)

    settings: Any = {"n": 4, "steps": 3, "lr": 20.0, "loss": distance, "path": True}
    found = spot.search(model, images, target, **settings)
    assert found.agreement is None
    assert (found.loss.amin(0) <= found.loss[0]).all()
    assert ((found.path >= 0) & (found.path <= 32)).all()
    free = spot.search(model, images, target, clamp=False, **settings)
    assert ((free.path < 0) | (free.path > 32)).any()


def test_a_nan_loss_is_never_the_best() -> None:
    model, images, labels = task()
    calls: list[int] = []

    def breaks(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        value = output.square().sum(1)
        return value if len(calls) == 1 else value * math.nan

    found = spot.search(model, images, labels, 3, 2, loss=breaks)
    assert torch.equal(found.centers, spot.isotropic(3, 32).expand(4, -1, -1))
    assert (found.best == 0).all()


def test_a_start_beyond_the_image_is_moved_to_its_edge() -> None:
    model, images, labels = task()
    start = torch.tensor([[-5.0, 40], [8, 8]])
    found = spot.search(model, images, labels, 2, 0, start=start, path=True)
    assert torch.equal(found.path[0, 0], torch.tensor([[0.0, 32], [8, 8]]))
    free = spot.search(model, images, labels, 2, 0, start=start, path=True, clamp=False)
    assert torch.equal(free.path[0, 0], start)


def test_search_works_in_inference_mode() -> None:
    model, images, labels = task()
    expected = spot.search(model, images, labels, 3, 2)
    with torch.inference_mode():
        found = spot.search(model, images.clone(), labels.clone(), 3, 2)
    torch.testing.assert_close(found.centers, expected.centers)
    assert not found.centers.is_inference()


@pytest.mark.parametrize("loss", [lambda o, _: o.detach().sum(1), lambda o, _: torch.zeros(4)])
def test_a_loss_without_a_gradient_raises(loss: Any) -> None:
    model, images, labels = task()
    with pytest.raises(ValueError, match=r"spot.search: loss must have a gradient with respect"):
        spot.search(model, images, labels, 3, 1, loss=loss)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"optimizer": "adam"}, TypeError, "optimizer must be callable, as .*; got str"),
        ({"start": torch.full((4, 2), math.nan)}, ValueError, "start must be finite; got 8 val"),
        ({"model": tiny(drop_rate=0.5).train()}, ValueError, "must be in eval mode"),
        ({"n": 0}, ValueError, "n must be an integer >= 1; got 0"),
        ({"steps": -1}, ValueError, "steps must be an integer >= 0; got -1"),
        ({"lr": 0.0}, ValueError, "lr must be > 0, and finite; got 0.0"),
        ({"start": "salient"}, ValueError, "start must be positions or one of 'uniform', .*salie"),
        ({"start": torch.zeros(5, 2)}, ValueError, r"with n = 4 and B = 4; got \[5, 2\]"),
        ({"labels": torch.zeros(4)}, TypeError, r"int64 \[4\], from 0 to 4; got torch.float32"),
        ({"labels": torch.full((4,), 5)}, ValueError, "from 0 to 4; got labels from 5 to 5"),
        ({"labels": torch.tensor(1)}, ValueError, r"int64 \[4\], from 0 to 4; got \[\]"),
        ({"labels": [0, 1, 2, 3]}, TypeError, "labels must be a torch.Tensor; got list"),
        ({"loss": lambda o, _: o.sum()}, ValueError, r"one value per image, \[4\]; got \[\]"),
        (
            {"model": tiny(class_token=False, global_pool="", num_classes=0)},
            ValueError,
            r"the model must return logits \[B, classes\]; got \[4, 4, 32\]",
        ),
    ],
)
def test_wrong_arguments_of_search_raise(change: Any, kind: type[Exception], message: str) -> None:
    model, images, labels = task()
    arguments: Any = {"model": model, "images": images, "labels": labels, "n": 4, "steps": 0}
    with pytest.raises(kind, match=f"spot.search: .*{message}"):
        spot.search(**{**arguments, **change})


# ---- a trained model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> tuple[VisionTransformer, torch.Tensor]:
    """ViT-Ti/16, and crops of photographs of scikit-image."""
    if not WEIGHTS.exists():
        pytest.skip("evaluation data, not in the repository: the weights of ViT-Ti/16")
    from safetensors.torch import load_file
    from skimage import data

    model = timm.create_model("vit_tiny_patch16_224").eval()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    photos = [data.astronaut(), data.chelsea(), data.coffee()]
    crops = [photo[y : y + 224, x : x + 224] for photo in photos for y, x in ((20, 60), (70, 180))]
    images = torch.stack([torch.from_numpy(crop.copy()) for crop in crops]).permute(0, 3, 1, 2)
    return model, images / 127.5 - 1


@torch.no_grad()
def test_the_grid_gives_the_logits_of_a_trained_model(trained: Any) -> None:
    model, images = trained
    found = spot.Subpixel(model)(images[:1], spot.grid(196, 224))
    torch.testing.assert_close(found, model(images[:1]), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_search_finds_positions_that_agree_with_all_patches(trained: Any) -> None:
    model, images = trained
    with torch.no_grad():
        labels = model(images).argmax(1)
    found = spot.search(model, images, labels, 49)
    best = found.agreement.gather(0, found.best[None])[0]
    assert best.sum() > found.agreement[0].sum()
    assert found.loss.amin(0).mean() < 0.5 * found.loss[0].mean()
