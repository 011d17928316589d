"""Models that other libraries wrap, hook or change; and the check of the final norm."""

from __future__ import annotations

import copy
import pickle
import re
import types
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from srt_ext import SRT
from srt_ext.backbones.wrappers import changes_in_training, unwrap

pytest.importorskip("timm")

ITSELF = torch.zeros(1, 2)
IMAGES = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
SQUARE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "dynamic_img_size": True}
SIZE = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 64,
    "patch_size": 16,
}


def with_random_norms(model: Any) -> Any:
    """Random norms, because new ones are all ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model.eval()


@pytest.fixture
def vit() -> Any:
    import timm

    torch.manual_seed(0)
    return with_random_norms(timm.create_model("vit_tiny_patch16_224", **TINY))


def of_transformers(kind: str, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **settings})
    return with_random_norms(getattr(transformers, f"{kind}Model")(config))


def tokens(model: Any, images: torch.Tensor = IMAGES, **settings: Any) -> torch.Tensor:
    """The tokens [B, N, C]: the field of SRT for one unshifted view at token scale."""
    srt = SRT(model, ITSELF, stride=16, upsample="nearest", **settings)
    field: torch.Tensor = srt(images).field
    return field.flatten(2).transpose(1, 2)


# ---- the final norm -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Aimv2Vision", {}),
        ("ViT", {"return_dict": False}),
        ("ViT", {"tie_last_hidden_states": True}),
        ("SiglipVision", {"tie_last_hidden_states": True, "return_dict": False}),
        ("Beit", {"use_mean_pooling": True}),
    ],
)
def test_the_last_layer_is_the_last_hidden_state(kind: str, settings: dict[str, Any]) -> None:
    images, model = IMAGES[..., :48], of_transformers(kind, **{"image_size": 48, **settings})
    with torch.no_grad():
        expected = model(pixel_values=images, return_dict=True).last_hidden_state[:, -9:]
    assert_close(tokens(model, images), expected, atol=1e-5, rtol=1e-5)


def ovis2() -> tuple[Any, torch.Tensor]:
    pytest.importorskip("transformers")
    from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
    from transformers.models.ovis2.modeling_ovis2 import Ovis2VisionModel

    torch.manual_seed(0)
    model = with_random_norms(Ovis2VisionModel(Ovis2VisionConfig(**SIZE)))
    with torch.no_grad():
        return model, model.transformer(pixel_values=SQUARE).last_hidden_state


def tied_vit() -> tuple[Any, torch.Tensor]:
    model = of_transformers("ViT", tie_last_hidden_states=True)
    with torch.no_grad():
        return model, model(pixel_values=SQUARE).last_hidden_state[:, 1:]


@pytest.mark.parametrize("first", ["eager", "train", "export", "compile"])
@pytest.mark.parametrize("make", [pytest.param(ovis2, marks=pytest.mark.slow), tied_vit])
def test_hidden_states_that_are_normalised_already(make: Any, first: str) -> None:
    """The last of the hidden_states is the last_hidden_state of the model."""
    model, expected = make()
    srt = SRT(model.train(first == "train"), ITSELF, stride=16, upsample="nearest")
    call: Any = srt
    if first == "export":
        call = torch.export.export(srt, (SQUARE,), strict=False).module()
    elif first == "compile":
        call = torch.compile(srt, backend="eager")
    actual = call(SQUARE).field.flatten(2).transpose(1, 2)
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    raw = tokens(model, SQUARE, layers=srt.backbone.modules[-1])
    assert not torch.allclose(raw, expected, atol=1e-3)
    if srt.backbone.is_normalized:  # before transformers 5.18
        with pytest.raises(ValueError, match="norm must be True for the last layer of Ovis2"):
            tokens(model, SQUARE, norm=False)
    else:
        assert_close(tokens(model, SQUARE, norm=False), raw)


@pytest.fixture
def no_tie_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with transformers 5.17, which does not read ``config.tie_last_hidden_states``."""
    monkeypatch.setattr("srt_ext.backbones.transformers.version", lambda _: "5.17.0")


