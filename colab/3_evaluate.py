# %% [markdown]
# # Evaluate classifiers on ImageNet
#
# The evaluation of the model cards: top-1 of `facebook/data2vec-vision-base-ft1k` and of
# `microsoft/beit-base-patch16-224` on ImageNet's 50,000 validation images, and how much of it depends on how images are
# prepared.
#
# `DATA = None` evaluates the digits classifier that this package contains on 450 held-out digits, and a Data2Vec-Vision
# of the same size with random weights, which must come out near chance: an evaluation that could not tell the two apart
# would be broken. With 450 images a standard error of an accuracy near 98 % is 0.7 points. No number of the default
# says anything about the published models.

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
DATA = None  # such as "/content/imagenet": written by `beit-jax prepare imagenet`, or a folder of images per class

# %% [markdown]
# ## What to expect with `DATA`
#
# | model | published top-1 | preparation it was measured with |
# |---|---|---|
# | `facebook/data2vec-vision-base-ft1k` | 83.97 % | `unilm_eval`: short side 256, bicubic, centre 224 |
# | `microsoft/beit-base-patch16-224` (by way of ImageNet-22k) | 85.2 % | the same |
#
# The published numbers are `beit-jax list`'s. They were measured by the original code; differences of some hundredths
# can come from decoding and resizing, differences of tenths should not. Classes are matched by name, by number or in
# the order of WordNet ids, and which rule was used is said; two classes of ImageNet are both called "crane" in some
# label lists, so folders are best named by WordNet id.

# %%
from importlib.resources import files
from pathlib import Path

import jax

import beit_jax
from beit_jax.images import HALF, preset
from beit_jax.train.data.prepare import prepare_digits
from beit_jax.train.initial.parameters import initial_params

if DATA is None:
    from dataclasses import replace

    data = prepare_digits(Path("prepared"), overwrite=True).directory
    trained, processor = beit_jax.from_pretrained(Path(str(files("beit_jax") / "digits")))
    config = replace(trained.config, model_type="data2vec-vision")
    random = beit_jax.build_model(config, initial_params(config, "finetune", jax.random.key(0)))
    models = {"embedded digits BEiT": (trained, processor), "random Data2Vec-Vision": (random, processor)}
else:
    data = Path(DATA)
    names = ("facebook/data2vec-vision-base-ft1k", "microsoft/beit-base-patch16-224")
    models = {name: beit_jax.from_pretrained(name) for name in names}

# %% [markdown]
# ## Evaluate
#
# Each model with its checkpoint's own processor, with the original's evaluation, and with timm's. The hub's processors
# squash the whole image to the model's size; the original and timm keep proportions and cut the borders off. For
# digits, which fill their 8x8 pixels and which the model saw squashed, cutting loses strokes; for photographs it is how
# the published numbers came about.

# %%
from beit_jax.train.evaluation.accuracy import describe
from beit_jax.train.evaluation.labelled import evaluate_directory

found = {}
how = {"batch_size": 90, "workers": 0} if DATA is None else {"batch_size": 128}  # 0: no process of its own
for name, (model, own) in models.items():
    size, mean, std = model.config.image_size, own.mean or HALF, own.std or HALF
    ways = {"checkpoint's": own} | {way: preset(way, size, mean=mean, std=std) for way in ("unilm_eval", "timm")}
    for way, prepares in ways.items():
        found[name, way] = evaluate_directory(model, prepares, data, **how)
for (name, way), scores in found.items():
    error = (scores.top1 * (1 - scores.top1) / scores.count) ** 0.5
    top1, top5 = f"{100 * scores.top1:6.2f} % +- {100 * error:.2f}", f"{100 * scores.top5:6.2f} %"
    print(f"{name:<36} {way:<13} top-1 {top1}  top-5 {top5}")

# %%
first = next(iter(models))
best = found[first, "checkpoint's" if DATA is None else "unilm_eval"]
print(first)
print(*describe(best), sep="\n")

# %% [markdown]
# ## Mistakes
#
# Rows are the images' classes, columns what they are taken for. On the command line the same picture is `beit-jax
# evaluate MODEL --data DATA --preset unilm_eval --confusion mistakes.png`; `--real real.json` counts ImageNet's
# reassessed labels as well.

# %%
import numpy as np
from matplotlib.figure import Figure

shares = np.asarray(best.confusion.todense(), float)
shares /= np.maximum(1, shares.sum(axis=1, keepdims=True))
figure = Figure(figsize=(6, 5), dpi=70, layout="constrained")
panel = figure.subplots()
shown = panel.imshow(shares**0.25, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
bar = figure.colorbar(shown, label="share of the row")
bar.set_ticks([0.01**0.25, 0.1**0.25, 0.5**0.25, 1], labels=["1 %", "10 %", "50 %", "100 %"])
if len(best.labels) <= 40:
    panel.set_xticks(range(len(best.labels)), labels=best.labels, rotation=90)
    panel.set_yticks(range(len(best.labels)), labels=best.labels)
panel.set(xlabel="taken for", ylabel="class", title=f"{first}: {100 * best.top1:.2f} %")
figure
