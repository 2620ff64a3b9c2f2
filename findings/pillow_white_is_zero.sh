#!/usr/bin/env bash
# Pillow 13.0.0 and TIFF's WhiteIsZero: turned over at 8 bits, left as stored at 16.
#
# A grey TIFF may say that 0 is white. Pillow honours it for 8 bits (black stays black on the screen) and ignores it
# for 16: the same scan, saved with twice the bits, comes out as its own negative. tifffile gives the stored numbers
# in both cases, so that it agrees with Pillow at 16 bits and is its negative at 8. Neither says anything, and a test
# with pictures of one depth shows nothing.
# Seen:
#   8 bits, tifffile: as stored
#   8 bits, Pillow: turned over
#   16 bits, tifffile: as stored
#   16 bits, Pillow: as stored
# Touched: whoever feeds scanned TIFF pages to a document model such as DiT.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'END'
import sys

import numpy as np
import tifffile
from PIL import Image

seen = {}
for kind in (np.uint8, np.uint16):
    full = int(np.iinfo(kind).max)
    stored = (np.arange(256).reshape(16, 16) * (full // 255)).astype(kind)
    tifffile.imwrite("grey.tif", stored, photometric="miniswhite")
    with tifffile.TiffFile("grey.tif") as file:
        assert file.pages[0].photometric.name == "MINISWHITE"
    readings = {"tifffile": tifffile.imread("grey.tif"), "Pillow": np.asarray(Image.open("grey.tif"))}
    for library, read in readings.items():
        same, over = np.array_equal(read, stored), np.array_equal(read, full - stored)
        seen[library, stored.itemsize] = "as stored" if same else "turned over" if over else "something else"
        print(f"{stored.itemsize * 8} bits, {library}: {seen[library, stored.itemsize]}")
expected = ["as stored", "turned over", "as stored", "as stored"]
sys.exit(0 if list(seen.values()) == expected else 1)
END
