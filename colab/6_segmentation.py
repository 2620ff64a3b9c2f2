# %% [markdown]
# # Semantic segmentation
#
# UperNet on BEiT: a class for every pixel of images of any size.
#
# `DATA = None` draws simple scenes (sky, grass, a building, trees) in the folders and with the class numbers of ADE20K,
# and trains a UperNet of 4 blocks on them for some tens of steps, through the recipe, loop and evaluation that the full
# models use. Flat shapes of nearly constant colour are no test of segmentation. What the run shows is that images and
# label maps stay aligned through cropping, scaling and sliding windows, that both heads learn, and that scores are
# computed as for ADE20K. With `DATA` set to ADE20K (`ADEChallengeData2016`), the cells evaluate the published
# `microsoft/beit-base-finetuned-ade-640-640` on its validation images instead.

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
DATA = None  # such as "/content/ADEChallengeData2016", with images/ and annotations/ in it

# %% [markdown]
# ## Images and label maps
#
# A label map is a PNG file with a class number for every pixel, named as its image. ADE20K counts classes from 1 and
# writes 0 where there is none.

# %%
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from beit_jax.images.label_maps import write_label_map

CLASSES = {"building": (1, (150, 90, 70)), "sky": (2, (120, 170, 230)), "tree": (4, (30, 90, 40))}
CLASSES["grass"] = (9, (110, 170, 70))  # names, numbers from 0, and colours


def draw_scene(seed):
    """A picture and its label map, of another size each time; a strip on the left has no class."""
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(64, 112, 2))
    horizon = int(height * rng.uniform(0.4, 0.7))
    labels = Image.new("L", (width, height), CLASSES["sky"][0])
    draw = ImageDraw.Draw(labels)
    draw.rectangle((0, horizon, width, height), fill=CLASSES["grass"][0])
    left, wide, tall = rng.uniform(0, 0.6) * width, rng.uniform(0.2, 0.4) * width, rng.uniform(0.2, 0.5) * height
    draw.rectangle((left, horizon - tall, left + wide, horizon + 4), fill=CLASSES["building"][0])
    for _ in range(2):
        x, radius = rng.uniform(0, width), rng.uniform(0.08, 0.16) * width
        draw.ellipse((x - radius, horizon - radius, x + radius, horizon + radius), fill=CLASSES["tree"][0])
    labels = np.array(labels)
    pixels = np.zeros((height, width, 3))
    for number, colour in CLASSES.values():
        pixels[labels == number] = np.array(colour) + rng.normal(0, 15, 3)
    pixels += rng.normal(0, 12, pixels.shape)
    labels += 1
    labels[:, :3] = 0
    return Image.fromarray(np.uint8(pixels.clip(0, 255))), labels


if DATA is None:
    for part, seeds in (("training", range(64)), ("validation", range(1000, 1012))):
        for kind in ("images", "annotations"):
            (Path("scenes") / kind / part).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            picture, labels = draw_scene(seed)
            picture.save(Path("scenes/images") / part / f"scene_{seed:04}.png")
            write_label_map(labels, Path("scenes/annotations") / part / f"scene_{seed:04}.png")
root = Path(DATA or "scenes")
images = sorted((root / "images" / "validation").iterdir())
print(len(images), "validation images")

# %% [markdown]
# ## Model
#
# The small model differs from the published ones in its sizes only. To train a published size on ADE20K:
#
#     beit-jax prepare ade20k ADEChallengeData2016 ade20k
#     beit-jax train beit_base_ade20k_640 --data ade20k --out run --init ENCODER
#
# The recipe is 160,000 steps of 16 images at 640 pixels, on eight GPUs in the original: nothing for one session here.

# %%
import beit_jax
from beit_jax.images import ade20k_processor
from beit_jax.looking import visualize
from beit_jax.train.data.prepare import prepare_ade20k
from beit_jax.train.loop.metrics_file import read_metrics
from beit_jax.train.loop.plan import make_plan
from beit_jax.train.loop.run import train
from beit_jax.train.recipes import recipe_named
from beit_jax.train.step.optim import optimizer


