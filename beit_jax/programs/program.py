"""A program that `beit-jax export --to stablehlo` wrote, loaded and called.

It needs JAX, NumPy, safetensors and flatbuffers; Pillow too where images are prepared. It imports neither Flax nor a
model of this library: what a model computes stands in the program.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.numpy import load_file

from beit_jax.errors import BeitJaxError, printable
from beit_jax.hub import CONFIG, PROCESSOR
from beit_jax.programs import manifest as manifests
from beit_jax.programs.manifest import EXPORTED, WEIGHTS, Manifest, Tensor, size_of

if TYPE_CHECKING:
    from beit_jax.images.files import ImageLike
    from beit_jax.images.processor import ImageProcessor
    from beit_jax.inference.predictor import Guess, OutputName, Pooling, Predictor

BAND: Final = 64  # rows of an image whose logits exist at a time
Place: TypeAlias = jax.Device | jax.sharding.Sharding


def load_program(path: str | Path, *, device: Place | None = None) -> "Program":
    """Loads a program: checks the digest of every file and JAX's version, and puts the weights on a device.

    >>> program = load_program("./served")
    >>> logits = program(program.prepare("cat.jpg"))["logits"]

    Args:
        path: the directory that ``beit-jax export NATIVE DEST --to stablehlo`` wrote.
        device: where the weights lie and the program runs, by default JAX's default device; or a sharding, such as
            ``NamedSharding(mesh, PartitionSpec())`` for the same weights on all devices of a mesh.

    Raises:
        BeitJaxError: no program, a damaged or exchanged file, a JAX that cannot call it, or a device of a platform that
            it was not written for. Nothing is compiled yet.
    """
    path = Path(path)
    told = manifests.read(path)
    _check_versions(path, told)
    place = _default_device() if device is None else device
    _check_platform(path, told, place)
    manifests.check_files(path, told)
    try:
        exported = export.deserialize(bytearray((path / EXPORTED).read_bytes()))
        weights = load_file(path / WEIGHTS)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise BeitJaxError(
            f"{printable(path)}: jax {jax.__version__} cannot read the program of jax {told.jax} "
            f"({printable(' '.join(str(error).split()))}); export the model again with this one"
        ) from None
    return Program(path, told, exported, jax.device_put(weights, place), place)


class Program:
    """A loaded program. Call it with what `prepare` gives; it returns its outputs by name.

    A program with a free batch is compiled for every size of batch that it meets: `warm_up` does so beforehand. Nothing
    is donated: weights and pixel values stay valid after a call. Calls may be made from several threads, and within
    ``jax.jit``.

    Attributes:
        path: the directory.
        manifest: inputs, outputs, task, labels, platforms and versions.
        exported: the program as `jax.export` knows it, called with (weights, inputs...).
        weights: the parameters by name, float32, on `device`.
        device: a device, or a sharding.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        exported: export.Exported,
        weights: Mapping[str, jax.Array],
        device: Place,
    ) -> None:
        self.path, self.manifest, self.exported = path, manifest, exported
        self.weights, self.device = dict(weights), device
        self._call = jax.jit(exported.call)

    def __repr__(self) -> str:
        takes, gives = (
            ", ".join(f"{name} {tensor}" for name, tensor in side.items()) for side in (self.inputs, self.outputs)
        )
        return f"<Program {self.manifest.task}: {takes} -> {gives}; {', '.join(self.manifest.platforms)}>"

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Shape and dtype of every input, by name and in order."""
        return self.manifest.inputs

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """Shape and dtype of every output, by name."""
        return self.manifest.outputs

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of the outputs."""
        return self.manifest.labels

    @cached_property
    def processor(self) -> "ImageProcessor":
        """What makes pixel values of images, as the checkpoint records it."""
        from beit_jax.images.processor import ImageProcessor  # needs Pillow

        return ImageProcessor.from_file(self.path / PROCESSOR)

    def prepare(self, images: "ImageLike | Iterable[ImageLike]") -> np.ndarray:
        """The pixel values [b, h, w, c] float32 of one image (b = 1) or several: paths, PIL images or arrays.

        Raises:
            BeitJaxError: as `beit_jax.ImageProcessor`.
        """
        return self.processor(images)

    def __call__(self, pixel_values: ArrayLike, bool_masked_pos: ArrayLike | None = None) -> dict[str, jax.Array]:
        """Computes the outputs of prepared images.

        Args:
            pixel_values: [b, h, w, c] float32, as `prepare` makes them. What lies on another device is moved.
            bool_masked_pos: [b, patches] bool, of masked image modelling alone: True where the model sees its mask
                token; by default nowhere.

        Returns:
            The outputs by name, on the device; the call may return before they are computed.

        Raises:
            BeitJaxError: an input of another shape or dtype than `inputs` says.
        """
        given: dict[str, Any] = {"pixel_values": pixel_values}
        if bool_masked_pos is not None:
            given["bool_masked_pos"] = bool_masked_pos
        unknown = given.keys() - self.inputs.keys()
        if unknown:
            raise BeitJaxError(f"{min(unknown)}: this program has no such input, it takes {', '.join(self.inputs)}")
        sizes: dict[str, int] = {}
        arguments = []
        for name, expected in self.inputs.items():
            value = given.get(name)
            if value is None:
                value = np.zeros([size_of(dim, sizes) for dim in expected.shape], expected.dtype)
            arguments.append(_checked(name, value, expected, sizes))
        if isinstance(self.device, jax.Device) and not any(isinstance(a, jax.core.Tracer) for a in arguments):
            arguments = jax.device_put(arguments, self.device)
        found: dict[str, jax.Array] = self._call(self.weights, *arguments)
        return found

    def warm_up(self, *batches: int) -> None:
        """Compiles the program for batches of these sizes; without any, for the fixed batch, or for one image.

        Raises:
            BeitJaxError: another size than the fixed one, or free height and width, which are compiled as they come.
        """
        shape = self.inputs["pixel_values"].shape
        if not all(isinstance(side, int) for side in shape[1:]):
            raise BeitJaxError(
                f"warm_up: height and width are free, {self.inputs['pixel_values']}; call it once for each"
            )
        for batch in batches or (self.manifest.batch or 1,):
            jax.block_until_ready(self(np.zeros([batch, *map(int, shape[1:])], np.float32)))

    def classify(
        self, images: "ImageLike | Iterable[ImageLike]", *, top: int = 5, batch_size: int = 8
    ) -> "list[Guess] | list[list[Guess]]":
        """The most probable classes of images, as `beit_jax.classify` has them.

        Args:
            images: one image, or several: paths, PIL images or arrays.
            top: classes per image.
            batch_size: images computed at once, unless the batch is fixed.

        Raises:
            BeitJaxError: a program without a classifier, or an image that cannot be read.
        """
        return self.predictor.classify(images, top=top, batch_size=self.manifest.batch or batch_size)

    def features(
        self, images: "ImageLike | Iterable[ImageLike]", *, pooling: "Pooling" = "pooled", batch_size: int = 8
    ) -> np.ndarray:
        """The features of images, [b, d] float32, as `beit_jax.features` has them.

        Args:
            images, batch_size: as in `classify`.
            pooling: as in `beit_jax.features`.

        Raises:
            BeitJaxError: a program without features, or an image that cannot be read.
        """
        return self.predictor.features(images, pooling=pooling, batch_size=self.manifest.batch or batch_size)

    def segment(self, images: "ImageLike | Iterable[ImageLike]") -> "np.ndarray | list[np.ndarray]":
        """The class of every pixel of an image, [h, w] int32; or a list of such maps.

        The whole image goes through the program at once, as `beit_jax.segment` does where the processor resizes images
        to the model's size.

        Raises:
            BeitJaxError: another task, a processor that crops or keeps proportions, or an image that cannot be read.
        """
        from beit_jax.images.bands import load
        from beit_jax.images.files import image_list, image_name

        sides = self.inputs["pixel_values"].shape[1:3]
        if self.manifest.task != "semantic_segmentation" or "logits" not in self.outputs:
            raise BeitJaxError(f"this program does not segment (its task is {self.manifest.task})")
        if self.processor.crop is not None or self.processor.resize != sides:
            raise BeitJaxError(
                f"segment: the image processor does not resize whole images to {sides[0]}x{sides[1]}; call the program "
                "with windows of that size, or use beit_jax.segment"
            )
        listed, one = image_list(images)
        maps = []
        for place, image in enumerate(listed):
            name = image_name(image, place)
            picture = np.asarray(load(image, self.processor.num_channels, name, select=self.processor.bands))
            logits = self._padded(self.processor.one(image, name)[None], "logits")[0]
            maps.append(_label_map(logits, (int(sides[0]), int(sides[1])), picture.shape[:2]))
        return maps[0] if one else maps

    @cached_property
    def predictor(self) -> "Predictor":
        """The program behind `classify` and `features`."""
        from beit_jax.config import BeitConfig
        from beit_jax.inference.predictor import Predictor

        return Predictor(BeitConfig.from_file(self.path / CONFIG), self.processor, self._output)

    def _output(self, pixel_values: ArrayLike, output: "OutputName") -> jax.Array:
        if output == "logits":
            return jnp.asarray(self._padded(pixel_values, "logits"))
        if output == "pooled":
            return jnp.asarray(self._padded(pixel_values, "pooled"))
        tokens = self._padded(pixel_values, "last_hidden_state")
        return jnp.asarray({"tokens": tokens, "cls": tokens[:, 0]}.get(output, tokens[:, 1:].mean(axis=1)))

    def _padded(self, pixel_values: ArrayLike, output: str) -> np.ndarray:
        """One output of a batch of any size up to the fixed one, which the program computes whole."""
        if output not in self.outputs:
            raise BeitJaxError(
                f"this program gives {', '.join(self.outputs)}, and no {output}; export the model "
                + ("without --features" if output == "logits" else "with --features")
            )
        pixels = np.asarray(pixel_values)
        spare = (self.manifest.batch or len(pixels)) - len(pixels)
        padded = np.pad(pixels, [(0, spare), (0, 0), (0, 0), (0, 0)])
        return np.asarray(self(padded)[output])[: len(pixels)]


