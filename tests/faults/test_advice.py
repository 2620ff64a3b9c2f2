"""Refusals whose advice is followed to its end: what the message says to do, done by the letter, works.

A row is a refused command, words that its one line must have, and the way out as the user goes it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import original
import pytest
import reference
import torch
from safetensors.torch import load_file, save_file

from beit_jax.cli.main import main
from beit_jax.config import BeitConfig
from beit_jax.images.processor import preset
from beit_jax.models.build import param_shapes
from beit_jax.weights import NativeCheckpoint, save

OPTIONS = reference.TINY | {"num_labels": 3, "use_relative_position_bias": True}
Command = list[str]


@dataclass
class Place:
    """A folder of one case.

    Attributes:
        hf: a classifier as transformers saves it.
    """

    path: Path
    hf: Path

    def convert(self, source: Path, *options: str) -> Command:
        return ["convert", str(source), str(self.path / "native"), *options]

    def state(self) -> dict[str, torch.Tensor]:
        return load_file(self.hf / "model.safetensors")

    def original(self, name: str = "beit.pth", **entries: Any) -> Path:
        torch.save({"model": original.original_names(self.state())} | entries, self.path / name)
        return self.path / name

    def edit(self, file: Path, **changes: Any) -> None:
        content = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def native(self, **config: Any) -> Path:
        """A native checkpoint of another configuration, with weights of zeros."""
        size = {"image_size": (16, 16), "patch_size": (8, 8), "hidden_size": 16, "num_hidden_layers": 2}
        size |= {"num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 12}
        model = BeitConfig(**size | config)
        params = {name: np.zeros(shape, np.float32) for name, shape in param_shapes(model).items()}
        (self.path / "trained").mkdir()
        save(self.path / "trained", NativeCheckpoint(model, preset("hf", 16), params))
        return self.path / "trained"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, reference.save(reference.random_model(**OPTIONS), tmp_path / "hf"))


Case = tuple[Command, list[str], Callable[[], None], Command]
"""The refused command, words of the message, the way out, and the command that works then."""


def nothing() -> None:
    """The way out is the command itself."""


def no_config(place: Place) -> Case:
    config = (place.hf / "config.json").rename(place.path / "config.json")
    command = place.convert(place.hf)
    return command, ["config.json: no such file", "copy"], lambda: shutil_copy(config, place.hf), command


def shutil_copy(file: Path, directory: Path) -> None:
    (directory / file.name).write_bytes(file.read_bytes())


def no_config_of_a_state(place: Place) -> Case:
    """accelerate's state: model.safetensors alone, under the names of transformers 5 in memory."""
    save_file(reference.random_model(**OPTIONS).state_dict(), place.hf / "model.safetensors")
    return no_config(place)


def not_square(place: Place) -> Case:
    model = reference.random_model(**OPTIONS | {"image_size": [16, 40]})
    place.hf = reference.save(model, place.path / "wide")
    command = place.convert(place.original())
    words = ["not of a square grid", "config.json", "image_size"]
    return command, words, lambda: shutil_copy(place.hf / "config.json", place.path), command


def not_square_in_a_host(place: Place) -> Case:
    """MiDaS's names around the encoder, and the encoder's own config.json."""
    model = reference.random_model(task="features", **OPTIONS | {"image_size": [16, 40]})
    place.hf = reference.save(model, place.path / "wide")
    state = original.original_names(place.state())
    torch.save({f"pretrained.model.{name}": tensor for name, tensor in state.items()}, place.path / "dpt.pt")
    command = place.convert(place.path / "dpt.pt")
    return command, ["config.json"], lambda: shutil_copy(place.hf / "config.json", place.path), command


def segmenter(place: Place, **meta: Any) -> Path:
    """mmseg's file of a model with four blocks, of which the first four feed the head."""
    model = reference.random_model(task="semantic_segmentation", **reference.SEGMENTATION)
    place.hf = reference.save(model, place.path / "ade")
    files = place.state()
    heads = {n: t for n, t in files.items() if n.startswith(("decode_head.", "auxiliary_head."))}
    heads = {n.replace("classifier", "conv_seg"): t for n, t in heads.items()}
    pyramid = {n: t for n, t in files.items() if n.startswith("fpn")}
    encoder = original.original_names({n: t for n, t in files.items() if n.startswith("beit.") and "pooler" not in n})
    state = {f"backbone.{n}": t for n, t in (encoder | pyramid).items()} | heads
    torch.save({"state_dict": state, "meta": meta}, place.path / "mmseg.pth")
    return place.path / "mmseg.pth"


def mmseg_of_another_depth(place: Place) -> Case:
    command = place.convert(segmenter(place))

    def write() -> None:
        shutil_copy(place.hf / "config.json", place.path)
        place.edit(place.path / "config.json", out_indices=[0, 1, 2, 3])

    return command, ["4 blocks", "config.json", "out_indices"], write, command


