"""A StableHLO program: the model's numbers without the model, for any batch, or one line that says why not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from forward import logits_of
from safetensors.numpy import load_file
from tiny_models import KINDS, TINY, checkpoint, differences

import beit_jax
from beit_jax.cli.main import main
from beit_jax.errors import BeitJaxError
from beit_jax.images.processor import ImageProcessor
from beit_jax.inference import predict, segmentation
from beit_jax.models.build import build_model
from beit_jax.programs import manifest as manifests
from beit_jax.programs import program as programs
from beit_jax.programs import stablehlo
from beit_jax.programs.manifest import EXPORTED, MANIFEST, WEIGHTS
from beit_jax.programs.options import ProgramOptions
from beit_jax.programs.program import load_program
from beit_jax.programs.signature import program
from beit_jax.tree import unflatten

ROOT = Path(__file__).parents[2]
BATCHES = (1, 3, 8)


def pixels(batch: int, sides: tuple[int, int] = (32, 32)) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, *sides, 3)).astype(np.float32)


def masks(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).random((batch, 16)) > 0.5


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of a classifier."""
    directory = tmp_path_factory.mktemp("programs") / "served"
    stablehlo.export_program(checkpoint(TINY), directory)
    return directory


@pytest.fixture
def copied(served: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(served, tmp_path / "copied"))


def rewrite(directory: Path, **changes: Any) -> None:
    """Changes ``program.json`` as its writer would have written it."""
    manifests.write(directory, replace(manifests.read(directory), **changes))


def refused(*needles: str, call: Callable[..., object], **options: Any) -> None:
    with pytest.raises(BeitJaxError) as caught:
        call(**options)
    message = str(caught.value)
    assert message.isprintable(), message
    for needle in needles:
        assert needle in message, message


# --- The model's numbers ----------------------------------------------------------------------------------------------


KIND = [pytest.param(kind, marks=[] if kind == "masked" else pytest.mark.thorough) for kind in KINDS]


@pytest.mark.parametrize("kind", KIND)
def test_every_model_is_served_for_any_batch(kind: str, tmp_path: Path) -> None:
    made = checkpoint(KINDS[kind])
    stablehlo.export_program(made, tmp_path / "served")
    loaded, expected = load_program(tmp_path / "served"), program(made.config, dtype="float32", features=False)
    for batch in BATCHES:
        inputs = [pixels(batch), *([masks(batch)] if kind == "masked" else [])]
        assert differences(loaded(*inputs), jax.jit(expected)(made.params, *inputs)) <= 1e-5
    assert loaded.manifest.batch is None
    assert loaded.manifest.platforms == ("cpu", "cuda", "tpu")
    if kind == "masked":  # without masks nothing is masked
        found = loaded(pixels(3))["logits"]
        np.testing.assert_allclose(found, logits_of(made.config, made.params, pixels(3)), atol=1e-5)


def test_the_program_is_the_model(served: Path) -> None:
    """By the model itself, and not by the function that was exported; and it depends on the weights."""
    loaded, model = load_program(served), build_model(TINY, unflatten(checkpoint(TINY).params))
    for batch in BATCHES:
        np.testing.assert_allclose(loaded(pixels(batch))["logits"], model(pixels(batch)).logits, atol=1e-5)
    other = build_model(TINY, unflatten(checkpoint(TINY, seed=1).params))
    assert float(np.abs(np.asarray(loaded(pixels(3))["logits"]) - other(pixels(3)).logits).max()) > 1e-2


@pytest.mark.thorough
def test_features_of_a_model_with_a_head_need_no_head(tmp_path: Path) -> None:
    made = checkpoint(KINDS["segmentation"])
    stablehlo.export_program(made, tmp_path / "served", ProgramOptions(features=True))
    loaded = load_program(tmp_path / "served")
    assert all(name.startswith("beit/") for name in loaded.weights)
    expected = build_model(made.config, unflatten(made.params)).beit(pixels(3))
    np.testing.assert_allclose(loaded(pixels(3))["last_hidden_state"], expected.last_hidden_state, atol=1e-5)