# --- Checks -----------------------------------------------------------------------------------------------------------


def _check_versions(path: Path, told: Manifest) -> None:
    if version_number(jax.__version__) < version_number(told.oldest_jax):
        free = told.batch is None and told.jax == told.oldest_jax
        way = f", with --batch N for a fixed batch, or with --jax-floor {jax.__version__}" if free else ""
        raise BeitJaxError(
            f"{printable(path)}: written by jax {told.jax} for jax {told.oldest_jax} and newer, found jax "
            f"{jax.__version__}; install jax>={told.oldest_jax}, or export the model again{way or ' with this jax'}"
        )
    least, most = (
        export.minimum_supported_calling_convention_version,
        export.maximum_supported_calling_convention_version,
    )
    if not least <= told.calling_convention <= most:
        raise BeitJaxError(
            f"{printable(path)}: written by jax {told.jax} with calling convention {told.calling_convention}, jax "
            f"{jax.__version__} calls {least} to {most}; export the model again with this jax"
        )
    check_flatbuffers()


def check_flatbuffers() -> None:
    """Refuses to go on without the package that `jax.export` reads and writes its files by.

    Raises:
        BeitJaxError: it is not installed; says how to install it.
    """
    try:
        import flatbuffers  # noqa: F401
    except ModuleNotFoundError:
        raise BeitJaxError("flatbuffers is not installed; pip install 'beit-jax[stablehlo]'") from None


