"""torch.export, torch.compile, copies, pickle and other processes: SRT, views and outputs."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import srt_ext
from srt_ext import SRT, RunningMean, views
from srt_ext import numpy as srt_numpy

PATCH = 8


class ViT(nn.Module):
    """Two blocks and a head, named as in timm; one class token; for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 6, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        for block in self.blocks:
            tokens = F.gelu(block(tokens))
        return self.head(tokens)  # type: ignore[no-any-return]


class Moments(nn.Module):
    """``SRT.moments`` as a module, because torch.export does not support methods."""

    def __init__(self, srt: SRT) -> None:
        super().__init__()
        self.srt = srt

    def forward(self, images: torch.Tensor) -> Any:
        return self.srt.moments(images)


def vit(**settings: Any) -> SRT:
    return SRT(ViT().eval(), **{"views": 4, "patch": PATCH, "prefix": 1, **settings})


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "layer": {"layers": "blocks.0"},
    "layers": {"layers": ["blocks.1", "blocks.0"]},
    "inject": {"inject": "blocks.0"},
    "inject, median": {"inject": "blocks.0", "reduce": "median"},
    "inject, no identity": {"inject": "blocks.1", "views": views.grid(0).offsets + 1},
    "median": {"reduce": "median"},
    "stride": {"stride": 4},
    "scale": {"scale": 1.25},
    "flips": {"views": "4+flip"},
    "weights": {"views": "ring:5:3"},
    "streaming": {"streaming": True, "view_batch": 3},
    "streamed median": {"streaming": True, "reduce": "median"},
    "parts": {"view_batch": 2, "stride": PATCH},
    "auto": {"view_batch": "auto"},
}
BY_HOOKS = ("layer", "layers", "inject", "inject, median", "inject, no identity")


