#!/usr/bin/env bash
# mmpretrain 1.2.0 on torch 2.13.0: early_layers of BEiT v2's neck does not choose the block that the neck reads.
#
# BEiT v2 predicts the visual tokens twice: from the last block, and from the last class token with the patches of an
# early block, behind blocks of their own. BEiTV2Neck documents early_layers as "the layer index of the early output
# from the backbone" (9 by default). It only sets the rates of stochastic depth. The block is the backbone's
# out_indices[0] + 1: with the published out_indices=[-4, -1] of 12 blocks these are one number, and with any other
# out_indices or depth they differ without a word. The checkpoint holds neither as a number.
# Seen, a neck on a backbone of 4 blocks, the difference to what it gives for early_layers=1, out_indices=[0, 3]:
#   early_layers=3, out_indices=[0, 3]: 0.00
#   early_layers=1, out_indices=[2, 3]: 0.13
# Touched: whoever converts a BEiT v2 that mmpretrain pre-trained, and whoever trains one of another depth there.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 \
    addict==2.4.0 yapf==0.43.0 termcolor==3.3.0 rich==15.0.0 pyyaml==6.0.3 matplotlib==3.11.2 einops==0.8.2 \
    opencv-python-headless==5.0.0.93 importlib-metadata==10.2.0 mat4py==0.6.0 modelindex==0.0.2 scipy==1.17.1
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps mmengine==0.10.7 mmcv-lite==2.1.0 \
    mmpretrain==1.2.0
cd "$folder"
venv/bin/python - 2> log <<'END'
import sys
import types

import torch


class Absent(types.ModuleType):
    """torchvision, which mmpretrain imports for its images and boxes; no layer of the model asks for it."""

    __path__, __version__ = [], "0.28.0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for name in ("", ".ops", ".ops.boxes", ".transforms", ".transforms.functional", ".transforms.transforms"):
    full = "torchvision" + name
    sys.modules[full] = Absent(full)
    if name:
        parent, _, child = full.rpartition(".")
        setattr(sys.modules[parent], child, sys.modules[full])
from mmpretrain.registry import MODELS
from mmpretrain.utils import register_all_modules

register_all_modules()
torch.manual_seed(0)
arch = {"embed_dims": 16, "num_layers": 4, "depth": 4, "num_heads": 2, "feedforward_channels": 32}
images, mask = torch.randn(1, 3, 32, 32), torch.zeros(1, 4, 4)


def second_prediction(early_layers, out_indices):
    """The states behind the neck's own blocks; every parameter is drawn, the same in every call."""
    backbone = {"type": "BEiTPretrainViT", "arch": arch, "img_size": 32, "patch_size": 8, "final_norm": False,
                "out_type": "raw", "out_indices": out_indices}
    neck = {"type": "BEiTV2Neck", "num_layers": 1, "early_layers": early_layers, "backbone_arch": arch}
    model = torch.nn.ModuleDict({"backbone": MODELS.build(backbone), "neck": MODELS.build(neck)}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        tokens = model["backbone"](images, mask)
        return model["neck"](tokens, model["backbone"].shared_rel_pos_bias)[1]


first = second_prediction(1, [0, 3])
off = []
for early_layers, out_indices in ((3, [0, 3]), (1, [2, 3])):
    off.append((second_prediction(early_layers, list(out_indices)) - first).abs().max().item())
    print(f"early_layers={early_layers}, out_indices={out_indices}: {off[-1]:.2f}")
sys.exit(0 if off[0] == 0 and off[1] > 0.01 else 1)
END
