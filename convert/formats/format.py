"""The parts of a source format's page: `SourceFormat`, and how a format says which model a file holds.

A page gives the names of the tensors as rules, and leaves everything else at its default where it can: the model is
then described by a ``config.json`` as transformers writes it, and the format is read only, never written.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from beit_jax.config import BeitConfig, PresetName
from beit_jax.errors import BeitJaxError
from beit_jax.json_file import Fields

from .config_notes import hf_notes
from .rules import Rule, Rules, export
from .segmentation import MMSEG_NAMES, SegmentationNames

if TYPE_CHECKING:
    from beit_jax.images.processor import ImageProcessor
    from beit_jax.weights.native import NativeCheckpoint

    from ..files.weight_file import TensorInfo

TRANSPOSED = (
    "transformers 5 reads the position biases of a grid that is not square with height and width exchanged; here they "
    "are read as they are counted, and its outputs are others"
)

_RUNNING_MEAN, _BATCHES = ".running_mean", ".num_batches_tracked"


@dataclass(frozen=True)
class Place:
    """Where an encoder stands in a file.

    Attributes:
        format: the format whose names the tensors have.
        outer: what stands before every name of the model, heads included: ``net.``; "" where the file is the model's.
        prefix: what stands before the names of the backbone behind it: ``beit.``.
    """

    format: "SourceFormat"
    outer: str
    prefix: str

    @property
    def before(self) -> str:
        """What stands before the names of the backbone in the file."""
        return self.outer + self.prefix


@dataclass(frozen=True)
class Sighting:
    """The facts from which a format describes the model in a file.

    Attributes:
        format: the format whose names the tensors have.
        prefix: what stands before the names of the backbone.
        hosted: the file is another model's, which holds the encoder and has heads of its own.
        keep_head: a classifier of a hosted encoder is asked for.
        tensors: name, shape and dtype of every tensor of the model, see `Place.outer`.
        metadata: plain data that lay beside the weights in their file.
        content: the parsed ``config.json``, or None where there is none.
        file: the weights, for messages.
        config_file: where ``config.json`` is or should be.
        num_heads: the number of attention heads as the user states it.
        aggregate_from: the block from which BEiT v2's patch aggregation reads, as the user states it.
    """

    format: "SourceFormat"
    prefix: str
    tensors: Mapping[str, "TensorInfo"]
    metadata: Mapping[str, object]
    content: Mapping[str, Any] | None
    file: str
    config_file: str
    num_heads: int | None = None
    aggregate_from: int | None = None
    hosted: bool = False
    keep_head: bool = False

    @property
    def has_head(self) -> bool:
        """True if a head among the tensors is the model's."""
        return not self.hosted or self.keep_head

    @cached_property
    def backbone(self) -> dict[str, "TensorInfo"]:
        """The tensors under `prefix`, without it."""
        under = {name: info for name, info in self.tensors.items() if name.startswith(self.prefix)}
        return {name.removeprefix(self.prefix): info for name, info in under.items()}

    def holds(self, rules: Collection[Rule], prefix: str, leaf: str) -> bool:
        """True if the file has a tensor of a leaf whose path begins with `leaf`."""
        names = [name for each in rules if each.flax.startswith(leaf) for name in each.torch]
        return any(prefix + name in self.tensors for name in names)


@dataclass(frozen=True)
class Description:
    """The model in a file, and how its images are prepared.

    Attributes:
        config: the model as it lies in the file, before any resizing.
        seen: lines for people that say how each part was recognised.
        processor: returns how images are prepared, if the source says so itself; nothing else is asked then.
        image_preset: how images are prepared if there is no ``preprocessor_config.json`` either.
        assumed: the same, where the code that trained the model does as no preset says.
        origin: what describes the model and may be wrong: a file, an option, or "" for the tensors themselves.
    """

    config: BeitConfig
    seen: tuple[str, ...]
    processor: Callable[[], "ImageProcessor"] | None = None
    image_preset: PresetName = "hf"
    origin: str = ""
    assumed: Callable[[], "ImageProcessor"] | None = None