def small_plan():
    """`beit_base_ade20k` for images of 64 pixels, twelve epochs, and a model of 4 blocks of width 32."""
    recipe = recipe_named("beit_base_ade20k")
    recipe = replace(
        recipe,
        model=replace(recipe.model, image_size=64, drop_path=0.0, dtype="float32"),
        data=replace(recipe.data, batch_size=8, workers=0),
        segment=replace(recipe.segment, scale=(256, 64), ratio=(0.8, 1.5)),
        optim=replace(recipe.optim, lr=4e-3, warmup_epochs=1, epochs=12, layer_decay=1.0, accumulate=1),
        run=replace(recipe.run, log_every=8, save_every=1000, eval_every_epochs=12),
    )
    plan = make_plan(recipe, prepare_ade20k(root, Path("prepared"), overwrite=True).directory)
    names = {number: name for name, (number, _) in CLASSES.items()}
    config = replace(
        plan.config,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        patch_size=(8, 8),
        out_indices=(0, 1, 2, 3),
        auxiliary_channels=16,
        labels=tuple(names.get(number, label) for number, label in enumerate(plan.config.labels)),
    )
    objective, tx = plan.objective.replaced(config=config), optimizer(recipe.optim, config)
    return replace(plan, config=config, objective=objective, tx=tx)


if DATA is None:
    outcome = train(small_plan(), Path("run"), quiet=True)
    model, processor = beit_jax.from_pretrained(Path("run/model"))
else:
    model, _ = beit_jax.from_pretrained("microsoft/beit-base-finetuned-ade-640-640")
    processor = ade20k_processor(640)  # as it was trained; the hub's file squashes images instead
print(f"{model.config.num_hidden_layers} blocks of width {model.config.hidden_size}; {processor.describe()}")

# %%
if DATA is None:
    figure = visualize.training_curves({"run": read_metrics(Path("run/metrics.jsonl"))}, metrics=["loss"])
    figure.set_dpi(70)
    display(figure)

# %% [markdown]
# ## Segment
#
# Windows of the model's native size slide over the image, a third of them overlapping, and their logits are averaged.
# Left the image under the colours of the classes that were found, with their share of the area; right the same of the
# annotation. What has no class has no colour.

# %%
from beit_jax.images.files import open_image
from beit_jax.images.label_maps import read_label_map, reduce_labels
from beit_jax.inference.segmentation import Inference
from beit_jax.looking.pictures import overlay

SLIDE = Inference(mode="slide", batch_size=4)


def pair(image):
    """What was found, and what is annotated, side by side."""
    picture = open_image(image)
    found = beit_jax.segment(model, processor, picture, SLIDE)
    annotated = reduce_labels(read_label_map(root / "annotations" / "validation" / f"{image.stem}.png"))
    zoom = max(1, 220 // picture.height)
    square = np.ones((zoom, zoom), int)
    big = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    parts = [overlay(big, np.kron(part, square), model.config.labels) for part in (found, annotated)]
    both = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)), "white")
    both.paste(parts[0], (0, 0))
    both.paste(parts[1], (parts[0].width, 0))
    return both


pairs = [pair(image) for image in images[:3]]
sheet = Image.new("RGB", (max(one.width for one in pairs), sum(one.height for one in pairs)), "white")
for place, one in enumerate(pairs):
    sheet.paste(one, (0, sum(before.height for before in pairs[:place])))
sheet

# %% [markdown]
# ## Score
#
# Intersection over union, averaged over the classes that occur. The published model has 53.61 mIoU on all 2000
# validation images in windows of one scale, as here, and 54.2 averaged over six scales and mirrored images
# (`Inference(mode="slide", scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True)`). A part of the images gives another
# number: raise `LIMIT` for one that can be compared, or run `beit-jax evaluate` with `--as-trained`. The scores of the
# default are of a dozen drawings.

# %%
from beit_jax.train.evaluation.segmentation import Confusion, describe

LIMIT = 100
confusion = Confusion(model.config.labels)
for image in images[:LIMIT]:
    truth = read_label_map(root / "annotations" / "validation" / f"{image.stem}.png")
    confusion.add(beit_jax.segment(model, processor, image, SLIDE), reduce_labels(truth), image.name)
scores = confusion.scores()
print(*describe(scores), sep="\n")
for label, iou in zip(scores.labels, scores.iou, strict=True):
    if iou > 0:
        print(f"{label:<24} IoU {iou:.3f}")
