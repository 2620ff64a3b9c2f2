"""Every objective on images of four bands: a few steps, and models that take four channels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from beit_jax.cli.main import main
from beit_jax.tokenizers.build import tokenizer_shapes
from beit_jax.tokenizers.checkpoint import TokenizerCheckpoint, read_tokenizer, save_tokenizer
from beit_jax.tokenizers.dvae import DvaeEncoderConfig
from beit_jax.weights import load

FEW: list[object] = ["--data.workers", 0, "--data.batch-size", 4, "--data.eval-batch-size", 4,
                     "--optim.warmup-epochs", 0, "--model.channels", 4,
                     "--optim.epochs", 1, "--model.dtype", "float32", "--model.image-size", 16]  # fmt: skip
MASK: list[object] = ["--mask.patches", 7, "--mask.min-block", 2]
DVAE: list[object] = ["--dvae.vocab-size", 16, "--dvae.width", 8, "--dvae.groups", 2, "--dvae.blocks", 1,
                      "--dvae.embedding", 8]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folder` and `masks`, prepared: eight images of four bands."""
    root, rng = tmp_path_factory.mktemp("four"), np.random.default_rng(0)
    for name in ("folder/a", "folder/b", "images", "masks"):
        (root / "source" / name).mkdir(parents=True)
    for number in range(8):
        pixels = rng.integers(0, 4000, (24, 24, 4), dtype=np.uint16)
        for path in (f"folder/{'ab'[number % 2]}/{number}.tif", f"images/{number}.tif"):
            tifffile.imwrite(root / "source" / path, pixels, photometric="minisblack", planarconfig="contig")
        Image.fromarray((pixels[..., 0] > 2000).astype(np.uint8)).save(root / "source" / f"masks/{number}.png")
    (root / "names.txt").write_text("dark\nbright\n")
    assert main(["prepare", "folder", str(root / "source" / "folder"), str(root / "folder"), "--held-out", "0.5"]) == 0
    return root


def run(recipe: str, data: Path, out: Path, *options: object) -> int:
    return main([str(word) for word in ("train", recipe, "--data", data, "--out", out, *FEW, *options)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_what_knows_rgb_alone_is_refused_by_name(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = DvaeEncoderConfig(n_hid=8, vocab_size=16, group_count=2, n_blk_per_group=1, image_size=(8, 8))
    params = {name: np.zeros(shape, np.float32) for name, shape in tokenizer_shapes(encoder).items()}
    (tmp_path / "rgb").mkdir()
    save_tokenizer(tmp_path / "rgb", TokenizerCheckpoint(encoder, params))
    message = refused(
        capsys, "digits_pretrain", data / "folder", tmp_path / "x", *MASK, "--tokenizer", tmp_path / "rgb"
    )
    assert "--tokenizer: takes images of 3 channels, the model of 4" in message and "data2vec" in message
    message = refused(capsys, "digits_data2vec", data / "folder", tmp_path / "x", *MASK, "--augment.color-jitter", 0.4)
    assert "colour jitter" in message and "pass --augment.color-jitter 0" in message


@pytest.mark.thorough
def test_a_tokenizer_and_masked_tokens(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("digits_tokenizer", data / "folder", tmp_path / "dvae", *DVAE, "--data.scale", 4000) == 0
    assert read_tokenizer(tmp_path / "dvae" / "tokenizer").config.input_channels == 4
    options = ["--tokenizer", tmp_path / "dvae", *MASK, "--data.scale", 4000]
    assert run("digits_pretrain", data / "folder", tmp_path / "pt", *options) == 0
    model = load(tmp_path / "pt" / "model")
    assert model.config.num_channels == 4 and model.processor.rescale_factor == 1 / 4000
    message = refused(capsys, "digits_pretrain", data / "folder", tmp_path / "x", *options, "--model.channels", 2)
    assert "--tokenizer: takes images of 4 channels, the model of 2" in message


@pytest.mark.thorough
def test_data2vec_and_a_probe_of_it(data: Path, tmp_path: Path) -> None:
    assert run("digits_data2vec", data / "folder", tmp_path / "d2v", *MASK, "--data.scale", 4000) == 0
    assert load(tmp_path / "d2v" / "model").config.num_channels == 4
    start = ["--init", tmp_path / "d2v", "--augment.randaugment", None]
    assert run("digits_probe", data / "folder", tmp_path / "probe", *start) == 0
    recipe = json.loads((tmp_path / "probe" / "run.json").read_text())["recipe"]
    assert recipe["data"]["scale"] == 4000 and len(recipe["data"]["mean"]) == 4, "as the checkpoint saw images"


@pytest.mark.thorough
def test_segmentation(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = data / "source"
    names = ["--labels", data / "names.txt"]
    words = ["prepare", "segmentation", source / "images", source / "masks", data / "scenes", *names, "--held-out", 0.5]
    assert main([str(word) for word in words]) == 0
    options = ["--model.variant", "None", "--model.hidden-size", 16, "--model.heads", 2, "--model.mlp", 32,
               "--model.depth", 4, "--model.patch-size", 4, "--segment.no-photometric"]  # fmt: skip
    assert run("segment", data / "scenes", tmp_path / "seg", *options) == 0
    model = load(tmp_path / "seg" / "model")
    assert model.config.num_channels == model.processor.num_channels == 4
    image = next((source / "images").glob("*.tif"))
    words = ["segment", tmp_path / "seg" / "model", image, "-o", tmp_path / "seen.png", "--mask", tmp_path / "mask.png"]
    assert main([str(word) for word in words]) == 0
    assert np.asarray(Image.open(tmp_path / "mask.png")).shape == (24, 24)
