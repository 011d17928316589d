"""Checks that an installed srt_ext is complete, including all kernels that its torch can use.

Run it in a folder from which no checkout of srt_ext can be imported instead.
"""

import ctypes
from importlib.util import find_spec
from pathlib import Path

import torch

import srt_ext
import srt_ext.numpy
from srt_ext._library import cuda_unavailable

with_cuda = torch.version.cuda is not None
print(f"srt_ext {srt_ext.__version__} at {srt_ext.__path__[0]}")
print(f"torch {torch.__version__}; CUDA kernels: {cuda_unavailable or 'loaded'}")
assert (cuda_unavailable is None) == with_cuda

tokens = torch.randn(9, 2, 12, 8)
arguments = (tokens, srt_ext.views.grid(1).offsets, (3, 4), (4, 4))
field = srt_ext.ensemble(*arguments)
torch.testing.assert_close(field, srt_ext.reference.ensemble(*arguments).float())
same = srt_ext.numpy.ensemble(tokens.numpy(), arguments[1].numpy(), *arguments[2:])
assert torch.equal(torch.from_numpy(same), field)
assert ctypes.CDLL(str(Path(srt_ext.__path__[0], "_xla.so"))).srt_ensemble
if find_spec("jax"):
    import srt_ext.jax

    same = srt_ext.jax.ensemble(tokens.numpy(), arguments[1].numpy(), *arguments[2:])
    assert torch.equal(torch.from_numpy(same.__array__()), field)
for name in ("small.safetensors", "astronaut.jpg", "MODEL_CARD.md"):
    assert (Path(srt_ext.__path__[0]) / "demo" / name).is_file(), name
if torch.cuda.is_available():
    torch.testing.assert_close(srt_ext.ensemble(tokens.cuda(), *arguments[1:]).cpu(), field)