def some_fast(names: Any, *fast: str) -> list[Any]:
    """Marks the other cases slow: each traces the model for a second or more."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(autouse=True)
def no_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_close(result: Any, expected: Any) -> None:
    """Asserts closeness and equal types."""
    leaves, shape = torch.utils._pytree.tree_flatten(result)
    right, right_shape = torch.utils._pytree.tree_flatten(expected)
    assert shape == right_shape
    torch.testing.assert_close(leaves, right)


def images_of(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, 22, 32, generator=torch.Generator().manual_seed(batch))


def through_a_file(program: Any, folder: Path) -> Any:
    path = folder / "program.pt2"
    torch.export.save(program, path)
    return torch.export.load(path).module()


@pytest.mark.parametrize(
    "name", some_fast([*SETTINGS, "moments"], "layers", "inject", "flips", "parts")
)
def test_export(name: str, tmp_path: Path) -> None:
    """Saved, loaded, and for any number of images."""
    module = Moments(vit()) if name == "moments" else vit(**SETTINGS[name])
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(module, (images_of(2),), dynamic_shapes=(batch,), strict=False)
    loaded = through_a_file(program, tmp_path)
    for count in (2, 5):
        assert_close(loaded(images_of(count)), module(images_of(count)))


# Dynamo follows the loop over the views, a generator, since 2.13.
follows_generators = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13),
    reason="torch's Dynamo does not follow generators",
)


@follows_generators
@pytest.mark.parametrize("name", some_fast([n for n in SETTINGS if n not in BY_HOOKS], "weights"))
def test_strict_export(name: str, tmp_path: Path) -> None:
    srt = vit(**SETTINGS[name])
    program = torch.export.export(srt, (images_of(1),), strict=True)
    assert_close(through_a_file(program, tmp_path)(images_of(1)), srt(images_of(1)))


@pytest.mark.parametrize("name", some_fast(SETTINGS, "inject", "flips"))
def test_compiled(name: str) -> None:
    """Several SRT modules around one model, compiled one after the other."""
    model = ViT().eval()
    settings: Any = {"views": 4, "patch": PATCH, "prefix": 1}
    other = SRT(model, **settings, layers="blocks.1")
    for module in (other, SRT(model, **{**settings, **SETTINGS[name]})):
        compiled = torch.compile(module, backend="eager")
        assert_close(compiled(images_of(2)), module(images_of(2)))


def test_views_in_compiled_code() -> None:
    srt = vit(scale=1.25)
    offsets = torch.compile(lambda factor: srt.views.offsets * factor, backend="eager")
    assert_close(offsets(torch.tensor(2.0)), srt.views.offsets * 2)


@follows_generators
@pytest.mark.parametrize("name", some_fast(BY_HOOKS, "layer"))
def test_tracing_a_model_that_is_read_by_hooks_raises(name: str) -> None:
    """If the model must not run eagerly."""
    srt = vit(**SETTINGS[name])
    with pytest.raises(Exception, match="by hooks, which run eagerly"):
        torch.compile(srt, backend="eager", fullgraph=True)(images_of(1))
    with pytest.raises(Exception, match="by hooks, which run eagerly"):
        torch.export.export(srt, (images_of(1),), strict=True)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["default", "layers", "inject", "weights", "scale"])
def test_inductor(name: str) -> None:
    srt = vit(**SETTINGS[name])
    assert_close(torch.compile(srt)(images_of(2)), srt(images_of(2)))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ["default", "layers", "inject", "weights"])
def test_ahead_of_time(name: str, tmp_path: Path) -> None:
    srt = vit(**SETTINGS[name])
    program = torch.export.export(srt, (images_of(2),), strict=False)
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    loaded = torch._inductor.aoti_load_package(path)
    assert_close(loaded(images_of(2)), srt(images_of(2)))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("how", [{}, {"layers": [0, -1]}, {"layers": "blocks.0"}, {"inject": 0}])
def test_models_of_timm_are_exported_and_compiled(how: Any, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    sizes = {"depth": 2, "embed_dim": 12, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes).eval()
    srt, images = SRT(model, 4, **how), torch.rand(2, 3, 48, 64)
    program = torch.export.export(srt, (images,), strict=False)
    assert_close(through_a_file(program, tmp_path)(images), srt(images))
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    assert_close(torch._inductor.aoti_load_package(path)(images), srt(images))
    assert_close(torch.compile(srt)(images), srt(images))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiled_models_explain_an_image_size(dynamic: bool | None) -> None:
    """Also after a call with a supported size."""
    timm = pytest.importorskip("timm")
    sizes = {"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    srt = SRT(torch.compile(model, backend="eager", dynamic=dynamic), 2)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"images of \[64, 64\].*raised: Input height \(64\)"):
            srt(torch.rand(1, 3, 64, 64))
        assert srt(torch.rand(1, 3, 32, 32)).field.shape == (1, 12, 32, 32)


# ---- copies, files, processes -------------------------------------------------------------------


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.copy, copy.deepcopy, through_pickle, through_torch]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", ["default", "layers", "inject", "weights", "flips", "scale"])
def test_srt_is_copied(copied: Any, name: str) -> None:
    srt = vit(**SETTINGS[name])
    expected = srt(images_of(2))
    twin = copied(srt)
    assert_close(twin(images_of(2)), expected)
    if copied is not copy.copy:
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
    assert_close(srt(images_of(2)), expected)


@pytest.mark.parametrize("copied", COPIES[1:])
def test_views_and_outputs_are_copied(copied: Any) -> None:
    srt = vit(views="ring:5:3+flip")
    values = [
        srt(images_of(1)),
        srt.moments(images_of(1)),
        srt.views,
        next(iter(srt.tokens(images_of(1)))),
        srt.cost((32, 32)),
    ]
    for value in values:
        twin = copied(value)
        assert type(twin) is type(value)
        assert_close(twin, value)


def test_results_and_views_load_with_weights_only() -> None:
    """The default of torch.load."""
    srt = vit(views="ring:5:3+flip")
    for value in (srt(images_of(1)), srt.moments(images_of(1)), srt.views, srt.cost((8, 8))):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        assert_close(torch.load(file, weights_only=True), value)


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("library", [srt_ext, srt_numpy])
@pytest.mark.parametrize("kind", ["RunningMean", "RunningMoments", "RunningMedian"])
def test_streams_are_copied(copied: Any, library: Any, kind: str) -> None:
    tokens: Any = torch.randn(8, 1, 4, 3)
    offsets: Any = views.lattice(8, 3).offsets
    if library is srt_numpy:
        tokens, offsets = tokens.numpy(), offsets.numpy()
    running, whole = (getattr(library, kind)((2, 2), (4, 4)) for _ in range(2))
    running.update(tokens[:4], offsets[:4])
    twin = copied(running)
    running.update(tokens[:4], offsets[:4])  # does not change the copy
    twin.update(tokens[4:], offsets[4:])
    for part in (tokens[:4], offsets[:4]), (tokens[4:], offsets[4:]):
        whole.update(*part)
    assert twin.views == 8
    assert (torch.as_tensor(twin.result()) == torch.as_tensor(whole.result())).all()


def test_state_dict_has_the_names_of_the_model() -> None:
    """So the weights of a model load into SRT with ``strict=True``, and vice versa."""
    srt = vit(scale=1.25)
    assert list(srt.state_dict()) == [f"model.{name}" for name in ViT().state_dict()]
    other = ViT().eval()
    with torch.no_grad():
        other.head.weight.mul_(2)
    srt.load_state_dict({f"model.{name}": value for name, value in other.state_dict().items()})
    expected = SRT(other, 4, scale=1.25, patch=PATCH, prefix=1)
    assert_close(srt(images_of(1)), expected(images_of(1)))


def test_casts_change_the_model_and_not_the_views() -> None:
    srt, design = vit(views="ring:5:2.5"), views.ring(5, 2.5)
    images = images_of(1)
    for cast, dtype in (
        (lambda s: s.double(), torch.float64),
        (lambda s: s.to(torch.bfloat16), torch.bfloat16),
        (lambda s: s.half(), torch.float16),
        (lambda s: s.to("cpu", torch.float32), torch.float32),
        (lambda s: s.share_memory(), torch.float32),
    ):
        assert cast(srt) is srt
        assert srt(images.to(dtype)).field.dtype == dtype
        assert torch.equal(srt.views.offsets, design.offsets)
    meta = vit().to("meta")
    field, prefix = meta(images.to("meta"))
    assert field.is_meta
    assert prefix.is_meta
    assert field.shape == (1, 5, 22, 32)


def elsewhere(queue: Any, srt: SRT, design: views.Views, running: Any, images: Any) -> None:
    torch.set_num_threads(1)
    result = srt(images)
    running.update(torch.ones(1, 1, 4, 1), torch.zeros(1, 2))
    queue.put((through_pickle(result), design, running))
    queue.get()  # until the other process has read the tensors


@pytest.mark.slow
def test_srt_in_a_spawned_process() -> None:
    timm = pytest.importorskip("timm")
    sizes = {"depth": 1, "embed_dim": 12, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes).eval()
    images, design = torch.rand(1, 3, 32, 32), views.flipped(views.ring(5, 3))
    for how in ({}, {"layers": [0]}, {"inject": 0}):
        srt = SRT(model, design, **how)
        context = torch.multiprocessing.get_context("spawn")
        results, done = context.Queue(), None
        running = RunningMean((2, 2), (4, 4))
        running.update(torch.zeros(1, 1, 4, 1), torch.zeros(1, 2))
        process = context.Process(target=elsewhere, args=(results, srt, design, running, images))
        process.start()
        result, moved, stream = results.get(timeout=120)
        assert_close(result, srt(images))
        assert_close(moved, design)
        assert (stream.result() == 0.5).all()
        results.put(done)
        process.join(60)
        assert process.exitcode == 0
