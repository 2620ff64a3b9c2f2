"""The example of docs/ray.md, as it stands there: the same table as the command's. Needs Ray (pytest -m ray)."""

from pathlib import Path

import numpy as np
import pytest
from documents import ROOT, blocks
from PIL import Image
from tiny_models import TINY, checkpoint

from beit_jax.cli.main import main
from beit_jax.tables.reading import read_features
from beit_jax.weights import save

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # of Ray and what it imports


def test_two_workers_give_the_table_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    Path("native").mkdir()
    save("native", checkpoint(TINY))
    Path("photos", "inner").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(150):
        folder = Path("photos", "inner") if number % 3 == 0 else Path("photos")
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{number:03}.png")
    (example,) = (block.code for block in blocks((ROOT / "docs" / "ray.md").read_text()) if block.language == "python")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        exec(compile(example, "docs/ray.md", "exec"), {"__name__": "example"})
    finally:
        ray.shutdown()
    assert main(["features", "native", str(Path("photos").resolve()), "-o", "features.npz", "--batch-size", "64"]) == 0
    by_ray, by_command = read_features("features"), read_features("features.npz")
    assert by_ray.names == by_command.names and len(by_ray.names) == 150
    np.testing.assert_allclose(by_ray.features, by_command.features, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert main(["neighbours", "features", by_ray.names[5], "--model", "native", "--top", "1"]) == 0
    assert capsys.readouterr().out.split()[-1] == by_ray.names[5]
