"""Builds the native libraries by running CMake. The metadata of the package is in pyproject.toml.

CMakeLists.txt defines the native build: sources, flags, instruction sets and GPUs. This file only
integrates it into setuptools. ``_C.so`` and ``_C_cuda.so`` are not Python extensions:
``torch.ops.load_library`` loads them, and they do not depend on the interpreter, so one build works
with every Python and every torch >= 2.10. ``_xla.so`` and ``_xla_cuda.so`` (srt_ext.jax) work with
every Python and every jaxlib that is at least as new as the headers of the build. ``_numpy.*.so``
(srt_ext.numpy) is a pybind11 extension for the Python that builds it. The latter three do not
depend on torch.

``pip install .`` builds in isolation, with the torch that pyproject.toml requires. Add
``--no-build-isolation`` to build with the installed torch, cmake, ninja and pybind11. ``-v`` prints
the configuration of the build. This file downloads nothing.

Environment variables:

- ``SRT_CUDA``: by default, the CUDA kernels are built if nvcc is found. ``1`` makes a missing nvcc
  an error; ``0`` disables the CUDA kernels.
- ``SRT_CUDA_ARCHS``: the GPU architectures, such as ``90``, ``80;90`` or ``native``. The default is
  ``all-major``.
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
    return sorted(path for name in ("_C", "_numpy", "_xla") for path in package.glob(f"{name}*.so"))


class CMakeBuild(build_ext):
    """Configures, builds and installs CMakeLists.txt into the package folder."""

    def run(self) -> None:
        package = ROOT / "srt_ext" if self.inplace else Path(self.build_lib).resolve() / "srt_ext"
        # Compiled objects are kept for the next build. The CMake cache is deleted: it contains
        # the paths of one build, and every isolated build has a new folder.
        build = ROOT / "build" / "cmake"
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        for name in ("SRT_CUDA", "SRT_CUDA_ARCHS"):
            if name in os.environ:
                options.append(f"-D{name}={os.environ[name]}")
        subprocess.check_call(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options])
        subprocess.check_call(["cmake", "--build", build])
        for library in libraries(package):  # from a build with other options
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
    # An extension is declared so that setuptools builds a platform wheel. CMake lists the sources.
    ext_modules=[Extension("srt_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
