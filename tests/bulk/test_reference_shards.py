"""Shards written by the package `webdataset` (tests/reference/make_webdataset.py) are read as it reads them."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import TINY, checkpoint

import beit_jax
from beit_jax.cli.main import main
from beit_jax.tables.reading import read_features
from beit_jax.weights import save

SHARDS = Path(__file__).parents[1] / "reference" / "webdataset"
SAMPLES = json.loads((SHARDS / "samples.json").read_text())


def test_every_image_of_the_shards_is_embedded_in_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "native").mkdir()
    save(tmp_path / "native", checkpoint(TINY))
    shards = [f"{SHARDS}/shard-{{000000..000001}}.tar", f"{SHARDS}/packed.tar.gz"]
    output = tmp_path / "features.npz"
    assert main(["features", str(tmp_path / "native"), *shards, "-o", str(output)]) == 0, capsys.readouterr().err
    table = read_features(output)
    images = []
    for archive in ("shard-000000.tar", "shard-000001.tar", "packed.tar.gz"):
        with tarfile.open(SHARDS / archive) as tar:
            for sample in SAMPLES[archive]:
                content = tar.extractfile(sample["name"])
                assert content is not None
                data = content.read()
                assert hashlib.sha256(data).hexdigest() == sample["sha256"]
                images.append((f"{SHARDS / archive}/{sample['name']}", Image.open(io.BytesIO(data)).convert("RGB")))
    assert table.names == [name for name, _ in images]
    model, processor = beit_jax.from_pretrained(tmp_path / "native")
    alone = beit_jax.features(model, processor, [image for _, image in images])
    np.testing.assert_allclose(table.features, alone, rtol=0, atol=1e-5)
