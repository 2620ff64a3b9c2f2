#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: target_modules="all-linear" loses BEiT's new classification head.
#
# "all-linear" is documented to leave a model's output layer out. BEiT's classifier is not recognised as one: it gets
# a LoRA adapter of its own on top of its random start, and that start, being a base weight, is not saved. The adapter
# folder looks complete (it has two tensors named classifier), loads without a warning onto the same pre-trained
# model, and gives other logits each time, since the head under it is drawn anew. With modules_to_save=["classifier"]
# it is right.
# Seen, an adapter saved and loaded again on the same pre-trained encoder:
#   all-linear: of the head is saved ['lora_A.weight', 'lora_B.weight']; logits off by 0.22; warnings 0
#   all-linear, modules_to_save: of the head is saved ['bias', 'weight']; logits off by 0.00; warnings 0
# Touched: whoever converts a BEiT fine-tuned by LoRA: such a folder does not hold the model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - 2> log <<'END'
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BeitConfig, BeitForImageClassification, BeitModel

small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
torch.manual_seed(0)
BeitModel(BeitConfig(**small, image_size=16, patch_size=8)).save_pretrained("encoder")
pixels = torch.randn(2, 3, 16, 16)


def with_new_head(seed):
    torch.manual_seed(seed)
    return BeitForImageClassification.from_pretrained("encoder", num_labels=3)


off = {}
for name, options in (("all-linear", {}), ("all-linear, modules_to_save", {"modules_to_save": ["classifier"]})):
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, **options)
    trained = get_peft_model(with_new_head(1), config).eval()
    trained.save_pretrained(name)
    tensors = load_file(f"{name}/adapter_model.safetensors")
    saved = [key.rpartition("classifier.")[2] for key in tensors if "classifier" in key]
    base = with_new_head(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base, name).eval()
    about = [w for w in caught if "adapter" in str(w.message).lower()]
    with torch.no_grad():
        off[name] = (trained(pixels).logits - loaded(pixels).logits).abs().max().item()
    print(f"{name}: of the head is saved {saved}; logits off by {off[name]:.2f}; warnings {len(about)}")
sys.exit(0 if [value > 1e-3 for value in off.values()] == [True, False] else 1)
END