def quantised(place: Place) -> Case:
    whole = place.state()
    name = "beit.encoder.layer.0.intermediate.dense.weight"
    state = whole | {name: whole[name].to(torch.int8), f"{name.removesuffix('.weight')}.SCB": torch.ones(48)}
    save_file(state, place.hf / "model.safetensors")
    command = place.convert(place.hf)
    return command, ["quantised", "dequantize"], lambda: save_file(whole, place.hf / "model.safetensors"), command


def wrong(key: str, value: Any, *words: str) -> Callable[[Place], Case]:
    """A config.json with one wrong value, which the message names with the right one."""

    def case(place: Place) -> Case:
        config = place.hf / "config.json"
        right = json.loads(config.read_text()).get(key)
        place.edit(config, **{key: value})
        command = place.convert(place.hf)
        return command, [f"orrect {config}", *words], lambda: place.edit(config, **{key: right}), command

    return case


def another_variant(place: Place) -> Case:
    source = place.original()
    refused = place.convert(source, "--variant", "beit_base_patch16_224")
    return refused, ["--variant beit_base_patch16_224", "leave", "out"], nothing, place.convert(source)


def aggregation_under_other_names(place: Place) -> Case:
    config = place.hf / "config.json"
    place.hf = reference.save(
        reference.random_model(task="masked_image_modeling", **reference.TINY | {"use_mask_token": True}), place.hf
    )
    place.edit(config, beit_jax={"aggregate_from": 1, "aggregation_layers": 2})
    command = place.convert(place.hf)
    words = [str(config), "aggregation/", "no names", "correct it"]
    return command, words, lambda: place.edit(config, beit_jax=None), command


def two_sets(place: Place) -> Case:
    source = place.original(model_ema=original.original_names(place.state()))
    return place.convert(source), ["--weights model or model_ema"], nothing, place.convert(source, "--weights", "ema")


def two_entries_of_one_set(place: Place) -> Case:
    source = place.original(state_dict=original.original_names(place.state()))
    words = ["--weights state_dict or model"]
    return place.convert(source), words, nothing, place.convert(source, "--weights", "state_dict")


def no_second_set(place: Place) -> Case:
    source = place.original()
    return place.convert(source, "--weights", "ema"), ["leave --weights out"], nothing, place.convert(source)


def option_against_the_file(place: Place) -> Case:
    return place.convert(place.hf, "--num-heads", "8"), ["leave the option out"], nothing, place.convert(place.hf)


def not_finite(place: Place) -> Case:
    state = place.state()
    state["classifier.bias"][0] = torch.nan
    save_file(state, place.hf / "model.safetensors")
    command = place.convert(place.hf)
    return command, ["classifier.bias", "--allow-nonfinite"], nothing, [*command, "--allow-nonfinite"]


def pickle_under_a_wrong_name(place: Place) -> Case:
    torch.save(place.state(), place.path / "w.safetensors")
    shutil_copy(place.hf / "config.json", place.path)
    refused = place.convert(place.path / "w.safetensors")
    return (
        refused, ["rename it to .bin"], lambda: (place.path / "w.safetensors").rename(place.path / "w.bin"),
        place.convert(place.path / "w.bin"),
    )  # fmt: skip


def weights_of_another_name(place: Place) -> Case:
    file = (place.hf / "model.safetensors").rename(place.hf / "best.safetensors")
    return place.convert(place.hf), ["holds no weights", "can be given itself"], nothing, place.convert(file)


def run_of_another_trainer(place: Place) -> Case:
    directory = place.hf.rename(place.path / "run")
    (directory / "step-5").mkdir()
    for file in [each for each in directory.iterdir() if each.is_file()]:
        file.rename(directory / "step-5" / file.name)
    return (
        place.convert(directory),
        ["step-5", "one of its directories"],
        nothing,
        place.convert(directory / "step-5"),
    )


def another_format(place: Place) -> Case:
    refused = place.convert(place.hf, "--format", "flax")
    return refused, ["flax_model.msgpack", "Leave --format out"], nothing, place.convert(place.hf)


def no_multiple_of_the_patch(place: Place) -> Case:
    refused = place.convert(place.hf, "--image-size", "30")
    return refused, ["--image-size", "such as 32 32"], nothing, place.convert(place.hf, "--image-size", "32", "32")


def no_shared_table(place: Place) -> Case:
    model = reference.random_model(**reference.TINY | {"num_labels": 3})
    place.hf = reference.save(model, place.path / "none")
    refused = place.convert(place.hf, "--position-bias", "per_layer")
    return refused, ["leave --position-bias out"], nothing, place.convert(place.hf)


def timm_with_borders(place: Place) -> Case:
    state = original.original_names(place.state())
    save_file(state, place.hf / "model.safetensors")
    content = {"architecture": "beit_base_patch16_224", "pretrained_cfg": {"crop_mode": "border"}}
    (place.hf / "config.json").write_text(json.dumps(content))
    refused = place.convert(place.hf)
    return refused, ["crop_mode", "border", "--image-preset hf"], nothing, [*refused, "--image-preset", "hf"]


