"""Writes a model as ONNX, by transformers' model and `torch.onnx`, and compares it with this library's model.

The way was chosen by trying four (torch 2.13, transformers 5.23, onnx 1.23). `torch.onnx.export` with ``dynamo=True``
and attention step by step ("eager") writes all kinds of models with a free batch. The older ``dynamo=False`` cannot
write UperNet's pooling for a free batch. ``dynamo=True`` cannot write attention by "sdpa". jax2onnx, from this
library's own function, makes a loop of the blocks, which onnxruntime runs slower, and fails with the newest JAX.

The files are those of Optimum: ``model.onnx`` with ``config.json`` and ``preprocessor_config.json`` beside it.
"""

import importlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from beit_jax.atomic import Contents, check_destination, new_directory
from beit_jax.config import BeitConfig
from beit_jax.convert import exporter, importer
from beit_jax.convert.formats import writers
from beit_jax.convert.reference import Reference
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, PROCESSOR, resolve
from beit_jax.inference.predictor import params_of
from beit_jax.json_file import write_json
from beit_jax.programs.options import DEFAULT, ProgramOptions
from beit_jax.programs.signature import program, takes_mask
from beit_jax.weights.native import NativeCheckpoint

MODEL: Final = "model.onnx"
DATA: Final = "model.onnx.data"
MARK: Final = "beit_jax"
PACKAGES: Final = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
BATCHES: Final = (1, 3, 8)
TOLERANCE: Final = 1e-5
"""The largest difference of an output from the model's, times the largest output where that exceeds 1."""
LARGEST_FILE: Final = 2_000_000_000
"""Bytes of weights up to which they lie in the model's file. A file of protobuf holds 2 GiB."""


def is_written_here(directory: Path) -> bool:
    """True if the ONNX model in a directory is one of this library."""
    try:
        with (directory / MODEL).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL))
            return MARK.encode() in file.read()  # metadata are the last fields of the file
    except OSError:
        return False


_TAIL = 1 << 16
ONNX = Contents("ONNX model", (MODEL, DATA, CONFIG, PROCESSOR), is_written_here)
"""What an export to ONNX may replace."""


def export_onnx(
    checkpoint: NativeCheckpoint,
    destination: str | Path,
    options: ProgramOptions = DEFAULT,
    *,
    overwrite: bool = False,
    source: str | Path | None = None,
) -> list[str]:
    """Writes the ONNX model of a checkpoint as a new directory, whole or not at all, after onnxruntime has run it.

    Inputs and outputs have transformers' names and layouts: ``pixel_values`` [batch, channels, height, width]. Height
    and width are the model's own. Weights above `LARGEST_FILE` lie in a file beside the model's.

    Args:
        options: `ProgramOptions.features` alone.
        overwrite: replace an earlier ONNX model, which stays whole until the new one is complete.
        source: where the checkpoint was read from, which is never replaced.

    Returns:
        Notes for the user: inputs, outputs, and how far onnxruntime's outputs are from this library's model.

    Raises:
        BeitJaxError: a package is missing; transformers has no such model, or computes it otherwise; the destination
            cannot be written.
    """
    destination, source = Path(destination), None if source is None else Path(source)
    check_export(destination, checkpoint.config, overwrite=overwrite, source=source)
    size = sum(leaf.nbytes for leaf in checkpoint.params.values())
    with new_directory(
        destination, overwrite=overwrite, contents=ONNX, source=source, need_bytes=2 * size
    ) as directory:
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name[:40]}.") as scratch:
            torch_model = _torch_model(checkpoint, Path(scratch) / "hf")
        wrapped = _wrapped(torch_model, checkpoint.config, options.features)
        _write(wrapped, checkpoint.config, options.features, directory / MODEL)
        write_json(directory / CONFIG, checkpoint.config.to_hf())
        write_json(directory / PROCESSOR, checkpoint.processor.to_hf())
        return _checked(directory / MODEL, checkpoint, options.features)


def check_export(destination: Path, config: BeitConfig, *, overwrite: bool = False, source: Path | None = None) -> None:
    """Refuses what `export_onnx` would refuse, before the checkpoint is read.

    Raises:
        BeitJaxError: as `export_onnx`.
    """
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            missing = printable(error.name or package)
            raise BeitJaxError(f"{missing} is not installed; pip install 'beit-jax[onnx]'") from None
    reasons = [each.refusal(_in_torch(config)) for each in writers("hf")]
    if all(reasons):
        raise BeitJaxError(f"--to onnx goes through transformers, and {reasons[-1]}; --to stablehlo holds every model")
    check_destination(destination, overwrite=overwrite, contents=ONNX, source=source)


def _in_torch(config: BeitConfig) -> BeitConfig:
    """The model as transformers can describe it. It counts the blocks that a head reads by another rule, and has no
    setting for the blocks that heads are trained on; `_torch_model` gives the model their numbers."""
    own = config.feature_taps == "original" and config.task in ("semantic_segmentation", "backbone")
    return replace(config, feature_taps="hf", out_indices=config.tapped_states) if own else config


