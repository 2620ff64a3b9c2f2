"""`inspect` and `convert` need no JAX, and `inspect` reads no tensor: this is why 1.2 GB are described in a second."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from beit_jax.cli.main import main
from beit_jax.config import BeitConfig
from beit_jax.convert import formats
from beit_jax.convert.formats.transformers import HF
from beit_jax.convert.formats.unilm import UNILM
from beit_jax.models.build import num_params, param_shapes
from beit_jax.variants import VARIANTS
from beit_jax.weights import leaves

FOREIGN = Path(__file__).parents[1] / "convert" / "foreign"
HEAVY = {"jax", "jaxlib", "flax", "optax", "torch", "transformers", "tensorflow", "scipy", "matplotlib", "IPython"}
LARGE = BeitConfig(image_size=(32, 32), patch_size=(16, 16), hidden_size=256, num_hidden_layers=4,
                   num_attention_heads=4, intermediate_size=1024, task="image_classification", labels=("a", "b"),
                   position_bias="per_layer")  # fmt: skip


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    sources = ["distributed/step_7", "lightning/last.ckpt", "trainer", "tensorflow/h5", "kecam/beit.h5"]
    code = (
        "import sys\nfrom beit_jax.cli.main import main\n"
        f"codes = [main(['inspect', f'{FOREIGN}/{{source}}']) for source in {sources}]\n"
        f"codes += [main(['convert', '{FOREIGN / sources[0]}', '{tmp_path / 'native'}'])]\n"
        f"codes += [main(['inspect', '{tmp_path / 'native'}'])]\n"
        f"print(codes, sorted({HEAVY} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0, 0] []"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier of 13 MB in four kinds of files."""
    folder = tmp_path_factory.mktemp("sources")
    found = {
        "pth": folder / "model.pth",
        "sharded": folder / "sharded",
        "dcp": folder / "dcp",
        "h5": folder / "keras.h5",
    }

    def tensors(naming) -> dict[str, torch.Tensor]:
        params = {name: torch.randn(shape).numpy() for name, shape in param_shapes(LARGE).items()}
        return {name: torch.from_numpy(array) for name, array in naming.to_torch(LARGE, params).items()}

    torch.save({"model": tensors(UNILM)}, found["pth"])
    with pytest.warns(UserWarning, match="torch.distributed is"):
        dcp.save({"model": tensors(UNILM)}, checkpoint_id=found["dcp"], no_dist=True)
    found["sharded"].mkdir()
    (found["sharded"] / "config.json").write_text(json.dumps(LARGE.to_hf()))
    held = tensors(HF)
    halves = dict(enumerate((sorted(held)[::2], sorted(held)[1::2])))
    for i, names in halves.items():
        save_file({name: held[name] for name in names}, found["sharded"] / f"{i}.safetensors", {"format": "pt"})
    weight_map = {name: f"{i}.safetensors" for i, names in halves.items() for name in names}
    (found["sharded"] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (keras,) = (each for each in formats.FORMATS if each.name == "keras_cv_attention_models")
    with h5py.File(found["h5"], "w") as file:
        for name, tensor in tensors(keras).items():
            file[f"{name.partition('/')[0]}/{name}"] = tensor.numpy()
    return found


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what Linux counts")
@pytest.mark.parametrize("kind", ["pth", "sharded", "dcp", "h5"])
def test_no_tensor_is_read(kind: str, sources: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    def read() -> int:
        """Bytes that this process has read so far, by whatever library."""
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

    assert main(["inspect", str(sources[kind])]) == 0  # what is imported at the first use is read
    assert f"{leaves.num_params(LARGE):,} parameters" in capsys.readouterr().out
    before = read()
    assert main(["inspect", str(sources[kind])]) == 0
    assert read() - before < 1_000_000


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_as_the_models_have_them(variant: str) -> None:
    assert leaves.num_params(VARIANTS[variant]) == num_params(VARIANTS[variant])
