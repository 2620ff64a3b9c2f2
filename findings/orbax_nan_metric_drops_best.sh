#!/usr/bin/env bash
# orbax-checkpoint 0.12.8: one metric that is NaN makes the manager delete the best checkpoint.
#
# A CheckpointManager that keeps the best by a metric sorts the steps by it. NaN compares as false with everything, so
# one evaluation that gave NaN leaves the list unsorted: of 0.9, NaN, 0.5, 0.7 the one best checkpoint it keeps is
# 0.7, best_step says so, and 0.9 is gone from the disk. One would expect NaN to count as worst or to be refused.
# Where the NaN falls decides whether it happens, and the v1 interface's BestN does the same.
# Seen, keeping one:
#   ordinary, scores [0.9, 0.2, 0.5, 0.7]: kept [0.9]
#   new, scores [0.9, 0.2, 0.5, 0.7]: kept [0.9]
#   ordinary, scores [0.9, nan, 0.5, 0.7]: kept [0.7]
#   new, scores [0.9, nan, 0.5, 0.7]: kept [0.7]
# Touched: whoever keeps the best by a score that may be undefined for an evaluation, such as mIoU without its class.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check orbax-checkpoint==0.12.8 jax==0.12.0.1 jaxlib==0.12.0.1 \
    tensorstore==0.1.86 numpy==2.5.5
cd "$folder"
JAX_PLATFORMS=cpu venv/bin/python - 2> log <<'END'
import math
import pathlib
import sys

import numpy as np
import orbax.checkpoint
from orbax.checkpoint.experimental import v1


def ordinary(place, scores):
    options = orbax.checkpoint.CheckpointManagerOptions(max_to_keep=1, best_fn=lambda metrics: metrics["score"])
    with orbax.checkpoint.CheckpointManager(place, options=options) as manager:
        for step, score in enumerate(scores):
            arguments = orbax.checkpoint.args.StandardSave({"step": np.array([step])})
            manager.save(step, args=arguments, metrics={"score": score})
            manager.wait_until_finished()
        return [scores[step] for step in manager.all_steps()]


def new(place, scores):
    policy = v1.training.preservation_policies.BestN(get_metric_fn=lambda metrics: metrics["score"], n=1)
    with v1.training.Checkpointer(place, preservation_policy=policy) as checkpointer:
        for step, score in enumerate(scores):
            checkpointer.save(step, {"step": np.array([step])}, metrics={"score": score})
        return [scores[checkpoint.step] for checkpoint in checkpointer.checkpoints]


wrong = []
for second in (0.2, math.nan):
    scores = [0.9, second, 0.5, 0.7]
    for interface in (ordinary, new):
        kept = interface(pathlib.Path(f"{interface.__name__}-{second}").resolve(), scores)
        print(f"{interface.__name__}, scores {scores}: kept {kept}")
        wrong.append(kept != [0.9])
sys.exit(0 if wrong == [False, False, True, True] else 1)
END
