"""The built libraries: symbols, instructions, schemas, threads, forks and import."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from process import run_python
from samples import Ensemble, Shift
from torch.utils.data import DataLoader, Dataset

import srt_ext
from srt_ext._library import cuda_unavailable

PACKAGE = Path(srt_ext.__file__).parent
LIBRARY = PACKAGE / "_C.so"
NUMPY = next(PACKAGE.glob("_numpy*.so"), None)
SOURCES = Path(__file__).resolve().parents[1] / "csrc"


def output_of(tool: str, *args: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def undefined_symbols(library: Path) -> list[str]:
    listing = output_of("nm", "-D", "--undefined-only", "-C", str(library))
    return [line.split(maxsplit=1)[1] for line in listing.splitlines()]


# ---- symbols, instructions, schemas -------------------------------------------------------------


@pytest.mark.parametrize("name", ["_C.so", "_C_cuda.so"])
def test_undefined_symbols_are_of_the_stable_abi(name: str) -> None:
    if not (PACKAGE / name).exists():
        pytest.skip(f"no {name}: built without nvcc")
    symbols = undefined_symbols(PACKAGE / name)
    of_torch = [s for s in symbols if re.search(r"torch|aoti|\bat::|\bc10::|caffe2", s)]
    assert "aoti_torch_library_init_impl" in of_torch
    # C functions have neither parameters nor a namespace in the demangled name.
    assert [s for s in of_torch if not re.fullmatch(r"(aoti_torch|torch)_\w+", s)] == []
    assert [s for s in symbols if re.match(r"_?Py|pybind11", s)] == []
    # The CUDA runtime is linked statically, so the binary does not need the one of a certain torch.
    assert [s for s in symbols if re.match(r"(__)?cuda|cu[A-Z]", s)] == []


def test_cuda_kernels_are_registered_or_the_reason_is_given() -> None:
    for op in ("shift", "windows", "ensemble", "ensemble.out"):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"srt::{op}", "CUDA")
        assert registered == (cuda_unavailable is None)
    if torch.version.cuda is None:
        assert cuda_unavailable == "torch was built without CUDA"
    elif not (PACKAGE / "_C_cuda.so").exists():
        assert "_C_cuda.so does not exist. srt_ext was built without" in str(cuda_unavailable)
    else:
        assert cuda_unavailable is None


def test_a_call_on_cuda_without_kernels_explains_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It extends the error of torch that no CUDA kernel is registered."""
    refusal = "Could not run 'srt::shift' with arguments from the 'CUDA' backend."
    call = "shift", torch.ops.srt.shift.default._schema, (torch.ones(1, 1, 2, 2), torch.ones(1, 2))
    monkeypatch.setattr(srt_ext.ops, "cuda_unavailable", "nvcc was not found")
    with pytest.raises(NotImplementedError, match=r"srt::shift: CUDA .* available: nvcc was not"):
        srt_ext.ops._explain(NotImplementedError(refusal), *call, {})
    monkeypatch.setattr(srt_ext.ops, "cuda_unavailable", None)
    with pytest.raises(NotImplementedError, match="Could not run"):
        srt_ext.ops._explain(NotImplementedError(refusal), *call, {})


def test_the_numpy_module_does_not_depend_on_torch() -> None:
    if NUMPY is None:
        pytest.skip("srt_ext.numpy was not built")
    symbols = undefined_symbols(NUMPY)
    assert "PyErr_SetString" in symbols
    assert [s for s in symbols if re.search(r"torch|\bat::|\bc10::|caffe2|cuda", s)] == []
    assert not re.search("torch|cuda", output_of("ldd", str(NUMPY)))


