"""Draws the figures of the README, docs/srt.jpg and docs/demo.jpg, and writes their photograph.

    python scripts/readme_picture.py [--weights FILE.safetensors]

FILE contains the weights of the ViT-Ti of docs/srt.jpg; without the option, timm downloads them.
The photograph is skimage.data.astronaut(): Eileen Collins, by NASA, in the public domain.
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image
from skimage import data

ROOT = Path(__file__).parents[1]
PHOTO = ROOT / "srt_ext" / "demo" / "astronaut.jpg"
MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"

photo = Image.fromarray(data.astronaut()).resize((448, 448), Image.Resampling.LANCZOS)
photo.save(PHOTO, quality=90)
show = ["show", PHOTO, "-o", ROOT / "docs" / "srt.jpg", "--views", "grid:6:2", "--model", MODEL]
for command in ([*show, *sys.argv[1:]], ["demo", "-o", ROOT / "docs" / "demo.jpg"]):
    subprocess.run([sys.executable, "-m", "srt_ext", *command], check=True)
