"""Published numbers of a checkpoint, and what it takes for this library to have computed them."""

import urllib.request
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

import beit_jax

MAX_DOWNLOAD = 10 * 2**20


@dataclass(frozen=True)
class Golden:
    """What somebody else measured on one image.

    Attributes:
        name: of the checkpoint: a hub name or a directory.
        shape: of the logits.
        logits: the first ones of the image: of a classifier [n], of a masked-image model [patches, n].
        tolerance: of their absolute difference.
        size: the image is squashed to this square; None for the checkpoint's own processor.
        argmax: the most probable class.
        labels: the names of the most probable classes, most probable first.
        all_masked: the logits are those with every patch masked.
    """

    name: str
    shape: tuple[int, ...]
    logits: tuple[float, ...] | tuple[tuple[float, ...], ...]
    tolerance: float
    size: int | None = None
    argmax: int | None = None
    labels: tuple[str, ...] = ()
    all_masked: bool = False


def check(golden: Golden, image: Path) -> None:
    """Loads the checkpoint, converts it in memory, runs it on `image`. Raises AssertionError where numbers differ."""
    model, processor = beit_jax.from_pretrained(golden.name)
    if golden.size is not None:
        processor = beit_jax.preset("hf", golden.size)
    rows, columns = model.config.grid
    mask = np.ones((1, rows * columns), bool) if golden.all_masked else None
    logits = np.asarray(jax.jit(lambda model, pixels: model(pixels, mask).logits)(model, processor(image)))

    assert logits.shape == golden.shape
    expected = np.array(golden.logits)
    found = logits[0][tuple(slice(length) for length in expected.shape)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=golden.tolerance)
    if golden.argmax is not None:
        assert logits[0].argmax() == golden.argmax
    if golden.labels:
        [best] = beit_jax.classify(model, processor, [image], top=len(golden.labels))
        assert tuple(guess.label for guess in best) == golden.labels


def download(url: str, path: Path) -> Path:
    """A file of at most `MAX_DOWNLOAD` bytes."""
    with urllib.request.urlopen(url, timeout=60) as response:
        content = response.read(MAX_DOWNLOAD + 1)
    assert len(content) <= MAX_DOWNLOAD, f"{url}: more than {MAX_DOWNLOAD} bytes"
    path.write_bytes(content)
    return path
