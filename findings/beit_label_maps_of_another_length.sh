#!/usr/bin/env bash
# transformers 5.23.0: class names are lost without a warning where a config.json counts them otherwise.
#
# `num_labels` beside an `id2label` of another length replaces all names by LABEL_0, LABEL_1, ...; only the log at
# level WARNING says so, and not through Python's warnings. `label2id` alone, as some exports write it, names nothing.
# Keys "1" and "01" are the same number: one of the names is gone.
# Seen:
#   three names, num_labels 2: LABEL_0 LABEL_1
#   label2id alone: LABEL_0 LABEL_1
#   keys 0, 1 and 01: 2 names
# Touched: whoever edits a BEiT checkpoint's names by hand, and reads predictions by `id2label`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python -W error - 2> log <<'END'
import sys
from pathlib import Path

from transformers import BeitConfig

cases = {
    "three names, num_labels 2": '"num_labels": 2, "id2label": {"0": "cat", "1": "dog", "2": "cow"}',
    "label2id alone": '"label2id": {"cat": 0, "dog": 1}',
    "keys 0, 1 and 01": '"id2label": {"0": "cat", "1": "dog", "01": "cow"}',
}
found = []
for name, fields in cases.items():
    Path("config.json").write_text('{"model_type": "beit", ' + fields + "}")
    names = BeitConfig.from_pretrained(".").id2label.values()
    found.append(" ".join(names) if "keys" not in name else f"{len(names)} names")
    print(f"{name}: {found[-1]}")
sys.exit(0 if found == ["LABEL_0 LABEL_1", "LABEL_0 LABEL_1", "2 names"] else 1)
END
