"""Builds the native library by driving CMake; metadata stands in pyproject.toml.

CMakeLists.txt is the one truth of the native build: what is compiled, with which flags, for which
instruction sets. This file only tells setuptools when to run it and where the result goes. The
result, ``_C.so``, is no Python extension: it is loaded by ``torch.ops.load_library`` and knows
nothing of the interpreter, so one build serves every Python and every torch >= 2.10.

``pip install .`` builds in isolation, with the torch that pyproject.toml asks for; add
``--no-build-isolation`` to build with the torch (and cmake and ninja) that you have. ``-v`` shows
what the build chose. Nothing is downloaded here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures, builds and installs CMakeLists.txt into the package folder."""

    def run(self) -> None:
        package = ROOT / "srt_ext" if self.inplace else Path(self.build_lib).resolve() / "srt_ext"
        build = Path(self.build_temp).resolve()
        # CMake keeps the paths of the first run; an isolated build has a new folder every time.
        options = [f"-DPython3_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
        subprocess.check_call(
            ["cmake", "-S", ROOT, "-B", build, "--fresh", "-G", "Ninja", *options]
        )
        subprocess.check_call(["cmake", "--build", build])
        subprocess.check_call(["cmake", "--install", build, "--prefix", package])

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "srt_ext" / "_C.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # Named so that setuptools makes a platform wheel; CMake knows the sources.
    ext_modules=[Extension("srt_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
