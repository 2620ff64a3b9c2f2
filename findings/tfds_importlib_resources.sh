#!/usr/bin/env bash
# tensorflow-datasets 4.9.10: a builder works in a plain module and fails in a package, for an undeclared dependency.
#
# The place of a builder's code is looked up with importlib_resources, which the package asks for only below Python
# 3.9. The look-up happens for builders inside a package alone: the same class, moved from a file of its own into a
# folder with an __init__.py, stops with ModuleNotFoundError at download_and_prepare, and so do MNIST and ImageNet,
# which ship with the library. tensorflow-datasets itself imports, lists and builds them without a complaint before
# that; and where some other package brings importlib_resources, nothing is ever seen.
# Seen:
#   declared: ['importlib_resources; python_version < "3.9"']
#   alone: prepared
#   package.numbers: No module named 'importlib_resources'
# Touched: whoever prepares data without TensorFlow; beit-jax names importlib-resources in its extra for training.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check tensorflow-datasets==4.9.10 \
    array-record==0.8.6 numpy==2.5.5
cd "$folder"
cat > alone.py <<'END'
import numpy as np
import tensorflow_datasets as tfds


class Numbers(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"number": np.int32}))

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(3):
            yield number, {"number": number}
END
mkdir package
touch package/__init__.py
cp alone.py package/numbers.py
cat > prepare.py <<'END'
import importlib
import sys

import tensorflow_datasets as tfds

name, expected = sys.argv[1:]
tfds.disable_progress_bar()
try:
    builder = importlib.import_module(name).Numbers(data_dir=f"{name}-data", file_format="array_record")
    builder.download_and_prepare()
    seen = "prepared"
except ModuleNotFoundError as error:
    seen = str(error)
print(f"{name}: {seen}", flush=True)
sys.exit(0 if seen == expected else 1)
END
venv/bin/python - <<'END'
import importlib.metadata

print("declared:", [r for r in importlib.metadata.requires("tensorflow-datasets") if r.startswith("importlib")])
END
{
    venv/bin/python prepare.py alone prepared
    venv/bin/python prepare.py package.numbers "No module named 'importlib_resources'"
} | grep -v -e "^Downloading" -e "^Dataset" -e '^$'
