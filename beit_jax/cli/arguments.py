"""Arguments that several commands take. Imports wait until a command runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from beit_jax.errors import BeitJaxError

if TYPE_CHECKING:
    from beit_jax.hub import Source
    from beit_jax.images.processor import ImageProcessor
    from beit_jax.inference.segmentation import Inference
    from beit_jax.models.build import Model

SourceName = Annotated[
    str,
    arg(
        metavar="SOURCE",
        help="A directory in Hugging Face format, a weight file in one, a native checkpoint, or a hub name.",
    ),
]
ImageFiles = Annotated[tuple[Path, ...], arg(metavar="IMAGE...", help="Image files.")]
Json = Annotated[bool, arg(help="Print JSON for programs instead of text for people.")]


@dataclass(frozen=True)
class Hub:
    """Options for a hub name such as microsoft/beit-base-patch16-224.

    huggingface_hub's environment variables set token, endpoint and offline mode (HF_TOKEN, HF_HUB_OFFLINE=1, ...).
    """

    revision: str | None = None
    """Branch, tag or commit."""
    cache_dir: Path | None = None
    """Where downloads are kept; by default huggingface_hub's cache."""

    def resolve(self, name: str) -> "Source":
        """Calls `beit_jax.hub.resolve` with these options."""
        from beit_jax.hub import resolve

        return resolve(name, revision=self.revision, cache_dir=self.cache_dir)

    def load(self, name: str) -> "tuple[Model, ImageProcessor]":
        """Calls `beit_jax.from_pretrained` with these options."""
        from beit_jax.inference import predict

        return predict.from_pretrained(name, revision=self.revision, cache_dir=self.cache_dir)


@dataclass(frozen=True)
class SegmentationArguments:
    """How images are cut into windows, scaled and averaged. The defaults are those of the checkpoint."""

    slide: bool = False
    """Use windows of the model's native size that overlap by a third; the default if proportions are kept."""
    whole: bool = False
    """Use the whole image at once; the default if the checkpoint resizes images to the native size."""
    as_trained: bool = False
    """Prepare images as BEiT was trained for ADE20K (ImageNet's mean, proportions kept), not as the checkpoint says."""
    scales: tuple[float, ...] = (1.0,)
    """Average over these sizes; the published multi-scale results use 0.5 0.75 1 1.25 1.5 1.75."""
    flip: bool = False
    """Average over the mirrored image too."""
    batch_size: int = 2
    """Windows computed at once."""

    def load(self, checkpoint: str, hub: Hub) -> "tuple[Model, ImageProcessor, Inference]":
        """Loads a segmentation model, its image processor and the inference options.

        Raises:
            BeitJaxError: the options contradict each other, or the model does not segment.
        """
        from beit_jax.images.processor import ade20k_processor
        from beit_jax.inference.segmentation import Inference

        if self.slide and self.whole:
            raise BeitJaxError("--slide and --whole were both given; give one")
        mode: Literal["slide", "whole"] | None = "slide" if self.slide else "whole" if self.whole else None
        inference = Inference(mode, scales=self.scales, flip=self.flip, batch_size=self.batch_size)
        model, processor = hub.load(checkpoint)
        if model.config.task != "semantic_segmentation":
            raise BeitJaxError(f"{checkpoint}: does not segment (its task is {model.config.task})")
        return model, ade20k_processor(min(model.config.image_size)) if self.as_trained else processor, inference


def require_images(images: Sequence[Path]) -> None:
    """Refuses a command line without image files.

    Raises:
        BeitJaxError: `images` is empty.
    """
    if not images:
        raise BeitJaxError("no images given; name at least one file")
