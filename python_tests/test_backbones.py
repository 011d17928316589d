"""SRT around each family of models: small instances of their libraries with random weights.

The expected fields are computed by the oracle from the model's features, read in another way.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import SHARED
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import avg_pool2d, interpolate, normalize, pad
from torch.testing import assert_close

from srt_ext import SRT, _cost, reference
from srt_ext import srt as srt_module
from srt_ext.backbones import describe, force_eager
from srt_ext.hub import load_timm

# The unshifted image, and shifts by whole and fractional pixels.
OFFSETS = torch.tensor([[0.0, 0.0], [1.5, -2.0], [-3.0, 0.25]])
ITSELF = torch.zeros(1, 2)
IMAGES = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
Tokens = Callable[[torch.Tensor], torch.Tensor]  # [B, 3, H, W] -> [B, h, w, C]


class Family(NamedTuple):
    name: str
    settings: dict[str, Any]
    size: tuple[int, int] = (48, 80)
    pitch: int = 16
    prefix: int = 1
    layout: str = "NLC"  # of model.forward_features


SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}  # of a plain ViT
ANY = {**SMALL, "dynamic_img_size": True}
TIMM = {
    "ViT": Family("vit_tiny_patch16_224", ANY),
    "DeiT": Family("deit_tiny_distilled_patch16_224", ANY, prefix=2),
    "MAE": Family("vit_base_patch16_224.mae", ANY),
    "DINOv2, registers": Family("vit_small_patch14_reg4_dinov2", ANY, (56, 70), 14, 5),
    "DINOv3": Family("vit_small_patch16_dinov3", SMALL, prefix=5),
    "CLIP": Family("vit_base_patch32_clip_224", ANY, (96, 64), 32),
    "SigLIP": Family("vit_base_patch16_siglip_224", ANY, prefix=0),
    "EVA-02, rotary": Family("eva02_tiny_patch14_224", ANY, (56, 70), 14),
    "BEiT": Family("beit_base_patch16_224", {**SMALL, "img_size": (48, 80)}),
    "SAM": Family(
        "samvit_base_patch16_224",
        {**SMALL, "window_size": 2, "global_attn_indexes": (1,), "neck_chans": 24},
        prefix=0,
        layout="NCHW",
    ),
    "Swin": Family(
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (1, 1, 2, 1), "img_size": (64, 96), "window_size": 2},
        (64, 96),
        32,
        0,
        "NHWC",
    ),
    "ConvNeXt": Family("test_convnext", {}, (64, 96), 32, 0, "NCHW"),
    "ResNet": Family("test_resnet", {}, (64, 96), 32, 0, "NCHW"),
}


def create(name: str, **settings: Any) -> Any:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, **settings).eval()


def timm_model(family: str) -> Any:
    return with_random_norms(create(TIMM[family].name, **TIMM[family].settings))


def with_random_norms(model: Any) -> Any:
    """Random norms, so that one that is applied twice changes the result: new ones are trivial."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def vit() -> Any:
    """Two blocks of 48 channels, one prefix token, patches of 16 pixels."""
    return timm_model("ViT")


def mapped(tokens: torch.Tensor, layout: str, grid: tuple[int, int]) -> torch.Tensor:
    """Tokens or a map in any layout -> [B, h, w, C], without prefix tokens."""
    if layout == "NCHW":
        return tokens.permute(0, 2, 3, 1)
    if layout == "NHWC":
        return tokens
    return tokens[:, tokens.shape[1] - grid[0] * grid[1] :].unflatten(1, grid)


