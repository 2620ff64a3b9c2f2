"""Published checkpoints give the logits that others published for them.

The image is 000000039769 of COCO val2017, two cats. The numbers are those of transformers' own tests, with their
tolerances (tests/models/beit/test_modeling_beit.py, tests/models/data2vec/test_modeling_data2vec_vision.py), and of the
script that converted the checkpoints (convert_beit_unilm_to_pytorch.py), which allows 1e-3. Where both have a row, the
tests' tighter tolerance holds.

Left out: base_224_pt22k_ft1k and large_224_pt22k_ft1k of that script, whose names on the hub are not known; the
segmenters and DPT, which this library does not compute; and DiT (microsoft/dit-base-finetuned-rvlcdip), whose image
lies in a Parquet file of a data set, which takes libraries that this one does not need.
"""

from pathlib import Path

import pytest
from golden import Golden, check, download

pytestmark = pytest.mark.hub

CATS = "http://images.cocodataset.org/val2017/000000039769.jpg"
GOLDEN = [
    Golden(
        "microsoft/beit-base-patch16-224-pt22k",
        (1, 196, 8192),
        ((-3.2437, 0.5072, -13.9174), (-3.2456, 0.4948, -13.9401), (-3.2033, 0.5121, -13.8550)),
        tolerance=1e-2,
        size=224,
        all_masked=True,
    ),
    Golden(
        "microsoft/beit-base-patch16-224",
        (1, 1000),
        (-1.2385, -1.0987, -1.0108),
        tolerance=1e-4,
        size=224,
        argmax=281,
    ),
    Golden(
        "microsoft/beit-large-patch16-224-pt22k-ft22k",
        (1, 21841),
        (1.6881, -0.2787, 0.5901),
        tolerance=1e-4,
        size=224,
        argmax=2396,
    ),
    Golden(
        "microsoft/beit-base-patch16-224-pt22k-ft22k",
        (1, 21841),
        (2.2288, 2.4671, 0.7395),
        tolerance=1e-3,
        size=224,
        argmax=2397,
    ),
    Golden(
        "microsoft/beit-base-patch16-384",
        (1, 1000),
        (-1.5303, -0.9484, -0.3147),
        tolerance=1e-3,
        size=384,
        argmax=761,
    ),
    Golden(
        "microsoft/beit-large-patch16-224",
        (1, 1000),
        (-0.4804, 0.6257, -0.1837),
        tolerance=1e-3,
        size=224,
        argmax=761,
    ),
    Golden(
        "microsoft/beit-large-patch16-384",
        (1, 1000),
        (-0.5122, 0.5117, -0.2113),
        tolerance=1e-3,
        size=384,
        argmax=761,
    ),
    Golden(
        "microsoft/beit-large-patch16-512",
        (1, 1000),
        (-0.3062, 0.7261, 0.4852),
        tolerance=1e-3,
        size=512,
        argmax=761,
    ),
    Golden(
        "facebook/data2vec-vision-base-ft1k",
        (1, 1000),
        (0.3277, -0.1395, 0.0911),
        tolerance=1e-4,
        labels=("remote control, remote", "tabby, tabby cat"),
    ),
]


@pytest.fixture(scope="session")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return download(CATS, tmp_path_factory.mktemp("coco") / "cats.jpg")


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_golden_logits(golden: Golden, cats: Path) -> None:
    check(golden, cats)
