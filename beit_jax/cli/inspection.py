"""Describes a checkpoint, in words for people and as data for programs. Reads no tensor."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import PROCESSOR, WEIGHTS, Source
from beit_jax.images.processor import ImageProcessor
from beit_jax.tokenizers.configs import TokenizerConfig, is_native_tokenizer
from beit_jax.weights.leaves import num_params
from beit_jax.weights.native import is_native, read_config
from beit_jax.weights.tensors import FORMAT, read_metadata, read_specs

if TYPE_CHECKING:
    from beit_jax.convert.importer import Plan
    from beit_jax.convert.options import Options
    from beit_jax.convert.tokenizers import TokenizerPlan
    from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint


@dataclass(frozen=True)
class Inspection:
    """A description: the same facts as lines for people and as data for programs."""

    lines: list[str]
    as_dict: dict[str, Any]


def inspect(source: Source, options: "Options | None" = None, *, tensors: bool = False) -> Inspection:
    """Describes a native checkpoint or any source the converter reads.

    Args:
        options: how to read a source that is converted.
        tensors: list every tensor too.

    Raises:
        BeitJaxError: the checkpoint cannot be loaded or converted.
    """
    if source.path.is_dir() and is_native(source.path):
        if is_native_tokenizer(source.path):
            from beit_jax.tokenizers.checkpoint import read_tokenizer  # builds the network, with JAX

            return describe_tokenizer(read_tokenizer(source.path))
        return _native(source, tensors)
    from beit_jax.convert import tokenizers
    from beit_jax.convert.importer import plan
    from beit_jax.convert.options import Options

    options = options or Options()
    if tokenizers.is_tokenizer(source, options):
        tokenizer = tokenizers.plan(source, options)
        with tokenizer.checkpoint:
            return describe_tokenizer_plan(tokenizer)
    decided = plan(source, options)
    with decided.checkpoint:
        listed = {name: (info.shape, str(info.dtype)) for name, info in decided.checkpoint.tensors.items()}
        found = plan_as_dict(decided) | ({"tensors": _tensors_as_dict(listed)} if tensors else {})
        return Inspection([*describe_plan(decided), *(_tensor_lines(listed) if tensors else ())], found)


def describe_tokenizer(checkpoint: "TokenizerCheckpoint") -> Inspection:
    """Describes a native tokenizer."""
    parameters = sum(leaf.size for leaf in checkpoint.params.values())
    return _tokenizer(checkpoint.config, checkpoint.provenance, parameters)


def describe_tokenizer_plan(plan: "TokenizerPlan") -> Inspection:
    """Describes a planned or finished conversion of a tokenizer."""
    return _tokenizer(plan.config, plan.provenance(), plan.parameters, plan.notes)


def _tokenizer(
    config: TokenizerConfig, provenance: Mapping[str, Any], parameters: int, notes: Iterable[str] = ()
) -> Inspection:
    fields = asdict(config)
    lines = [
        *_describe_provenance(provenance),
        f"model        {config.model_type}, {parameters:,} parameters",
        f"config       {', '.join(f'{name} {value}' for name, value in fields.items())}",
        *(f"note         {note}" for note in notes),
    ]
    found = {"provenance": dict(provenance), "parameters": parameters, "config": fields}
    return Inspection(lines, found | ({"notes": list(notes)} if notes else {}))


def describe_plan(plan: "Plan") -> list[str]:
    """Describes a planned conversion in lines for people."""
    from beit_jax.convert.provenance import written_by

    revision = f" at {plan.source.revision}" if plan.source.revision else ""
    dropped = f", {len(plan.dropped)} left out{_computed(plan)}" if plan.dropped else ""
    program = written_by(plan.source, plan.checkpoint)
    lines = [
        f"source       {printable(plan.source.name)}{revision}",
        f"files        {', '.join(printable(file.name) for file in plan.checkpoint.files)} ({plan.checkpoint.format})",
        f"written by   {program or 'a program that its files do not name'}",
        f"naming       {plan.naming.name}, {len(plan.checkpoint.tensors)} tensors{dropped}",
        *_describe_model(plan.config, plan.images.found, {str(spec.dtype) for spec in plan.specs.values()}),
    ]
    return [*lines, *(f"note         {note}" for note in plan.notes)]


def _computed(plan: "Plan") -> str:
    """Those among the tensors that are left out which a model computes, by their last names; notes tell the others."""
    names = [re.split(r"[./]", name)[-1] for name in plan.dropped if plan.naming.derived.search(name)]
    counts = [f"{printable(name.removesuffix(':0'), 60)} ({count})" for name, count in sorted(Counter(names).items())]
    return f" (computed: {', '.join(counts)})" if counts else ""


def plan_as_dict(plan: "Plan") -> dict[str, Any]:
    """Describes a planned conversion for programs."""
    from beit_jax.convert.provenance import written_by

    return plan.provenance() | {
        "written_by": written_by(plan.source, plan.checkpoint),
        "source_tensors": len(plan.checkpoint.tensors),
        "dropped": list(plan.dropped),
        "notes": list(plan.notes),
        **_model_as_dict(plan.config, plan.images.found),
    }


def _native(source: Source, tensors: bool) -> Inspection:
    config = read_config(source.path)
    processor = _processor(source.path / PROCESSOR)
    provenance = json.loads(read_metadata(source.path / WEIGHTS)["provenance"])
    listed = read_specs(source.path / WEIGHTS)
    dtypes = {dtype for _, dtype in listed.values()}
    lines = [
        f"source       {printable(source.name)} (native checkpoint)",
        *_describe_provenance(provenance),
        *_describe_model(config, processor, dtypes),
    ]
    found = {"format": FORMAT, "provenance": provenance, **_model_as_dict(config, processor)}
    if tensors:
        return Inspection([*lines, *_tensor_lines(listed)], found | {"tensors": _tensors_as_dict(listed)})
    return Inspection(lines, found)


def _processor(path: Path) -> ImageProcessor | BeitJaxError:
    """How images are prepared, or why nobody knows: a description needs no image."""
    try:
        return ImageProcessor.from_file(path)
    except BeitJaxError as error:
        return error


def _describe_provenance(provenance: Mapping[str, Any]) -> list[str]:
    """Lines of the recorded provenance. Other programs than the converter may have recorded nothing."""
    files = [f"{name} sha256 {digest}" if digest else name for name, digest in provenance.get("files", {}).items()]
    formats = [provenance[key] for key in ("format", "naming") if key in provenance]
    facts = {
        "converted": " by ".join(str(provenance[key]) for key in ("source", "converter") if key in provenance),
        "revision": provenance.get("revision"),
        "files": ", ".join([*files, *formats]),
        "options": ", ".join(f"{name} {value}" for name, value in provenance.get("options", {}).items()),
    }
    return [f"{key:12} {printable(value, 500)}" for key, value in facts.items() if value]


def _outputs(config: BeitConfig) -> str:
    """What a classifier's outputs are, by its problem_type."""
    if config.problem_type == "regression":
        return "values (regression)"
    return "classes, of which several may hold" if config.problem_type == "multi_label_classification" else "classes"