@pytest.mark.parametrize("name", ["_xla.so", "_xla_cuda.so"])
def test_libraries_for_jax_need_neither_torch_nor_python(name: str) -> None:
    library = PACKAGE / name
    if not library.exists():
        pytest.skip("srt_ext.jax was not built")
    symbols = undefined_symbols(library)
    assert any(symbol.startswith("memcpy") for symbol in symbols)
    assert [s for s in symbols if re.search(r"torch|\bat::|\bc10::|caffe2|^_?Py", s)] == []
    assert not re.search(
        "torch|python|xla", output_of("ldd", str(library)).replace(str(library), "")
    )


@pytest.mark.parametrize(
    ("folder", "foreign", "beside"),
    [
        ("srt", r"torch|ATen|c10|Python\.h|pybind11|numpy", "srt"),
        ("numpy", r"torch|ATen|c10", "srt"),
        ("torch", r"Python\.h|pybind11|numpy", "srt"),
        ("xla", r"torch|ATen|c10|Python\.h|pybind11|numpy", "srt"),
    ],
)
def test_dependencies_point_one_way(folder: str, foreign: str, beside: str) -> None:
    """The kernels include neither torch nor Python; each binding includes only the kernels."""
    if not SOURCES.is_dir():
        pytest.skip("not in a checkout")
    files = (SOURCES / folder).rglob("*")
    files = [path for path in files if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(files) > 2
    for path in files:
        for include in re.findall(r"^\s*#\s*include\s*([<\"].*[>\"])", path.read_text(), re.M):
            if include.startswith('"'):
                inside = (path.parent / include.strip('"')).resolve()
                assert inside.is_relative_to(SOURCES / folder) or inside.is_relative_to(
                    SOURCES / beside
                ), path
            else:
                assert not re.search(foreign, include), path


def instruction_sets(library: Path) -> dict[str, list[str]]:
    """The instruction sets of the copies of each function of the library, by its name."""
    functions = defaultdict(list)
    listing = output_of("objdump", "-d", "--no-show-raw-insn", str(library))
    for body in re.split(r"\n(?=[0-9a-f]+ <)", listing)[1:]:
        name = body[body.index("<") + 1 : body.index(">:")]
        if re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[1-7]", body):
            functions[name].append("avx512")
        else:
            functions[name].append("avx2" if re.search(r"\n[^\t]*\tv\w", body) else "baseline")
    return functions


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="reads x86 code")
@pytest.mark.parametrize("library", [LIBRARY, NUMPY], ids=["_C", "_numpy"])
def test_wide_instructions_stay_in_their_objects(library: Path | None) -> None:
    """Functions that the linker may share between objects must run on every processor."""
    if library is None:
        pytest.skip("srt_ext.numpy was not built")
    functions = instruction_sets(library)
    # srt::cpu::(anonymous namespace), or local to a function of it.
    local = "_ZZ?N3srt3cpu12_GLOBAL__N_1"
    for name, sets in functions.items():
        assert re.match(local, name) or set(sets) == {"baseline"}, name
    names = r"4mean|5shift|8per_view|13mean_backward|14shift_backward"
    names += r"|7windows|14windows_points|16windows_backward"
    kernel = local + rf"({names})I.*Plan"
    kernels = {n: s for n, s in functions.items() if re.match(kernel, n)}
    kernels = {n: s for n, s in kernels.items() if "." not in n}  # without cold parts
    # shift and windows of five dtypes; mean and moments of four, two of them also into float32; the
    # median and its stream. Gradients of four dtypes: of the mean, of shift, two of windows.
    assert len(kernels) == 2 * 5 + 2 * (4 + 2) + 2 * 4 + 4 + 4 + 2 * 4
    # One copy per object. A kernel that only calls others contains no vector code.
    assert {name: len(sets) for name, sets in kernels.items()} == dict.fromkeys(kernels, 3)
    inner = {name: sets for name, sets in functions.items() if re.match(local, name)}
    assert set().union(*inner.values()) == {"avx2", "avx512", "baseline"}


