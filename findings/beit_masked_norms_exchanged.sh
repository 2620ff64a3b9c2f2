#!/usr/bin/env bash
# transformers 5.23.0: BeitForMaskedImageModeling.from_pretrained exchanges two norms of a file it wrote itself.
#
# With use_mean_pooling=False the model has a final norm in its encoder (beit.layernorm) and another before its head
# (layernorm). save_pretrained writes both under their right names; from_pretrained gives each the other's numbers,
# reports nothing missing and nothing unexpected, and the logits are those of another model. load_state_dict of the
# same file is right. Both norms are all ones and zeros in a fresh model, so that a round trip of one shows nothing;
# with the default, use_mean_pooling=True, there is one norm only.
# Seen, for a model with random numbers everywhere:
#   beit.layernorm.weight: file right True, loaded model holds layernorm.weight
#   beit.layernorm.bias: file right True, loaded model holds layernorm.bias
#   layernorm.weight: file right True, loaded model holds beit.layernorm.weight
#   layernorm.bias: file right True, loaded model holds beit.layernorm.bias
#   reported: nothing
#   logits up to 19.5, off by up to 24.1
# Touched: whoever takes from_pretrained for the reference of a conversion; beit-jax's parity looks at what it loaded.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 \
    numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'END'
import sys

import torch
from safetensors.torch import load_file
from transformers import BeitConfig, BeitForMaskedImageModeling

torch.manual_seed(0)
small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
small |= {"image_size": 32, "patch_size": 16, "vocab_size": 50, "use_mask_token": True, "use_mean_pooling": False}
model = BeitForMaskedImageModeling(BeitConfig(**small)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_()
model.save_pretrained("saved")
saved, before = load_file("saved/model.safetensors"), model.state_dict()
loaded, report = BeitForMaskedImageModeling.from_pretrained("saved", output_loading_info=True)
after = loaded.eval().state_dict()

changed = [name for name in before if not torch.equal(before[name], after[name])]
holds = {}
for name in changed:
    same = [n for n in before if before[n].shape == after[name].shape and torch.equal(before[n], after[name])]
    holds[name] = same[0] if same else "neither"
    print(f"{name}: file right {torch.equal(saved[name], before[name])}, loaded model holds {holds[name]}")
print("reported:", {kind: list(names) for kind, names in report.items() if names} or "nothing")
pixels, mask = torch.randn(1, 3, 32, 32), torch.zeros(1, 4, dtype=torch.bool)
with torch.no_grad():
    wanted, given = model(pixels, mask).logits, loaded(pixels, mask).logits
print(f"logits up to {wanted.abs().max():.1f}, off by up to {(given - wanted).abs().max():.1f}")
expected = {f"beit.layernorm.{kind}": f"layernorm.{kind}" for kind in ("weight", "bias")}
expected |= {other: name for name, other in expected.items()}
sys.exit(0 if holds == expected else 1)
END
