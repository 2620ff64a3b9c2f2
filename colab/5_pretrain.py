# %% [markdown]
# # Pre-train: masked tokens and data2vec
#
# The two self-supervised objectives on the same images without labels. BEiT hides patches and predicts the visual
# tokens that a tokenizer gives them; data2vec predicts, for hidden patches, the features that a moving average of the
# model gives when it sees them.
#
# `DATA = None` takes 1347 handwritten digits of 8x8 pixels, a model of 200,000 parameters and a few hundred steps. That
# is enough to see that losses fall, that hidden patches are predicted better than by always guessing the most frequent
# token, and that features learned from masked tokens tell digits apart better than those of random weights. It is not
# enough for data2vec, which gets a quarter of the steps, nor to compare the two objectives. Recipes `digits_tokenizer`,
# `digits_pretrain` and `digits_data2vec` in full length take minutes more; a linear probe then names 71.1 % (masked
# tokens) and 65.0 % (data2vec) of held-out digits, against 23.6 % with random weights
# (`benchmarks/digits_pretraining.py`).

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
DATA = None  # such as "/content/images": any tree of images; or "/content/imagenet", written by `beit-jax prepare`

# %% [markdown]
# ## Data, and how long to train
#
# With `DATA`, the recipes are those of the papers (`beit_base_pt1k`, `data2vec_base_800`), cut to ten epochs and 64
# images a step with the learning rate scaled along: something to begin with on one accelerator. The published models
# took 800 epochs with 2048 images a step. The tokenizer is then DALL-E's; put its two files, `encoder.pkl` and
# `decoder.pkl` of `cdn.openai.com/dall-e`, into `/content`.

# %%
from dataclasses import replace
from pathlib import Path

from beit_jax.convert import tokenizers
from beit_jax.hub import resolve
from beit_jax.train.data.prepare import prepare_digits, prepare_images
from beit_jax.train.data.shards import INFO
from beit_jax.train.loop.plan import make_plan
from beit_jax.train.loop.run import train
from beit_jax.train.recipes import recipe_named


def shortened(name, epochs, *, batch_size=None):
    """The recipe for fewer epochs, one of them warmup, evaluated at the end; learning rate in proportion to batches."""
    recipe = recipe_named(name)
    batch_size = batch_size or recipe.data.batch_size
    rate = recipe.optim.lr * batch_size / recipe.data.batch_size
    return replace(
        recipe,
        data=replace(recipe.data, batch_size=batch_size, eval_batch_size=batch_size),
        optim=replace(recipe.optim, epochs=epochs, warmup_epochs=1, lr=rate),
        run=replace(recipe.run, eval_every_epochs=epochs),
    )


if DATA is None:
    data = prepare_digits(Path("prepared"), overwrite=True).directory
    tokens_recipe, data2vec_recipe = shortened("digits_pretrain", 12), shortened("digits_data2vec", 3)
else:
    prepared = (Path(DATA) / INFO).is_file()
    data = Path(DATA) if prepared else prepare_images(Path(DATA), Path("prepared"), held_out=0.05).directory
    tokens_recipe = shortened("beit_base_pt1k", 10, batch_size=64)
    data2vec_recipe = shortened("data2vec_base_800", 10, batch_size=64)

# %% [markdown]
# ## A tokenizer
#
# For digits a small dVAE is trained first: 64 tokens, each standing for 4x4 pixels of an image resized to 16x16.

# %%
if DATA is None:
    outcome = train(make_plan(shortened("digits_tokenizer", 3), data), Path("tokenizer"), quiet=True)
    encoder, decoder = Path("tokenizer/tokenizer"), Path("tokenizer/decoder")
    print({name: round(value, 3) for name, value in outcome.scores.items()})
else:
    encoder, decoder = Path("dalle-encoder"), Path("dalle-decoder")
    for name, place in (("encoder.pkl", encoder), ("decoder.pkl", decoder)):
        tokenizers.convert(resolve(f"/content/{name}"), place, overwrite=True)

# %% [markdown]
# ## Masked tokens

# %%
tokens_run = train(make_plan(tokens_recipe, data, tokenizer=encoder), Path("beit"), quiet=True)
print({name: round(value, 3) for name, value in tokens_run.scores.items()})

# %% [markdown]
# ## data2vec
#
# The loss has no absolute meaning, since the targets move. What to watch are the deviations of predictions and targets:
# if they fall towards zero, both have collapsed to a constant.

# %%
data2vec_run = train(make_plan(data2vec_recipe, data), Path("data2vec"), quiet=True)
print({name: round(value, 3) for name, value in data2vec_run.scores.items()})