def test_forcing_kernels() -> None:
    available = torch.ops.srt._available_cpu_kernels().split(",")
    assert available[0] == "baseline"
    assert torch.ops.srt._cpu_kernels() == available[-1]
    for name in ("", "sse9", "AVX2", "baseline,avx2"):
        with pytest.raises(RuntimeError, match=re.escape(f"got '{name}'")):
            torch.ops.srt._force_cpu_kernels(name)
    assert torch.ops.srt._cpu_kernels() == available[-1]


def test_schemas_do_not_change() -> None:
    """Only keyword arguments with defaults, other than tensors, may be added."""
    ensemble = (
        "Tensor tokens, Tensor offsets, int[2] grid, int[2] patch, Tensor? weights=None, *, "
        'str reduce="mean", str upsample="bilinear", str border="coverage", int[2] stride=1'
    )
    places = "Tensor tokens, Tensor offsets, int[2] grid, int[2] patch"
    modes = '*, str upsample="bilinear", str border="coverage", int[2] stride=1'
    views = f"{places}, Tensor? weights=None, {modes}"
    shift = 'Tensor image, Tensor offsets, *, str padding="reflect", str interpolation="bilinear"'
    windows = "Tensor image, Tensor centers, int[2] size, Tensor? scale=None, *, "
    windows += 'str padding="border"'
    promised = (
        f"srt::shift({shift} ...) -> Tensor",
        f"srt::windows({windows} ...) -> Tensor",
        f"srt::ensemble({ensemble} ...) -> Tensor",
        f"srt::ensemble.out({ensemble} ..., Tensor(a!) out) -> ()",
        f"srt::ensemble_moments({views} ...) -> (Tensor mean, Tensor var)",
        f"srt::accumulate_mean_(Tensor(a!) mean, Tensor(b!) weight, {views} ...) -> ()",
        f"srt::accumulate_moments_(Tensor(a!) mean, Tensor(b!) var, Tensor(c!) weight, {views}"
        " ...) -> ()",
        f"srt::accumulate_median_(Tensor(a!) window, Tensor(b!) count, {places}, {modes}"
        " ...) -> ()",
    )
    for schema in promised:
        begin, end = schema.split(" ...")
        name, _, overload = begin[len("srt::") : begin.index("(")].partition(".")
        actual = str(getattr(getattr(torch.ops.srt, name), overload or "default")._schema)
        assert actual.startswith(begin)
        assert actual.endswith(end)


# ---- threads and processes ----------------------------------------------------------------------


