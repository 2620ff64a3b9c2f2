"""The model card of an export: ``README.md`` with the hub's metadata, written from what the checkpoint says of itself.

It tells nothing that the checkpoint does not record, and no path of this machine. A card that a person wrote is kept.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from beit_jax.config import BeitConfig
from beit_jax.errors import printable
from beit_jax.json_file import read_json
from beit_jax.publishing.push import CARD
from beit_jax.version import __version__

MARK: Final = "<!-- Written by beit-jax export. Remove this line to keep what you change. -->"
RUN: Final = "run.json"
MOST_LABELS: Final = 20
_HUB_NAME: Final = re.compile(r"[\w-]+/[\w.-]+")

TASKS: Final[Mapping[str, tuple[str, str]]] = {
    "image_classification": ("image-classification", "AutoModelForImageClassification"),
    "semantic_segmentation": ("image-segmentation", "AutoModelForSemanticSegmentation"),
    "masked_image_modeling": ("image-feature-extraction", "AutoModelForMaskedImageModeling"),
    "features": ("image-feature-extraction", "AutoModel"),
    "backbone": ("image-feature-extraction", "AutoBackbone"),
}
"""The hub's name of a task, and transformers' class, by the task of a configuration."""

LIBRARIES: Final = {"hf": "transformers", "timm": "timm", "peft": "peft", "onnx": "onnx"}
"""What the hub calls the library of a layout; of all others it is this one."""

METRICS: Final = {"accuracy": "accuracy", "accuracy_top5": "accuracy_top5", "mIoU": "mean_iou"}


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Attributes:
        repository: OWNER/NAME.
        layout: what the files are for: "hf", "stablehlo" and so on.
        provenance: where the weights are from, as the checkpoint records it.
        start: the same of the checkpoint that a run began with; None if it began at random, or nobody knows.
        notes: what the export says of itself.
    """

    repository: str
    license: str
    layout: str
    config: BeitConfig
    provenance: Mapping[str, Any]
    start: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()

    @property
    def base_model(self) -> str | None:
        """The name on the hub of what the weights were made of, if they were."""
        origin = self.provenance if "recipe" not in self.provenance else self.start or {}
        name = origin.get("source")
        known = origin.get("revision") is not None and isinstance(name, str) and _HUB_NAME.fullmatch(name)
        return str(name) if known else None


def start_of(native: Path) -> Mapping[str, Any] | None:
    """Where the run of a model began, from the ``run.json`` beside it; None if there is none."""
    file = native.parent / RUN
    found = read_json(file).get("start") if file.is_file() else None
    return found if isinstance(found, Mapping) else None


def write_card(directory: Path, subject: Subject) -> bool:
    """Writes the card into an export, unless a person's lies there already.

    Returns:
        True if it was written.
    """
    path = directory / CARD
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    path.write_text(card(subject), encoding="utf-8")
    return True


def card(subject: Subject) -> str:
    """The text of the card."""
    from huggingface_hub import EvalResult, ModelCardData

    name, config = subject.repository.partition("/")[2], subject.config
    data = subject.provenance.get("data")
    measured = _scores(subject.provenance)
    results = [
        EvalResult(
            task_type=TASKS[config.task][0],
            dataset_type=_data_name(data) or "unknown",
            dataset_name=_data_name(data) or "unknown",
            dataset_split="validation",
            metric_type=METRICS[score],
            metric_value=value,
        )
        for score, value in measured.items()
        if score in METRICS
    ]
    metadata = ModelCardData(
        license=subject.license,
        library_name=LIBRARIES.get(subject.layout, "beit-jax"),
        pipeline_tag=TASKS[config.task][0],
        base_model=subject.base_model,
        tags=[config.model_type, "vision", "beit-jax"],
        model_name=name if results else None,
        eval_results=results or None,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---\n{MARK}",
        f"# {name}",
        "\n".join(_what(subject)),
        "## Where it comes from\n\n" + "\n".join(_origin(subject)),
    ]
    if measured:
        rows = [f"| {score} | {value:.6g} |" for score, value in measured.items()]
        parts.append(f"## Scores\n\n{_on(data)}\n\n| score | value |\n|---|---|\n" + "\n".join(rows))
    parts.append("## How to load it\n\n" + "\n\n".join(_loading(subject)))
    if subject.notes:
        parts.append("## Notes\n\n" + "\n".join(f"* {_text(note)}" for note in subject.notes))
    parts.append(f"## Licence\n\nThe licence of the weights, as the uploader states it: {subject.license}.")
    return "\n\n".join(parts) + "\n"


