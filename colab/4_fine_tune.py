# %% [markdown]
# # Fine-tune on own images
#
# From a folder with a folder of images per class to a classifier: prepare the data, start from a pre-trained encoder,
# train, look at the curves and the mistakes, use the result.
#
# `DATA = None` writes handwritten digits into two folders, `even` and `odd`, and starts from the digits classifier that
# this package contains, with a new head. The encoder knows digits already, and the new question is easy for it: the run
# shows the path of the data and the mechanics, and its accuracy says nothing about BEiT. The same number of steps from
# random weights, for comparison, shows what the start is worth here. Set `DATA` to your folder, and the same cells
# fine-tune BEiT-base on whatever accelerators JAX finds.

# %%
import subprocess
import sys

REPOSITORY = ""  # in Colab: where this package is cloned from, such as "https://host/name/beit-jax.git"
JAX = "jax"  # in Colab: "jax[cuda12]" on a runtime with a GPU, "jax[tpu]" on one with a TPU
if "google.colab" in sys.modules:
    if not REPOSITORY:
        raise SystemExit("Say where this package is cloned from: fill in REPOSITORY above, and run this cell again.")
    package = f"beit-jax[train] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, JAX], check=True)
# %matplotlib inline

# %%
DATA = None  # such as "/content/images", with a folder per class in it, below train/ and val/ or not

# %% [markdown]
# ## Data
#
# `prepare_folder` reads every image once and writes TFDS data in ArrayRecord files; a tenth of each class is held out
# unless there is a folder `val`. On the command line: `beit-jax prepare folder DATA prepared`.

# %%
from importlib.resources import files
from pathlib import Path

import jax
from sklearn.datasets import load_digits

from beit_jax.train.data.prepare import prepare_folder

if DATA is None:
    import numpy as np
    from PIL import Image

    scans = load_digits()
    for index, (pixels, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        folder = Path("folders") / ("odd" if digit % 2 else "even")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(pixels * 255 / 16)).save(folder / f"{index:04}_{digit}.png")
prepared = prepare_folder(Path(DATA or "folders"), Path("prepared"), held_out=0.25, overwrite=True, skip_bad=True)
print(prepared.splits, "images of", ", ".join(prepared.labels))
print("devices:", ", ".join(sorted({device.device_kind for device in jax.devices()})))

# %% [markdown]
# ## Recipe and start
#
# A recipe is a line of the paper's tables; every number can be changed, here and by options of `beit-jax train`.
# `beit_base_ft1k` was made for 1.2 million images and 1024 a step. For some thousand images of your own: fewer images a
# step with a smaller learning rate, and a few epochs. The start is converted from the hub.

# %%
from dataclasses import replace

from beit_jax.convert import importer
from beit_jax.hub import Source, resolve
from beit_jax.train.recipes import recipe_named

if DATA is None:
    recipe = recipe_named("digits_finetune")
    recipe = replace(recipe, optim=replace(recipe.optim, epochs=3, warmup_epochs=1, lr=1e-3))
    start = Source(Path(str(files("beit_jax") / "digits")), "embedded digits classifier")
else:
    recipe = recipe_named("beit_base_ft1k")
    recipe = replace(
        recipe,
        data=replace(recipe.data, batch_size=64, eval_batch_size=64),
        optim=replace(recipe.optim, epochs=10, warmup_epochs=1, lr=recipe.optim.lr * 64 / recipe.data.batch_size),
    )
    start = resolve("microsoft/beit-base-patch16-224-pt22k")
recipe = replace(recipe, run=replace(recipe.run, log_every=10, eval_every_epochs=1))
converted = importer.convert(start, Path("start"), overwrite=True)
print(f"start: {start.name}, {len(converted.steps)} arrays")

# %% [markdown]
# Before anything is computed: parameters, memory and operations of a step, and what is taken from the start.

# %%
from beit_jax.train.forecast.preview import preview
from beit_jax.train.loop.plan import make_plan

plan = make_plan(recipe, Path("prepared"), Path("start"))
print(*preview(plan).lines()[-14:], sep="\n")

# %% [markdown]
# ## Train
#
# All devices share a batch. A run that is interrupted goes on from its last checkpoint when the cell is run again, as
# long as its directory is still there: on Colab, put it on a mounted drive.

# %%
from beit_jax.train.loop.run import train

outcome = train(plan, Path("fine-tuned"), quiet=True)
print({name: round(value, 4) for name, value in outcome.scores.items()})

# %%
runs = ["fine-tuned"]
if DATA is None:
    unlearned = train(make_plan(recipe, Path("prepared")), Path("from-random"), quiet=True)
    print({name: round(value, 4) for name, value in unlearned.scores.items()})
    runs.append("from-random")

# %%
from beit_jax.looking import visualize
from beit_jax.train.loop.metrics_file import read_metrics

figure = visualize.training_curves(
    {name: read_metrics(Path(name) / "metrics.jsonl") for name in runs}, metrics=["loss", "accuracy"]
)
figure.set_dpi(70)
figure

# %% [markdown]
# The loss of training contains label smoothing and is of augmented images; the accuracy is of held-out images.

# %% [markdown]
# ## Which images are mistaken
#
# The model that was written is an ordinary native checkpoint.

# %%
from matplotlib.figure import Figure

import beit_jax
from beit_jax.train.data.datasets import open_dataset
from beit_jax.train.evaluation import accuracy
from beit_jax.train.evaluation.labelled import evaluate_directory

model, processor = beit_jax.from_pretrained(Path("fine-tuned/model"))
scores = evaluate_directory(model, processor, Path("prepared"), workers=0 if DATA is None else None)
print(*accuracy.describe(scores), sep="\n")

# %%
held_out = open_dataset(Path("prepared"), "validation")
images, labels = zip(*(held_out.load(index) for index in range(min(len(held_out), 2000))), strict=True)
guesses = [best[0] for best in beit_jax.classify(model, processor, images, top=1, batch_size=64)]
wrong = [i for i, (guess, label) in enumerate(zip(guesses, labels, strict=True)) if guess.index != label]
order = (wrong + [i for i in range(len(images)) if i not in set(wrong)])[:10]

figure = Figure(figsize=(12, 1.9), dpi=70, layout="constrained")
for panel, i in zip(figure.subplots(1, 10), order, strict=False):
    panel.imshow(images[i])
    mark = "wrong" if i in wrong else "right"
    panel.set_title(f"{mark}: {guesses[i].label[:12]}\n{guesses[i].probability:.2f}", fontsize=8)
    panel.set_axis_off()
figure

# %% [markdown]
# ## Back to PyTorch
#
# `for-torch` is a directory for transformers' `AutoModelForImageClassification.from_pretrained`.

# %%
from beit_jax import weights
from beit_jax.convert import exporter

exporter.export(weights.load(Path("fine-tuned/model")), Path("for-torch"), "hf", overwrite=True)
print(sorted(file.name for file in Path("for-torch").iterdir()))
