#!/usr/bin/env bash
# transformers 5.23.0: the Trainer's load_best_model_at_end restores none of BEiT's blocks.
#
# A checkpoint on disk has transformers 4's names for BEiT (beit.encoder.layer.0...), a model in memory the new ones
# (beit.layers.0...). from_pretrained translates; the Trainer, which loads the state itself, does not. After training,
# the embeddings, the pooler and the head are those of the best checkpoint and every tensor of every block is still
# the last step's: a mixture that was never evaluated, and that save_model then writes. All there is to see are two
# lines of log with names. from_pretrained on the best folder gives the best model.
# Seen, for one block, with the first epoch scored best of three:
#   best run/checkpoint-2, last run/checkpoint-6
#   of 17 tensors in the block: best 0, last 17
#   of 7 tensors elsewhere: best 7, last 0
# Touched: whoever fine-tunes BEiT by the Trainer and converts the outcome: convert the checkpoint's folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
    numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - <<'END'
import sys

import torch
from transformers import BeitConfig, BeitForImageClassification, PrinterCallback, Trainer, TrainingArguments

torch.manual_seed(0)
small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
model = BeitForImageClassification(BeitConfig(**small, image_size=16, patch_size=8, num_labels=2))
data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(16)]
scores = iter((1.0, 0.5, 0.1))
options = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
options |= {"eval_strategy": "epoch", "save_strategy": "epoch", "report_to": [], "disable_tqdm": True}
options |= {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
trainer = Trainer(
    model,
    TrainingArguments("run", **options),
    train_dataset=data,
    eval_dataset=data,
    compute_metrics=lambda _: {"score": next(scores)},
)
trainer.remove_callback(PrinterCallback)
trainer.train()

best_folder = trainer.state.best_model_checkpoint
best = BeitForImageClassification.from_pretrained(best_folder).state_dict()
last = BeitForImageClassification.from_pretrained("run/checkpoint-6").state_dict()
now = model.state_dict()
from_best = {name for name in now if torch.equal(now[name], best[name])}
from_last = {name for name in now if torch.equal(now[name], last[name])}
blocks = {name for name in now if ".layers." in name}
print(f"best {best_folder}, last run/checkpoint-6")
others = set(now) - blocks
for where, names in (("in the block", blocks), ("elsewhere", others)):
    print(f"of {len(names)} tensors {where}: best {len(names & from_best)}, last {len(names & from_last)}")
sys.exit(0 if from_best == others and from_last == blocks else 1)
END