def test_hidden_states_that_are_always_normalised(no_tie_setting: None) -> None:
    model, expected = ovis2()
    assert_close(tokens(model, SQUARE), expected, atol=1e-5, rtol=1e-5)
    message = "norm must be True for the last layer of Ovis2VisionModel, .*transformers 5.17.0"
    with pytest.raises(ValueError, match=message):
        SRT(model, ITSELF, norm=False)
    assert tokens(model, SQUARE, norm=False, layers=-2).isfinite().all()
    model.transformer.rms_norm = torch.nn.Identity()
    name = SRT(model, ITSELF).backbone.modules[-1]
    for norm in (True, False):
        assert_close(tokens(model, SQUARE, norm=norm), tokens(model, SQUARE, layers=name))


def test_models_without_a_last_hidden_state(no_tie_setting: None) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = with_random_norms(transformers.Dinov2Backbone(transformers.Dinov2Config(**SIZE)))
    raw = tokens(model, SQUARE, layers=SRT(model, ITSELF).backbone.modules[-1], prefix=1)
    assert_close(tokens(model, SQUARE, norm=False), raw)
    assert_close(tokens(model, SQUARE), model.layernorm(raw))


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "CLIPVision"])
def test_a_model_of_transformers_is_pickled_after_a_call(kind: str) -> None:
    model = of_transformers(kind)
    srt = SRT(model, 2, stride=8)
    expected, seen = srt(SQUARE).field, model(SQUARE, output_hidden_states=True).hidden_states
    for copied in (pickle.loads(pickle.dumps((srt, model))), copy.deepcopy((srt, model))):
        assert_close(copied[0](SQUARE).field, expected)
        assert_close(copied[1](SQUARE, output_hidden_states=True).hidden_states, seen)


def test_first_calls_of_one_model_by_several_threads() -> None:
    model, expected = tied_vit()
    srt = SRT(model, ITSELF, stride=16, upsample="nearest")
    with ThreadPoolExecutor(4) as pool:
        for output in pool.map(srt, [SQUARE] * 4):
            assert_close(output.field.flatten(2).transpose(1, 2), expected)


def test_a_module_after_the_last_layer_raises() -> None:
    """The last layers of XCiT attend to the class token and also change the other tokens."""
    import timm

    torch.manual_seed(0)
    model = with_random_norms(timm.create_model("xcit_nano_12_p16_224", depth=2))
    with pytest.raises(ValueError, match="must equal the output of forward_features of Xcit"):
        tokens(model)
    found = tokens(model, layers="norm", patch=16, prefix=1)
    assert_close(found, model.forward_features(IMAGES)[:, 1:])


