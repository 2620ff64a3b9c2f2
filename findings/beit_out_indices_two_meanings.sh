#!/usr/bin/env bash
# transformers 5.23.0: the same out_indices mean one block less in BeitForSemanticSegmentation than in BeitBackbone.
#
# out_indices=[3, 5, 7, 11] is BEiT's usual choice for segmentation. BeitBackbone gives the outputs of blocks 3, 5, 7
# and 11, counted from 1. BeitForSemanticSegmentation, with the same configuration and weights, decodes those of
# blocks 2, 4, 6 and 10. The original, from whose configuration the numbers come, counts from 0 and collects after
# each (read in its source, not run here): blocks 4, 6, 8 and 12, two further than are decoded. One cannot correct it
# by other numbers, since the last that one would need is refused. Shapes are the same everywhere.
# Seen:
#   BeitBackbone: [3, 5, 7, 11]
#   BeitForSemanticSegmentation: [2, 4, 6, 10]
#   out_indices=[5, 7, 9, 13]: refused
# Touched: whoever compares segmentation with the original's; beit-jax has both readings, by name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'END'
import sys

import torch
from transformers import BeitBackbone, BeitConfig, BeitForSemanticSegmentation

torch.manual_seed(0)
small = {"hidden_size": 16, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 32}
small |= {"image_size": 32, "patch_size": 8, "num_labels": 3, "layer_scale_init_value": 1.0}
model = BeitForSemanticSegmentation(BeitConfig(**small, out_indices=[3, 5, 7, 11])).eval()
backbone = BeitBackbone(BeitConfig(**small, out_indices=[3, 5, 7, 11])).eval()
backbone.load_state_dict({name: model.state_dict()[name] for name in backbone.state_dict()})

decoded = []
model.fpn.register_forward_hook(lambda module, inputs, output: decoded.extend(inputs[0]))
pixels = torch.randn(1, 3, 32, 32)
with torch.no_grad():
    states = model(pixels, output_hidden_states=True).hidden_states
    maps = backbone(pixels).feature_maps


def blocks(features):
    grids = [state[:, 1:].transpose(1, 2).reshape(1, 16, 4, 4) for state in states]
    return [next(i for i, grid in enumerate(grids) if torch.equal(grid, feature)) for feature in features]


print("BeitBackbone:", blocks(maps))
print("BeitForSemanticSegmentation:", blocks(decoded))
try:
    BeitConfig(**small, out_indices=[5, 7, 9, 13])
    refused = False
except Exception as error:
    refused = "stage13" in str(error) or "13" in str(error)
print("out_indices=[5, 7, 9, 13]:", "refused" if refused else "accepted")
sys.exit(0 if (blocks(maps), blocks(decoded), refused) == ([3, 5, 7, 11], [2, 4, 6, 10], True) else 1)
END