def describe_by_config(sighting: Sighting) -> Description:
    """Describes a model by the ``config.json`` that transformers writes.

    Raises:
        BeitJaxError: there is none, or it describes no model of this family.
    """
    file, content = sighting.config_file, sighting.content
    if content is None:
        raise BeitJaxError(
            f"{file}: no such file, and {sighting.format.name} names do not describe a model: pass --config FILE with "
            "the model's config.json, copy it there, or pass --variant with a name of beit-jax list"
        )
    notes = tuple(hf_notes(content, file=file))
    content = _of_encoder(content, file, hosted=sighting.hosted)
    if not content.get("architectures"):
        family = "Data2VecVision" if content.get("model_type") == "data2vec-vision" else "Beit"
        content = {**content, "architectures": [family + _head(sighting)]}
    config = BeitConfig.from_hf(content, file=file)
    # Only names can tell whether a bare encoder that pools the mean was saved with its pooling layer.
    if config.task == "features" and config.pooling == "mean":
        pooler = sighting.holds(sighting.format.backbone, sighting.prefix, "pooler_norm/")
        config = replace(config, add_pooling_layer=pooler)
    return Description(config, notes, image_preset=default_preset(config), origin=file)


def _of_encoder(content: Mapping[str, Any], file: str, *, hosted: bool) -> Mapping[str, Any]:
    """The description of the encoder within that of the model around it, such as DPT or VisionEncoderDecoderModel."""
    if hosted:
        return {**Fields(content, file).typed("backbone_config", dict, content), "architectures": None}
    for inside in map(content.get, _ENCODERS if content.get("model_type") not in _FAMILIES else ()):
        if isinstance(inside, Mapping) and inside.get("model_type") in _FAMILIES:
            return {**inside, "architectures": None}
    return content


_FAMILIES = ("beit", "data2vec-vision")
_ENCODERS = ("backbone_config", "encoder", "vision_config")


def _head(sighting: Sighting) -> str:
    """The suffix of transformers' class for the head that a file has."""
    if sighting.has_head:
        if sighting.holds(sighting.format.heads, "", "classifier/"):
            return "ForImageClassification"
        if sighting.holds(sighting.format.heads, "", "lm_head/"):
            return "ForMaskedImageModeling"
        if any(name.startswith(("decode_head.", "decode_head/")) for name in sighting.tensors):
            return "ForSemanticSegmentation"
    return "Model"


def _ends(outer: str, hosts: Collection[str]) -> bool:
    return any(outer == host or outer.endswith(f".{host}") for host in hosts)


def is_transposed(config: BeitConfig) -> bool:
    """True for a model of which transformers reads the position biases in another order than they are counted in."""
    return config.position_bias != "none" and config.grid[0] != config.grid[1]


def default_preset(config: BeitConfig) -> PresetName:
    """Returns the image preset of the code that resizes positions as `config` does: transformers or the original.

    The original's crops are square; images of other proportions can only be resized as transformers does.
    """
    height, width = config.image_size
    return "hf" if config.position_resize == "bilinear" or height != width else "unilm_eval"


Writer = Callable[["SourceFormat", Path, "NativeCheckpoint"], list[str]]


