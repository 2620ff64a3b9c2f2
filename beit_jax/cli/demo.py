"""The demo: the embedded digits classifier, trained in PyTorch, is converted, compared with PyTorch and used.

PyTorch computed the logits to compare with when the checkpoint was made (tests/reference/make_digits.py), so the demo
needs no torch.
"""

import json
import time
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import jax
import numpy as np

from beit_jax.errors import BeitJaxError
from beit_jax.hub import WEIGHTS, Source
from beit_jax.inference import predict
from beit_jax.terminal import Progress, no_progress
from beit_jax.weights.native import is_native
from beit_jax.weights.tensors import read_metadata

DIGITS = "embedded digits classifier"
TOLERANCE = 1e-5
"""The largest absolute difference that any logit may have: the parity bound of float32 models of this size."""


@dataclass(frozen=True)
class Demonstration:
    """The result of the demo."""

    destination: str
    images: int
    correct: int
    max_error: float
    largest_logit: float
    held_out_accuracy: float
    seconds: float

    @property
    def passed(self) -> bool:
        return self.max_error <= TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tolerance": TOLERANCE, "passed": self.passed}


def run(destination: Path, *, progress: Progress = no_progress) -> Demonstration:
    """Converts the embedded checkpoint to `destination`, compares its logits with PyTorch's, classifies its images.

    Raises:
        BeitJaxError: the destination exists and is no result of an earlier demo, or it cannot be written.
    """
    from beit_jax.convert import importer

    start = time.perf_counter()
    with as_file(files("beit_jax") / "digits") as directory:
        expected = json.loads((directory / "expected.json").read_text(encoding="utf-8"))
        importer.convert(
            Source(directory, DIGITS), destination, overwrite=_is_earlier_result(destination), progress=progress
        )
        model, processor = predict.from_pretrained(destination)
        pixels = processor([directory / "images" / name for name in expected["images"]])
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(lambda model, pixels: model(pixels).logits)(model, pixels))
    reference = np.array([image["logits"] for image in expected["images"].values()], np.float32)
    labels = np.array([image["label"] for image in expected["images"].values()])
    return Demonstration(
        destination=str(destination),
        images=len(labels),
        correct=int((logits.argmax(axis=1) == labels).sum()),
        max_error=float(np.abs(logits - reference).max()),
        largest_logit=float(np.abs(reference).max()),
        held_out_accuracy=expected["held_out_accuracy"],
        seconds=time.perf_counter() - start,
    )


def describe(result: Demonstration) -> list[str]:
    """The result in lines for people."""
    verdict = "equal" if result.passed else "DIFFERENT"
    return [
        "A BEiT classifier of handwritten digits, trained in PyTorch by transformers, is now a Flax model.",
        "",
        f"converted    {result.destination}",
        f"logits       {verdict}: at most {result.max_error:.1e} from PyTorch's (tolerance {TOLERANCE:.0e}, "
        f"largest logit {result.largest_logit:.1f})",
        f"classified   {result.correct} of {result.images} held-out images correctly; "
        f"PyTorch's accuracy on all held-out images was {result.held_out_accuracy:.1%}",
        f"time         {result.seconds:.1f} s",
        "",
        f"Next: beit-jax inspect {result.destination}",
        "      beit-jax convert microsoft/beit-base-patch16-224 beit-base",
    ]


def _is_earlier_result(destination: Path) -> bool:
    if not destination.is_dir() or not is_native(destination):
        return False
    try:
        metadata = read_metadata(destination / WEIGHTS)
    except BeitJaxError:
        return False
    return bool(json.loads(metadata["provenance"]).get("source") == DIGITS)