def _what(subject: Subject) -> Iterator[str]:
    config = subject.config
    family = {"beit": "BEiT", "data2vec-vision": "Data2Vec-Vision"}.get(config.model_type, config.model_type)
    (height, width), (rows, columns) = config.image_size, config.patch_size
    yield (
        f"A {family} model for {config.task.replace('_', ' ')}: {config.num_hidden_layers} blocks of width "
        f"{config.hidden_size}, images of {height} x {width} pixels and {config.num_channels} channels, patches of "
        f"{rows} x {columns}. Written by [beit-jax](https://pypi.org/project/beit-jax/) {__version__} for "
        f"{LIBRARIES.get(subject.layout, subject.layout)}."
    )
    if config.labels and config.task in ("image_classification", "semantic_segmentation"):
        shown = ", ".join(_text(label) for label in config.labels[:MOST_LABELS])
        more = f", and {len(config.labels) - MOST_LABELS} more" if len(config.labels) > MOST_LABELS else ""
        yield f"\n{len(config.labels)} classes: {shown}{more}."


def _origin(subject: Subject) -> Iterator[str]:
    """Lines of Markdown. The name of a local source is a path, and is left out."""
    record = subject.provenance
    if "recipe" in record:
        recipe, data = record["recipe"], record.get("data")
        yield f"* trained by `beit-jax train {_text(_named(recipe))}`" + (
            f", {record['step']:,} steps" if isinstance(record.get("step"), int) else ""
        )
        yield f"* data: {_described(data)}"
        yield f"* began with {_source(subject.start)}" if subject.start else "* its beginning is not recorded here"
    else:
        yield f"* converted from {_source(record)}"
    files = (record if "recipe" not in record else subject.start or {}).get("files")
    for file, digest in files.items() if isinstance(files, Mapping) else ():
        if digest:
            yield f"* `{_text(file)}`: SHA-256 `{_text(digest)}`"


def _source(record: Mapping[str, Any] | None) -> str:
    record = record or {}
    name, revision = record.get("source"), record.get("revision")
    if isinstance(name, str) and revision is not None and _HUB_NAME.fullmatch(name):
        return f"[{name}](https://huggingface.co/{name}) at revision `{_text(revision)}`"
    if "recipe" in record:
        return f"a model trained by `beit-jax train {_text(_named(record['recipe']))}`"
    naming = record.get("naming")
    return f"a local checkpoint, by the names of {_text(naming)}" if naming else "a local checkpoint"


def _named(recipe: Any) -> str:
    return str(recipe.get("name", "RECIPE")) if isinstance(recipe, Mapping) else "RECIPE"


def _data_name(data: Any) -> str | None:
    return str(data["dataset"]) if isinstance(data, Mapping) and data.get("dataset") else None


def _described(data: Any) -> str:
    if not isinstance(data, Mapping) or not _data_name(data):
        return "not recorded"
    records = f", {data['records']:,} records" if isinstance(data.get("records"), int) else ""
    return f"{_text(_data_name(data))}, split {_text(data.get('split'))}{records}"


def _on(data: Any) -> str:
    known = _data_name(data)
    return (
        f"On the validation images of {_text(known)}, at the end of training." if known else "At the end of training."
    )


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    found = record.get("scores")
    items = found.items() if isinstance(found, Mapping) else ()
    return {str(name): float(value) for name, value in items if isinstance(value, int | float) and math.isfinite(value)}


def _loading(subject: Subject) -> Iterator[str]:
    """Blocks of code: with the library that the layout is for, and with this one."""
    name, config = subject.repository, subject.config
    here = f'import beit_jax\n\nmodel, processor = beit_jax.from_pretrained("{name}")'
    get = f'from huggingface_hub import snapshot_download\n\ndirectory = snapshot_download("{name}")'
    match subject.layout:
        case "hf":
            kind = TASKS[config.task][1]
            yield _code(
                f"from transformers import AutoImageProcessor, {kind}\n\n"
                f'processor = AutoImageProcessor.from_pretrained("{name}")\nmodel = {kind}.from_pretrained("{name}")'
            )
            yield _code(here)
        case "timm":
            yield _code(f'import timm\n\nmodel = timm.create_model("hf-hub:{name}", pretrained=True)')
            yield _code(here)
        case "peft":
            yield _code(f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, "{name}")')
        case "stablehlo":
            yield "Needs jax, flatbuffers and safetensors: `pip install 'beit-jax[stablehlo]'`."
            yield _code(f"{get}\n\nimport beit_jax\n\nprogram = beit_jax.load_program(directory)\n{_call(config)}")
        case "onnx":
            yield _code(
                f'{get}\n\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession(f"{{directory}}/model.onnx")'
            )
        case _:
            yield f"The file is `checkpoint.pth`, for the scripts of {_text(subject.layout)}; here:"
            yield _code(
                f"{get}\n\nimport beit_jax\n\n"
                'model, processor = beit_jax.from_pretrained(f"{directory}/checkpoint.pth")'
            )


def _call(config: BeitConfig) -> str:
    if config.task == "image_classification":
        return 'print(program.classify("cat.jpg", top=3))'
    return 'print(program(program.prepare("cat.jpg")))'


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _text(value: object) -> str:
    """Text in Markdown that nothing can end: no line break, no markup, no HTML."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(printable(value, 300).split()))
