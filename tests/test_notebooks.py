"""Notebooks of colab/ run to their end on their small defaults, without a network, and show what they promise."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

for package in ("jupytext", "nbclient", "nbformat", "ipykernel", "matplotlib", "optax"):
    pytest.importorskip(package, reason=f"notebooks need {package}; pip install 'beit-jax[notebooks]'")

notebooks = pytest.importorskip("notebooks")  # tests/support

PICTURES = {
    "1_convert_and_check": 1,
    "2_own_images": 6,
    "3_evaluate": 1,
    "4_fine_tune": 2,
    "5_pretrain": 2,
    "6_segmentation": 2,
}
MOST_BYTES = 1_500_000  # of the folder: every clone takes all its versions along
DIGITS = Path(str(files("beit_jax") / "digits"))
Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a notebook as Colab would open it; no cell fails, and as many pictures appear as are kept.

    With `changes` it is run as a user would change it: text of its cells, and what stands there instead.
    """

    def run(name: str, changes: Mapping[str, str] = MappingProxyType({})) -> Any:
        programs = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}  # kept between runs by conftest
        environment = {key: value for key, value in programs.items() if value}
        notebook = notebooks.kept(name)
        for old, new in changes.items():
            assert any(old in cell.source for cell in notebook.cells)
            for cell in notebook.cells:
                cell.source = cell.source.replace(old, new)
        notebook = notebooks.execute(notebook, tmp_path, **environment)
        found = notebooks.pictures(notebook)
        assert len(found) == PICTURES[name]
        for picture in found:
            assert np.ptp(np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L"))) > 100
        return notebook

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The package's fifty digits, in a folder for each class."""
    names = json.loads((DIGITS / "config.json").read_text())["id2label"]
    for image in (DIGITS / "images").iterdir():
        place = tmp_path / "own images" / names[image.stem[-1]]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, place)
    return tmp_path / "own images"


def number(pattern: str, notebook: Any) -> float:
    """The number that follows the pattern in what the notebook printed."""
    found = re.search(pattern + r"\s*(-?\d+(\.\d+)?(e-?\d+)?)", notebooks.text(notebook))
    assert found, pattern
    return float(found[1])


def test_every_notebook_is_a_pair() -> None:
    assert notebooks.names() == list(PICTURES)
    assert sorted(path.stem for path in notebooks.COLAB.glob("*.ipynb")) == list(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_both_files_have_the_same_cells(name: str) -> None:
    text, kept = ([(c.cell_type, c.source) for c in of(name).cells] for of in (notebooks.source, notebooks.kept))
    assert text == kept, f"run: python tests/support/notebooks.py {name}"


@pytest.mark.parametrize("name", PICTURES)
def test_what_is_kept_is_whole_and_of_no_machine(name: str) -> None:
    notebook = notebooks.kept(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    found = notebooks.outputs(notebook)
    assert {output.output_type for output in found} <= {"stream", "display_data", "execute_result"}
    assert not [output.text for output in found if output.get("name") == "stderr"]
    assert len(notebooks.pictures(notebook)) == PICTURES[name]
    assert not re.search(r"/(home|root|tmp|work|usr|opt|Users|private|var)/", notebooks.text(notebook))


@pytest.mark.parametrize("name", PICTURES)
def test_one_variable_switches_to_the_real_thing(name: str) -> None:
    code = [cell.source for cell in notebooks.source(name).cells if cell.cell_type == "code"]
    assert 'if "google.colab" in sys.modules:' in code[0]
    assert re.fullmatch(r"(SOURCE|DATA) = None  # such as .*", code[1])


def test_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in notebooks.COLAB.iterdir() if path.is_file()) < MOST_BYTES


def test_a_connection_is_refused(tmp_path: Path) -> None:
    cell = notebooks.code_cell("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)")
    with pytest.raises(Exception, match="needs no network"):
        notebooks.execute(notebooks.of_cells([cell]), tmp_path)


def test_conversion_agrees_with_pytorch_and_damage_does_not(run: Run) -> None:
    pytest.importorskip("transformers", reason="the check against PyTorch needs it; pip install 'beit-jax[torch]'")
    notebook = run("1_convert_and_check")
    text = notebooks.text(notebook)
    assert number("logits +error", notebook) < 1e-5
    assert "79 of 79 exported tensors equal the source's bit for bit" in text
    assert "transformers on the export: equal" in text
    assert re.search(r"block 1 +error 0.0e\+00\nblock 2 +error [1-9]\.\de-01\n", text)


@pytest.mark.thorough
def test_any_other_checkpoint_is_converted_and_checked(run: Run, tmp_path: Path) -> None:
    reference = pytest.importorskip("reference", reason="a checkpoint to check needs pip install 'beit-jax[torch]'")
    model = reference.random_model(task="masked_image_modeling", **reference.BIAS["shared"], **reference.TINY)
    source = reference.save(model, tmp_path / "random")
    notebook = run("1_convert_and_check", {"SOURCE = None": f"SOURCE = {str(source)!r}"})
    assert "BeitForMaskedImageModeling" in notebooks.text(notebook)
    assert "transformers on the export: equal" in notebooks.text(notebook)


@pytest.mark.thorough
def test_neighbours_are_of_the_same_class(run: Run) -> None:
    assert number("k-NN accuracy", run("2_own_images")) > 0.97


@pytest.mark.thorough
def test_own_images_are_prepared_and_searched(run: Run, folder: Path) -> None:
    changes = {"DATA = None": f"DATA = {str(folder)!r}", "facebook/data2vec-vision-base-ft1k": str(DIGITS)}
    assert number("k-NN accuracy", run("2_own_images", changes)) > 0.7


@pytest.mark.thorough
def test_own_images_are_evaluated(run: Run, folder: Path) -> None:
    names = dict.fromkeys(("facebook/data2vec-vision-base-ft1k", "microsoft/beit-base-patch16-224"), str(DIGITS))
    notebook = run("3_evaluate", {"DATA = None": f"DATA = {str(folder)!r}"} | names)
    assert number(re.escape(str(DIGITS)) + " +checkpoint's +top-1", notebook) == 100


@pytest.mark.thorough
def test_evaluation_tells_a_trained_model_from_a_random_one(run: Run) -> None:
    notebook = run("3_evaluate")
    assert number("embedded digits BEiT +checkpoint's +top-1", notebook) == 98.89  # as PyTorch's, expected.json
    assert number("random Data2Vec-Vision +checkpoint's +top-1", notebook) < 25


@pytest.mark.slow
def test_fine_tuning_learns(run: Run) -> None:
    assert number("top-1", run("4_fine_tune")) > 95


@pytest.mark.slow
def test_pretraining_beats_guessing_and_random_weights(run: Run) -> None:
    notebook = run("5_pretrain")
    assert number("hidden tokens predicted right", notebook) > 1.3 * number("the most frequent token", notebook)
    learned, random = (number(f"k-NN accuracy +{name}", notebook) for name in ("masked tokens", "random weights"))
    assert learned > random > 0.1  # chance


@pytest.mark.slow
def test_segmentation_finds_the_classes(run: Run) -> None:
    notebook = run("6_segmentation")
    for name in ("sky", "grass", "building"):
        assert number(rf"{name} +IoU", notebook) > 0.5
