"""The command `list`: the published checkpoints, in sections that say once what all of their rows share."""

from dataclasses import asdict

from beit_jax.cli.arguments import Json
from beit_jax.config import BeitConfig
from beit_jax.published import PUBLISHED, Published
from beit_jax.terminal import print_json, print_lines, print_table
from beit_jax.variants import PARAMETERS, VARIANTS

_HUB = "Hub names. Every command takes them as they are: beit-jax convert NAME DEST"


def list_published(*, json: Json = False) -> int:
    """List the published checkpoints: name, size, accuracy and where they are.

    Try:
      beit-jax list
      beit-jax list --json

    Accuracies are top-1 on ImageNet-1k unless another measure is named.
    """
    if json:
        print_json([asdict(row) | _size(row.variant) for row in PUBLISHED])
        return 0
    for place, rows in _sections().items():
        print_lines([place, ""])
        cells = [[name, *_size_cells(row.variant), row.result or "-"] for name, row in rows]
        known = [index for index, column in enumerate(zip(*cells, strict=True)) if {*column} != {"-"}]
        head = ["name", "parameters", "pixels", "result"]
        print_table([head[index] for index in known], [[row[index] for index in known] for row in cells])
        print_lines([""])
    print_lines(["Variants, for convert --variant and train --model.variant", ""])
    print_table(
        ["name", "parameters", "pixels", "output"],
        [[name, *_size_cells(name), _output(config)] for name, config in VARIANTS.items()],
    )
    return 0


def _sections() -> dict[str, list[tuple[str, Published]]]:
    """By heading, which says where they are: checkpoints and their names there. Those on the hub come first."""
    found: dict[str, list[tuple[str, Published]]] = {_HUB: []}
    for row in PUBLISHED:
        place, name = _place(row)
        found.setdefault(place, []).append((name, row))
    return found


def _place(row: Published) -> tuple[str, str]:
    """Where a checkpoint is, as a heading; and its name there."""
    if not row.where.startswith("https:"):
        return _HUB, row.where
    name = row.name.rpartition(" ")[2]  # some names begin with that of their project
    return f"Files to download: {row.where.replace(name, 'NAME')}", name


def _size(variant: str | None) -> dict[str, int | None]:
    if variant is None:
        return {"parameters": None, "image_size": None}
    return {"parameters": PARAMETERS[variant], "image_size": VARIANTS[variant].image_size[0]}


def _size_cells(variant: str | None) -> list[str]:
    parameters, pixels = _size(variant).values()
    return ["-" if parameters is None else f"{parameters / 1e6:.1f} M", "-" if pixels is None else f"{pixels}"]


def _output(config: BeitConfig) -> str:
    """What the model of a variant computes, in a word or two."""
    return {
        "features": "features",
        "masked_image_modeling": f"{config.vocab_size:,} visual tokens",
        "image_classification": f"{config.num_labels:,} classes",
        "semantic_segmentation": f"label maps, {config.num_labels:,} classes",
        "backbone": "feature maps",
    }[config.task]