def output_of(model: nn.Module, name: str, **arguments: Any) -> Callable[[torch.Tensor], Any]:
    """A function that runs the model and returns the output of one of its modules."""

    def call(images: torch.Tensor) -> Any:
        kept = []
        hook = model.get_submodule(name).register_forward_hook(lambda _m, _i, out: kept.append(out))
        model(images, **arguments)
        hook.remove()
        return kept[0][0] if isinstance(kept[0], tuple) else kept[0]

    return call


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts equality up to the effect of rounding the image on a network."""
    assert_close(actual, expected, atol=1e-4 * float(expected.detach().abs().max()), rtol=1e-4)


def assert_field(
    actual: torch.Tensor, tokens_of: Tokens, images: torch.Tensor, stride: int
) -> None:
    """Asserts that a field of the views OFFSETS equals the oracle."""
    shifted = reference.shift(images, OFFSETS).float()
    with torch.no_grad():
        tokens = torch.stack([tokens_of(view) for view in shifted])  # [V, B, h, w, C]
    grid = (tokens.shape[2], tokens.shape[3])
    patch = (images.shape[2] // grid[0], images.shape[3] // grid[1])
    field = reference.ensemble(tokens.flatten(2, 3), OFFSETS, grid, patch, stride=stride).float()
    assert_near(actual, field)


def count_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def assert_injected(
    model: Any, images: torch.Tensor, of: Any = lambda x: x, **settings: Any
) -> None:
    """Asserts that shifted views change the output and one unshifted view does not.

    ``of`` extracts a tensor from the output of the model.
    """
    with torch.no_grad():
        expected, hooks = of(model(images)), count_hooks(model)
    assert_close(of(SRT(model, ITSELF, **settings)(images)), expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(of(SRT(model, OFFSETS, **settings)(images)), expected)
    assert count_hooks(model) == hooks


def batch_sizes(model: Any) -> list[int]:
    """A list that records the batch size of each forward pass from here on."""
    sizes: list[int] = []
    model.blocks[0].register_forward_pre_hook(lambda _m, inputs: sizes.append(len(inputs[0])))
    return sizes


# ---- timm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TIMM)
def test_families_of_timm_need_no_settings(family: str) -> None:
    """The last layer with norm; first and last layer without, at their token spacing; inject."""
    model, kind = timm_model(family), TIMM[family]
    images, stride = torch.randn(2, 3, *kind.size), kind.pitch // 2
    srt = SRT(model, OFFSETS, stride=stride, view_batch=2)
    field, prefix = srt(images)
    assert srt.backbone.patch == (kind.pitch, kind.pitch)
    assert (0 if prefix is None else prefix.shape[1]) == kind.prefix

    def tokens_of(
        view: torch.Tensor, of: Any = model.forward_features, pitch: int = kind.pitch
    ) -> Any:
        tokens = of(view)
        layout = "NLC" if tokens.dim() == 3 else kind.layout
        if family == "SAM" and of != model.forward_features:
            layout = "NHWC"  # the neck alone is NCHW
        return mapped(tokens, layout, (kind.size[0] // pitch, kind.size[1] // pitch))

    assert_field(field, tokens_of, images, stride)

    layers = [len(model.feature_info) - 1, 0]
    outputs = SRT(model, OFFSETS, layers=layers, norm=False, stride=stride)(images)
    for info, output in zip((model.feature_info[i] for i in layers), outputs, strict=True):
        raw = output_of(model, info["module"])
        layer = functools.partial(tokens_of, of=raw, pitch=info["reduction"])
        assert_field(output.field, layer, images, stride)
        if kind.prefix:
            views = reference.shift(images, OFFSETS).float()
            assert_near(output.prefix, sum(raw(v)[:, : kind.prefix] for v in views) / len(views))
    assert_injected(model, images, inject=0)


def test_hiera_unrolls_its_tokens() -> None:
    """Its modules permute the tokens; timm restores their order."""
    settings = {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 2, 1), "img_size": (64, 96)}
    model = create("hiera_tiny_224", **settings)
    images = torch.randn(1, 3, 64, 96)
    features = functools.partial(model.forward_features, return_intermediates=True)
    outputs = SRT(model, OFFSETS, layers=[1, -1], stride=8)(images)
    assert_field(outputs[0].field, lambda view: features(view)[1][1], images, 8)
    assert_field(outputs[1].field, lambda view: features(view)[1][3], images, 8)
    with pytest.raises(ValueError, match="reorder the tokens"):
        SRT(model, layers="blocks.2")
    with pytest.raises(ValueError, match="inject must be omitted"):
        SRT(model, inject=1)


def test_the_final_norm_is_applied_to_every_layer_of_a_vit(vit: Any) -> None:
    first, last = SRT(vit, OFFSETS, layers=(0, -1), stride=8)(IMAGES)
    raw = output_of(vit, "blocks.0")
    assert_field(first.field, lambda view: mapped(vit.norm(raw(view)), "NLC", (3, 5)), IMAGES, 8)
    for layer, output in ((None, last), (0, first)):
        assert torch.equal(output.field, SRT(vit, OFFSETS, layers=layer, stride=8)(IMAGES).field)


def test_patches_need_not_be_square() -> None:
    model = create("vit_tiny_patch16_224", **ANY, patch_size=(16, 8))
    images = torch.randn(1, 3, 48, 40)
    raw = output_of(model, "blocks.0")
    for layer in (0, "blocks.0"):
        field = SRT(model, OFFSETS, layers=layer, norm=False, stride=8)(images).field
        assert_field(field, lambda view: mapped(raw(view), "NLC", (3, 5)), images, 8)
    assert_injected(model, images, inject=0)


def test_stages_without_a_module_have_features_but_no_injection() -> None:
    """timm names them block.0, the model blocks."""
    model = create("twins_pcpvt_small", depths=(1, 1, 1, 1))
    assert SRT(model, ITSELF, layers=0, stride=4)(torch.zeros(1, 3, 64, 64)).field.shape[1] == 64
    with pytest.raises(ValueError, match="inject must be the name"):
        SRT(model, inject=0)


@pytest.mark.parametrize("how", ["slice", "prune", "features_only", "stages", "DINO", "chunks"])
def test_models_without_their_last_layers(how: str) -> None:
    """The declarations of the layers still include the removed ones."""
    settings = {**ANY, "depth": 3}
    model: Any = (
        create("test_convnext") if how == "stages" else create(TIMM["ViT"].name, **settings)
    )
    own, images, patch = model.forward_features, torch.randn(2, 3, 48, 64), 16
    if how == "slice":
        model.blocks = model.blocks[:2]
    elif how == "prune":
        model.prune_intermediate_layers([1], prune_norm=True)
    elif how == "features_only":
        one = {"features_only": True, "out_indices": [1]}
        model = create(TIMM["ViT"].name, **settings, **one).get_submodule("model")
        own = model.forward_features
    elif how == "stages":
        model.stages, model.head, patch = model.stages[:2], nn.Identity(), 8
    else:
        model = Dino(model)
        model.n_blocks, model.vit.blocks = 3, model.vit.blocks[:2]
        model.blocks = model.vit.blocks
        if how == "chunks":
            chunks = [nn.ModuleList([nn.Identity()] * i + [model.vit.blocks[i]]) for i in range(2)]
            model.blocks = nn.ModuleList(chunks)

    def tokens_of(view: torch.Tensor) -> torch.Tensor:
        layout = "NCHW" if how == "stages" else "NLC"
        return mapped(own(view), layout, (48 // patch, 64 // patch))

    assert_field(SRT(model, OFFSETS, stride=8)(images).field, tokens_of, images, 8)
    with pytest.raises(ValueError, match=r"layers must be in -2 \.\.\. 1; got 2"):
        SRT(model, layers=2)
    if how not in ("DINO", "chunks"):  # their layers are in a nested model, under other names
        assert_injected(model, images, inject=-1)


def test_several_layers_need_one_pass(vit: Any) -> None:
    srt, done = SRT(vit, OFFSETS, layers=[0, 1, -1], stride=8, view_batch=2), []
    srt(IMAGES)  # the first call compares the final norm with the model's
    sizes = batch_sizes(vit)
    moments = srt.moments(IMAGES, done.append)
    assert sizes == [4, 2]
    assert done == [2, 3]
    assert [m.var.shape for m in moments] == [torch.Size([2, 48, 6, 10])] * 3


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_image_size_that_timm_rejects_is_explained(compiled: bool) -> None:
    model = create("vit_tiny_patch16_224", depth=1)
    torch._dynamo.reset()
    srt = SRT(torch.compile(model, backend="eager") if compiled else model, OFFSETS, stride=16)
    named = SRT(model, OFFSETS, layers="blocks.0", stride=16)
    for refused in (srt, named, SRT(model, OFFSETS, inject=0)):
        with pytest.raises(ValueError, match=r"(?s)accept images of \[48, 80\].*dynamic_img"):
            refused(torch.zeros(1, 3, 48, 70))
    assert srt(torch.zeros(1, 3, 224, 224)).field.shape == (1, 192, 14, 14)


@pytest.mark.slow
def test_real_weights_classify_a_photograph_and_separate_its_objects() -> None:
    """Logits of injected tokens show a cat; a suit is more similar to itself than to the wall."""
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    weights = SHARED / "weights" / f"{name}.fp16.safetensors"
    if not weights.exists():
        pytest.skip(f"evaluation data, not in the repository: {weights.name}")
    data = pytest.importorskip("skimage.data")
    model, _ = load_timm(name, weights)

    def photo(pixels: Any, size: tuple[int, int]) -> torch.Tensor:
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        return interpolate(image, size, mode="bilinear", antialias=True)

    with torch.no_grad():
        plain = model(photo(data.chelsea(), (240, 320)))
    logits = SRT(model, views=9, inject=5)(photo(data.chelsea(), (240, 320)))
    # A tabby, a tiger cat or an Egyptian cat, as without SRT, but with other logits.
    assert int(plain.argmax()) in (281, 282, 285)
    assert int(logits.argmax()) in (281, 282, 285)
    assert 1e-3 < float((logits - plain).norm() / plain.norm()) < 0.5
    field = SRT(model, "grid:1")(photo(data.astronaut(), (448, 448))).field[0]
    suit, other_sleeve, wall = normalize(field, dim=0)[:, [330, 270, 60], [60, 262, 290]].T
    assert suit @ other_sleeve > suit @ wall + 0.3  # 0.87 and 0.27


# ---- transformers -------------------------------------------------------------------------------

WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TRANSFORMERS = {
    "ViT": ("ViT", {"image_size": 32, "patch_size": 16}, 1, "layernorm"),
    "DINOv2": ("Dinov2", {"image_size": 28, "patch_size": 14}, 1, "layernorm"),
    "DINOv2, registers": (
        "Dinov2WithRegisters",
        {"image_size": 28, "patch_size": 14, "num_register_tokens": 4},
        5,
        "layernorm",
    ),
    "DINOv3": ("DINOv3ViT", {"patch_size": 16, "num_register_tokens": 4}, 5, "norm"),
    "CLIP": ("CLIPVision", {"image_size": 64, "patch_size": 32}, 1, "post_layernorm"),
    "SigLIP": ("SiglipVision", {"image_size": 32, "patch_size": 16}, 0, "post_layernorm"),
}


def transformers_model(kind: str, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**WIDTH, **settings)
    return with_random_norms(getattr(transformers, f"{kind}Model")(config).eval())


def blocks_of(model: nn.Module) -> str:
    return next(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == 3
    )


@pytest.mark.parametrize(
    "case", [*(("timm", f) for f in TIMM), *(("transformers", f) for f in TRANSFORMERS)]
)
def test_models_that_declare_any_size_support_presets(case: tuple[str, str]) -> None:
    """Other models are not enlarged."""
    library, family = case
    if library == "timm":
        model, patch = timm_model(family), TIMM[family].pitch
    else:
        kind, settings, *_ = TRANSFORMERS[family]
        model, patch = transformers_model(kind, **settings), settings["patch_size"]
    backbone = describe(model)
    assert backbone.any_size == (family not in ("BEiT", "Swin"))
    if backbone.any_size:
        srt = SRT(model, quality="outlines", stride=patch)
        assert srt.scale > 1
        assert srt(torch.randn(1, 3, 4 * patch, 3 * patch)).field.shape[2:] == (4, 3)
    else:
        with pytest.warns(UserWarning, match="'outlines' uses scale 1 instead of 1.5"):
            assert SRT(model, quality="outlines").scale == 1


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_families_of_transformers_need_no_settings(family: str) -> None:
    """First and last layer, with the norm and without, at another size than the configuration's."""
    kind, settings, prefix, norm_name = TRANSFORMERS[family]
    model = transformers_model(kind, **settings)
    patch = settings["patch_size"]
    images = torch.randn(2, 3, 3 * patch, 5 * patch)
    norm = [m for name, m in model.named_modules() if name.rpartition(".")[2] == norm_name][-1]
    any_size = {"interpolate_pos_encoding": True} if family in ("ViT", "CLIP", "SigLIP") else {}
    raw = {at: output_of(model, f"{blocks_of(model)}.{at}", **any_size) for at in (0, 2)}
    if family != "CLIP":  # which normalises only its class token
        with torch.no_grad():
            assert_close(norm(raw[2](images)), model(images, **any_size).last_hidden_state)
    for normalise in (norm, nn.Identity()):
        srt = SRT(model, OFFSETS, layers=[0, -1], norm=normalise is norm, stride=patch // 2)
        for at, output in zip(raw, srt(images), strict=True):
            assert (0 if output.prefix is None else output.prefix.shape[1]) == prefix

            def tokens_of(view: torch.Tensor, at: int = at, norm: Tokens = normalise) -> Any:
                return mapped(norm(raw[at](view)), "NLC", (3, 5))

            assert_field(output.field, tokens_of, images, patch // 2)


@pytest.mark.parametrize(
    ("kind", "settings", "layers"),
    [
        (
            "SamVision",
            {"output_channels": 8, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64},
            [-1, 0],  # the map of the neck has channels first, that of a block has channels last
        ),
        ("VitDet", {}, [-1]),
    ],
)
def test_maps_of_transformers(kind: str, settings: dict[str, Any], layers: list[int]) -> None:
    model = transformers_model(kind, image_size=64, patch_size=16, **settings)
    images = torch.randn(1, 3, 64, 64)
    last, *first = SRT(model, OFFSETS, layers=layers, stride=8)(images)
    last_map = lambda view: mapped(model(view).last_hidden_state, "NCHW", (4, 4))  # noqa: E731
    assert_field(last.field, last_map, images, 8)
    for output in first:
        assert_field(output.field, output_of(model, f"{blocks_of(model)}.0"), images, 8)
        assert output.prefix is None


@pytest.mark.parametrize("kind", ["ConvNext", "Swin"])
def test_stages_of_transformers_raise(kind: str) -> None:
    """Their layers have different patch sizes; layers by name are supported."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")())
    with pytest.raises(ValueError, match="layers must be names of modules, with patch"):
        SRT(model, layers=0)


def test_vit_mae_of_transformers_keeps_its_patches_in_order() -> None:
    settings = {"image_size": 48, "patch_size": 16}
    model = transformers_model("ViTMAE", mask_ratio=0.0, **settings)
    noise = torch.arange(15).expand(2, -1)

    def tokens_of(view: torch.Tensor) -> torch.Tensor:
        tokens = model(view, noise=noise, interpolate_pos_encoding=True).last_hidden_state
        return mapped(tokens, "NLC", (3, 5))

    assert_field(SRT(model, OFFSETS, stride=8)(IMAGES).field, tokens_of, IMAGES, 8)
    actual = SRT(model, ITSELF, inject=0)(IMAGES).last_hidden_state
    assert_close(mapped(actual, "NLC", (3, 5)), tokens_of(IMAGES).detach())
    with pytest.raises(ValueError, match=r"mask_ratio .* must be 0.*got 0\.75"):
        SRT(transformers_model("ViTMAE", **settings), OFFSETS)(IMAGES)


@pytest.mark.parametrize(
    "name", ["CLIPForImageClassification", "SiglipForImageClassification", "CLIPModel"]
)
def test_the_vision_tower_of_a_model_is_found(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {**WIDTH, "image_size": 64, "patch_size": 32}
    text = {**WIDTH, "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    family = "Siglip" if name.startswith("Siglip") else "CLIP"
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    model = getattr(transformers, name)(config).eval()
    images = torch.randn(1, 3, 64, 96 if name == "CLIPModel" else 64)
    whole, tower = (SRT(m, OFFSETS, stride=16)(images) for m in (model, model.vision_model))
    assert torch.equal(whole.field, tower.field)
    if name == "CLIPModel":
        for how in ({"inject": 0}, {"layers": "vision_model.encoder.layers.0"}):
            with pytest.raises(ValueError, match=r"images as its only input .* got CLIPModel"):
                SRT(model, OFFSETS, **how)  # type: ignore[arg-type]
    else:
        assert_injected(model, images, lambda output: output.logits, inject=0)


# ---- DINO, hooks, calls -------------------------------------------------------------------------


class Dino(nn.Module):
    """The interface of the repository of DINOv2, around a real ViT."""

    def __init__(self, vit: Any = None) -> None:
        super().__init__()
        self.vit = vit or timm_model("ViT")
        self.blocks, self.norm, self.patch_size = self.vit.blocks, self.vit.norm, 16

    def get_intermediate_layers(
        self, x: Any, n: Any, reshape: bool, return_class_token: bool, norm: bool = True
    ) -> Any:
        assert return_class_token
        assert not reshape
        pairs = self.vit.forward_intermediates(
            x, n, True, norm, output_fmt="NLC", intermediates_only=True
        )
        return tuple((tokens, prefix[:, 0]) for tokens, prefix in pairs)


class FirstDino(Dino):
    """The interface of the repository of the first DINO."""

    def get_intermediate_layers(self, x: Any, n: int = 1) -> Any:  # type: ignore[override]
        every = self.vit.forward_intermediates(
            x, None, True, True, output_fmt="NLC", intermediates_only=True
        )
        return [torch.cat([prefix, tokens], 1) for tokens, prefix in every[-n:]]


@pytest.mark.parametrize("norm", [True, False])
def test_intermediate_layers_of_dinov2(norm: bool) -> None:
    model = Dino()
    settings = {"layers": [-1, 0], "stride": 8, "norm": norm}
    actual, expected = (SRT(m, OFFSETS, **settings)(IMAGES[..., :70]) for m in (model, model.vit))
    assert_close(tuple(actual), tuple(expected))


def test_intermediate_layers_of_the_first_dino() -> None:
    model, settings = FirstDino(), {"layers": [-1, 0], "stride": 8}
    expected = SRT(model.vit, OFFSETS, **settings)(IMAGES)
    with pytest.warns(UserWarning, match="prefix=1"):
        outputs = SRT(model, OFFSETS, **settings)(IMAGES)
    assert_close(tuple(outputs), tuple(expected))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SRT(model, OFFSETS, prefix=1, **settings)(IMAGES)
    with pytest.raises(ValueError, match="norm must be True"):
        SRT(model, OFFSETS, norm=False)


def test_modules_by_name_in_any_model(vit: Any) -> None:
    plain = nn.Sequential(nn.Identity(), vit)
    images, settings = IMAGES[..., :70], {"views": OFFSETS, "stride": 8}
    expected = SRT(vit, layers=[1, 0], norm=False, **settings)(images)
    names = ["1.blocks.1", "1.blocks.0"]
    outputs = SRT(plain, layers=names, patch=16, prefix=1, **settings)(images)
    assert_close(tuple(outputs), tuple(expected))
    with pytest.warns(UserWarning, match=r"so prefix=1 \(class and register tokens\) is"):
        SRT(lambda x: vit.forward_features(x), OFFSETS, patch=16)(images)
    with pytest.raises(ValueError, match=r"at most 16 tokens more .* got 26 tokens.*prefix=25"):
        SRT(lambda x: vit.forward_features(x), OFFSETS, patch=80)(images)
    with warnings.catch_warnings():  # what timm declares is not inferred
        warnings.simplefilter("error")
        output = SRT(vit, layers="blocks.0", **settings)(images)
        inside = SRT(plain, layers=names, **settings)(images)
    assert_close(output, expected[1])
    assert_close(tuple(inside), tuple(expected))
    assert count_hooks(plain) == 0


def test_maps_are_read_in_both_layouts() -> None:
    images, settings = IMAGES[..., :32, :48], {"views": OFFSETS, "patch": 8, "stride": 4}
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 8, stride=8)

    def channels_last(x: torch.Tensor) -> torch.Tensor:
        return conv(x).permute(0, 2, 3, 1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_field(SRT(conv, **settings)(images).field, channels_last, images, 4)
        named = SRT(nn.Sequential(conv), layers="0", **settings)
        assert_field(named(images).field, channels_last, images, 4)
        # Four channels on a grid of 4 x 6: [B, 4, 6, 4] cannot have channels first.
        assert_field(SRT(channels_last, **settings)(images).field, channels_last, images, 4)
    coarser = SRT(nn.Sequential(conv, nn.AvgPool2d(2)), **settings)
    with pytest.warns(UserWarning, match=r"read as NCHW with a patch of \[16, 16\]"):
        field = coarser(images).field
    assert_field(field, lambda x: avg_pool2d(conv(x), 2).permute(0, 2, 3, 1), images, 4)
    with pytest.warns(UserWarning, match="read as NCHW"):  # 4 channels on a grid of 4 x 4
        SRT(conv, **settings)(images[..., :32])


def test_the_map_at_the_patch_size_is_selected_from_a_pyramid() -> None:
    model = create("test_resnet", features_only=True)
    images = torch.randn(1, 3, 64, 96)
    field = SRT(model, OFFSETS, patch=16, stride=8)(images).field
    assert_field(field, lambda view: mapped(model(view)[3], "NCHW", (4, 6)), images, 8)
    with pytest.raises(ValueError, match=r"a map with a grid of \[1, 2\]; got 0 in"):
        SRT(lambda view: model(view)[:3], OFFSETS, patch=64, stride=8)(images)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"layers": 2}, ValueError, r"layers must be in -2 \.\.\. 1; got 2"),
        ({"layers": []}, ValueError, "layers must not be empty"),
        ({"layers": 1.0}, TypeError, "layers must be indices or names"),
        ({"layers": [0, "norm"]}, TypeError, "all indices or all names"),
        ({"layers": "block.7"}, ValueError, r"names of modules of VisionTransformer.*'block.7'"),
        ({"patch": 8}, ValueError, r"patch must equal .*, \(16, 16\); got 8"),
        ({"prefix": 2}, ValueError, "prefix must equal the number of .*, 1; got 2"),
        ({"inject": [0]}, TypeError, "inject must be one index or module name"),
        ({"inject": 0, "layers": 1}, ValueError, "layers must be None with inject"),
        ({"inject": 0, "stride": 16}, ValueError, "stride must be omitted with inject"),
        ({"inject": 5}, ValueError, "layers must be in"),
        (
            {"view_batch": "many"},
            TypeError,
            "view_batch must be .*, or 'auto'; got 'many'",
        ),
        ({"norm": "no"}, TypeError, "norm must be True or False; got 'no'"),
        ({"streaming": 1}, TypeError, "streaming must be True or False; got 1"),
    ],
)
def test_wrong_settings_raise(
    settings: dict[str, Any], kind: type[Exception], message: str, vit: Any
) -> None:
    with pytest.raises(kind, match=message):
        SRT(vit, OFFSETS, **settings)


def test_models_that_do_not_fit_raise(vit: Any) -> None:
    plain = nn.Sequential(vit)
    vit.unused = nn.Identity()
    windows = module(lambda x: x.reshape(-1, 2, 2, 4))  # [B, 60, 4] -> [B * 15, 2, 2, 4]
    windowed = nn.Sequential(Around(nn.Identity()), windows)
    for model, settings, message in (
        (plain, {"layers": 3, "patch": 16}, r"layers must be names of modules, with patch.*\[3\]"),
        (plain, {}, r"patch must be given.*pass model.get_submodule\('0'\).*layers='0.norm' runs"),
        (nn.Sequential(nn.Identity()), {"layers": "0"}, "patch must be given"),
        (plain, {"layers": "0.blocks.0", "patch": 8}, r"tokens \[B, 1 \+ 60, C\].*\[6, 16, 48\]"),
        (plain, {"patch": 16}, r"the model must return tokens.*got \[6, 1000\]"),
        (vit, {"layers": "unused"}, "did not call"),
        (
            windowed,
            {"layers": "1", "patch": 8},
            r"each of 6 images, in .*; got \[90, 2, 2, 4\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            SRT(model, OFFSETS, **settings)(IMAGES)
    with pytest.raises(ValueError, match="inject must be None for moments; got 0"):
        SRT(vit, OFFSETS, inject=0).moments(IMAGES)
    assert count_hooks(vit) == 0


def test_srt_uses_a_backbone_with_its_settings(vit: Any) -> None:
    backbone = describe(vit, [0, -1])
    assert [f.tokens.shape for f in backbone.features(IMAGES)] == [torch.Size([2, 15, 48])] * 2
    assert backbone.modules == ("blocks.0", "blocks.1")
    srt = SRT(backbone, OFFSETS, stride=8)
    assert torch.equal(srt(IMAGES)[1].field, SRT(vit, OFFSETS, stride=8)(IMAGES).field)
    for settings in ({"layers": 1}, {"inject": 1}, {"norm": False}, {"patch": 16}, {"prefix": 1}):
        with pytest.raises(ValueError, match="must be omitted for a Backbone"):
            SRT(backbone, OFFSETS, **settings)  # type: ignore[arg-type]
    srt.model = timm_model("DeiT")
    with pytest.raises(ValueError, match="model must not be replaced if a Backbone"):
        srt(IMAGES)


def test_an_integer_weight_equals_repeated_views(vit: Any) -> None:
    weights = torch.tensor([1.0, 0.0, 3.0])
    actual = SRT(vit, (OFFSETS, weights), stride=8, view_batch=2)(IMAGES)
    expected = SRT(vit, OFFSETS[[0, 2, 2, 2]], stride=8)(IMAGES)
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="no weights if reduce is 'median'"):
        SRT(vit, (OFFSETS, weights), reduce="median")


def test_training_mode_warns_if_it_changes_the_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.Dropout(0.5))
    with pytest.warns(UserWarning, match=r"in training mode.*model\.eval"):
        SRT(model, OFFSETS, patch=8)(IMAGES)
    stochastic_depth = create("vit_tiny_patch16_224", **ANY, drop_path_rate=0.3).train()
    with pytest.warns(UserWarning, match="in training mode"):
        SRT(stochastic_depth, OFFSETS, stride=8)(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SRT(model.eval(), OFFSETS, patch=8)(IMAGES)


# ---- precision, compilers, threads --------------------------------------------------------------


def assert_close_in_bfloat16(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.float() - expected).norm() / expected.norm()
    assert error < 0.03


def test_half_precision_and_autocast(vit: Any) -> None:
    expected = SRT(vit, OFFSETS, stride=8)(IMAGES).field
    with torch.autocast("cpu", torch.bfloat16):
        cast = SRT(vit, OFFSETS, layers=[0, -1], norm=False, stride=8)(IMAGES)
        assert_close_in_bfloat16(SRT(vit, OFFSETS, stride=8)(IMAGES).field, expected)
    assert all(bool(out.field.isfinite().all()) for out in cast)
    vit.bfloat16()
    for streaming in (False, True):
        field, prefix = SRT(vit, OFFSETS, stride=8, streaming=streaming)(IMAGES.bfloat16())
        assert field.dtype == prefix.dtype == torch.bfloat16
        assert_close_in_bfloat16(field, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fields_on_a_gpu_equal_those_on_the_cpu(dtype: torch.dtype, vit: Any) -> None:
    fields, inject = (
        SRT(vit, OFFSETS, view_batch="auto", **how)
        for how in ({"layers": [0, -1], "stride": 8}, {"inject": 0})
    )
    expected, logits = fields(IMAGES), inject(IMAGES)
    vit.to("cuda", dtype)
    there = IMAGES.to("cuda", dtype)
    for actual, cpu in zip(fields(there), expected, strict=True):
        assert actual.field.is_cuda
        assert_close_in_bfloat16(actual.field.cpu(), cpu.field)
    assert_close_in_bfloat16(inject(there).cpu(), logits)


def compiled_with_graphs(model: nn.Module) -> tuple[Any, list[Any]]:
    """A compiled model, and a list that records each compiled graph from here on."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend), graphs


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_features_of_compiled_models_are_compiled_once(library: str) -> None:
    """One compilation for all batches of views; with layers by name the model runs eagerly."""
    if library == "timm":
        model, images, stride = timm_model("ViT"), torch.randn(1, 3, 56, 80), 8
    else:
        model = transformers_model("Dinov2", image_size=28, patch_size=14)
        images, stride = torch.randn(1, 3, 56, 70), 7
    compiled, graphs = compiled_with_graphs(model)
    offsets = torch.cat([OFFSETS, OFFSETS + 1])
    settings = {"layers": [0, -1], "stride": stride, "view_batch": 4}
    srt = SRT(compiled, offsets, **settings)
    expected = tuple(SRT(model, offsets, **settings)(images))
    assert_close(tuple(srt(images)), expected)
    count = len(graphs)
    assert count > 0
    srt(images)
    assert len(graphs) == count
    assert_close(tuple(copy.deepcopy(srt)(images)), expected)
    name = next(n for n, _ in model.named_modules() if n.endswith(".0"))
    by_name = SRT(compiled, offsets, layers=name, patch=srt.backbone.patch, prefix=1, stride=stride)
    raw = SRT(model, offsets, layers=0, norm=False, stride=stride)(images).field
    assert_close(by_name(images).field, raw)


@pytest.mark.slow
def test_eager_mode_ends_with_the_last_thread_that_forces_it() -> None:
    first, second = (force_eager(torch.compile(nn.Identity())) for _ in range(2))
    compiled, graphs = compiled_with_graphs(nn.Linear(2, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    compiled(torch.zeros(1, 2))
    assert not graphs
    second.__exit__(None, None, None)
    compiled(torch.zeros(1, 2))
    assert graphs


def test_hooks_ignore_other_threads_that_run_the_model(vit: Any) -> None:
    with torch.no_grad():
        expected = vit(IMAGES)
    by_name, inject = SRT(vit, OFFSETS, layers="blocks.0", stride=16), SRT(vit, OFFSETS, inject=0)
    field, logits = by_name(IMAGES).field, inject(IMAGES)
    others: list[torch.Tensor] = []

    def in_another_thread(_m: nn.Module, _i: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: others.append(vit(IMAGES * 1)))
            thread.start()
            thread.join()

    vit.blocks[0].register_forward_pre_hook(in_another_thread)
    assert_close(by_name(IMAGES).field, field)
    assert_close(inject(IMAGES), logits)
    assert len(others) == 3  # one hooked forward pass, two of inject
    for other in others:
        assert_close(other, expected)


# ---- inject -------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"reduce": "median"}, {"streaming": True}])
@pytest.mark.parametrize("itself", [True, False])
def test_inject_equals_the_ensemble_and_the_remaining_layers(
    settings: dict[str, Any], itself: bool
) -> None:
    model = create("vit_tiny_patch16_224", **{**ANY, "depth": 3})
    images = torch.randn(2, 3, 40, 80)  # padded to 48 x 80
    offsets = torch.cat([OFFSETS, torch.tensor([[2.0, 1.0], [-1.0, -2.0]])])
    offsets = offsets[0 if itself else 1 :]
    ran = {0: 0, 1: 0, 2: 0}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _m, _i, out, i=i: ran.update({i: ran[i] + len(out)}))
    done: list[int] = []
    actual = SRT(model, offsets, inject=1, view_batch=2, **settings)(images, done.append)
    assert ran == {
        0: 10,
        1: 10,
        2: 2,
    }  # images per block: V views, plus the unshifted image if it is not a view
    assert done[-1] == len(offsets)

    padded = pad(images, (0, 0, 0, 8), mode="replicate")
    shifted = reference.shift(padded, offsets).float()
    how = {"output_fmt": "NLC", "intermediates_only": True}
    with torch.no_grad():
        found = [model.forward_intermediates(view, [1], True, **how)[0] for view in shifted]
        tokens, prefix = (torch.stack(part) for part in zip(*found, strict=True))
        modes = {"reduce": settings.get("reduce", "mean"), "upsample": "nearest", "stride": 16}
        field = reference.ensemble(tokens, offsets, (3, 5), (16, 16), **modes).float()
        x = torch.cat([prefix.mean(0), field.flatten(2).transpose(1, 2)], 1)
        expected = model.forward_head(model.norm(model.blocks[2](x)))
    assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_inject_before_a_depth_head() -> None:
    """DPT reads several layers, some before the injected one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    backbone = transformers.Dinov2Config(
        **WIDTH,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage3"],
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        neck_hidden_sizes=[8, 8],
        reassemble_factors=[1, 0.5],
        fusion_hidden_size=8,
        head_hidden_size=8,
        reassemble_hidden_size=32,
    )
    model = transformers.DepthAnythingForDepthEstimation(config).eval()
    settings = {"inject": blocks_of(model) + ".1", "patch": 14, "prefix": 1}
    images = torch.randn(2, 3, 42, 70)
    assert_injected(model, images, lambda output: output.predicted_depth, **settings)


def module(function: Callable[[torch.Tensor], Any]) -> nn.Module:
    result = nn.Identity()
    result.forward = function  # type: ignore[method-assign]
    return result


class Around(nn.Module):
    """A convolution and a module that may be called several times."""

    def __init__(self, inner: nn.Module, calls: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner, self.calls = nn.Conv2d(3, 4, 8, stride=8), inner, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for _ in range(self.calls):
            out = self.inner(x)
            x = out if isinstance(out, torch.Tensor) else out[0]
        return x


class Named(NamedTuple):
    last_hidden_state: torch.Tensor


def test_the_model_is_left_as_it_was_after_an_exception(vit: Any) -> None:
    def fail(_x: torch.Tensor) -> Any:
        raise RuntimeError("out of order")

    head, vit.head = vit.head, module(fail)
    before = {name: id(module) for name, module in vit.named_modules()}
    srt = SRT(vit, OFFSETS, inject=0)
    with pytest.raises(RuntimeError, match="out of order"):
        srt(IMAGES)
    assert {name: id(module) for name, module in vit.named_modules()} == before
    assert count_hooks(vit) == 0
    vit.head = head
    assert srt(IMAGES).shape == (2, 1000)


def test_inject_keeps_the_output_type_of_the_module() -> None:
    settings = {"inject": "inner", "patch": 8, "prefix": 0}
    for pack in (lambda x: x, lambda x: (x, 1), lambda x: [x, 1]):
        assert_injected(Around(module(pack)), IMAGES, **settings)
    with pytest.raises(ValueError, match=r"inject must name a module.*inner returns Named"):
        SRT(Around(module(Named)), ITSELF, **settings)(IMAGES)
    for offsets in (OFFSETS, OFFSETS[1:]):
        with pytest.raises(ValueError, match=r"call the layer .* once.*it called inner again"):
            SRT(Around(nn.Identity(), calls=2), offsets, **settings)(IMAGES)


def test_a_model_that_catches_every_exception_is_still_read() -> None:
    class Careful(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return super().forward(x)
            except Exception:
                return x

    actual, expected = (
        SRT(kind(nn.Identity()), OFFSETS, layers="inner", patch=8, prefix=0)(IMAGES).field
        for kind in (Careful, Around)
    )
    assert torch.equal(actual, expected)


# ---- memory -------------------------------------------------------------------------------------


def test_peak_bytes_counts_simultaneous_allocations() -> None:
    start = torch.ones(1000)

    def call() -> torch.Tensor:
        kept = start * 2  # 4000 bytes
        for _ in range(3):
            kept = (kept + 1).exp_()  # two tensors at a time
        return torch.cat([kept, kept.view(10, 100).reshape(-1)]).double()  # 4 + 8 + 16 kB

    result, peak = _cost.peak_bytes(call)
    assert (result.dtype, peak) == (torch.float64, 28000)
    assert _cost.peak_bytes(lambda: start.view(10, 100))[1] == 0


def test_products_with_packed_weights_are_counted() -> None:
    with FakeTensorMode():
        x, scales = torch.rand(20, 64, dtype=torch.bfloat16), torch.rand(2, 32, 2).bfloat16()
        integers = torch.zeros(32, 64, dtype=torch.int8)  # [N, K]
        packed = torch.zeros(32, 32, dtype=torch.uint8)
        for product in (
            lambda: torch._int_mm(x.to(torch.int8), integers.T),
            lambda: torch._weight_int8pack_mm(x, integers, scales[0, :, 0]),
            lambda: torch._weight_int4pack_mm_for_cpu(x, packed, 32, scales),
        ):
            assert _cost.operations_and_bytes(product)[0] == 2 * 20 * 64 * 32


@pytest.mark.parametrize(
    ("how", "free", "batches"),
    [
        ({"stride": 8}, 2**40, [1, 7, 7, 6]),
        ({"stride": 8}, 0, [1] * 21),
        # Two planes of the field, of 4 bytes, and in half of the rest 5 views of 1000.
        ({"stride": 8}, 2 * 48 * 6 * 10 * 4 + 2 * 5 * 1000, [1, 5, 5, 5, 5]),
        ({"inject": 0}, 2 * 48 * 3 * 5 * 4 + 2 * 5 * 1000, [1, 5, 5, 5, 4, 1]),  # at token scale
    ],
)
def test_view_batch_auto_fits_half_of_the_cost(
    how: Any, free: int, batches: list[int], vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, images = batch_sizes(vit), IMAGES[:1]
    offsets = torch.cat([OFFSETS + i for i in range(7)])
    expected = SRT(vit, offsets, **how)(images)
    srt = SRT(vit, offsets, view_batch="auto", **how)
    srt.backbone.features(images)  # the first call compares the final norm with the model's
    sizes.clear()
    measure = _cost.peak_bytes
    monkeypatch.setattr(srt_module, "peak_bytes", lambda call: (measure(call)[0], 1000))
    monkeypatch.setattr(srt_module, "free_bytes", lambda _device: free)
    assert_close(srt(images), expected)
    assert sizes == batches
