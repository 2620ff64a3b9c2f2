"""Reads the fields of an ImageProcessor from a `preprocessor_config.json` of transformers 4 or 5."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

from beit_jax.errors import BeitJaxError, printable

Resample: TypeAlias = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Rounding: TypeAlias = Literal["floor", "half_even"]
RESAMPLES: Final[tuple[Resample, ...]] = get_args(
    Resample
)  # the files record Pillow's numbers, which count in this order
ROUNDINGS: Final[tuple[Rounding, ...]] = get_args(Rounding)


@dataclass(frozen=True)
class Within:
    """A resize that keeps proportions: the largest size with a short edge <= `short` and a long edge <= `long`.

    Sides are rounded half up, as mmcv's ``rescale_size`` does.
    """

    short: int
    long: int


# The values of absent keys, and per type the values that differ. The slow BeitImageProcessor of transformers 4 resized
# to 256 and cropped to 224 too; transformers 5 has other defaults under that name, but version 4 wrote every key.
_DEFAULTS: Final[dict[str, Any]] = {
    "do_resize": True,
    "size": 224,
    "default_to_square": True,
    "resample": RESAMPLES.index("bicubic"),
    "antialias": True,
    "max_longest_edge": None,
    "do_center_crop": False,
    "crop_size": 224,
    "crop_rounding": "floor",
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "bands": None,
}
_TYPES: Final[dict[str, dict[str, Any]]] = {
    "BeitFeatureExtractor": {"size": 256, "do_center_crop": True},
    "BeitImageProcessor": {},
    "BeitImageProcessorFast": {},
    "BeitImageProcessorPil": {},
}


def processor_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Reads the fields of ImageProcessor. Their types are checked, their ranges are not.

    Raises:
        BeitJaxError: begins with `source`; a value of the wrong type, or an unknown type of processor.
    """
    read = _Reader(_with_defaults(config, source), source)
    channels = read.channels()
    mean, std = read.numbers("image_mean", channels), read.numbers("image_std", channels)
    normalise = read.flag("do_normalize")
    return {
        "resize": read.resize() if read.flag("do_resize") else None,
        "resample": read.resample(),
        "antialias": read.flag("antialias"),
        "crop": read.crop() if read.flag("do_center_crop") else None,
        "crop_rounding": read.rounding(),
        "rescale_factor": read.number("rescale_factor") if read.flag("do_rescale") else None,
        "mean": mean if normalise else None,
        "std": std if normalise else None,
        "num_channels": channels,
        "bands": read.bands(),
        "do_reduce_labels": read.reduces_labels(),
    }


def _with_defaults(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    # Without a recorded type, transformers takes the model's type, which for these models means BeitImageProcessor.
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or "BeitImageProcessor"
    if not isinstance(kind, str) or kind not in _TYPES:
        found, known = printable(repr(kind)), ", ".join(_TYPES)
        raise BeitJaxError(f"{source}: image_processor_type is {found}, expected one of {known}; correct the file")
    defaults = _DEFAULTS | _TYPES[kind]
    values = {key: default if config.get(key) is None else config[key] for key, default in defaults.items()}
    # The older files of transformers say reduce_labels. An absent key says nothing: models are trained either way.
    named = (config.get(key) for key in ("do_reduce_labels", "reduce_labels"))
    return values | {"do_reduce_labels": next((value for value in named if value is not None), None)}


@dataclass(frozen=True)
class _Reader:
    """Reads `values` and checks their types. Errors begin with `source`."""

    values: Mapping[str, Any]
    source: str

    def wrong(self, key: str, expected: str) -> BeitJaxError:
        found = printable(repr(self.values[key]))
        return BeitJaxError(f"{self.source}: {key} is {found}, expected {expected}; correct the file")

    def flag(self, key: str) -> bool:
        value = self.values[key]
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def reduces_labels(self) -> bool | None:
        return None if self.values["do_reduce_labels"] is None else self.flag("do_reduce_labels")

    def number(self, key: str) -> float:
        return self._numbers(key, [self.values[key]], "a number")[0]

    def channels(self) -> int:
        lists = [self.values[key] for key in ("image_mean", "image_std") if isinstance(self.values[key], list | tuple)]
        return len(lists[0]) if lists else 3

    def bands(self) -> tuple[int, ...] | None:
        """Reads this library's key ``bands``, which selects bands of files."""
        value = self.values["bands"]
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not value or not all(type(band) is int for band in value):
            raise self.wrong("bands", "a list of the numbers of bands, from 1")
        return tuple(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.values[key]
        return self._numbers(key, value if isinstance(value, list | tuple) else [value] * count, "numbers")

    def _numbers(self, key: str, values: list[Any] | tuple[Any, ...], expected: str) -> tuple[float, ...]:
        # The bounds also keep out integers that float() cannot hold.
        if not all(type(value) in (int, float) and -1e30 < value < 1e30 for value in values):
            raise self.wrong(key, expected)
        return tuple(map(float, values))

    def resample(self) -> Resample:
        value = self.values["resample"]
        if type(value) is not int or not 0 <= value < len(RESAMPLES):
            raise self.wrong("resample", f"an int from 0 to {len(RESAMPLES) - 1}")
        return RESAMPLES[value]

    def rounding(self) -> Rounding:
        value = self.values["crop_rounding"]
        if value not in ROUNDINGS:
            raise self.wrong("crop_rounding", f"one of {', '.join(ROUNDINGS)}")
        return ROUNDINGS[ROUNDINGS.index(value)]

    def edges(self, key: str, square: bool) -> tuple[int, int] | int:
        """Reads (height, width), or the shortest edge."""
        value = edges = self.values[key]
        if isinstance(value, dict):
            named = {name: edge for name, edge in value.items() if edge is not None}
            if set(named) == {"shortest_edge"}:
                edges, square = named["shortest_edge"], False
            else:
                edges = [named["height"], named["width"]] if set(named) == {"height", "width"} else None
        if type(edges) is int:
            return (edges, edges) if square else edges
        if not isinstance(edges, list | tuple) or [type(edge) for edge in edges] != [int, int]:
            raise self.wrong(key, "an int, [height, width], {height, width} or {shortest_edge}, in pixels")
        return edges[0], edges[1]

    def resize(self) -> tuple[int, int] | int | Within:
        """Reads the size. This library's key ``max_longest_edge`` adds a limit to a shortest edge."""
        edges, longest = self.edges("size", self.flag("default_to_square")), self.values["max_longest_edge"]
        if longest is None:
            return edges
        if type(longest) is not int or not isinstance(edges, int):
            raise self.wrong("max_longest_edge", "an int, with a size of {shortest_edge}")
        return Within(edges, longest)

    def crop(self) -> tuple[int, int]:
        edges = self.edges("crop_size", square=True)
        if isinstance(edges, int):
            raise self.wrong("crop_size", "a height and a width")
        return edges
