#!/usr/bin/env bash
# webdataset 1.0.2: neither decode("pil") nor decode("pill") gives an index mask's class numbers.
#
# A segmentation mask in a shard is usually a PNG with a palette, whose pixels are class numbers. decode("pil") makes
# RGB of everything, so the classes become the palette's colours; decode("pill"), the grey one, makes the brightness
# of those colours, numbers in 0 to 255 that pass for classes; and 16-bit masks are cut at 255. Grey masks of 8 bits
# come through "pill", which is why a trial with those does not show it. Pillow alone reads all three rightly.
# Seen, a mask of the classes 0, 1, 2, 3 (times 1000 in 16 bits):
#   palette, Pillow: [0, 1, 2, 3]
#   palette, pil: [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]
#   palette, pill: [0, 76, 150, 29]
#   grey, Pillow: [0, 1, 2, 3]
#   grey, pil: [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]
#   grey, pill: [0, 1, 2, 3]
#   16 bits, Pillow: [0, 1000, 2000, 3000]
#   16 bits, pil: [[0, 0, 0], [255, 255, 255], [255, 255, 255], [255, 255, 255]]
#   16 bits, pill: [0, 255, 255, 255]
# Touched: whoever trains segmentation from such shards: take the bytes undecoded, and open them with Pillow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check webdataset==1.0.2 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'END'
import io
import sys
import tarfile

import numpy as np
import webdataset
from PIL import Image

classes = np.array([[0, 1, 2, 3]], np.uint8)
palette = Image.fromarray(classes)
palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
deep = Image.fromarray(classes.astype(np.uint16) * 1000)
masks = {"palette": palette, "grey": Image.fromarray(classes), "16 bits": deep}
right = {}
for name, mask in masks.items():
    file = io.BytesIO()
    mask.save(file, "PNG")
    member = tarfile.TarInfo("picture.png")
    member.size = len(file.getvalue())
    with tarfile.open("shard.tar", "w") as shard:
        shard.addfile(member, io.BytesIO(file.getvalue()))
    stored = np.asarray(Image.open(file))
    print(f"{name}, Pillow: {stored.tolist()[0]}")
    for decoder in ("pil", "pill"):
        sample = next(iter(webdataset.WebDataset("shard.tar", shardshuffle=False).decode(decoder)))
        given = np.asarray(sample["png"])
        right[name, decoder] = np.array_equal(given, stored)
        print(f"{name}, {decoder}: {given.tolist()[0]}")
sys.exit(0 if [key for key, value in right.items() if value] == [("grey", "pill")] else 1)
END
