"""Writes and reads back shards with the package `webdataset`, for tests/bulk/test_reference_shards.py.

    pip install webdataset==1.0.2 pillow numpy  # in an environment of its own
    python tests/reference/make_webdataset.py tests/reference/webdataset

The images are of what shards hold in practice: JPEG and PNG, a folder in the key, a dot in an ending ("left.png"), and
beside some images a class or JSON. `samples.json` holds what webdataset itself reads from the shards, in its order.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image


def pixels(number: int) -> Image.Image:
    """Blocks of colours, which JPEG keeps small."""
    blocks = np.random.default_rng(number).integers(0, 255, (2, 2, 3), np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(12, 1))


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=2, verbose=0) as writer:
        for number in range(3):
            image = {"jpg": pixels(number)} if number % 2 else {"left.png": pixels(number), "right.png": pixels(9)}
            key = f"train/{number:04}" if number < 1 else f"{number:04}"
            labels = ({"cls": number}, {}, {"json": {"number": number}})[number]
            writer.write({"__key__": key, **image, **labels})
    with webdataset.TarWriter(str(folder / "packed.tar.gz"), compress=True) as packed:
        packed.write({"__key__": "packed", "png": pixels(7), "cls": 1})
    found = {}
    for path in sorted(folder.glob("*.tar*")):
        found[path.name] = []
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            for ending, content in sample.items():
                if ending.endswith(("jpg", "png")):
                    digest = hashlib.sha256(content).hexdigest()
                    found[path.name].append({"name": f"{sample['__key__']}.{ending}", "sha256": digest})
    (folder / "samples.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
