#!/usr/bin/env bash
# mmengine 0.10.7 on torch 2.13.0: with EMAHook a checkpoint's "ema_state_dict" holds the raw weights.
#
# On saving, EMAHook exchanges the two: state_dict is the moving average, and ema_state_dict the weights as trained. A
# reader that takes the entry named for the average gets from files of the OpenMMLab family (mmpretrain,
# mmsegmentation) the weights it meant to avoid. Nothing in the file says so, shapes and names are the same but for
# "module.", and both are good models, one a little better.
# Seen, one weight after an epoch:
#   in memory: trained 1.9383, average 1.1126
#   in the file: state_dict 1.1126, ema_state_dict 1.9383
# Touched: whoever converts a checkpoint of mmpretrain's or mmsegmentation's BEiT that was trained with an average.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 addict==2.4.0 yapf==0.43.0 \
    termcolor==3.3.0 rich==15.0.0 pyyaml==6.0.3 matplotlib==3.11.2 opencv-python-headless==5.0.0.93
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps mmengine==0.10.7
cd "$folder"
venv/bin/python - 2> log <<'END'
import sys

import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.runner import Runner


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def forward(self, pixels, mode="loss"):
        return {"loss": (self.linear(torch.stack(pixels)) - 5).pow(2).mean()}


torch.manual_seed(0)
model = Line()
loader = {"batch_size": 2, "sampler": {"type": "DefaultSampler", "shuffle": False}}
runner = Runner(
    model,
    work_dir="run",
    train_dataloader=loader | {"dataset": [{"pixels": torch.ones(1)}] * 8},
    train_cfg={"by_epoch": True, "max_epochs": 1},
    optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
    custom_hooks=[{"type": "EMAHook", "momentum": 0.1}],
    log_level="ERROR",
)
runner.train()
trained = model.linear.weight.item()
average = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module.linear.weight.item()
file = torch.load("run/epoch_1.pth", weights_only=False)  # written above
saved = file["state_dict"]["linear.weight"].item(), file["ema_state_dict"]["module.linear.weight"].item()
print(f"in memory: trained {trained:.4f}, average {average:.4f}")
print(f"in the file: state_dict {saved[0]:.4f}, ema_state_dict {saved[1]:.4f}")
sys.exit(0 if trained != average and saved == (average, trained) else 1)
END
