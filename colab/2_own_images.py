# %% [markdown]
# # Own images: classes, features, attention, nearest neighbours
#
# What a trained model says about a folder of images, and what it looks at.
#
# `DATA = None` takes scikit-learn's handwritten digits (8x8 pixels) and the classifier of digits that this package
# contains. That model was trained with the labels of the very images that serve as the memory of the search below, so a
# high accuracy there shows that the cells work, and nothing about self-supervised features. Set `DATA` to a folder with
# a folder of images per class, and the same cells use Data2Vec-Vision, fine-tuned on ImageNet-1k.

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
DATA = None  # such as "/content/images", with a folder per class in it

# %% [markdown]
# ## Images and model

# %%
from importlib.resources import files
from pathlib import Path

import numpy as np

import beit_jax
from beit_jax.train.data.datasets import open_dataset
from beit_jax.train.data.prepare import prepare_digits, prepare_folder

if DATA is None:
    prepared = prepare_digits(Path("prepared"), overwrite=True)
    model, processor = beit_jax.from_pretrained(Path(str(files("beit_jax") / "digits")))
else:
    prepared = prepare_folder(Path(DATA), Path("prepared"), held_out=0.2, overwrite=True, skip_bad=True)
    model, processor = beit_jax.from_pretrained("facebook/data2vec-vision-base-ft1k")

LIMIT = 2000  # images of each split, drawn at random: features of a base model take a while without an accelerator


def sample(split):
    """Images and labels of a split, in random order."""
    data = open_dataset(prepared.directory, split)
    chosen = np.random.default_rng(0).permutation(len(data))[:LIMIT]
    images, labels = zip(*(data.load(int(index)) for index in chosen), strict=True)
    return list(images), np.array(labels)


memory, memory_labels = sample("train")
queries, query_labels = sample("validation")
names = prepared.labels
print(f"{len(memory)} images to search in, {len(queries)} to ask about, {len(names)} classes")
print(f"model: {model.config.model_type}, {model.config.num_hidden_layers} blocks, {processor.describe()}")

# %% [markdown]
# ## Classes
#
# The three most probable classes of the model, with their softmax probabilities. They are the model's classes, not
# those of your folders: an image of something that ImageNet has no class for gets one all the same, often with
# confidence.

# %%
from itertools import chain

from matplotlib.figure import Figure


def gallery(rows, titles):
    """Rows of images, each with a title."""
    figure = Figure(figsize=(1.5 * len(rows[0]), 1.8 * len(rows)), dpi=72, layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for panel, image, title in zip(axes.flat, chain(*rows), chain(*titles), strict=True):
        panel.imshow(image)
        panel.set_title(title, fontsize=8)
        panel.set_axis_off()
    return figure


guesses = beit_jax.classify(model, processor, queries[:8], top=3)
lines = ["\n".join(f"{guess.label[:16]} {guess.probability:.2f}" for guess in best) for best in guesses]
gallery([queries[:8]], [lines])

# %% [markdown]
# ## Features and search
#
# The features are what the model pools for its classifier: the mean of its last patch tokens, normalised. For every
# query the five images of largest cosine similarity; then all queries are classified by a weighted vote of their 20
# nearest neighbours (`beit_jax.train.evaluation.neighbours.knn`, as DINO's evaluation does it). No weight is trained
# for this, and the classes are those of your folders.

# %%
from beit_jax.train.evaluation.neighbours import knn

keys = beit_jax.features(model, processor, memory, batch_size=64)
values = beit_jax.features(model, processor, queries, batch_size=64)


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


similarity = unit(values[:4]) @ unit(keys).T
nearest = np.argsort(-similarity, axis=1)[:, :5]
rows = [[queries[i], *(memory[j] for j in nearest[i])] for i in range(4)]
titles = [
    [f"query: {names[query_labels[i]]}", *(f"{names[memory_labels[j]]} {similarity[i, j]:.3f}" for j in nearest[i])]
    for i in range(4)
]
gallery(rows, titles)

# %%
votes = knn(keys, memory_labels, values, k=min(20, len(keys)))[:, 0]
print(f"features {keys.shape[1]} numbers an image")
print(f"k-NN accuracy {np.mean(votes == query_labels):.4f} of {len(queries)} images, chance {1 / len(names):.4f}")

# %% [markdown]
# A map of the features: their two leading principal components. Two of many dimensions hide most of what the vote above
# uses; classes that overlap here may still be separate.

# %%
centred = values - values.mean(axis=0)
_, spread, directions = np.linalg.svd(centred, full_matrices=False)
flat = centred @ directions[:2].T
figure = Figure(figsize=(5.5, 4), dpi=72, layout="constrained")
panel = figure.subplots()
for label in np.unique(query_labels)[:10]:
    panel.scatter(*flat[query_labels == label].T, s=8, label=names[label])
panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
shares = spread[:2] ** 2 / (spread**2).sum()
panel.set(xlabel=f"{100 * shares[0]:.0f} % of the variance", ylabel=f"{100 * shares[1]:.0f} %")
figure

# %% [markdown]
# ## Attention
#
# What the last block attends to, head by head: the share of attention that each patch gets. Attention is that of what
# the model pools: in both published families the mean of all patches, so the first picture shows the mean of their
# attention. Their class token is never trained in fine-tuning; `patch="class"` would show its attention. The second
# picture takes one patch. Attention weights are not explanations: values, MLPs and residual connections decide as well.

# %%
from beit_jax.looking import visualize
from beit_jax.looking.interpret import image_attention

attention = image_attention(model, processor, queries[0])
figure = visualize.attention_maps(attention)
figure.set_dpi(72)
figure

# %%
middle = tuple(side // 2 for side in attention.grid)
figure = visualize.attention_maps(attention, patch=middle)
figure.set_dpi(72)
figure

# %% [markdown]
# Attention rollout multiplies the blocks' mean attention, each mixed half and half with the residual connection.

# %%
figure = visualize.attention_rollout(attention, patch=middle)
figure.set_dpi(72)
figure