def _describe_model(config: BeitConfig, images: ImageProcessor | BeitJaxError, dtypes: Iterable[str]) -> list[str]:
    head = {
        "features": "no head",
        "masked_image_modeling": f"{config.vocab_size} visual tokens",
        "image_classification": f"{config.num_labels} {_outputs(config)}",
        "semantic_segmentation": f"UperNet, {config.num_labels} classes",
        "backbone": f"{len(config.out_indices)} feature maps",
    }[config.task]
    absolute = "absolute positions, " if config.use_absolute_position_embeddings else ""
    return [
        f"model        {config.to_hf()['architectures'][0]}, {num_params(config):,} parameters, {head}",
        f"encoder      {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, mlp {config.intermediate_size}, "
        f"layer norm epsilon {config.layer_norm_eps:g}",
        f"positions    {absolute}relative bias {config.position_bias}, resized by {config.position_resize}",
        f"pooling      {config.pooling}; layer scale {'yes' if config.layer_scale_init_value > 0 else 'no'}; "
        f"mask token {'yes' if config.use_mask_token else 'no'}",
        f"images       {'x'.join(map(str, config.image_size))}, patch {'x'.join(map(str, config.patch_size))}: "
        f"{f'cannot be prepared ({images})' if isinstance(images, BeitJaxError) else images.describe()}",
        *_describe_taps(config),
        f"stored as    {', '.join(sorted(dtypes))}",
    ]


def _describe_taps(config: BeitConfig) -> list[str]:
    if not config.out_indices:
        return []
    counted = "as trained" if config.feature_taps == "original" else "as transformers reads them"
    return [
        f"taps         out_indices {list(config.out_indices)}, {counted}: hidden states {list(config.tapped_states)}"
    ]


def _model_as_dict(config: BeitConfig, images: ImageProcessor | BeitJaxError) -> dict[str, Any]:
    return {
        "parameters": num_params(config),
        "config": config.to_hf(),
        "preprocessor": {"error": str(images)} if isinstance(images, BeitJaxError) else images.to_hf(),
    }


def _tensor_lines(listed: Mapping[str, tuple[tuple[int, ...], str]]) -> list[str]:
    return [f"{dtype:9} {'x'.join(map(str, shape)):>20}  {printable(name)}" for name, (shape, dtype) in listed.items()]


def _tensors_as_dict(listed: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
    return {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in listed.items()}
