"""Outputs under the name of an input, of each other, or of a file of the user's: refused, and every byte stays.

A row is a command whose output must not be written. Words in capitals are places of the fixture.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beit_jax.cli.main import main
from beit_jax.looking.written import png_info
from tests.support.segmenter import save_segmenter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_segmenter(tmp_path_factory.mktemp("segmenter") / "model", ("a", "b", "c"))


@pytest.fixture
def places(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A working directory with a picture under several names, a folder of pictures, and pictures of default names."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save("image.png")
    Path("image.npz").write_bytes(Path("image.png").read_bytes())  # an image, whatever its name
    Path("folder/cat").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Path("folder/cat", name).write_bytes(Path("image.png").read_bytes())
    os.link("image.png", "hard.png")
    Path("soft.png").symlink_to("image.png")
    for name in ("attention", "rollout", "position-bias", "curves", "parity", "reconstruction"):
        Path(f"{name}.png").write_bytes(b"a picture of the user's")
    Path("report.png").write_text("[]")
    Path("masks").mkdir()
    Path("masks/mine.png").write_bytes(b"a mask of the user's")
    return {"MODEL": str(model), "IMAGE": "image.png", "HERE": str(tmp_path)}


def everything(root: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in root.rglob("*") if path.is_file()}


ROWS = {
    "a picture over its image": ["segment", "MODEL", "IMAGE", "-o", "image.png"],
    "a mask over its image": ["segment", "MODEL", "IMAGE", "--mask", "image.png"],
    "by another spelling": ["segment", "MODEL", "IMAGE", "-o", "folder/../image.png"],
    "by the absolute path": ["segment", "MODEL", "IMAGE", "--mask", "HERE/image.png"],
    "by a hard link": ["segment", "MODEL", "IMAGE", "-o", "hard.png"],
    "by a symbolic link": ["segment", "MODEL", "IMAGE", "-o", "soft.png"],
    "both the same": ["segment", "MODEL", "IMAGE", "-o", "new.png", "--mask", "new.png"],
    "both the same by spelling": ["segment", "MODEL", "IMAGE", "-o", "new.png", "--mask", "./folder/../new.png"],
    "a folder that is there": ["segment", "MODEL", "folder", "--mask", "masks"],
    "the folder itself": ["segment", "MODEL", "folder/cat", "-o", "folder/cat"],
    "both the same folder": ["segment", "MODEL", "folder", "-o", "new", "--mask", "new"],
    "features over an image": ["features", "MODEL", "IMAGE", "image.npz", "-o", "image.npz"],
    "attention over its image": ["plot", "attention", "MODEL", "IMAGE", "-o", "image.png"],
    "rollout over its image": ["plot", "rollout", "MODEL", "IMAGE", "-o", "image.png"],
    "parity over its report": ["plot", "parity", "report.png", "-o", "report.png"],
    "confusion over an image": ["evaluate", "MODEL", "--data", "folder", "--confusion", "folder/cat/a.png"],
    "attention's default name": ["plot", "attention", "MODEL", "IMAGE"],
    "rollout's default name": ["plot", "rollout", "MODEL", "IMAGE"],
    "the default name of position bias": ["plot", "position-bias", "MODEL"],
    "the default name of curves": ["plot", "curves", "folder"],
    "parity's default name": ["plot", "parity", "report.png"],
    "reconstruction's default name": ["reconstruct", "MODEL", "IMAGE", "--tokenizer", "MODEL", "--decoder", "MODEL"],
    "reconstruction over an image": ["reconstruct", "MODEL", "IMAGE", "--tokenizer", "MODEL", "--decoder", "MODEL",
                                     "-o", "image.png"],
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_nothing_of_the_users_is_replaced(
    row: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(tmp_path)
    arguments = []
    for word in ROWS[row]:
        first, slash, rest = word.partition("/")
        arguments.append(places.get(first, first) + slash + rest)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert everything(tmp_path) == before


def test_two_names_are_written_and_written_again(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the refusals advise: other names; and what was written once may be replaced."""
    arguments = ["segment", places["MODEL"], "image.png", "-o", "picture.png", "--mask", "mask.png"]
    for _ in range(2):
        assert main(arguments) == 0
    with Image.open("mask.png") as mask, Image.open("image.png") as image:
        assert mask.size == image.size


def test_a_picture_of_ours_under_a_default_name_is_replaced(
    places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (1, 1)).save("attention.png", pnginfo=png_info())
    for _ in range(2):
        assert main(["plot", "attention", places["MODEL"], "image.png"]) == 0
        with Image.open("attention.png") as picture:
            assert picture.info["Software"] == "beit-jax" and min(picture.size) > 100
    assert main(["plot", "rollout", places["MODEL"], "image.png", "-o", "other.png"]) == 0


def test_a_mistake_in_the_second_output_leaves_no_first(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(tmp_path)
    assert main(["segment", places["MODEL"], "image.png", "-o", "new.png", "--mask", "nowhere/m.png"]) == 2
    assert everything(tmp_path) == before
