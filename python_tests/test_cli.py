"""``srt-ext`` as a user meets it: a real ViT, a real photograph, and what goes wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("typer")

import timm
from cli import SMALL, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from skimage import data

from srt_ext import SRT, hub, views
from srt_ext.cli import common
from srt_ext.demo.small import load_small

WEIGHTS = Path(__file__).parents[2] / "shared/weights"
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def real(weights: object) -> tuple[object, ...]:
    return ("--model", MODEL, "--weights", weights)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real weights where they are, else random ones of the same model."""
    real = WEIGHTS / f"{MODEL}.fp16.safetensors"
    if real.exists():
        return real
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_file(timm.create_model(MODEL.split(".")[0]).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "chelsea.png"
    Image.fromarray(data.chelsea()).save(path)
    return path


def test_show_writes_the_picture(photo: Path, weights: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    code, text = run("show", photo, "-o", output, *real(weights), "--views", "grid:1")
    assert code == 0, text
    assert "448 x 298" in text
    assert "9 views" in text
    assert "model" in text
    assert "SRT" in text
    picture = np.asarray(Image.open(output).convert("RGB"))
    assert picture.shape[1] > 5 * picture.shape[0] * 0.9  # five panels side by side
    assert picture.std() > 20


def test_show_noise_adds_a_panel(photo: Path, weights: Path, tmp_path: Path) -> None:
    pictures = []
    for noise in ([], ["--noise"]):
        output = tmp_path / f"out{len(noise)}.png"
        options = ("--views", "grid:1", "--stride", 4, "--size", 128, *real(weights))
        code, text = run("show", photo, "-o", output, *options, *noise)
        assert code == 0, text
        pictures.append(np.asarray(Image.open(output).convert("RGB")))
    five, six = pictures
    assert six.shape[1] > 1.15 * five.shape[1]
    panel = six[:, 5 * six.shape[1] // 6 :]
    assert panel.std() > 20
    assert (panel == panel[:, :, :1]).mean() > 0.99  # grey


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_are_those_of_srt(photo: Path, weights: Path, tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"out{suffix}"
    options = ("--views", "grid:1", "--stride", 4, "--size", 64, *real(weights))
    code, text = run("features", photo, "-o", output, *options)
    assert code == 0, text
    if suffix == ".npz":
        tensors = {k: torch.from_numpy(v) for k, v in np.load(output).items()}
    else:
        tensors = load_file(output)
        with safe_open(output, "pt") as file:
            assert file.metadata()["views"] == "grid:1"

    model, config = hub.load_timm(MODEL, weights)
    small = Image.open(photo)
    small.thumbnail((64, 64), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    assert config["mean"] == (0.5, 0.5, 0.5)
    expected = SRT(model, views.grid(1), stride=4)((pixels - 0.5) / 0.5)
    torch.testing.assert_close(tensors["field"], expected.field[0])
    assert expected.prefix is not None
    torch.testing.assert_close(tensors["prefix"], expected.prefix[0])


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the real weights are not here")
def test_real_weights_separate_the_astronaut_from_the_wall(tmp_path: Path, weights: Path) -> None:
    """The field of a real ViT means something: suit is closer to suit than to the background."""
    photo, output = tmp_path / "astronaut.png", tmp_path / "field.npz"
    Image.fromarray(data.astronaut()).save(photo)
    code, text = run("features", photo, "-o", output, *real(weights), "--views", "grid:1")
    assert code == 0, text
    field = torch.nn.functional.normalize(torch.from_numpy(np.load(output)["field"]), dim=0)
    suit, other_sleeve, wall = field[:, 330, 60], field[:, 270, 262], field[:, 60, 290]
    assert suit @ other_sleeve > suit @ wall + 0.3  # 0.87 and 0.27


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jpg"], "missing.jpg does not exist"),
        (["broken.jpg"], "no readable picture"),
        (["PHOTO", "--model", "vit_nonsense"], "timm has no model 'vit_nonsense'"),
        (["PHOTO", "--model", "resnet18", "--weights", "WEIGHTS"], "do not fit resnet18"),
        (["PHOTO", "--weights", "missing.safetensors"], "missing.safetensors is no file"),
        (["PHOTO", "--weights", "broken.jpg"], "no readable safetensors file"),
        (
            ["PHOTO", "--weights", "WEIGHTS", "--model", "vit_small_patch16_224"],
            "do not fit vit_small_patch16_224",
        ),
        (["PHOTO", "--weights", "WEIGHTS"], f"do not fit {common.DEFAULT_MODEL}: cls_token must "),
        (["PHOTO", "--weights", "WEIGHTS"], "must be [1, 1, 384], is [1, 1, 192]"),
        (["PHOTO", "--weights", "WEIGHTS"], "more). Name the model that they are of with --model"),
        (["PHOTO", "--views", "ring"], "views must be"),
        (
            ["PHOTO", *real("WEIGHTS"), "--layer", "12"],
            "layers must be in -12 ... 11; got 12",
        ),
        (["PHOTO", *real("WEIGHTS"), "--stride", "5"], "stride must divide"),
        (["PHOTO", "-o", "out.xyz"], "must end in"),
        (["PHOTO", "-o", "nowhere/out.png"], "does not exist"),
        (["PHOTO", "-o", "folder.png"], "folder.png cannot be written"),
        (["PHOTO", "--weights", "."], "is no file"),
        (["PHOTO", "--weights", "WEIGHTS", "--model", MODEL + "x"], "timm cannot make"),
        (["no[/b]picture[red].png"], "no[/b]picture[red].png does not exist"),
        (["dot.png", *real("WEIGHTS")], "fewer than 3 tokens"),
        (["float.tif", *real("WEIGHTS")], "is no picture of 8 or 16 bits"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    arguments: list[str],
    message: str,
    photo: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    Path("folder.png").mkdir()
    Image.new("RGB", (3, 3)).save("dot.png")
    Image.new("F", (20, 20)).save("float.tif")
    names = {"PHOTO": str(photo), "WEIGHTS": str(weights)}
    code, text = run("show", *(names.get(a, a) for a in arguments))
    assert code == 1
    assert "error:" in text
    assert message in text
    assert "Traceback" not in text
    assert not Path("srt.png").exists()


def test_depth_and_transparency(tmp_path: Path) -> None:
    """16 bits keep their shades, and what is transparent is white."""
    from srt_ext.cli.images import open_image

    shades = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(shades).save(tmp_path / "deep.png")
    deep = np.asarray(open_image(tmp_path / "deep.png"))
    assert (deep == (shades // 257)[:, :, None]).all()
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(open_image(tmp_path / "clear.png")) == 255).all()


def test_a_picture_too_large_to_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    code, text = run("show", tmp_path / "bomb.png")
    assert code == 1
    assert "no readable picture" in text


# ---- the default model --------------------------------------------------------------------------


class Hub:
    """A cache, and what is asked through the client of the hub."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers = False
        self.asked: list[str] = []

    def head(self, url: str, timeout: float) -> None:
        self.asked.append(url)
        if not self.answers:
            raise ConnectionError("no network")

    def keep(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """Pretrained weights, as the client leaves them."""
        path = self.folder / f"models--timm--{name}"
        for part, content in (("refs/main", "abc"), ("snapshots/abc/config.json", "{}")):
            (path / part).parent.mkdir(parents=True)
            (path / part).write_text(content)
        save_file(state, path / "snapshots/abc/model.safetensors")


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty one, without a network."""
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made.folder))
    monkeypatch.setattr("huggingface_hub.get_session", lambda: made)
    return made


def test_without_a_network_the_default_is_the_small_model(tmp_path: Path) -> None:
    """As the one line says, and the hub's client does not try again and again."""
    Image.new("RGB", (40, 32)).save(tmp_path / "photo.png")
    output = tmp_path / "out.safetensors"
    options = ("features", tmp_path / "photo.png", "-o", output, "--views", "grid:1")
    result = subprocess.run(
        [sys.executable, "-m", "srt_ext", *(str(option) for option in options)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_CACHE": str(tmp_path),
            "PYTHONWARNINGS": "ignore",  # of other packages
        },
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"note: the weights of {common.DEFAULT_MODEL} cannot be had ")
    assert "using the small ViT that comes with srt_ext; --model or --weights" in result.stderr
    with safe_open(output, "pt") as file:
        assert file.metadata()["model"] == "small"


@pytest.mark.parametrize("tag", ["", ".augreg_in21k_ft_in1k", ".nonsense"])
def test_a_model_that_was_named_is_never_another(
    photo: Path, fake_hub: Hub, tmp_path: Path, tag: str
) -> None:
    name, output = MODEL.split(".")[0] + tag, tmp_path / "out.npz"
    code, text = run("features", photo, "-o", output, "--model", name)
    assert code == 1
    assert text.count("\n") == 1
    assert text.startswith(f"error: the pretrained weights of {name} cannot be had: ")
    assert ("tag (nonsense)" if tag == ".nonsense" else "does not answer: Conn") in text
    assert "--weights" in text
    assert not output.exists()


def test_the_default_is_a_dinov2_of_timm(photo: Path, fake_hub: Hub, tmp_path: Path) -> None:
    """From the hub's cache, and the hub is not asked."""
    model = timm.create_model(common.DEFAULT_MODEL, dynamic_img_size=True).eval()
    fake_hub.keep(common.DEFAULT_MODEL, model.state_dict())
    output = tmp_path / "out.safetensors"
    code, text = run("features", photo, "-o", output, "--views", "grid:1", "--size", 64)
    assert code == 0, text
    assert "note" not in text
    assert fake_hub.asked == []
    with safe_open(output, "pt") as file:
        assert file.metadata()["model"] == common.DEFAULT_MODEL
    small = Image.open(photo)
    small.thumbnail((64, 64), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    expected = SRT(model, views.grid(1))(((pixels - mean) / std)[None])
    assert expected.field.shape[1:] == (384, 43, 64)  # of 4 x 5 patches of 14 pixels
    torch.testing.assert_close(load_file(output)["field"], expected.field[0])


def test_the_hub_is_asked_once(fake_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it does not answer timm is left alone; if it does, what timm makes of it is told."""
    name, made = f"{SMALL}.r160_in1k", timm.create_model
    tried: list[Any] = []

    def create_model(*arguments: Any, **settings: Any) -> Any:
        tried.append(arguments)
        if settings == {"dynamic_img_size": True} and arguments == (name, True):
            raise OSError("no such file there")
        return made(*arguments, **settings)

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(hub.PretrainedError, match="does not answer: ConnectionError"):
        hub.load_timm(name)
    assert (len(fake_hub.asked), len(tried)) == (1, 0)
    fake_hub.answers = True
    with pytest.raises(hub.PretrainedError, match="OSError: no such file there"):
        hub.load_timm(name)
    assert (len(fake_hub.asked), len(tried)) == (2, 1)

    model = made(name)
    fake_hub.keep(name, model.state_dict())
    loaded = hub.load_timm(name)[0].state_dict()
    assert all(tensor.equal(loaded[key]) for key, tensor in model.state_dict().items())
    assert len(fake_hub.asked) == 2


def test_the_small_model_by_name(photo: Path, fake_hub: Hub, tmp_path: Path) -> None:
    model, config = load_small()
    save_file({k: v + 1 for k, v in model.state_dict().items()}, tmp_path / "more.safetensors")
    pixels = torch.from_numpy(np.array(Image.open(photo).resize((40, 32)))).permute(2, 0, 1) / 255
    Image.open(photo).resize((40, 32)).save(tmp_path / "photo.png")
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    for options, more in (((), 0), (("--weights", tmp_path / "more.safetensors"), 1)):
        output = tmp_path / f"out{more}.npz"
        settings = ("--model", "small", "--views", "grid:1", *options)
        code, text = run("features", tmp_path / "photo.png", "-o", output, *settings)
        assert code == 0, text
        assert "note" not in text
        state = {k: v + more for k, v in load_small()[0].state_dict().items()}
        model.load_state_dict(state)
        expected = SRT(model, views.grid(1))(((pixels - mean) / std)[None])
        torch.testing.assert_close(torch.from_numpy(np.load(output)["field"]), expected.field[0])
    assert fake_hub.asked == []


def test_info_tells_whether_the_default_is_in_the_cache(fake_hub: Hub) -> None:
    assert re.search(rf"default model +{common.DEFAULT_MODEL}: not in the hub's", run("info")[1])
    fake_hub.keep(common.DEFAULT_MODEL, {})
    assert re.search(rf"default model +{common.DEFAULT_MODEL}: in the hub's", run("info")[1])
    assert fake_hub.asked == []


def test_info_tells_backends() -> None:
    code, text = run("info")
    assert code == 0
    for word in ("srt_ext", "torch", "CPU", "CUDA", torch.ops.srt._cpu_kernels(), "timm"):
        assert word in text
    assert re.search(r"srt_ext.numpy +(not available: |\w+ \(of .*\), \d+ threads)", text)


def test_info_without_what_the_command_needs() -> None:
    script = (
        "import sys; sys.modules['typer'] = sys.modules['torch'] = None\n"
        "from srt_ext.__main__ import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert result.returncode == 1
    assert "the command needs packages that are not installed" in result.stderr
    assert "no ops: torch is not installed" in result.stderr
    assert re.search("srt_ext.numpy is (not )?available", result.stderr)


def test_module_and_script_are_the_same_command() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "srt_ext", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(name in text for name in ("show", "features", "info"))