@pytest.mark.thorough
def test_segmentation_leaves_out_what_only_the_loss_uses(tmp_path: Path) -> None:
    made = checkpoint(KINDS["segmentation"])
    stablehlo.export_program(made, tmp_path / "served")
    loaded = load_program(tmp_path / "served")
    left = made.params.keys() - loaded.weights.keys()
    assert left and all(name.startswith("auxiliary_head/") for name in left)
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    model = build_model(made.config, unflatten(made.params))
    found, expected = loaded.segment(image), segmentation.segment(model, made.processor, image)
    assert isinstance(found, np.ndarray)
    assert np.mean(found == expected) > 0.999  # a pixel whose two best classes are equal up to rounding
    assert isinstance(loaded.segment([image, image]), list)


@pytest.mark.thorough
def test_without_positions_height_and_width_are_free(tmp_path: Path) -> None:
    made = checkpoint(KINDS["without positions"])
    stablehlo.export_program(made, tmp_path / "served", ProgramOptions(free_sides=True))
    loaded, model = load_program(tmp_path / "served"), build_model(made.config, unflatten(made.params))
    for sides in ((32, 32), (8, 24)):
        np.testing.assert_allclose(loaded(pixels(2, sides))["logits"], model(pixels(2, sides)).logits, atol=1e-5)
    refused("pixel_values: expected [b, 8*h, 8*w, 3] float32, found [1, 32, 30, 3]", call=loaded,
            pixel_values=pixels(1, (32, 30)))  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "without positions"])
def test_sides_that_must_be_known_are_not_free(kind: str, tmp_path: Path) -> None:
    refused("--free-sides", "need a known height and width", call=stablehlo.check_export, destination=tmp_path / "x",
            config=KINDS[kind], options=ProgramOptions(free_sides=True))  # fmt: skip


@pytest.mark.thorough
def test_products_in_bfloat16_are_stated(tmp_path: Path) -> None:
    made = checkpoint(TINY)
    stablehlo.export_program(made, tmp_path / "served", ProgramOptions(precision="bfloat16"))
    loaded = load_program(tmp_path / "served")
    assert loaded.manifest.dtype == "bfloat16"
    found = loaded(pixels(3))["logits"]
    assert found.dtype == np.float32
    assert 1e-5 < float(np.abs(found - logits_of(TINY, made.params, pixels(3))).max()) < 0.1


# --- What is in it ----------------------------------------------------------------------------------------------------


def test_nothing_of_the_machine_is_in_it(tmp_path: Path, served: Path) -> None:
    """No path of the repository, of the environment or of the destination, no name of a source file."""
    homes = [str(ROOT), sys.prefix, sys.base_prefix, str(served.parent), str(Path.home()), "site-packages", ".py"]
    for file in served.iterdir():
        content = file.read_bytes()
        assert [home for home in homes if home.encode() in content] == [], file.name


def test_locations_would_be_in_it_otherwise() -> None:
    """So the search above can find them; and the setting is as it was."""
    exported = jax.export.export(jax.jit(lambda x: x + 1))(jax.ShapeDtypeStruct((2,), np.float32))
    assert b".py" in exported.serialize()


def test_the_origin_is_a_hub_name_and_no_path() -> None:
    local = {"source": "/home/someone/beit", "revision": None, "files": {"model.safetensors": "ab"}, "options": {}}
    assert stablehlo.public_origin(local) == {"files": {"model.safetensors": "ab"}}
    hub = {**local, "source": "org/beit", "revision": "c0ffee"}
    assert stablehlo.public_origin(hub) == {
        "source": "org/beit", "revision": "c0ffee", "files": {"model.safetensors": "ab"}
    }  # fmt: skip


def test_the_same_model_is_the_same_bytes(served: Path, tmp_path: Path) -> None:
    stablehlo.export_program(checkpoint(TINY), tmp_path / "again")
    assert {file.name: file.read_bytes() for file in served.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()
    }


