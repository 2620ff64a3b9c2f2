#!/usr/bin/env bash
# transformers 5.23.0: BeitImageProcessorPil resizes label maps by the picture's bicubic, and reduces the caller's own.
#
# A segmentation map with five class numbers, resized together with its image, comes back with dozens: bicubic
# interpolation between class numbers makes classes that are nowhere in the picture, and by its overshoot numbers
# above the largest. Nearest is what segmentation means by resizing, and the processor has no option for it. With
# do_reduce_labels the NumPy array that was passed in is changed as well: its zeros are 255 afterwards, so that a
# second epoch over maps kept in memory sees other labels than the first.
# Seen:
#   5 classes up to 140 become 93 up to 157
#   a map of zeros holds [255] after do_reduce_labels
# Touched: whoever trains BEiT's segmentation with this processor; beit-jax resizes maps by the nearest pixel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 pillow==13.0.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'END'
import sys

import numpy as np
from transformers import BeitImageProcessorPil

ids = np.array([3, 7, 20, 60, 140], np.uint8)
stripes = np.arange(40) // 8
mask = ids[np.add.outer(stripes, stripes) % 5]
picture = np.zeros((40, 40, 3), np.uint8)
processor = BeitImageProcessorPil(size={"height": 64, "width": 64})
labels = processor(picture, segmentation_maps=mask, return_tensors="np")["labels"]
many = len(np.unique(labels))
print(f"{len(ids)} classes up to {ids.max()} become {many} up to {labels.max()}")

mask = np.zeros((40, 40), np.uint8)
processor = BeitImageProcessorPil(size={"height": 40, "width": 40}, do_reduce_labels=True)
processor(picture, segmentation_maps=mask, return_tensors="np")
print(f"a map of zeros holds {np.unique(mask).tolist()} after do_reduce_labels")
sys.exit(0 if many > 20 and labels.max() > 140 and (mask == 255).all() else 1)
END
