"""The examples in docstrings and documentation pages run."""

import doctest
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from process import run_python

import srt_ext

ROOT = Path(__file__).resolve().parents[1]
ON_RAY = ROOT / "docs/extraction.md"  # whose blocks follow each other: .ci/run --full runs them
PAGES = sorted({*ROOT.glob("docs/*.md")} - {ON_RAY})


# Python blocks by page, section heading, and number within the section.
EXAMPLES = {
    f"{page.stem}: {section.splitlines()[0].lstrip('# ')} {i}": code
    for page in PAGES
    for section in page.read_text().split("\n## ")
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", section, re.M | re.S))
}


NEEDED = {
    "data": "pyarrow",
    "jax": "srt_ext.jax",
    "numpy": "srt_ext.numpy",
    "ray.features": "pyarrow",
    "spot": "timm",
}
MODULES = [*NEEDED, "dlpack", "onnx", "ops", "polyphase", "reference", "srt", "streaming", "views"]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module: str) -> None:
    if module in NEEDED:
        pytest.importorskip(NEEDED[module], exc_type=ImportError)
    if module == "ray.features":
        pytest.importorskip("timm")
    results = doctest.testmod(importlib.import_module(f"srt_ext.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_page(name: str, tmp_path: Path) -> None:
    for module in re.findall(r"^(?:import|from) ([\w.]+)", EXAMPLES[name], re.M):
        if find_spec(module.split(".")[0]) is None or find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    script = tmp_path / "example.py"  # a file, because spawned workers import it
    script.write_text(EXAMPLES[name])
    path = {"PYTHONPATH": str(Path(srt_ext.__file__).parents[1])}
    output = run_python(script, cwd=ROOT, env=path, timeout=120).stdout
    printed = re.findall(r"print\(.*\)  # (.+)", EXAMPLES[name])
    assert printed
    for line in printed:
        assert line in output