def test_jax_export_alone_calls_it(served: Path) -> None:
    """Without this library: three lines, as the documents give them."""
    exported = jax.export.deserialize(bytearray((served / EXPORTED).read_bytes()))
    found = exported.call(load_file(served / WEIGHTS), pixels(3))["logits"]
    np.testing.assert_array_equal(found, load_program(served)(pixels(3))["logits"])


BLOCKED = """
import sys

BLOCKED = set(sys.argv[2].split())

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Finder())
import numpy as np
import beit_jax
program = beit_jax.load_program(sys.argv[1])
logits = program(np.zeros((2, 32, 32, 3), np.float32))["logits"]
assert logits.shape == (2, 3), logits.shape
print(*sorted(name for name in sys.modules if name.startswith("beit_jax")))
"""
OTHERS = "flax jaxtyping PIL tyro rich xxhash huggingface_hub msgpack torch transformers optax orbax beartype"


def test_loading_imports_neither_flax_nor_a_model(served: Path) -> None:
    """JAX, NumPy and safetensors are enough: a process that can import none of the rest loads and calls it."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(served), OTHERS],
        capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rooms = {name.split(".")[1] for name in done.stdout.split() if name.count(".") > 1}
    assert rooms == {"programs"}


# --- Images -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 255, (20 + i, 30, 3), np.uint8) for i in range(5)]


def test_raw_images_are_classified_as_by_the_model(served: Path, images: list[np.ndarray]) -> None:
    loaded, made = load_program(served), checkpoint(TINY)
    model = build_model(TINY, unflatten(made.params))
    assert isinstance(loaded.processor, ImageProcessor)
    np.testing.assert_array_equal(loaded.prepare(images), made.processor(images))
    found, expected = (
        loaded.classify(images, top=2, batch_size=2),
        predict.classify(model, made.processor, images, top=2),
    )
    assert [[guess.label for guess in row] for row in found] == [[guess.label for guess in row] for row in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose([g.probability for g in one], [g.probability for g in other], atol=1e-6)
    assert loaded.classify(images[0], top=1)[0].label in loaded.labels == ("ant", "bee", "cat")
    refused("this program gives logits, and no pooled", "with --features", call=loaded.features, images=images)
    refused("does not segment (its task is image_classification)", call=loaded.segment, images=images)


@pytest.mark.thorough
def test_features_of_raw_images(tmp_path: Path, images: list[np.ndarray]) -> None:
    made = checkpoint(KINDS["features"])
    stablehlo.export_program(made, tmp_path / "served", ProgramOptions(batch=4))
    loaded, model = load_program(tmp_path / "served"), build_model(made.config, unflatten(made.params))
    for pooling in ("pooled", "mean", "cls", "tokens"):
        expected = predict.features(model, made.processor, images, pooling=pooling)
        np.testing.assert_allclose(loaded.features(images, pooling=pooling), expected, atol=1e-5)


def test_the_commands_take_a_program(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.npy"
    np.save(image, np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    assert main(["classify", str(served), str(image), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    expected = load_program(served).classify(image)
    assert [row["class"] if "class" in row else row["label"] for row in found["classes"]] == [g.label for g in expected]


def test_it_is_called_within_jit(served: Path) -> None:
    loaded = load_program(served)
    found = jax.jit(lambda x: loaded(x)["logits"].argmax(-1))(pixels(3))
    np.testing.assert_array_equal(found, np.asarray(loaded(pixels(3))["logits"]).argmax(-1))


def test_nothing_is_donated_and_it_is_warmed_up(served: Path) -> None:
    loaded, given = load_program(served, device=jax.devices()[0]), jax.numpy.asarray(pixels(2))
    loaded.warm_up(2)
    first = loaded(given)["logits"]
    np.testing.assert_array_equal(first, loaded(given)["logits"])
    assert first.devices() == {jax.devices()[0]}
    assert "pixel_values [b, 32, 32, 3] float32 -> logits [b, 3] float32; cpu, cuda, tpu" in repr(loaded)


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (np.zeros((1, 16, 16, 3), np.float32), "found [1, 16, 16, 3] float32"),
        (np.zeros((1, 3, 32, 32), np.float32), "found [1, 3, 32, 32] float32"),
        (np.zeros((32, 32, 3), np.float32), "found [32, 32, 3] float32"),
        (np.zeros((0, 32, 32, 3), np.float32), "found [0, 32, 32, 3] float32"),
        (np.zeros((1, 32, 32, 3), np.uint8), "found [1, 32, 32, 3] uint8"),
    ],
)
def test_wrong_shapes_are_one_line(given: np.ndarray, found: str, served: Path) -> None:
    refused("pixel_values: expected [b, 32, 32, 3] float32", found, "prepare()", call=load_program(served),
            pixel_values=given)  # fmt: skip


def test_masks_are_for_masked_image_modelling(served: Path) -> None:
    refused("bool_masked_pos: this program has no such input, it takes pixel_values", call=load_program(served),
            pixel_values=pixels(2), bool_masked_pos=masks(2))  # fmt: skip


@pytest.mark.parametrize("name", [*manifests.DIGESTED])
def test_a_changed_file_is_named(name: str, copied: Path) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    refused(name, "sha256", "expected", "found", call=load_program, path=copied)
    (copied / name).unlink()
    refused(name, "cannot be read", call=load_program, path=copied)


def test_another_programs_weights_are_refused(copied: Path, tmp_path: Path) -> None:
    stablehlo.export_program(checkpoint(TINY, seed=1), tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS, copied / WEIGHTS)
    refused(WEIGHTS, "of another program", call=load_program, path=copied)


def test_a_changed_manifest_is_refused(copied: Path) -> None:
    content = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**content, "labels": ["ant", "cat", "bee"]}))
    refused(MANIFEST, "changed since it was written", call=load_program, path=copied)
    (copied / MANIFEST).write_text(json.dumps({**content, "format": "beit-jax program 9"}))
    refused(
        MANIFEST, 'expected the format "beit-jax program 1", found "beit-jax program 9"', call=load_program, path=copied
    )
    (copied / MANIFEST).write_text("{")
    refused(MANIFEST, call=load_program, path=copied)


def test_what_is_no_program_is_said(tmp_path: Path) -> None:
    refused("not a program (no program.json in it)", "--to stablehlo", call=load_program, path=tmp_path)
    refused("not a program", call=beit_jax.load_program, path=tmp_path / "nothing")


def test_an_older_jax_is_refused_before_it_fails(copied: Path) -> None:
    rewrite(copied, jax="99.1", oldest_jax="99.1")
    refused(f"written by jax 99.1 for jax 99.1 and newer, found jax {jax.__version__}", "--batch N",
            f"--jax-floor {jax.__version__}", call=load_program, path=copied)  # fmt: skip
    rewrite(copied, jax="99.1", oldest_jax="0.10.2")  # as a program with a fixed batch says
    assert load_program(copied)(pixels(2))["logits"].shape == (2, 3)


def test_another_calling_convention_is_refused(copied: Path) -> None:
    rewrite(copied, calling_convention=99)
    refused("calling convention 99", "export the model again", call=load_program, path=copied)


def test_another_platform_is_refused(copied: Path) -> None:
    rewrite(copied, platforms=("cuda", "tpu"))
    refused("written for cuda, tpu, found a device of the platform cpu", call=load_program, path=copied)


def test_without_flatbuffers_one_line_says_how_to_install_it(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    refused("pip install 'beit-jax[stablehlo]'", call=load_program, path=served)
    refused("pip install 'beit-jax[stablehlo]'", call=stablehlo.export_program, checkpoint=checkpoint(TINY),
            destination=tmp_path / "x")  # fmt: skip
    assert not (tmp_path / "x").exists()


# --- Fixed batches and floors -----------------------------------------------------------------------------------------


def test_a_fixed_batch_is_for_every_jax_and_pads_by_itself(tmp_path: Path, images: list[np.ndarray]) -> None:
    made = checkpoint(TINY)
    stablehlo.export_program(made, tmp_path / "served", ProgramOptions(batch=4))
    loaded = load_program(tmp_path / "served")
    assert (loaded.manifest.batch, loaded.manifest.oldest_jax) == (4, stablehlo.OLDEST_JAX)
    refused("pixel_values: expected [4, 32, 32, 3] float32, found [3, 32, 32, 3]", "pad it to 4", call=loaded,
            pixel_values=pixels(3))  # fmt: skip
    model = build_model(TINY, unflatten(made.params))
    expected = predict.classify(model, made.processor, images, top=1)
    assert [row[0].label for row in loaded.classify(images, top=1)] == [row[0].label for row in expected]


def test_a_floor_writes_the_stablehlo_of_its_release(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an older one here, which every release reads."""
    monkeypatch.setattr(stablehlo, "STABLEHLO_OF", {stablehlo.OLDEST_JAX: "1.13.0"})
    stablehlo.export_program(checkpoint(TINY), tmp_path / "old", ProgramOptions(jax_floor=stablehlo.OLDEST_JAX))
    assert b"StableHLO_v1.13.0" in (tmp_path / "old" / EXPORTED).read_bytes()
    assert b"StableHLO_v1.13.0" not in (served / EXPORTED).read_bytes()
    loaded = load_program(tmp_path / "old")
    assert loaded.manifest.oldest_jax == stablehlo.OLDEST_JAX
    np.testing.assert_array_equal(loaded(pixels(3))["logits"], load_program(served)(pixels(3))["logits"])


