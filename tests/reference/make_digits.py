"""How the checkpoint inside the package (`beit_jax/digits/`) came to be.

A small BEiT classifier, trained by PyTorch and transformers on scikit-learn's handwritten digits (1797 images of 8x8
pixels, values 0..16). Three quarters train it; the rest is held out and used only after the last epoch. The initial
weights, length and distortion were compared on a fifth of the training images, set aside for that. The directory
receives the checkpoint in Hugging Face format, five held-out images of every class, and the logits PyTorch gives for
those files. Everything follows from SEED:

    python tests/reference/make_digits.py    # about four minutes on one core; needs torch, transformers, scikit-learn
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sklearn
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn.functional import cross_entropy
from transformers import BeitConfig, BeitForImageClassification, BeitImageProcessorPil
from transformers.image_utils import PILImageResampling

SEED = 0
EPOCHS, BATCH = 60, 32
PEAK_LR, WEIGHT_DECAY, WARMUP_EPOCHS = 2e-3, 0.05, 5
LABEL_SMOOTHING = 0.1  # as in BEiT's fine-tuning; keeps the logits of the published models' size, a few units
HELD_OUT, IMAGES_PER_CLASS = 0.25, 5
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DESTINATION = Path(__file__).parents[2] / "beit_jax" / "digits"

Example = tuple[Image.Image, int]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and write the checkpoint embedded in beit_jax.")
    parser.add_argument("destination", nargs="?", type=Path, default=DESTINATION)
    destination: Path = parser.parse_args().destination

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    training, held_out = split_digits()
    processor = new_processor()
    model = train(new_model(), processor, training)

    processor.save_pretrained(destination)
    model.save_pretrained(destination)
    files = write_images(destination / "images", held_out)
    write_expected(destination, files, len(training), held_out)


def split_digits() -> tuple[list[Example], list[Example]]:
    """The digits as 8x8 greyscale pictures (0..16 scaled to 0..255), split by class into training and held-out."""
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    examples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    return tuple(train_test_split(examples, test_size=HELD_OUT, random_state=SEED, stratify=digits.target))


def new_processor() -> BeitImageProcessorPil:
    """The one path from a picture to the model, in training as in use: 32x32 bilinear, then [0, 255] to [-1, 1]."""
    return BeitImageProcessorPil(
        size={"height": 32, "width": 32},
        crop_size={"height": 32, "width": 32},
        resample=PILImageResampling.BILINEAR,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        do_convert_rgb=True,
    )


def new_model() -> BeitForImageClassification:
    model = BeitForImageClassification(
        BeitConfig(
            image_size=32,
            patch_size=4,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            use_relative_position_bias=True,
            use_mask_token=False,
            use_mean_pooling=True,
            layer_scale_init_value=0.1,
            drop_path_rate=0.1,
            initializer_range=0.1,  # about 1 / sqrt(64); the default 0.02 suits 768 channels and learns far slower here
            id2label=dict(enumerate(NAMES)),
            label2id={name: label for label, name in enumerate(NAMES)},
        )
    )
    # transformers starts the class token at zero, where LayerNorm's slope is 1 / sqrt(1e-12): one such gradient would
    # swallow the clipped norm and fill Adam's second moment. BEiT itself starts it at a standard deviation of 0.02.
    torch.nn.init.trunc_normal_(model.beit.embeddings.cls_token, std=0.02)
    return model


def train(
    model: BeitForImageClassification, processor: BeitImageProcessorPil, examples: list[Example]
) -> BeitForImageClassification:
    """AdamW under a linear warm-up and a cosine, on freshly distorted pictures; returns the model after EPOCHS."""
    rng = np.random.default_rng(SEED)
    labels = torch.tensor([label for _, label in examples])
    steps_per_epoch = len(examples) // BATCH
    optimizer = torch.optim.AdamW(decay_groups(model), lr=PEAK_LR, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine((step + 1) / steps_per_epoch, WARMUP_EPOCHS, EPOCHS)
    )
    model.train()
    for epoch in range(1, EPOCHS + 1):
        pixel_values = pixels(processor, (distort(image, rng) for image, _ in examples))
        loss_sum, correct = 0.0, 0
        for batch in torch.from_numpy(rng.permutation(len(examples))).split(BATCH)[:steps_per_epoch]:
            logits = model(pixel_values=pixel_values[batch]).logits
            loss = cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
            correct += int((logits.argmax(-1) == labels[batch]).sum())
        accuracy = correct / (steps_per_epoch * BATCH)
        print(f"epoch {epoch:2d}/{EPOCHS}  loss {loss_sum / steps_per_epoch:.4f}  accuracy {accuracy:.4f}", flush=True)
    return model


def decay_groups(model: BeitForImageClassification) -> list[dict]:
    """Matrices decay; vectors and the class token do not (as in BEiT's own fine-tuning)."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim > 1 and not name.endswith("cls_token")].append(parameter)
    return [{"params": groups[True], "weight_decay": WEIGHT_DECAY}, {"params": groups[False], "weight_decay": 0.0}]


def warmup_cosine(epoch: float, warmup: float, total: float) -> float:
    """The share of the peak learning rate at a fractional epoch: linear up to `warmup`, then a half cosine to zero."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / (total - warmup))))


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn by up to 15 degrees and shift by up to half a pixel each way; what enters from outside is background."""
    angle, (right, down) = rng.uniform(-15, 15), rng.uniform(-0.5, 0.5, 2)
    return image.rotate(angle, resample=Image.Resampling.BILINEAR, translate=(right, down))


def pixels(processor: BeitImageProcessorPil, images: Iterable[Image.Image]) -> torch.Tensor:
    """float32 [b, 3, 32, 32]."""
    return processor(list(images), return_tensors="pt").pixel_values


def write_images(directory: Path, held_out: list[Example]) -> dict[str, int]:
    """The first IMAGES_PER_CLASS of every class in the held-out split's own order; returns file name to label."""
    directory.mkdir(parents=True, exist_ok=True)
    files: dict[str, int] = {}
    for image, label in held_out:
        if list(files.values()).count(label) < IMAGES_PER_CLASS:
            name = f"{len(files):02d}_label_{label}.png"
            image.save(directory / name)
            files[name] = label
    return files


@torch.inference_mode()
def write_expected(directory: Path, files: dict[str, int], training_size: int, held_out: list[Example]) -> None:
    """What PyTorch says, read back from the written files alone: checkpoint, processor settings and PNGs."""
    model = BeitForImageClassification.from_pretrained(directory).eval()
    processor = BeitImageProcessorPil.from_pretrained(directory)
    images = [Image.open(directory / "images" / name) for name in files]
    logits = model(pixels(processor, images)).logits
    predicted = model(pixels(processor, (image for image, _ in held_out))).logits.argmax(-1).tolist()
    correct = sum(guess == label for guess, (_, label) in zip(predicted, held_out, strict=True))
    expected = {
        "made_by": "tests/reference/make_digits.py",
        "dataset": "sklearn.datasets.load_digits",
        "seed": SEED,
        "versions": {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "training_size": training_size,
        "held_out_size": len(held_out),
        "held_out_correct": correct,
        "held_out_accuracy": correct / len(held_out),
        "images_correct": int((logits.argmax(-1) == torch.tensor(list(files.values()))).sum()),
        # A float32 widened to Python's float prints with 17 digits: it comes back bit for bit.
        "images": {
            name: {"label": label, "logits": row}
            for (name, label), row in zip(files.items(), logits.tolist(), strict=True)
        },
    }
    (directory / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(f"held out: {correct} of {len(held_out)} correct, {correct / len(held_out):.4f}")


if __name__ == "__main__":
    main()