def test_a_different_norm_raises() -> None:
    transformers = pytest.importorskip("transformers")

    class Renamed(transformers.ViTModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = 2 * output.last_hidden_state
            return output

    model, images = Renamed(transformers.ViTConfig(**SIZE)).eval(), torch.rand(2, 3, 64, 64)
    srt = SRT(model, ITSELF)
    for _ in range(2):
        with pytest.raises(ValueError, match="must equal the output of last_hidden_state"):
            srt(images)
    assert tokens(model, images, norm=False).shape == (2, 16, 48)
    assert tokens(model, images, layers="layers.0").shape == (2, 16, 48)


@pytest.mark.parametrize("kind", ["dict", "tensor"])
def test_a_different_norm_of_a_model_with_intermediate_layers_raises(kind: str) -> None:
    class Dino(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_size, self.blocks = 16, nn.ModuleList([nn.Identity()])
            self.embed = nn.Conv2d(3, 8, 16, 16)

        def get_intermediate_layers(
            self, x: torch.Tensor, n: list[int], return_class_token: bool, norm: bool
        ) -> list[tuple[torch.Tensor, torch.Tensor]]:
            found = self.embed(x).flatten(2).transpose(1, 2)
            return [(found, found[:, 0]) for _ in n]

        def forward_features(self, x: torch.Tensor) -> Any:
            found = 2 * self.embed(x).flatten(2).transpose(1, 2)
            every = torch.cat([found[:, :1], found], 1)
            return {"x_norm_patchtokens": found} if kind == "dict" else every

    with pytest.raises(ValueError, match="must equal the output of forward_features of Dino"):
        tokens(Dino())
    assert tokens(Dino(), norm=False).shape == (2, 12, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_compared_once_for_each_dtype(
    dtype: torch.dtype, vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    own = vit.forward_features
    monkeypatch.setattr(vit, "forward_features", lambda x: seen.append(x.shape) or own(x))
    srt = SRT(vit, ITSELF)
    srt(IMAGES), srt(IMAGES)
    assert seen == [(1, 3, 32, 48)]
    srt.to(dtype)(IMAGES.to(dtype))
    assert len(seen) == (1 if dtype == torch.float32 else 2)
    SRT(vit, ITSELF, norm=False)(IMAGES.to(dtype))
    monkeypatch.setattr(
        vit, "forward_features", lambda x: own(x)[:, :, :10]
    )  # other channels: not comparable
    SRT(vit, ITSELF)(IMAGES.to(dtype))
    monkeypatch.setattr(vit, "forward_features", lambda x: own(x) + 0.1)
    with pytest.raises(ValueError, match="must equal the output of forward_features"):
        SRT(vit, ITSELF)(IMAGES.to(dtype))


def test_a_model_of_zeros_is_equal_to_itself(vit: Any) -> None:
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    assert tokens(vit).abs().max() == 0
    assert SRT(vit.to("meta"), ITSELF)(IMAGES.to("meta")).field.is_meta


def test_the_norm_is_not_compared_while_tracing(vit: Any) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def refuse(_images: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called while tracing")

    vit.requires_grad_(False).forward_features = refuse
    srt = SRT(vit, ITSELF)
    assert len(make_fx(srt)(IMAGES).graph.nodes) > 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(lambda x: srt(x).field, IMAGES, check_trace=False)
    torch.export.export(srt, (IMAGES,), strict=False)
    assert not srt.backbone._compared


# ---- hooks --------------------------------------------------------------------------------------


def doubled(_module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (2 * inputs[0],)


def doubled_by_name(_module: Any, args: Any, kwargs: dict[str, torch.Tensor]) -> Any:
    return args, {**kwargs, "pixel_values": 2 * kwargs["pixel_values"]}


def test_hooks_on_the_input_of_a_model_run(vit: Any) -> None:
    expected = tokens(vit, 2 * IMAGES)
    vit.register_forward_pre_hook(doubled)
    assert_close(tokens(vit), expected)
    assert_close(tokens(vit, layers="norm"), expected)
    assert "forward" not in vit.__dict__
    vit.compile(backend="eager")  # in place: compiles the calls of the module
    assert_close(tokens(vit), expected)


def test_attributes_that_hooks_set_on_the_model_are_kept(vit: Any) -> None:
    def count(module: Any, _inputs: Any) -> None:
        module.calls = getattr(module, "calls", 0) + 1
        module.shift = module.pos_embed + 1

    vit.register_forward_pre_hook(count)
    srt = SRT(vit, ITSELF, norm=False)
    srt(IMAGES), srt(IMAGES)
    assert vit.calls == 2
    assert_close(vit.shift, vit.pos_embed + 1)


def test_tensors_that_hooks_compute_are_current(vit: Any) -> None:
    """Pruning sets the masked parameter before each forward pass."""
    from torch.nn.utils import prune

    prune.l1_unstructured(vit, "pos_embed", 0.5)
    with torch.no_grad():
        vit.pos_embed_orig.mul_(3)
        own = vit.forward_features  # reads the tensor that the hook set at the last call
        vit(torch.nn.functional.pad(IMAGES, (0, 160, 0, 176)))
        expected = own(IMAGES)[:, 1:]
    vit.pos_embed = torch.zeros_like(vit.pos_embed)  # stale
    assert_close(tokens(vit), expected)


def test_hooks_on_every_module_run_for_the_model(vit: Any) -> None:
    seen = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda m, _i: seen.append(type(m)))
    with hook:
        tokens(vit, norm=False)
    assert type(vit) in seen


@pytest.mark.parametrize("how", [{}, {"with_kwargs": True}])
def test_hooks_on_the_input_of_a_model_of_transformers_run(how: dict[str, bool]) -> None:
    model = of_transformers("ViT")
    expected = tokens(model, 2 * IMAGES)
    model.register_forward_pre_hook(doubled_by_name if how else doubled, **how)
    assert_close(tokens(model), expected)
    assert_close(tokens(model, layers="layernorm"), expected)


def test_hooks_that_would_be_bypassed_raise(vit: Any) -> None:
    transformers = pytest.importorskip("transformers")
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**SIZE)).eval()
    parallel, patched, hooked = nn.DataParallel(vit), copy.deepcopy(vit), copy.deepcopy(vit)
    for model in (parallel, classifier):
        model.register_forward_pre_hook(doubled)
    patched.forward = types.MethodType(lambda self, x: type(self).forward(self, 2 * x), patched)
    srt = SRT(hooked, ITSELF, stride=16, upsample="nearest")
    srt(IMAGES)
    hooked.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    for model, way in (
        (parallel, "doubled on DataParallel. Register it on the VisionTransformer inside"),
        (classifier, "doubled on ViTForImageClassification. Pass layers by name"),
        (patched, "<lambda> on VisionTransformer. Pass layers by name"),
        (hooked, "<lambda> on VisionTransformer. Pass layers by name"),
    ):
        with pytest.raises(ValueError, match=rf"must have no hooks.*got .*{way}"):
            tokens(model)
    with pytest.raises(ValueError, match="must have no hooks"):  # added after the first call
        srt(IMAGES)
    assert_close(tokens(classifier, layers="vit.layernorm"), tokens(classifier.vit, 2 * IMAGES))
    assert_close(tokens(patched, layers="norm"), tokens(vit, 2 * IMAGES))
    assert_close(tokens(hooked, layers="norm"), tokens(vit))


def test_weights_that_accelerate_offloads(vit: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = tokens(vit)
    offloaded = accelerate.cpu_offload(copy.deepcopy(vit), torch.device("cpu"))
    assert_close(tokens(offloaded), expected)
    assert_close(tokens(offloaded, layers="norm"), expected)
    assert offloaded.cls_token.is_meta  # the loaded weights are released
    restored = accelerate.hooks.remove_hook_from_module(copy.deepcopy(offloaded), recurse=True)
    assert_close(tokens(restored), expected)  # its forward is an attribute of the instance
    with torch.no_grad():
        assert_close(SRT(offloaded, ITSELF, inject=0)(IMAGES), vit(IMAGES))


def test_autocast_of_accelerate_is_not_bypassed(vit: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, expected = copy.deepcopy(vit), tokens(vit)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(vit)
    with pytest.raises(ValueError, match=r"must have no hooks.*Pass layers by name"):
        tokens(prepared)
    with torch.autocast("cpu", torch.bfloat16):
        half = tokens(plain)
    assert_close(tokens(prepared, layers="norm"), half, atol=0.1, rtol=0.1)
    restored = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert_close(tokens(restored), expected)


def test_a_forward_that_a_subclass_overrides_warns(vit: Any) -> None:
    class Normalised(type(vit)):  # type: ignore[misc]
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * images)  # type: ignore[no-any-return]

    expected = tokens(vit, 2 * IMAGES)
    vit.__class__ = Normalised
    with pytest.warns(UserWarning, match="does not run the forward that Normalised overrides"):
        SRT(vit)
    assert_close(tokens(vit, layers="norm"), expected)


@pytest.mark.parametrize("where", ["transformers", "torch", "timm"])
def test_functional_dropout_counts_as_training_mode(where: str) -> None:
    import timm

    if where == "transformers":
        model = of_transformers("ViT", attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.0)
    elif where == "timm":
        model = timm.create_model("vit_tiny_patch16_224", **TINY, patch_drop_rate=0.5)
    else:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 16, 16), nn.Flatten(2), nn.MultiheadAttention(8, 2, 0.1)
        )
    assert not changes_in_training(model.eval())
    assert changes_in_training(model.train())


def test_errors_of_the_model_itself_are_kept(vit: Any) -> None:
    def check(_module: nn.Module, _inputs: Any) -> None:
        raise AssertionError("a check of the user")

    with pytest.raises(RuntimeError, match="should be the same"):
        tokens(vit, IMAGES.double())
    vit.register_forward_pre_hook(check)
    with pytest.raises(AssertionError, match="a check of the user"):
        tokens(vit)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("how", ["trace", "script", "export", "fx"])
@pytest.mark.parametrize("around", ["itself", "Sequential", "DataParallel"])
def test_layers_of_code_that_calls_no_hooks_raise(how: str, around: str) -> None:
    original = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 16, 16)), nn.Conv2d(8, 8, 1)).eval()
    make: Any = {
        "trace": lambda: torch.jit.trace(original, IMAGES),
        "script": lambda: torch.jit.script(original),
        "export": lambda: torch.export.export(original, (IMAGES,)).module(),
        "fx": lambda: torch.fx.symbolic_trace(original),  # calls 0.0, which is a part of 0
    }
    wrap: Any = {
        "itself": lambda m: m,
        "Sequential": nn.Sequential,
        "DataParallel": nn.DataParallel,
    }
    model, place = wrap[around](make[how]()), "0." if around == "Sequential" else ""
    with pytest.raises(ValueError, match="must be modules that Python code calls") as error:
        SRT(model, ITSELF, layers=f"{place}0", patch=16)
    assert "Pass the original model, or patch without layers" in str(error.value)
    with pytest.raises(ValueError, match="must be modules that Python code calls"):
        SRT(model, ITSELF, inject=f"{place}0", patch=16)
    assert_close(tokens(model, patch=16), tokens(original, layers="1", patch=16))


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_graphs_that_call_modules_are_read_by_name() -> None:
    own = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 16, 16)), nn.Conv2d(8, 8, 1)).eval()
    expected = tokens(own, layers="0", patch=16)
    traced = torch.fx.symbolic_trace(own)
    unflattened = torch.export.unflatten(torch.export.export(own, (IMAGES,)))
    for model, layer in (
        (traced, "0.0"),
        (nn.Sequential(traced), "0.0.0"),
        (unflattened, "0"),
        (nn.Sequential(torch.jit.trace(own[0], IMAGES), own[1]), "0"),
        (nn.Sequential(own[0], torch.jit.script(own[1])), "0"),
    ):
        assert_close(tokens(model, layers=layer, patch=16), expected)