@pytest.mark.parametrize("floor", ["0.9.0", "99.0", "newest", ""])
def test_a_floor_is_a_release_that_can_be_written(floor: str, tmp_path: Path) -> None:
    refused("--jax-floor", f"expected a version from 0.10.2 to {jax.__version__}", call=stablehlo.check_export,
            destination=tmp_path / "x", config=TINY, options=ProgramOptions(jax_floor=floor))  # fmt: skip


def test_versions_are_numbers() -> None:
    number = programs.version_number
    assert number("0.9.2") < number("0.10.2") < number("0.12.0") < number("0.12.0.1") < number("0.13.0.dev1")


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_it_and_says_what_it_takes(
    native: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "served"
    assert main(["export", str(native()), str(destination), "--to", "stablehlo"]) == 0
    said = capsys.readouterr().out
    assert "takes pixel_values [b, 32, 32, 3] float32" in said
    assert "gives logits [b, 3] float32" in said
    assert load_program(destination).labels == ("ant", "bee", "cat")
    again = ["export", str(native("classification", 1)), str(destination), "--to", "stablehlo"]
    assert main(again) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "hf", "--batch", "8"], "--batch"),
        (["--to", "timm", "--features"], "--features"),
        (["--to", "onnx", "--jax-floor", "0.10.2"], "--jax-floor"),
        (["--to", "stablehlo", "--batch", "0"], "--batch: expected 1 to"),
        (["--to", "stablehlo", "--free-sides"], "--free-sides"),
        (["--to", "stablehlo", "--jax-floor", "0.1"], "--jax-floor"),
    ],
)
def test_options_are_used_or_refused(
    options: list[str], said: str, native: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(native()), str(tmp_path / "served"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error
    assert not (tmp_path / "served").exists()


def test_a_damaged_program_is_one_line_of_the_command(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(ROOT / "beit_jax" / "digits" / "images")
    (copied / WEIGHTS).write_bytes(b"")
    assert main(["classify", str(copied), image]) == 2
    error = capsys.readouterr().err
    assert WEIGHTS in error and "sha256" in error and error.count("\n") == 1, error
