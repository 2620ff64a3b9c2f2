#!/usr/bin/env bash
# tifffile 2026.3.3: an array [height, width, 13] becomes a file of `height` pages.
#
# Without `photometric` and `planarconfig`, tifffile takes the last axis of 3 or 4 for colours, and any other last axis
# for the width of a page: 13 bands of an image of 5 x 7 pixels are stored as five pages of 7 x 13. tifffile reads the
# same array back, because a note in the file has its shape; every other reader sees the pages, the first of which is
# a row of the image with its bands side by side.
# Seen:
#   (5, 7, 4): 1 page of (5, 7, 4)
#   (5, 7, 13): 5 pages of (7, 13)
#   (5, 7, 13) with photometric and planarconfig: 1 page of (5, 7, 13)
# Touched: whoever writes Sentinel-2 or other multi-band images by one call, and reads them by GDAL or Pillow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
venv/bin/python - 2> log <<'END'
import sys

import numpy as np
import tifffile

found = []
for bands, options in ((4, {}), (13, {}), (13, {"photometric": "minisblack", "planarconfig": "contig"})):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, bands), dtype=np.uint8)
    tifffile.imwrite("bands.tif", image, **options)
    assert np.array_equal(tifffile.imread("bands.tif"), image)
    with tifffile.TiffFile("bands.tif") as file:
        found.append((len(file.pages), file.pages[0].shape))
    pages, shape = found[-1]
    with_options = " with " + " and ".join(options) if options else ""
    print(f"{image.shape}{with_options}: {pages} page{'s' if pages > 1 else ''} of {shape}")
sys.exit(0 if found == [(1, (5, 7, 4)), (5, (7, 13)), (1, (5, 7, 13))] else 1)
END
