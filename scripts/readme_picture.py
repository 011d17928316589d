"""Makes docs/astronaut.jpg and the README's picture, docs/srt.jpg.

    python scripts/readme_picture.py [--weights FILE.safetensors]

The photograph is skimage.data.astronaut(): Eileen Collins, by NASA, in the public domain.
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image
from skimage import data

DOCS = Path(__file__).parents[1] / "docs"

photo = Image.fromarray(data.astronaut()).resize((448, 448), Image.Resampling.LANCZOS)
photo.save(DOCS / "astronaut.jpg", quality=90)
command = ["show", DOCS / "astronaut.jpg", "-o", DOCS / "srt.jpg", "--views", "grid:6:2"]
subprocess.run([sys.executable, "-m", "srt_ext", *command, *sys.argv[1:]], check=True)