def busy_call(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A call that is large enough for torch to split it over its threads."""
    case = Ensemble((7, 9), (8, 8), channels=65, seed=seed)
    args, modes = case.call(case.tokens())
    shift = Shift((65, 127), seed=seed)
    image, moves = shift.call(shift.image())
    return srt_ext.ensemble(*args, **modes), srt_ext.shift(*image, **moves)


@pytest.mark.parametrize("intra_op", [1, 3])
def test_concurrent_calls(intra_op: int, threads: Callable[[int], None]) -> None:
    threads(intra_op)
    seeds = [seed % 5 for seed in range(40)]
    expected = [busy_call(seed) for seed in range(5)]
    with ThreadPoolExecutor(8) as pool:
        for seed, results in zip(seeds, pool.map(busy_call, seeds), strict=True):
            assert all(map(torch.equal, results, expected[seed]))


class _Calls(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> torch.Tensor:
        return torch.cat([result.flatten() for result in busy_call(seed)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_workers(threads: Callable[[int], None]) -> None:
    """A child does not have the threads of its parent and must not wait for them."""
    threads(2)
    expected = [torch.cat([r.flatten() for r in busy_call(seed)]) for seed in range(4)]
    loader = DataLoader(
        _Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for result, alone in zip(loader, expected, strict=True):
        assert torch.equal(result, alone)


# ---- import -------------------------------------------------------------------------------------

IMPORT = """
import sys
sys.path.insert(0, {path!r})
{before}
import srt_ext
assert srt_ext.__version__
try:
    {use}
except ImportError as error:
    print(error)
"""

NO_TORCH = "sys.modules['torch'] = None"
OLD_TORCH = """
import types, importlib.machinery as m
torch = types.ModuleType('torch')
torch.__version__ = '2.9.1+cpu'
torch.__spec__ = m.ModuleSpec('torch', None)
sys.modules['torch'] = torch
"""
USE, USE_NUMPY = "srt_ext.ensemble", "import srt_ext.numpy"
USE_CUDA = (
    "import torch, srt_ext._library; print(srt_ext._library.cuda_unavailable); "
    "srt_ext.shift(torch.ones(1, 1, 2, 2), torch.zeros(1, 2))"
)
OTHER = "_numpy.cpython-399-x86_64-linux-gnu.so"
BROKEN_TORCH = {"torch/__init__.py": "raise ImportError('libcudart.so.13: not found')"}
BROKEN = "not a library"
BROKEN_NUMPY = {f"srt_ext/{NUMPY and NUMPY.name}": BROKEN}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "files", "before", "use", "reason"),
    [
        (None, {}, NO_TORCH, USE, "not available: torch is not installed. Run pip install"),
        (None, BROKEN_TORCH, "", USE, "cannot be imported: libcudart.so.13: not found"),
        (None, {}, OLD_TORCH, USE, "torch >= 2.10 is required; found 2.9.1+cpu"),
        ("*.so", {}, "", USE, "_C.so does not exist. Python imported the sources"),
        ("_C.so", {"srt_ext/_C.so": BROKEN}, "", USE, "_C.so cannot be loaded"),
        ("_C_cuda.so", {}, "", USE_CUDA, "_C_cuda.so does not exist. srt_ext was built"),
        ("_C_cuda.so", {"srt_ext/_C_cuda.so": BROKEN}, "", USE_CUDA, "cannot be loaded"),
        ("*.so", {}, NO_TORCH, USE_NUMPY, "does not contain _numpy."),
        ("*.so", {f"srt_ext/{OTHER}": ""}, NO_TORCH, USE_NUMPY, f"for another Python: {OTHER}"),
        ("*.so", {}, NO_TORCH, "import srt_ext.jax", "_xla.so does not exist"),
        ("*.so", {"srt_ext/_xla.so": BROKEN}, NO_TORCH, "import srt_ext.jax", "cannot be loaded"),
        ("*.so", BROKEN_NUMPY, NO_TORCH, USE_NUMPY, "srt_ext._numpy cannot be loaded"),
        (None, {}, NO_TORCH, "srt_ext.dlpack", "srt_ext.dlpack is not available"),
        (None, {}, NO_TORCH, "import srt_ext.dlpack", "srt_ext.dlpack is not available"),
        (None, {}, NO_TORCH, "import srt_ext.onnx", "srt_ext.onnx is not available"),
    ],
)
def test_import_never_fails(
    without: str | None, files: dict[str, str], before: str, use: str, reason: str, tmp_path: Path
) -> None:
    """The first use of a library that does not load raises an error with the reason."""
    if use == USE_CUDA and torch.version.cuda is None:
        pytest.skip("torch was built without CUDA")
    ignored = without and shutil.ignore_patterns(without)
    shutil.copytree(PACKAGE, tmp_path / "srt_ext", ignore=ignored)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    script = IMPORT.format(path=str(tmp_path), before=before, use=use)
    assert reason in run_python("-c", script, cwd=tmp_path).stdout


@pytest.mark.slow
def test_import_does_not_load_the_compiler_of_torch(tmp_path: Path) -> None:
    """Loading it takes a second; ops, and SRT with layers by index, do not need it."""
    use = "print('torch._dynamo' in sys.modules)"
    script = IMPORT.format(path=str(PACKAGE.parent), before="", use=use)
    assert run_python("-c", script, cwd=tmp_path).stdout.strip() == "False"
