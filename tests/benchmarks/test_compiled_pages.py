"""The pages of compiled programs: what stands side by side is of one compiler, and counted as they say."""

from pathlib import Path

import aot
import pytest
import torchax_cycles

ROOT = Path(__file__).parents[2]


def record(libtpu: str, traffic: float, checkout: str = "abc") -> dict[str, object]:
    row = {
        "recipe": "beit_base_pt1k", "topology": "v5e:4x4", "mesh": {"data": 16, "fsdp": 1, "tensor": 1},
        "remat": "block", "accumulate": 1, "traffic": traffic, "step_seconds": [0.1, 0.2], "memory": 2**30,
    }  # fmt: skip
    layout = {"counting": aot.COUNTING}
    return {"row": row, "versions": f"jax 0.12.0.1, libtpu {libtpu}", "checkout": checkout, "layout": layout}


def test_what_stands_side_by_side_is_of_one_compiler() -> None:
    cells = aot.side_by_side(record("0.0.50.1", 200e9), record("0.0.50.1", 50e9))
    assert cells[5:7] == ["200 : 50", "0.25"] and cells[-1] == "libtpu 0.0.50.1, abc"
    with pytest.raises(AssertionError, match="one compiler"):
        aot.side_by_side(record("0.0.50.1", 200e9), record("0.0.42.1", 50e9))


def test_another_checkout_is_laid_out_as_it_is_installed(tmp_path: Path) -> None:
    place = aot.as_installed(ROOT, tmp_path / "product")
    assert (place / "beit_jax/config.py").samefile(ROOT / "beit_jax/config.py")
    assert (place / "beit_jax/train/recipe.py").samefile(ROOT / "train/recipe.py")
    with pytest.raises(FileNotFoundError):
        aot.as_installed(tmp_path / "nowhere", tmp_path / "other")


def test_rows_have_names_of_their_own_and_come_back_from_them() -> None:
    rows = list(aot.cases())
    assert len({case.name for case in rows}) == len(rows)
    topologies = {case.topology.partition(":")[0] for case in rows if case.part == aot.EVERY}
    assert topologies == {"v4", "v5e", "v5p", "v6e", "tpu7x"}


@pytest.mark.parametrize("page", ["aot", "torchax_cycles"])
def test_a_page_is_that_of_its_records(page: str) -> None:
    made = {"aot": aot, "torchax_cycles": torchax_cycles}[page]
    records = made.read_records(ROOT / f"benchmarks/{page}.json")
    assert made.page(records) == (ROOT / f"benchmarks/{page}.md").read_text()


def test_kernels_that_libtpu_does_not_estimate_take_cycles() -> None:
    """128 tokens, one head of 64, one image: 14 x 64 operations a score, forward and backward."""
    scores = 128**2
    flops = 14 * 64 * scores
    products, vectors = flops / (4 * 128**2), scores * (24 / 4096 + 2 / 1024)
    assert torchax_cycles.kernel_cycles(flops, 128) == pytest.approx(products + vectors)
    # The vector unit works on whole tiles, half of which are empty.
    assert torchax_cycles.kernel_cycles(flops, 64) == pytest.approx(products + 2 * vectors)