# ---- wrappers -----------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_parallel_wrappers(vit: Any, one_process: None) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    expected = tokens(vit)
    sharded = copy.deepcopy(vit)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in (*sharded.blocks, sharded):
        fully_shard(module, mesh=mesh)
    compiled = torch.compile(vit, backend="eager")
    for model in (
        nn.DataParallel(vit),
        DistributedDataParallel(vit),
        torch.compile(DistributedDataParallel(vit), backend="eager"),
        DistributedDataParallel(compiled),
        sharded,
    ):
        assert_close(tokens(model), expected)
        assert_close(tokens(model, patch=16, layers="norm"), expected)
        path = next(n for n, module in model.named_modules() if module is unwrap(model))
        assert_close(tokens(model, layers=f"{path}.norm".lstrip(".")), expected)


def test_fully_sharded_modules_are_read_by_names(vit: Any, one_process: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    expected = tokens(vit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = FullyShardedDataParallel(copy.deepcopy(vit), device_id=torch.device("cpu"))
    message = "layers='_fsdp_wrapped_module.norm' runs the whole FullyShardedDataParallel"
    with pytest.raises(ValueError, match=message):
        tokens(sharded)
    for _ in range(2):
        assert_close(tokens(sharded, layers="_fsdp_wrapped_module.norm"), expected)


@pytest.mark.parametrize("kind", ["timm", "ViT", "CLIPVision", "own"])
def test_models_under_peft(kind: str, vit: Any) -> None:
    peft = pytest.importorskip("peft")
    targets, settings = ["qkv"], {}
    if kind == "own":
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.Conv2d(8, 8, 1))
        targets, settings = ["1"], {"patch": 16}
    else:
        model = vit if kind == "timm" else of_transformers(kind)
        targets = ["qkv"] if kind == "timm" else ["q_proj", "query"]
    adapter = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), adapter).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    images = IMAGES[..., :40]
    expected = tokens(merged, images, **settings)
    assert_close(tokens(adapted, images, **settings), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, tokens(model, images, **settings), atol=1e-3)


class Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.model(2 * images)}


def test_the_error_names_a_nested_model(vit: Any) -> None:
    expected = tokens(vit, 2 * IMAGES)
    alone = r"pass model.get_submodule\('model'\) to run it alone"
    for settings in ({}, {"patch": 16}, {"layers": -1}):
        with pytest.raises(ValueError, match=rf"{alone}; layers='model.norm' runs the whole Aro"):
            tokens(Around(vit), **settings)
    assert_close(tokens(Around(vit), layers="model.norm"), expected)
    assert_close(tokens(Around(vit).get_submodule("model"), 2 * IMAGES), expected)
    averaged = torch.optim.swa_utils.AveragedModel(vit)
    assert_close(tokens(averaged, 2 * IMAGES, layers="module.norm"), expected)


class Doubled(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * images


def follow(model: Any, images: torch.Tensor, **settings: Any) -> tuple[list[Any], list[Any]]:
    """Follows the advice of an error.

    Returns:
        the tokens of the nested models, with doubled images, and the tokens of layers by name.
    """
    with pytest.raises(ValueError, match="It contains a") as error:
        tokens(model, images, **settings)
    inside = re.findall(r"get_submodule\('([^']+)'\)", str(error.value))
    names = re.findall(r"layers='([^']+)'", str(error.value))
    return (
        [tokens(model.get_submodule(name), 2 * images) for name in inside],
        [tokens(model, images, layers=name) for name in names],
    )


@pytest.mark.parametrize(
    "kind",
    ["timm", "no norm", "ViT", "Dinov2", "CLIPVision", "DataParallel", "peft", "TimmWrapper"],
)
def test_the_advice_for_a_nested_model_works(kind: str, vit: Any) -> None:
    """The model alone, and layers by the name of its norm, or of its last block without one."""
    model: Any = vit
    if kind == "no norm":
        vit.norm = nn.Identity()
    elif kind in ("ViT", "Dinov2"):  # with a head around the encoder
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{kind}Config")(**SIZE)
        head = getattr(transformers, f"{kind}ForImageClassification")
        model = with_random_norms(head(config))
    elif kind == "CLIPVision":  # its norm is applied only to the pooled token
        model = of_transformers(kind)
    elif kind == "TimmWrapper":
        transformers = pytest.importorskip("transformers")
        settings: Any = {"architecture": "vit_tiny_patch16_224", "model_args": TINY}
        config = transformers.TimmWrapperConfig(**settings)
        model = with_random_norms(transformers.TimmWrapperModel(config))
    around: Any = nn.Sequential(Doubled(), model)
    if kind == "DataParallel":
        around = nn.DataParallel(around)
    elif kind == "peft":
        peft = pytest.importorskip("peft")
        around = peft.get_peft_model(around, peft.LoraConfig(target_modules=["qkv"])).eval()
    (inside,), (by_name,) = follow(around, SQUARE)
    if kind == "CLIPVision":
        inside = tokens(model, 2 * SQUARE, norm=False)
    assert_close(by_name, inside)


def test_the_error_does_not_advise_names_that_cannot_be_read() -> None:
    import timm

    settings = {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1), "img_size": 64}
    hiera = timm.create_model("hiera_tiny_224", **settings).eval()
    around = nn.Sequential(Doubled(), hiera)
    with pytest.raises(
        ValueError, match=r"patch must be given.*pass model.get_submodule\('1'\) "
    ) as e:
        SRT(around, ITSELF)
    assert "layers=" not in str(e.value)
    assert SRT(around.get_submodule("1"), ITSELF)(SQUARE).field.shape == (2, 192, 64, 64)
    with pytest.raises(ValueError, match="reorder the tokens"):
        SRT(around, layers="1.blocks.2")


