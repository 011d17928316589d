"""srt_ext.onnx against the ops, in PyTorch and exported in ONNX Runtime."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import samples
import torch
from hypothesis import given

import srt_ext
from srt_ext.onnx import SRT, Ensemble, Shift

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

PRECISION = {"rtol": 1e-5, "atol": 1e-5}
BATCH = torch.export.Dim("batch")
OPERATORS = {"Add", "Gather", "MatMul", "Mul", "Pad", "Reshape", "Slice", "Squeeze", "Transpose"}
BORDERS = [
    replace(
        samples.ENSEMBLES["grid"],
        offsets=((0.5, 1.25), (-3.0, 2.0), (0.5, -2.75), (-3.0, 40.0)),
        border=border,
        upsample=upsample,
        stride=stride,
    )
    for border, upsample, stride in samples.pairwise(
        samples.BORDERS, samples.UPSAMPLES, [(1, 1), (2, 3), (4, 6)]
    )
]


class Many(torch.nn.Module):
    """Several modules with one input each, because one export is faster than several."""

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [part(x) for part, x in zip(self.parts, inputs, strict=True)]


def exported(module: torch.nn.Module, inputs: Sequence[torch.Tensor], dim: int) -> Any:
    """The ONNX program, with a batch of any size along ``dim`` of each input."""
    shapes: Any = tuple({dim: BATCH} for _ in inputs)
    shapes = (shapes,) if isinstance(module, Many) else shapes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.onnx, about itself
        return torch.onnx.export(
            module, tuple(inputs), dynamo=True, dynamic_shapes=shapes, verbose=False
        )


def in_onnxruntime(program: Any) -> Callable[..., list[torch.Tensor]]:
    model = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        arrays = (x.contiguous().numpy() for x in inputs)
        results = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(result) for result in results]

    return run


def ensemble_of(case: samples.Ensemble) -> Ensemble:
    (_, *views), modes = case.call(torch.zeros(0))
    return Ensemble(*views, **modes)


def shift_of(case: samples.Shift) -> Shift:
    (_, offsets), modes = case.call(torch.zeros(0))
    return Shift(offsets, case.size, **modes)


# ---- in PyTorch ----------------------------------------------------------------------------------


@given(samples.ensembles())
def test_ensemble(case: samples.Ensemble) -> None:
    args, modes = case.call(case.tokens())
    expected = srt_ext.ensemble(*args, **modes)
    torch.testing.assert_close(ensemble_of(case)(args[0]), expected, **PRECISION)


@given(samples.shifts())
def test_shift(case: samples.Shift) -> None:
    args, modes = case.call(case.image())
    expected = srt_ext.shift(*args, **modes)
    torch.testing.assert_close(shift_of(case)(args[0]), expected, **PRECISION)


def test_whole_pixels_are_copied_bitwise() -> None:
    """In every dtype, next to values that are not finite, and with zeros from outside."""
    for padding in samples.PADDINGS:
        case = replace(samples.SHIFTS["whole"], padding=padding)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            args, modes = case.call(samples.poison(case.image(dtype), 0))
            result, expected = shift_of(case)(args[0]), srt_ext.shift(*args, **modes)
            assert result.dtype == dtype
            torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_views_of_weight_0_are_not_read_and_cells_without_a_view_are_0() -> None:
    offsets = torch.tensor([[0.0, 5.0], [1.0, -3.0], [0.0, 500.0]])
    tokens = torch.randn(3, 1, 6, 2)
    tokens[1] = torch.nan
    weights = torch.tensor([2.0, 0.0, 1.0])
    field = Ensemble(offsets, (2, 3), (4, 4), weights)(tokens)
    expected = srt_ext.ensemble(tokens, offsets, (2, 3), (4, 4), weights)
    torch.testing.assert_close(field, expected, **PRECISION)
    assert (field[..., 7:] == 0).all()  # only the first view counts, where it covers
    assert (field[..., :7] != 0).all()
    none = Ensemble(offsets, (2, 3), (4, 4), torch.zeros(3))
    assert (none(torch.randn(3, 1, 6, 2)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    case = samples.ENSEMBLES["weights"]
    tokens = case.tokens(dtype)
    result = ensemble_of(case)(tokens)
    assert result.dtype == dtype
    assert torch.equal(result, ensemble_of(case)(tokens.float()).to(dtype))


def test_tables_are_not_in_the_state_dict() -> None:
    """So the weights of a model around them load with ``strict=True``."""
    modules = ensemble_of(samples.ENSEMBLES["real"]), shift_of(samples.SHIFTS["real"])
    assert [list(module.state_dict()) for module in modules] == [[], []]
    tokens = samples.ENSEMBLES["real"].tokens()
    assert torch.equal(copy.deepcopy(modules[0])(tokens), modules[0](tokens))


def test_blocks_leave_out_most_zeros() -> None:
    """Each product reads a few tokens around the diagonal, not all 40."""
    module = Ensemble(srt_ext.views.best(16).offsets, (40, 40), (16, 16))
    assert module.rows.shape[3] <= 10  # of one view
    assert module.columns.shape[2] <= 16 * 10


# ---- in ONNX Runtime -----------------------------------------------------------------------------


@pytest.mark.slow  # test_srt_is_exported has ensembles, too
def test_ensembles_are_exported() -> None:
    """All borders, upsamplings, strides, weights and kinds of grids, for any batch."""
    cases = [*samples.ENSEMBLES.values(), *BORDERS]
    inputs = [replace(case, batch=2).tokens() for case in cases]
    program = exported(Many([ensemble_of(case) for case in cases]), inputs, 1)
    assert {node.op_type for node in program.model.graph} <= OPERATORS
    assert {node.domain for node in program.model.graph} == {""}
    run = in_onnxruntime(program)
    for batch in (1, 3):
        calls = [case.call(replace(case, batch=batch).tokens()) for case in cases]
        results = run(*(args[0] for args, _ in calls))
        for (args, modes), result in zip(calls, results, strict=True):
            torch.testing.assert_close(result, srt_ext.ensemble(*args, **modes), **PRECISION)


@pytest.mark.slow  # test_srt_is_exported has shifts, too
def test_shifts_are_exported() -> None:
    """All paddings and interpolations, for any batch."""
    cases = list(samples.SHIFTS.values())
    program = exported(Many([shift_of(case) for case in cases]), [c.image() for c in cases], 0)
    assert {node.op_type for node in program.model.graph} <= OPERATORS
    run = in_onnxruntime(program)
    for batch in (1, 3):
        calls = [case.call(replace(case, batch=batch).image()) for case in cases]
        results = run(*(args[0] for args, _ in calls))
        for (args, modes), result in zip(calls, results, strict=True):
            torch.testing.assert_close(result, srt_ext.shift(*args, **modes), **PRECISION)


def test_no_tensor_of_the_graph_holds_the_maps_of_all_views() -> None:
    offsets, grid, channels = srt_ext.views.grid(3).offsets, (14, 14), 8
    tokens = torch.randn(49, 1, 196, channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = Ensemble(offsets, grid, (16, 16))
        program: Any = torch.onnx.export(module, (tokens,), dynamo=True, verbose=False)
    field = channels * 224 * 224
    sizes = [x.shape.numpy() for node in program.model.graph for x in node.outputs]
    elements = [torch.Size(size).numel() for size in sizes]
    assert field in elements
    assert max(elements) <= 1.5 * field  # maps of all views have 49 * field


# ---- image to field ------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "weights, layers": {
        "views": (torch.tensor([[0.5, -2.0], [3.0, 1.25], [0.0, 0.0]]), torch.tensor([1.0, 0, 3])),
        "layers": [0, -1],
        "stride": (4, 3),
        "view_batch": 2,
    },
    "mirrored": {"views": "4+flip", "scale": 1.3, "stride": 5, "view_batch": "auto"},
    "circular": {
        "views": "ring:5:2.5",
        "border": "circular",
        "padding": "circular",
        "interpolation": "bicubic",
        "upsample": "nearest",
    },
}


def vit(**settings: Any) -> srt_ext.SRT:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"depth": 2, "embed_dim": 12, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **sizes).eval()
    return srt_ext.SRT(model, **settings)


def leaves(outputs: Any) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(outputs) if x is not None]


FAST = ("weights, layers",)
NAMES = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS]


@pytest.mark.parametrize("name", NAMES)
def test_srt_is_exported(name: str) -> None:
    """Around a ViT of timm, from the image to the field and the prefix tokens."""
    size = (48, 64) if name == "circular" else (45, 67)
    srt = vit(**SETTINGS[name])
    module = SRT(srt, size)
    images = torch.rand(2, 3, *size)
    torch.testing.assert_close(module(images), srt(images), **PRECISION)
    run = in_onnxruntime(exported(module, (images,), 0))
    for batch in (1, 3):
        images = torch.rand(batch, 3, *size)
        torch.testing.assert_close(run(images), leaves(srt(images)), **PRECISION)


def test_srt_around_a_callable_and_in_half_precision() -> None:
    model = torch.nn.Conv2d(3, 5, 8, stride=8).bfloat16()
    srt = srt_ext.SRT(model, "ring:5:2.5", patch=8)
    images = torch.rand(2, 3, 30, 20, dtype=torch.bfloat16)
    field, prefix = SRT(srt, (30, 20))(images)
    assert prefix is None
    torch.testing.assert_close(field, srt(images).field)


# ---- errors --------------------------------------------------------------------------------------

OFFSETS = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Ensemble([(0, 0)], 2, 4), TypeError, "offsets must be a torch.Tensor; got list"),
        (lambda: Ensemble(OFFSETS[0], 2, 4), ValueError, r"offsets must .* \[V, 2\]"),
        (lambda: Ensemble(OFFSETS[:0], 2, 4), ValueError, "srt::ensemble: .*view"),
        (lambda: Ensemble(OFFSETS / 0, 2, 4), ValueError, "offsets must be finite"),
        (lambda: Ensemble(OFFSETS, 0, 4), ValueError, r"grid must be .* >= 1; got \[0, 0\]"),
        (lambda: Ensemble(OFFSETS, 2, 4, stride=3), ValueError, "stride must divide"),
        (lambda: Ensemble(OFFSETS, 2, 4, [1, 1]), TypeError, "weights must be a torch.Tensor"),
        (lambda: Ensemble(OFFSETS, 2, 4, -OFFSETS[0] - 1), ValueError, "weights must be"),
        (lambda: Ensemble(OFFSETS, 2, 4, border="none"), ValueError, "border must be one of"),
        (
            lambda: Ensemble(OFFSETS, 2, 4, reduce="median"),
            ValueError,
            "srt::ensemble: reduce must be 'mean' for ONNX; .* got 'median'",
        ),
        (
            lambda: Ensemble(OFFSETS, 2, 4)(torch.zeros(2, 1, 5, 3)),
            ValueError,
            r"tokens must be \[V, B, N, C\], V = 2, N = 4; got \[2, 1, 5, 3\]",
        ),
        (
            lambda: Ensemble(OFFSETS, 2, 4)(torch.zeros(2, 1, 4, 3, dtype=torch.float64)),
            TypeError,
            "tokens must be float32, float16 or bfloat16; got torch.float64",
        ),
        (lambda: Shift(None, 4), TypeError, "offsets must be a torch.Tensor; got NoneType"),
        (lambda: Shift(OFFSETS, (4, 0)), ValueError, "size must be"),
        (lambda: Shift(OFFSETS.int(), 4), TypeError, "offsets must be float32 or float64"),
        (lambda: Shift(OFFSETS, 4, padding="none"), ValueError, "padding must be one of"),
        (
            lambda: Shift(OFFSETS, 4)(torch.zeros(1, 3, 4, 5)),
            ValueError,
            r"image must be \[B, C, H, W\], H = 4, W = 4; got \[1, 3, 4, 5\]",
        ),
        (lambda: SRT(torch.nn.Identity(), 32), TypeError, "srt must be a srt_ext.SRT; got Ident"),
        (
            lambda: SRT(vit(reduce="median"), 32),
            ValueError,
            "srt_ext.onnx.SRT: reduce of srt must be 'mean'; got 'median'",
        ),
        (lambda: SRT(vit(inject=0), 32), ValueError, "inject of srt must be None; got 0"),
        (
            lambda: SRT(vit(border="circular", padding="circular", anchor="full"), 32),
            ValueError,
            "anchor of srt must be None; got 'full'",
        ),
        (
            lambda: SRT(vit(), (32, 48))(torch.zeros(1, 3, 48, 32)),
            ValueError,
            r"images must be \[B, C, H, W\], C = 3, H = 32, W = 48; got \[1, 3, 48, 32\]",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("unit", [1e-60, 1e-40, 1e39, 1e60])
def test_only_ratios_of_weights_matter(unit: float) -> None:
    """Also for weights outside the range of float32."""
    case = replace(samples.ENSEMBLES["weights"], value_dtype=torch.float64)
    (tokens, offsets, grid, patch, weights), modes = case.call(case.tokens())
    module = Ensemble(offsets, grid, patch, weights * unit, **modes)
    expected = srt_ext.ensemble(tokens, offsets, grid, patch, weights, **modes)
    torch.testing.assert_close(module(tokens), expected, rtol=0, atol=1e-5)
