"""Compares a converted model with transformers, stage by stage, on the same input.

The reference is built from the tensors of the file itself, by name and strictly: `from_pretrained` draws what it does
not find, and may put a tensor in another's place.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, Source
from beit_jax.json_file import read_json_array
from beit_jax.models.build import build_model
from beit_jax.models.interface import BeitOutput
from beit_jax.tree import unflatten

from .importer import plan
from .reference import Reference, refusing

TOLERANCE = 1e-5
"""The largest absolute error of a stage may be this, times the stage's largest magnitude where that exceeds 1. float32
carries seven digits, and the hidden states of real checkpoints are in the hundreds."""

MASKED_SHARE = 0.4  # the share of patches that is masked, in a model that predicts masked patches


@dataclass(frozen=True)
class Stage:
    """The distance of one stage of the model from the reference.

    Attributes:
        max_error, mean_error: the largest and the mean absolute difference.
        scale: the largest magnitude in the reference.
    """

    name: str
    max_error: float
    mean_error: float
    scale: float

    @property
    def tolerance(self) -> float:
        return TOLERANCE * max(1.0, self.scale)

    @property
    def passed(self) -> bool:
        return self.max_error <= self.tolerance  # False for NaN

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"tolerance": self.tolerance, "passed": self.passed}


@dataclass(frozen=True)
class Comparison:
    """The stages of a comparison, and lines for the user about the reference."""

    stages: list[Stage]
    notes: tuple[str, ...]


def check(source: Source, pixel_values: np.ndarray | None = None, *, seed: int = 0, batch: int = 2) -> list[Stage]:
    """Returns the stages of `compare`, on `pixel_values` [b, h, w, c] or noise."""
    return compare(source, pixel_values, seed=seed, batch=batch).stages


def compare(
    source: Source,
    pixel_values: np.ndarray | None = None,
    *,
    images: Sequence[Path] = (),
    seed: int = 0,
    batch: int = 2,
) -> Comparison:
    """Runs transformers and the converted model on the same pixels in float32 and compares every stage.

    Args:
        source: a directory in Hugging Face format, or a weight file in one.
        pixel_values: [b, h, w, c] float32; by default `batch` images of normal noise of the native size.
        images: files to prepare as the source says, instead of `pixel_values`.
        seed: for the noise and for the masked positions.

    Raises:
        BeitJaxError: torch or transformers is not installed; the source cannot be read, or not by transformers.
    """
    decided = plan(source)
    with decided.checkpoint:
        config = decided.config
        rng = np.random.default_rng(seed)
        if images:
            pixel_values = decided.processor(list(images))
        if pixel_values is None:
            pixel_values = rng.standard_normal((batch, *config.image_size, config.num_channels)).astype(np.float32)
        mask = _mask(config, pixel_values, rng)
        reference = Reference(decided)
        with refusing(source.directory / CONFIG):
            expected = list(_reference_stages(reference.model, pixel_values, mask))
        params = {name: leaf.astype(np.float32) for name, leaf in decided.reader.params().items()}
    with jax.default_matmul_precision("highest"):
        model = build_model(config, unflatten(params))
        run = jax.jit(lambda model, pixels, mask: model(pixels, mask, output_hidden_states=True))
        found = dict(_stages(run(model, jnp.asarray(pixel_values), mask)))
    return Comparison([_compare(name, found[name], value) for name, value in expected], reference.notes)


def read_report(path: Path) -> list[dict[str, Any]]:
    """Returns the stages that `beit-jax parity --json` printed into a file, as `Stage.as_dict` gives them.

    Raises:
        BeitJaxError: the file cannot be read, or it is no such report.
    """
    report = read_json_array(path, advice=f"give {_REPORT}")
    if not report:
        raise BeitJaxError(f"{printable(path)}: expected a list of stages, found an empty one; give {_REPORT}")
    for number, stage in enumerate(report, 1):
        for name, kind in _FIELDS.items():
            value = stage.get(name) if isinstance(stage, dict) else None
            if kind is float and type(value) is int:
                value = stage[name] = float(str(value))  # infinite beyond the largest float
            if type(value) is not kind:
                raise BeitJaxError(
                    f"{printable(path)}: stage {number}: {name}: expected {_KINDS[kind]}, found "
                    f"{printable(json.dumps(value), 40)}; give {_REPORT}"
                )
    return report


_REPORT = "what beit-jax parity --json printed"
_FIELDS: Mapping[str, type] = {
    "name": str,
    "max_error": float,
    "mean_error": float,
    "scale": float,
    "tolerance": float,
    "passed": bool,
}
_KINDS: Mapping[type, str] = {str: "a string", float: "a number", bool: "true or false"}


def _mask(config: BeitConfig, pixel_values: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    if config.task != "masked_image_modeling" or not config.use_mask_token:
        return None
    patches = np.prod([side // patch for side, patch in zip(pixel_values.shape[1:3], config.patch_size, strict=True)])
    return rng.random((len(pixel_values), patches)) < MASKED_SHARE


def _stages(output: BeitOutput) -> Iterator[tuple[str, np.ndarray]]:
    assert output.hidden_states is not None
    for i, state in enumerate(output.hidden_states):
        yield ("embeddings" if i == 0 else f"block {i}"), np.asarray(state)
    for name, value in (("pooled", output.pooler_output), ("logits", output.logits)):
        if value is not None:
            yield name, np.asarray(value)
    for i, value in enumerate(getattr(output, "feature_maps", ())):
        yield f"feature map {i}", np.asarray(value)
    yield "last hidden state", np.asarray(output.last_hidden_state)


def _compare(name: str, found: np.ndarray, reference: np.ndarray) -> Stage:
    assert found.shape == reference.shape, f"{name}: {found.shape} here, {reference.shape} in the reference"
    difference = np.abs(found.astype(np.float64) - reference)
    return Stage(name, float(difference.max()), float(difference.mean()), float(np.abs(reference).max()))


def _reference_stages(
    model: Any, pixel_values: np.ndarray, mask: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the stages in order, as transformers computes them."""
    import torch

    captured: dict[str, Any] = {}
    backbone = model.base_model
    if backbone.pooler is not None:
        backbone.pooler.register_forward_hook(_keep(captured, "pooled"))
    backbone.register_forward_hook(_keep(captured, "backbone"))
    arguments = {} if mask is None else {"bool_masked_pos": torch.from_numpy(mask)}
    with torch.no_grad():
        pixels = torch.from_numpy(pixel_values).permute(0, 3, 1, 2).contiguous()
        output = model(pixels, output_hidden_states=True, return_dict=True, **arguments)
    for i, state in enumerate(output.hidden_states):
        yield ("embeddings" if i == 0 else f"block {i}"), state.numpy()
    yield "last hidden state", captured["backbone"][0].numpy()
    if "pooled" in captured:
        yield "pooled", captured["pooled"].numpy()
    if "logits" in output:
        yield "logits", _channels_last(output.logits.numpy())
    for i, value in enumerate(output.get("feature_maps") or ()):
        yield f"feature map {i}", _channels_last(value.numpy())


def _channels_last(array: np.ndarray) -> np.ndarray:
    """Returns maps [b, c, h, w] as [b, h, w, c], and any other array as it is."""
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def _keep(captured: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(module: Any, inputs: Any, output: Any) -> None:
        captured[name] = output

    return hook