@dataclass(frozen=True)
class SourceFormat:
    """All that is known of one kind of files.

    A backbone's names are written bare; the prefix (``beit.`` in a model with a head) is found in the file, and so is
    what other programs put before all names of a model.

    Attributes:
        name: for people, and for the record in a converted checkpoint.
        backbone: the rules of the encoder.
        heads: the rules of the heads for classification and masked image modelling.
        pooled: the rules of leaves of the encoder whose names do not begin as the backbone's do.
        marker: a tensor of the backbone that every file of this format has, and no file of a later format in the list.
        prefixes: what may stand before the names of the backbone.
        written_prefix: the one of them that an export writes; None where the model's family and task decide.
        segmentation: the names of the segmentation heads.
        head_marker: a further tensor, of a head, for a format that differs in the heads only.
        unused_norm_prefix: what stands before the norm of the last state in a model that gives feature maps, which does
            not use it; None if it is the prefix of the backbone.
        hosts: prefixes under which other models (DPT, MiDaS) keep a BEiT encoder; the rest of such a file is theirs,
            and a head behind such a prefix is one that they do not use.
        bilinear_hosts: those of them that resize position biases as transformers does, whatever this format does.
        copies: prefixes under which a training keeps a copy of the encoder beside it, which is not asked for.
        derived: matches the names of tensors that are computed, not learned. They are left out.
        foreign: matches the names of learned tensors of parts that do not exist here. They are left out, with a note.
        fits: True for tensors that may be this format's: what their shapes, and a ``config.json``, say where names do
            not.
        matches: True for the content of a ``config.json`` (None without one) that a directory of this format may have.
        describe: the model in a file, and its images.
        write: writes a checkpoint into a directory as this format lays it out, and returns notes for the user. None for
            a format that is only read.
        refusal: the reason why this format cannot hold a model, or None if it can.
    """

    name: str
    backbone: Rules
    heads: Rules
    marker: str
    prefixes: tuple[str, ...]
    pooled: Rules = ()
    written_prefix: str | None = None
    segmentation: SegmentationNames = MMSEG_NAMES
    head_marker: str | None = None
    unused_norm_prefix: str | None = None
    hosts: tuple[str, ...] = ()
    bilinear_hosts: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    derived: re.Pattern[str] = re.compile(r"(^|[./])(relative_position_index|num_batches_tracked)$")
    foreign: re.Pattern[str] = re.compile(r"(?!)")
    fits: Callable[[Mapping[str, "TensorInfo"], Place, Mapping[str, Any] | None], bool] = lambda *_: True
    matches: Callable[[Mapping[str, Any] | None], bool] = lambda content: True
    describe: Callable[[Sighting], Description] = describe_by_config
    write: Writer | None = None
    refusal: Callable[[BeitConfig], str | None] = lambda config: None

    def places_in(self, names: Collection[str]) -> list[Place]:
        """Returns where a file with these tensors has encoders of this format, whatever stands before their names."""
        found = []
        for name in names:
            before = name.removesuffix(self.marker)
            prefix = self._own_end(before) if name.endswith(self.marker) else None
            if prefix is None:
                continue
            place = Place(self, before.removesuffix(prefix), prefix)
            if self.head_marker is None or place.outer + self.head_marker in names:
                found.append(place)
        return [each for each in found if each.outer not in self.copies or len(found) == 1]

    def _own_end(self, before: str) -> str | None:
        """The longest of `prefixes` with which `before` ends, as whole words; None if there is none."""
        for prefix in sorted(self.prefixes, key=len, reverse=True):
            if before.endswith(prefix) and before.removesuffix(prefix)[-1:] in ("", ".", "/"):
                return prefix
        return None

    @cached_property
    def classifier(self) -> frozenset[str]:
        """The names of a classifier's tensors."""
        return frozenset(name for rule in self.heads if rule.flax.startswith("classifier/") for name in rule.torch)

    def is_hosted(self, outer: str) -> bool:
        """True if another model keeps its encoder under `outer`."""
        return _ends(outer, self.hosts)

    def is_bilinear(self, outer: str) -> bool:
        """True if the model that keeps its encoder under `outer` resizes position biases as transformers does."""
        return _ends(outer, self.bilinear_hosts)

    def rules(self, config: BeitConfig, prefix: str) -> list[Rule]:
        """Returns the rules for a model: torch names with `prefix`, and leaves where the model of its task has them."""
        parent = "" if config.task == "features" else "beit/"

        def placed(rule: Rule) -> Rule:
            unused = config.task == "backbone" and rule.flax.startswith("norm/")
            before = prefix if self.unused_norm_prefix is None or not unused else self.unused_norm_prefix
            return replace(rule, torch=tuple(before + name for name in rule.torch), flax=parent + rule.flax)

        backbone = [*map(placed, self.backbone), *(replace(each, flax=parent + each.flax) for each in self.pooled)]
        if config.task == "features":
            return backbone
        if config.task == "backbone":
            return [*backbone, *self.segmentation.pyramid_rules()]
        if config.task == "semantic_segmentation":
            return [*backbone, *self.segmentation.pyramid_rules(), *self.segmentation.head_rules(config)]
        return [*backbone, *self.heads]

    def own_prefix(self, config: BeitConfig) -> str:
        """Returns the prefix that the source itself writes for the model.

        Raises:
            BeitJaxError: the source has no such models.
        """
        if self.written_prefix is not None:
            return self.written_prefix
        if len(self.prefixes) == 1:
            return self.prefixes[0]
        if config.task in ("features", "backbone"):
            return ""
        family = config.model_type.replace("-", "_")
        found = [prefix for prefix in self.prefixes if prefix.startswith(family)]
        if not found:
            raise BeitJaxError(f"{self.name} has no {config.model_type} models")
        return found[0]

    def to_torch(self, config: BeitConfig, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns flat parameters as this format's tensors by name, contiguous, in the dtype they have.

        Batch norm's counters of batches, which nothing reads, are zero.
        """
        rules = [rule for rule in self.rules(config, self.own_prefix(config)) if rule.flax in params]
        tensors = export(rules, params)
        layers = [name.removesuffix(_RUNNING_MEAN) for name in tensors if name.endswith(_RUNNING_MEAN)]
        return tensors | {layer + _BATCHES: np.zeros((), np.int64) for layer in layers}