def preset_of_a_square(place: Place) -> Case:
    place.hf = reference.save(reference.random_model(**OPTIONS | {"image_size": [16, 40]}), place.path / "wide")
    refused = place.convert(place.hf, "--image-preset", "timm")
    return refused, ["16x40", "hf"], nothing, place.convert(place.hf, "--image-preset", "hf")


def classified_at_once(place: Place) -> Case:
    """A command without options of conversion: its message leads to the command that has them."""
    model = reference.random_model(**reference.TINY | {"use_absolute_position_embeddings": True, "num_labels": 3})
    place.hf = reference.save(model, place.path / "open")
    source, image = place.original(), place.path / "i.png"
    from PIL import Image

    Image.new("RGB", (32, 32)).save(image)

    def convert() -> None:
        assert main(place.convert(source, "--num-heads", "4")) == 0

    words = ["convert it with --num-heads"]
    return ["classify", str(source), str(image)], words, convert, ["classify", str(place.path / "native"), str(image)]


MASKED = {"task": "masked_image_modeling", "use_mask_token": True}
DATA2VEC = MASKED | {"model_type": "data2vec-vision", "vocab_size": 16}
AGGREGATION = MASKED | {"aggregate_from": 1, "aggregation_layers": 1, "position_bias": "shared"}


def exported(words: list[str], refused: str, works: str, **config: Any) -> Callable[[Place], Case]:
    def case(place: Place) -> Case:
        command = ["export", str(place.native(**config)), str(place.path / "out"), "--to"]
        return [*command, refused], words, nothing, [*command, works]

    return case


def aggregation_to_transformers(place: Place) -> Case:
    """The other way out: without the extra blocks."""
    native, file = place.native(**AGGREGATION), place.path / "original"
    assert main(["export", str(native), str(file), "--to", "original"]) == 0

    def without() -> None:
        assert main(place.convert(file / "checkpoint.pth", "--aggregate-from", "0")) == 0

    refused = ["export", str(native), str(place.path / "out")]
    return refused, ["--aggregate-from 0"], without, ["export", str(place.path / "native"), str(place.path / "out")]


TO_ORIGINAL, TO_HF = ["export --to original"], ["export --to hf"]
CASES: Mapping[str, Callable[[Place], Case]] = {
    "transformers' names without config.json": no_config,
    "names in memory without config.json": no_config_of_a_state,
    "positions of no square": not_square,
    "positions of no square in a host": not_square_in_a_host,
    "mmseg of another depth": mmseg_of_another_depth,
    "quantised": quantised,
    "wrong layers": wrong("num_hidden_layers", 3, "has 2 layers", "num_hidden_layers says 3"),
    "wrong heads": wrong("num_attention_heads", 8, "has 4 attention heads", "num_attention_heads says 8"),
    "wrong image size": wrong("image_size", 64, "4 x 4 grid"),
    "wrong classes": wrong("id2label", {"0": "a"}, "has 3 classes", "id2label has 1"),
    "wrong mlp": wrong("intermediate_size", 64, "of another shape"),
    "another variant": another_variant,
    "aggregation under other names": aggregation_under_other_names,
    "two sets of weights": two_sets,
    "two entries of one set": two_entries_of_one_set,
    "no second set": no_second_set,
    "option against the file": option_against_the_file,
    "not finite": not_finite,
    "pickle under a wrong name": pickle_under_a_wrong_name,
    "weights of another name": weights_of_another_name,
    "run of another trainer": run_of_another_trainer,
    "another format": another_format,
    "no multiple of the patch": no_multiple_of_the_patch,
    "no shared table": no_shared_table,
    "timm with borders": timm_with_borders,
    "preset of a square": preset_of_a_square,
    "classified at once": classified_at_once,
    "pre-training to timm": exported(["export --to hf or --to original or --to mmpretrain"], "timm", "hf", **MASKED),
    "pre-training with two norms to timm": exported(TO_HF, "timm", "hf", **MASKED, pooling="cls"),
    "pre-training with two norms to original": exported(TO_HF, "original", "hf", **MASKED, pooling="cls"),
    "data2vec to timm": exported(TO_ORIGINAL, "timm", "original", **DATA2VEC),
    "data2vec to transformers": exported(TO_ORIGINAL, "hf", "original", **DATA2VEC),
    "aggregation to transformers": exported(TO_ORIGINAL, "hf", "original", **AGGREGATION),
    "aggregation left out": aggregation_to_transformers,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_advice_works(case: Callable[[Place], Case], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    refused, words, follow, works = case(place)
    capsys.readouterr()
    assert main(refused) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert not (place.path / "native").exists() and not (place.path / "out").exists()
    follow()
    assert main(works) == 0, capsys.readouterr().err