def version_number(version: str) -> tuple[int, ...]:
    """A version as numbers: 0.12.0.1 as (0, 12, 0, 1); what is no number ends it, as in 0.13.0.dev1."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _default_device() -> jax.Device:
    """Where JAX puts an array that nobody places."""
    return next(iter(jnp.zeros(()).devices()))


def _check_platform(path: Path, told: Manifest, place: Place) -> None:
    device = place if isinstance(place, jax.Device) else min(place.device_set, key=lambda each: each.id)
    rocm = "rocm" in device.client.platform_version.lower()
    platform = {"gpu": "rocm" if rocm else "cuda"}.get(device.platform, device.platform)
    if platform not in told.platforms:
        raise BeitJaxError(
            f"{printable(path)}: written for {', '.join(told.platforms)}, found a device of the platform {platform}; "
            "give another device, such as jax.devices('cpu')[0]"
        )


def _checked(name: str, value: Any, expected: Tensor, sizes: dict[str, int]) -> Any:
    """The value of an input, in its dtype, if its shape is the expected one. Learns the free sizes from it.

    Integers are refused as pixel values: they are pixels that nobody has prepared.
    """
    value = value if hasattr(value, "shape") and hasattr(value, "dtype") else np.asarray(value)
    kinds = "b" if expected.dtype == "bool" else "fV"  # V: NumPy's kind of bfloat16
    fits = len(value.shape) == len(expected.shape) and np.dtype(value.dtype).kind in kinds
    for dim, size in zip(expected.shape, value.shape, strict=False):
        *factors, last = str(dim).split("*")
        if not last.isdecimal() and last not in sizes and all(factor.isdecimal() for factor in factors):
            sizes[last] = max(size // size_of("*".join(factors) or 1, sizes), 1)
        fits = fits and size_of(dim, sizes) == size
    if not fits:
        fixed = f"; the batch is fixed, pad it to {expected.shape[0]}" if isinstance(expected.shape[0], int) else ""
        raise BeitJaxError(
            f"{name}: expected {expected}, found [{', '.join(map(str, value.shape))}] {value.dtype}{fixed}; "
            "prepare() makes pixel_values of images"
        )
    return value.astype(expected.dtype)


def _label_map(logits: np.ndarray, native: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The class of every pixel [h, w] int32, from logits [rows, columns, classes] of an image resized to `native`."""
    from beit_jax.resize import linear_matrix

    rows, columns = (
        (linear_matrix(side, length) @ linear_matrix(count, side)).astype(np.float32)
        for count, side, length in zip(logits.shape, native, size, strict=False)
    )
    labels = np.empty(size, np.int32)
    for start in range(0, size[0], BAND):
        down = np.tensordot(rows[start : start + BAND], logits, axes=1)
        labels[start : start + BAND] = np.einsum("ymc,xm->yxc", down, columns, optimize=True).argmax(axis=-1)
    return labels
