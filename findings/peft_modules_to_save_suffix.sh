#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: modules_to_save=["embeddings"] leaves BEiT's patch embedding untrained.
#
# modules_to_save is documented to name modules that are trained and saved whole. The names are compared as suffixes,
# without a dot before them: "embeddings" also matches embeddings.patch_embeddings. The second wrapper is put on the
# first wrapper and not into the copy that runs: the patch embedding that runs is frozen, and the one that is called
# trainable, and is saved under its name, is never run and stays what it was. Nothing warns; the saved adapter looks
# complete. With modules_to_save=["beit.embeddings"] it is right.
# Seen, an adapter after one step of SGD:
#   embeddings: 2 wrappers; the class token learned: True; the patch embedding learned: False
#   beit.embeddings: 1 wrappers; the class token learned: True; the patch embedding learned: True
# Touched: whoever trains BEiT's embeddings beside LoRA, for images of another kind or number of channels.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2 \
    accelerate==1.15.0 safetensors==0.8.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - 2> log <<'END'
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BeitConfig, BeitForImageClassification

small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
pixels = torch.randn(2, 3, 16, 16)
learned = {}
for name in ("embeddings", "beit.embeddings"):
    torch.manual_seed(0)
    model = BeitForImageClassification(BeitConfig(**small, image_size=16, patch_size=8, num_labels=3))
    old = {key: tensor.clone() for key, tensor in model.beit.embeddings.state_dict().items()}
    trained = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[name]))
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], 1.0)
    trained(pixels).logits.square().sum().backward()
    optimizer.step()
    trained.save_pretrained(name)
    saved = load_file(f"{name}/adapter_model.safetensors")
    changed = []
    for part in ("cls_token", "patch_embeddings.projection.weight"):
        (key,) = (key for key in saved if key.endswith(f"embeddings.{part}"))
        changed.append(not torch.equal(saved[key], old[part]))
    wrappers = sum(type(module).__name__ == "ModulesToSaveWrapper" for module in trained.modules())
    learned[name] = (wrappers, *changed)
    print(f"{name}: {wrappers} wrappers; the class token learned: {changed[0]}; the patch embedding learned: {changed[1]}")
sys.exit(0 if learned == {"embeddings": (2, True, False), "beit.embeddings": (1, True, True)} else 1)
END
