#!/usr/bin/env bash
# Pillow 13.0.0 reading what tifffile 2026.3.3 wrote: bands and bits are dropped without a word.
#
# Three valid TIFF files that tifffile reads back bit for bit. Pillow opens a picture of red, green, blue and near
# infrared (a fourth sample that is declared "unspecified", not alpha) as RGB and forgets the fourth band; two grey
# bands as one; and of 16-bit RGB it keeps the upper eight bits. One would expect an error, since Pillow does refuse
# four grey bands, or the fourth band as alpha, which is what it makes of a fourth sample that is declared so. No
# warning is raised.
# Seen:
#   RGB and near infrared: written (5, 7, 4) uint8, Pillow has RGB (5, 7, 3) uint8
#   two grey bands: written (5, 7, 2) uint8, Pillow has L (5, 7) uint8
#   16-bit RGB: written (5, 7, 3) uint16, Pillow has RGB (5, 7, 3) uint8
# Touched: whoever classifies multi-band or 16-bit images that a PIL-based loader opens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'END'
import sys
import warnings

import numpy as np
import tifffile
from PIL import Image

warnings.simplefilter("error")
generator = np.random.default_rng(0)
eight = generator.integers(0, 256, (5, 7, 4), dtype=np.uint8)
sixteen = generator.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
cases = {
    "RGB and near infrared": (eight, {"photometric": "rgb", "extrasamples": ["unspecified"]}, eight[..., :3]),
    "two grey bands": (eight[..., :2], {"photometric": "minisblack", "planarconfig": "contig"}, eight[..., 0]),
    "16-bit RGB": (sixteen, {"photometric": "rgb"}, (sixteen >> 8).astype(np.uint8)),
}
changed = False
for name, (bands, options, left) in cases.items():
    tifffile.imwrite("bands.tif", bands, **options)
    assert np.array_equal(tifffile.imread("bands.tif"), bands)
    with Image.open("bands.tif") as image:
        seen = np.asarray(image)
        print(f"{name}: written {bands.shape} {bands.dtype}, Pillow has {image.mode} {seen.shape} {seen.dtype}")
    changed |= not (seen.dtype == left.dtype and np.array_equal(seen, left))
sys.exit(1 if changed else 0)
END