def test_the_error_names_each_of_several_nested_models(vit: Any) -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = copy.deepcopy(vit), vit

        def forward(self, images: torch.Tensor) -> Any:
            return self.student(2 * images)

    model = Student()
    for name in ("teacher", "student"):
        way = rf"pass model.get_submodule\('{name}'\) to run it alone; layers='{name}.norm'"
        with pytest.raises(ValueError, match=way):
            tokens(model)
    assert_close(tokens(model, layers="student.norm"), tokens(vit, 2 * IMAGES))
    with pytest.raises(ValueError, match=r"did not call \['teacher.norm'\]"):
        tokens(model, layers="teacher.norm")


def test_several_maps_of_one_grid_are_not_a_pyramid() -> None:
    import timm

    maps: Any = {"features_only": True, "out_indices": [0, 1]}
    model = timm.create_model("vit_tiny_patch16_224", **maps, **TINY).eval()
    for settings, rule in (({}, "forward_intermediates"), ({"patch": 16}, "got 2 in")):
        with pytest.raises(ValueError, match=rule):
            tokens(model, **settings)
        (inside,), (by_name,) = follow(model, IMAGES, **settings)
        assert_close(tokens(model, layers="model.blocks.1"), by_name)
        assert_close(tokens(model.model, 2 * IMAGES), inside)
    assert_close(by_name, model(IMAGES)[-1].flatten(2).transpose(1, 2))


