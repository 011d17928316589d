"""examples/flax_vit.py gives the fields of the torch path with the same weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from process import run_python

import srt_ext

pytest.importorskip("srt_ext.jax", exc_type=ImportError)
nnx = pytest.importorskip("flax.nnx", exc_type=ImportError)
small = pytest.importorskip("srt_ext.demo.small", exc_type=ImportError)
pytest.importorskip("timm")

FILE = Path(__file__).resolve().parents[1] / "examples/flax_vit.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flax_vit", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_jax_example_runs(example: ModuleType) -> None:
    env = {"PYTHONPATH": str(Path(srt_ext.__file__).parents[1])}
    printed = run_python(FILE, env=env, timeout=120).stdout
    assert printed == "image (1, 3, 160, 224) -> field (1, 128, 80, 112), float32\n"
    best = srt_ext.views.best(9, srt_ext.views.radius_for(example.PATCH))
    np.testing.assert_array_equal(example.OFFSETS, best.offsets)


@pytest.mark.parametrize("weights", ["small", pytest.param("random", marks=pytest.mark.slow)])
def test_jax_example_equals_torch(example: ModuleType, weights: str) -> None:
    """With the weights of the example, and with those of a timm ViT of another size."""
    if weights == "small":
        model, flax = small.load_small()[0], example.small_vit()
    else:
        timm_vit = pytest.importorskip("timm.models.vision_transformer").VisionTransformer
        sizes = {"patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}
        model = timm_vit(64, **sizes, class_token=False, global_pool="", dynamic_img_size=True)
        flax = example.ViT(96, 2, 3, 8, 8, nnx.Rngs(0))
        example.load(flax, {name: value.numpy() for name, value in model.state_dict().items()})
    image = np.array(example.read_image(example.DEMO / "astronaut.jpg", (96, 64)))
    image = np.concatenate([image, image[..., ::-1]])  # two images, to test the order of the views
    found = np.array(example.dense_features(flax, image))
    views = srt_ext.views.Views(torch.from_numpy(example.OFFSETS))
    expected = srt_ext.SRT(model.eval(), views, stride=example.STRIDE)(torch.from_numpy(image))
    assert np.abs(found).max() > 1
    np.testing.assert_allclose(found, expected.field.numpy(), rtol=0, atol=1e-5)