# %%
from beit_jax.looking import visualize
from beit_jax.train.loop.metrics_file import read_metrics

runs = {name: read_metrics(Path(name) / "metrics.jsonl") for name in ("beit", "data2vec")}
figure = visualize.training_curves(runs, metrics=["loss", "masked_accuracy", "target_deviation"])
figure.set_dpi(60)
figure

# %% [markdown]
# ## What the model sees behind hidden patches
#
# Held-out images, two fifths of their patches hidden. The third column decodes the image's own tokens: no prediction
# can be better than that. The fourth has the predicted tokens in the hidden places. Each place is predicted on its own,
# from the most probable token, so neighbouring hidden patches need not fit together. After the default's few steps the
# tokenizer is coarse, and most predictions are its brightest and darkest tokens: roughly where digits have ink.

# %%
import numpy as np
from PIL import Image

import beit_jax
from beit_jax.looking.reconstruct import grid_picture, reconstruct
from beit_jax.tokenizers.checkpoint import load_decoder, load_tokenizer
from beit_jax.train.augmentation.masking import BlockMask
from beit_jax.train.data.datasets import open_dataset, splits
from beit_jax.train.recipe import MaskOptions

model, processor = beit_jax.from_pretrained(Path("beit/model"))
tokenizer = load_tokenizer(encoder)
held_out = open_dataset(data, "validation" if "validation" in splits(data) else "train")
chosen = np.random.default_rng(0).permutation(len(held_out))[:256]
images = [held_out.load(int(index))[0] for index in chosen]

rows, columns = model.config.grid
count = round(rows * columns * 2 / 5)
mask = BlockMask(model.config.grid, MaskOptions(count, min_block=max(2, rows * columns // 12), exact=True))
rng = np.random.default_rng(0)
masks = np.stack([mask(rng) for _ in images])
found = reconstruct(model, processor, tokenizer, load_decoder(decoder), images, masks)
few = replace(found, **{name: getattr(found, name)[:5] for name in ("original", "masked", "tokenizer", "predicted")})
Image.fromarray(grid_picture(few))

# %% [markdown]
# Is that more than guessing? Tokens are not equally frequent; the fair comparison is with the most frequent one.

# %%
height, width = (side * patch for side, patch in zip(model.config.grid, tokenizer.patch_size, strict=True))
low, high = tokenizer.value_range
views = np.stack([np.asarray(Image.fromarray(image).resize((width, height), 3)) for image in images[:64]]) / 255
tokens = np.asarray(tokenizer.tokens((low + (high - low) * views).astype(np.float32))).ravel()
print(f"hidden tokens predicted right  {found.correct:.3f}")
print(f"the most frequent token        {np.bincount(tokens).max() / len(tokens):.3f}")

# %% [markdown]
# ## Are the features good for something?
#
# The mean patch token, frozen; a vote of the 20 nearest training images. Of 450 digits a standard error is about 2.3
# points: after 126 steps data2vec cannot be told apart from random weights; masked tokens, after 504, lie a few points
# above them. Labels are used here only. Images without labels (`prepare images`) have a single class, and this cell
# says nothing.

# %%
import jax

from beit_jax.train.evaluation.neighbours import knn
from beit_jax.train.initial.parameters import initial_params


def sample(split, limit=2000):
    part = open_dataset(data, split)
    chosen = np.random.default_rng(1).permutation(len(part))[:limit]
    images, labels = zip(*(part.load(int(index)) for index in chosen), strict=True)
    return list(images), np.array(labels)


(memory, memory_labels), (queries, query_labels) = sample("train"), sample(held_out.split)
start = beit_jax.build_model(model.config, initial_params(model.config, "pretrain", jax.random.key(0)))
models = {
    "masked tokens": model,
    "data2vec": beit_jax.from_pretrained(Path("data2vec/model"))[0],
    "random weights": start,
}
for name, one in models.items():
    keys, values = (beit_jax.features(one, processor, part, batch_size=64) for part in (memory, queries))
    votes = knn(keys, memory_labels, values, k=20)[:, 0]
    print(f"k-NN accuracy  {name:<15} {np.mean(votes == query_labels):.3f}")

# %% [markdown]
# ## Go on from here
#
# `beit/model` and `data2vec/model` are native checkpoints: fine-tune them (notebook 4), probe every block (`beit-jax
# train digits_probe --data prepared --out probe --init beit/model --model.image-size 16`), or export them with
# `beit-jax export`. On TPU pods the same recipes run sharded over all hosts: docs/pods.md. In the full recipes masked
# accuracies stay low: BEiT-B on ImageNet-1k ends near 0.05 of 8192 tokens.