def _torch_model(checkpoint: NativeCheckpoint, directory: Path) -> Any:
    """transformers' model with the tensors of a checkpoint, by name and strictly, and with eager attention."""
    config = checkpoint.config
    exporter.export(replace(checkpoint, config=_in_torch(config)), directory, "hf")
    try:
        model = Reference(importer.plan(resolve(directory))).model
    except BeitJaxError as error:
        raise BeitJaxError(
            f"--to onnx goes through transformers, which does not read this model ({printable(error, 300)}); "
            "--to stablehlo holds every model"
        ) from None
    if config.task == "semantic_segmentation":
        # It reads hidden state i - 1 of an index i. The setter refuses the last block's; the model does not.
        model.config._out_indices = [state + 1 for state in config.tapped_states]
    return model


def names(config: BeitConfig, features: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of inputs and outputs: transformers', as Optimum expects them."""
    inputs = ("pixel_values", *(["bool_masked_pos"] if takes_mask(config, features) else []))
    if config.task == "backbone" and not features:
        return inputs, tuple(f"feature_map_{index}" for index in config.out_indices)
    if config.task == "features" or features:
        return inputs, ("last_hidden_state", "pooler_output")
    return inputs, ("logits",)


def _wrapped(model: Any, config: BeitConfig, features: bool) -> Any:
    """A module that gives tensors, in the order of `names`."""
    import torch

    _, outputs = names(config, features)
    encoder = getattr(model, model.base_model_prefix, model) if features else model

    class Outputs(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.model = encoder

        def forward(self, pixel_values: Any, bool_masked_pos: Any = None) -> Any:
            masked = {} if bool_masked_pos is None else {"bool_masked_pos": bool_masked_pos}
            output = self.model(pixel_values, **masked)
            if outputs == ("logits",):
                return output.logits
            if outputs[0] != "last_hidden_state":
                return tuple(output.feature_maps)
            tokens, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
            return tokens, tokens[:, 1:].mean(1) if pooled is None else pooled

    return Outputs().eval()


def _write(module: Any, config: BeitConfig, features: bool, path: Path) -> None:
    """Writes a module by `torch.onnx`, without the lines of source files that torch notes at every node."""
    import torch

    inputs, outputs = names(config, features)
    examples = tuple(torch.from_numpy(_noise(config, name, 2)) for name in inputs)
    batch = torch.export.Dim("batch")
    with _quietly():
        written = torch.onnx.export(
            module, examples, dynamo=True, verbose=False, input_names=list(inputs), output_names=list(outputs),
            dynamic_shapes=tuple({0: batch} for _ in inputs), optimize=True,
        )  # fmt: skip
    assert written is not None
    model = written.model
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes() if hasattr(graph, "all_nodes") else graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        graph.metadata_props.clear()
        for value in graph.inputs:
            value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props["producer"] = MARK
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.state_dict().values())
    written.save(path, external_data=size > LARGEST_FILE)


def _checked(path: Path, checkpoint: NativeCheckpoint, features: bool) -> list[str]:
    """Runs the file by onnxruntime, and compares it with this library's model.

    Raises:
        BeitJaxError: their outputs differ by more than `TOLERANCE`.
    """
    import onnxruntime

    config = checkpoint.config
    inputs, outputs = names(config, features)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model: Callable[..., Mapping[str, jax.Array]] = jax.jit(program(config, dtype="float32", features=features))
    params, worst, largest = params_of(checkpoint), 0.0, 0.0
    for batch in BATCHES:
        given = {name: _noise(config, name, batch) for name in inputs}
        expected = list(model(params, *(_channels_last(value) for value in given.values())).values())
        for found, wanted in zip(session.run(list(outputs), given), expected, strict=True):
            ours = _channels_first(np.asarray(wanted))
            error = float(np.abs(found - ours).max()) if found.shape == ours.shape else float("inf")
            worst, largest = max(worst, error), max(largest, float(np.abs(ours).max()))
            if not error <= TOLERANCE * max(1.0, float(np.abs(ours).max())):
                raise BeitJaxError(
                    f"--to onnx goes through transformers, whose model is {error:.1e} from this one (outputs up to "
                    f"{largest:.3g}); nothing was kept, --to stablehlo holds every model"
                )
    shapes = [*session.get_inputs(), *session.get_outputs()]
    external = ", its weights in a file beside it" if (path.parent / DATA).exists() else ""
    return [
        *(
            f"{'takes' if each.name in inputs else 'gives'} {each.name} {_spoken(each.shape)} {each.type}"
            for each in shapes
        ),
        f"run by onnxruntime {onnxruntime.__version__} with {', '.join(map(str, BATCHES))} images: at most {worst:.1e} "
        f"from the model (largest output {largest:.3g}){external}",
    ]


def _spoken(shape: list[Any]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _noise(config: BeitConfig, name: str, batch: int) -> np.ndarray:
    """An example of an input, in transformers' layout."""
    rng = np.random.default_rng(batch)
    if name == "bool_masked_pos":
        return rng.random((batch, config.grid[0] * config.grid[1])) > 0.5
    return rng.standard_normal((batch, config.num_channels, *config.image_size)).astype(np.float32)


def _channels_last(value: np.ndarray) -> np.ndarray:
    return np.moveaxis(value, 1, -1) if value.ndim == 4 else value


def _channels_first(value: np.ndarray) -> np.ndarray:
    return np.moveaxis(value, -1, 1) if value.ndim == 4 else value


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps torch's progress and its deprecations of itself from the terminal."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