def test_the_error_names_only_models_that_can_be_read() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}
    swin = transformers.SwinModel(transformers.SwinConfig(**sizes)).eval()
    rule = "layers must be names of modules, with patch, for SwinModel"
    with pytest.raises(ValueError, match=rf"{rule}, whose layers cannot be .*; got None$"):
        tokens(swin, SQUARE)
    srt = SRT(swin, ITSELF, layers="layernorm", patch=8, stride=8, upsample="nearest")
    images = SQUARE[:, :, :32, :32]
    found = srt(images).field.flatten(2).transpose(1, 2)
    assert_close(found, swin(images).last_hidden_state)


class Int8Linear(nn.Module):
    """As in bitsandbytes: integer weights, which are not floating-point parameters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_quantised_models(vit: Any) -> None:
    expected = tokens(vit)
    for block in vit.blocks:
        block.attn.qkv = Int8Linear(block.attn.qkv)
    actual = tokens(vit)
    assert 0 < (actual - expected).abs().max() < 0.05
    assert SRT(vit, 4).cost(64).operations > 0
    copied = copy.deepcopy(SRT(vit, ITSELF, stride=16, upsample="nearest"))
    assert_close(copied(IMAGES).field.flatten(2).transpose(1, 2), actual)


@pytest.mark.parametrize("config", ["Int8WeightOnly", "Int8DynamicActivationInt8Weight"])
def test_models_that_torchao_quantises(config: str, vit: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    expected, operations = tokens(vit), SRT(vit, 4).cost(64).operations
    quantization.quantize_(vit, getattr(quantization, f"{config}Config")())
    actual = tokens(vit)
    assert 0 < (actual - expected).abs().max() < 0.1
    assert_close(tokens(vit, layers="norm"), actual)
    assert SRT(vit, 4).cost(64).operations == operations


@pytest.mark.filterwarnings("ignore")  # deprecated
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_models_that_torch_quantises(dtype: torch.dtype, vit: Any) -> None:
    expected, operations = tokens(vit), SRT(vit, 4).cost(64).operations
    quantised = torch.ao.quantization.quantize_dynamic(vit, {nn.Linear}, dtype=dtype)
    assert 0 < (tokens(quantised) - expected).abs().max() < 0.1
    assert SRT(quantised, 4).cost(64).operations == operations
