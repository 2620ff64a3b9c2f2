#!/usr/bin/env bash
# peft 0.21.2: a fresh DoRA adapter on a bfloat16 or float16 layer is not the identity.
#
# A new LoRA adapter adds exactly nothing, and so does DoRA's in float32: its magnitude is the norm of the weights'
# rows, which divides out. On a half-precision layer peft computes that first magnitude in the layer's type, rounded,
# and the norm it is divided by in float32: the quotient is off by some thousandths, and a fifth of the layer's
# outputs differ before a single step. An adapter that was never trained thus changes a model, and evaluating "before"
# with the adapter on is not evaluating the base model.
# Seen, a fresh adapter on a 256 x 256 layer:
#   float32, LoRA: 0 % of the outputs differ
#   float32, DoRA: 0 % of the outputs differ
#   bfloat16, LoRA: 0 % of the outputs differ
#   bfloat16, DoRA: 20 % of the outputs differ
#   float16, LoRA: 0 % of the outputs differ
#   float16, DoRA: 20 % of the outputs differ
# Touched: whoever fine-tunes BEiT in bfloat16 with DoRA, or takes a fresh adapter for the base model's numbers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> "$folder/log" <<'END'
import sys

import torch
from peft import LoraConfig, get_peft_model

differ = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for dora in (False, True):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(256, 256)).to(dtype).eval()
        inputs = torch.randn(64, 256).to(dtype)
        with torch.no_grad():
            before = base(inputs)
            adapted = get_peft_model(base, LoraConfig(target_modules=["0"], use_dora=dora)).eval()
            share = (adapted(inputs) != before).float().mean().item()
        differ[dtype, dora] = share
        print(f"{str(dtype)[6:]}, {'DoRA' if dora else 'LoRA'}: {100 * share:.0f} % of the outputs differ")
expected = [dora and dtype != torch.float32 for dtype, dora in differ]
sys.exit(0 if [share > 0.05 for share in differ.values()] == expected else 1)
END
