"""The model used in the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from research.quality.fields import Network


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    """An untrained ViT-Ti/16 with two blocks."""
    import timm
    import torch
    from safetensors.torch import save_file

    from research.quality.fields import Network

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return Network("test_vit", path, [0, 1], "cpu")
