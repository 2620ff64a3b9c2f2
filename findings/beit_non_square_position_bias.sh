#!/usr/bin/env bash
# transformers 5.23.0: BEiT reads the position biases of a non-square image with height and width exchanged.
#
# BeitConfig takes image_size=(height, width), and the bias table's rows are counted for it: one per difference in
# height and width. Before each use the table is reshaped to (width, height) and interpolated to (height, width), at
# the very size it was made for, too: patches that are one row apart get a mixture of the biases for one row and for
# none. Square images, all that is published, are exact, and no shape ever disagrees.
# Seen, for a grid of 2 x 3 patches and a table that holds each row's own difference in height:
#   grid (3, 3): bias off by up to 0.00
#   grid (2, 3): bias off by up to 0.33
#   third patch of the first row, bias: [0.0, 0.0, 0.0, -0.67, -0.8, -1.0]
#   third patch of the first row, truth: [0.0, 0.0, 0.0, -1.0, -1.0, -1.0]
# Touched: whoever trains or converts BEiT for non-square images; beit-jax takes the rows as they are counted.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'END'
import sys

import torch
from transformers import BeitConfig, BeitModel

small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16, "patch_size": 4}


def bias_of_table(height, width):
    """what the first block adds to the scores of patches, with a table of differences in height"""
    config = BeitConfig(**small, image_size=(4 * height, 4 * width), use_relative_position_bias=True)
    bias = BeitModel(config).eval().layers[0].relative_position_bias
    differences = torch.arange(1 - height, height).repeat_interleave(2 * width - 1)
    with torch.no_grad():
        bias.relative_position_bias_table[:-3, 0] = differences.float()
        return bias((height, width))[0, 0, 1:, 1:]


def difference(height, width):
    rows = torch.arange(height).repeat_interleave(width)
    return (rows[:, None] - rows[None, :]).float()


off = {}
for grid in ((3, 3), (2, 3)):
    off[grid] = (bias_of_table(*grid) - difference(*grid)).abs().max().item()
    print(f"grid {grid}: bias off by up to {off[grid]:.2f}")
print("third patch of the first row, bias:", [round(b, 2) for b in bias_of_table(2, 3)[2].tolist()])
print("third patch of the first row, truth:", difference(2, 3)[2].tolist())
sys.exit(0 if off[3, 3] == 0 and off[2, 3] > 0.1 else 1)
END
