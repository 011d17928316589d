"""Builds the native library by driving CMake; metadata stands in pyproject.toml.

CMakeLists.txt is the one truth of the native build: what is compiled, with which flags, for which
instruction sets and GPUs. This file only tells setuptools when to run it and where the result goes.
The results ``_C.so`` and ``_C_cuda.so`` are no Python extensions: they are loaded by
``torch.ops.load_library`` and know nothing of the interpreter, so one build serves every Python and
every torch >= 2.10. ``_numpy.*.so`` (srt_ext.numpy) is one, by pybind11, for the Python that builds
it; it knows nothing of torch.

``pip install .`` builds in isolation, with the torch that pyproject.toml asks for; add
``--no-build-isolation`` to build with the torch (and cmake, ninja and pybind11) that you have.
``-v`` shows what the build chose. Nothing is downloaded here.

The CUDA kernels are built where nvcc is found. In the environment ``SRT_CUDA=1`` makes it an error
if it is not, ``SRT_CUDA=0`` leaves them out, and ``SRT_CUDA_ARCHS`` (``90``, ``80;90``, ``native``)
builds for other GPUs than ``all-major``, the default.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def libraries(package: Path) -> list[Path]:
    return sorted([*package.glob("_C*.so"), *package.glob("_numpy*.so")])


class CMakeBuild(build_ext):
    """Configures, builds and installs CMakeLists.txt into the package folder."""

    def run(self) -> None:
        package = ROOT / "srt_ext" if self.inplace else Path(self.build_lib).resolve() / "srt_ext"
        # Compiled objects are kept for the next build. The cache is not: its paths are those of
        # this build, and an isolated build is in a new folder every time.
        build = ROOT / "build" / "cmake"
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        for name in ("SRT_CUDA", "SRT_CUDA_ARCHS"):
            if name in os.environ:
                options.append(f"-D{name}={os.environ[name]}")
        subprocess.check_call(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options])
        subprocess.check_call(["cmake", "--build", build])
        for library in libraries(package):  # of a build with other options
            library.unlink()
        subprocess.check_call(
            ["cmake", "--install", build, "--component", "python", "--prefix", package]
        )

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "srt_ext"
        return [str(path) for path in libraries(package)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # Named so that setuptools makes a platform wheel; CMake knows the sources.
    ext_modules=[Extension("srt_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
