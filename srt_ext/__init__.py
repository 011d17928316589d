"""Dense features from frozen Vision Transformers by Stochastic Resonance Transformers (SRT).

``import srt_ext`` registers ``torch.ops.srt.*``. The import always succeeds. If torch or the native
library is missing, the names that need it raise an :class:`ImportError` that states the reason;
``srt-ext info`` prints the same reason.
"""

from typing import Any

from ._library import unavailable as _unavailable
from ._version import __version__

__all__ = [
    "SRT",
    "LayerTokens",
    "RunningMean",
    "RunningMedian",
    "RunningMoments",
    "SRTMoments",
    "SRTOutput",
    "ViewTokens",
    "__version__",
    "dlpack",
    "ensemble",
    "ensemble_moments",
    "polyphase",
    "reference",
    "sample",
    "shift",
    "spot",
    "views",
    "windows",
]

if _unavailable is None:
    from . import _autograd as _autograd
    from . import dlpack, reference, spot, views
    from .ops import ensemble, ensemble_moments, sample, shift, windows
    from .polyphase import polyphase
    from .srt import SRT, LayerTokens, SRTMoments, SRTOutput, ViewTokens
    from .streaming import RunningMean, RunningMedian, RunningMoments


def __getattr__(name: str) -> Any:
    if _unavailable is not None and name in __all__:
        raise ImportError(f"srt_ext.{name} is not available: {_unavailable}")
    if _unavailable is None and name == "array":
        import warnings

        warnings.warn(
            "srt_ext.array is deprecated; use srt_ext.dlpack", DeprecationWarning, stacklevel=2
        )
        return dlpack
    raise AttributeError(f"module 'srt_ext' has no attribute {name!r}")
