#!/usr/bin/env bash
# transformers 5.23.0 reading what peft 0.21.2 wrote: `load_adapter` loses the magnitudes of a DoRA adapter.
#
# peft saves the magnitude of a layer as `...lora_magnitude_vector`, and reads it back. The model's own `load_adapter`,
# the other documented way to load the same directory, looks for the name that the magnitude has in memory,
# `...lora_magnitude_vector.default.weight`, and leaves the fresh norms of the base in place. The factors are loaded,
# so outputs are neither the base's nor the adapter's.
# Seen, the largest difference from the adapter's logits:
#   PeftModel.from_pretrained: 0
#   model.load_adapter: not 0
# Touched: whoever loads a DoRA adapter of BEiT (or any model) without peft's own class.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - 2> log <<'END'
import copy
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BeitConfig, BeitForImageClassification

torch.manual_seed(0)
config = BeitConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16
)
base = BeitForImageClassification(config).eval()
pixels = torch.randn(2, 3, 32, 32)
adapted = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"], use_dora=True)).eval()
with torch.no_grad():
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.rand_like(parameter))
    expected = adapted(pixels).logits
    adapted.save_pretrained("adapter")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), "adapter").eval()(pixels).logits
    model = copy.deepcopy(base)
    model.load_adapter("adapter")
    own = model.eval()(pixels).logits
found = [(logits - expected).abs().max().item() for logits in (theirs, own)]
for name, error in zip(("PeftModel.from_pretrained", "model.load_adapter"), found):
    print(f"{name}: {'not 0' if error > 1e-6 else 0}")
sys.exit(0 if found[0] <= 1e-6 < found[1] else 1)
END
