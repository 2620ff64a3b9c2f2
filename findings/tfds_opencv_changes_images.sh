#!/usr/bin/env bash
# tensorflow-datasets 4.9.10: whether OpenCV is installed decides what a palette PNG and a CMYK JPEG contain.
#
# Without TensorFlow (as_data_source) images are decoded by Pillow, or by OpenCV if it can be imported, which the
# library recommends in a warning, as faster. With Pillow a palette PNG gives its indices, also where the feature says
# three channels: a mask is right, a picture is nonsense three times over. With OpenCV it gives the palette's colours,
# also where the feature says one channel: a picture is right, a mask is not, and has a shape that the feature
# excludes. A CMYK JPEG, of which ImageNet has some, has four channels with Pillow and three with OpenCV. A package
# that brings OpenCV for something else changes the data.
# Seen:
#   Pillow, palette, 1 declared: (1, 4, 1), the second pixel [1]
#   Pillow, palette, 3 declared: (1, 4, 3), the second pixel [1, 1, 1]
#   Pillow, CMYK: (2, 4, 4)
#   OpenCV, palette, 1 declared: (1, 4, 3), the second pixel [255, 0, 0]
#   OpenCV, palette, 3 declared: (1, 4, 3), the second pixel [255, 0, 0]
#   OpenCV, CMYK: (2, 4, 3)
# Touched: whoever reads masks or ImageNet by tensorflow-datasets; beit-jax takes the bytes and decodes them itself.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tensorflow-datasets==4.9.10 array-record==0.8.6 \
    pillow==13.0.0 numpy==2.5.5
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$folder/opencv" \
    opencv-python-headless==5.0.0.93
cd "$folder"
cat > decode.py <<'END'
import importlib.util
import io
import sys

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def file(image, kind):
    held = io.BytesIO()
    image.save(held, kind)
    return held.getvalue()


mask = Image.fromarray(np.array([[0, 1, 2, 3]], np.uint8))
mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
name = "OpenCV" if importlib.util.find_spec("cv2") else "Pillow"
seen = []
for channels in (1, 3):
    feature = tfds.features.Image(shape=(None, None, channels))
    pixels = feature.decode_example_np(file(mask, "PNG"))
    seen.append(pixels.shape)
    print(f"{name}, palette, {channels} declared: {pixels.shape}, the second pixel {pixels[0, 1].tolist()}", flush=True)
pixels = tfds.features.Image().decode_example_np(file(Image.new("CMYK", (4, 2), (10, 20, 30, 40)), "JPEG"))
seen.append(pixels.shape)
print(f"{name}, CMYK: {pixels.shape}")
expected = {"Pillow": [(1, 4, 1), (1, 4, 3), (2, 4, 4)], "OpenCV": [(1, 4, 3), (1, 4, 3), (2, 4, 3)]}
sys.exit(0 if seen == expected[name] else 1)
END
venv/bin/python decode.py 2> log
PYTHONPATH=$folder/opencv venv/bin/python decode.py 2> log
