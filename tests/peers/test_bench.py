"""All of it: who takes part, who is left out and why, and that the peers that are installed compute the same."""

from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import toy_contenders
from tiny_models import TINY, checkpoint

from beit_jax.convert import importer
from beit_jax.errors import BeitJaxError
from beit_jax.peers import bench, forward, needs, race, same_model
from beit_jax.peers.race import ContenderFailed
from beit_jax.terminal import Bar
from beit_jax.weights.native import NativeCheckpoint

DIGITS = Path(str(files("beit_jax") / "digits"))


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "TURN", 0.02)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toys in the place of all implementations, all of them installed."""
    monkeypatch.setattr(race, "PROCESS", toy_contenders.PROCESS)
    monkeypatch.setattr(needs, "find_spec", lambda name: name)


def test_there_is_a_way_for_every_name() -> None:
    assert list(forward.FORWARD) == list(needs.NEEDS) and set(bench.CONTENDERS) < set(needs.NEEDS)


def test_alone_it_measures_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = bench.bench(checkpoint(TINY), batch_size=3, threads=1, rounds=2)
    assert list(found.contenders) == ["ours", "ours, XLA"]
    assert set(found.left_out) == set(bench.CONTENDERS) - set(found.contenders)
    assert found.left_out["timm"] == "not installed: torch, timm"
    assert found.difference < 1e-5 and found.batch_size == 3 and found.clock == "wall"
    for row in found.contenders.values():
        assert row["images_per_second"] == pytest.approx(3 / row["seconds"]) and row["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("toys")
def test_who_fails_is_left_out_with_the_reason() -> None:
    done: list[int] = []

    def progress(total: int) -> Bar:
        done.append(-total)
        return nullcontext(done.append)

    found = bench.bench(
        checkpoint(TINY),
        threads=1,
        rounds=2,
        contenders=("ours", "transformers, sdpa", "timm"),
        progress=progress,
    )
    assert list(found.contenders) == ["ours", "transformers, sdpa"]
    assert found.left_out == {"timm": "failed: RuntimeError: no compiler here"}
    assert sum(done) == 0
    assert "left out: timm (failed: RuntimeError: no compiler here)" in found.lines()
    head, rows = found.rows()
    assert [row[0] for row in rows] == ["ours", "transformers, sdpa"] and len(head) == len(rows[0])
    assert rows[0][3] == "-" and " to " in rows[1][3]


@pytest.mark.usefixtures("toys")
def test_who_has_no_such_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = same_model.export

    def export(model: NativeCheckpoint, destination: Path, layout: str) -> list[str]:
        if layout == "timm":
            raise BeitJaxError("timm has no such model")
        return right(model, destination, layout)

    monkeypatch.setattr(same_model, "export", export)
    found = bench.bench(checkpoint(TINY), rounds=1, contenders=("ours", "transformers, sdpa", "timm"))
    assert found.left_out == {"timm": "timm has no such model"} and len(found.contenders) == 2


@pytest.mark.usefixtures("toys")
def test_who_disagrees_ends_it() -> None:
    with pytest.raises(BeitJaxError, match="onnxruntime computes something else than ours"):
        bench.bench(checkpoint(TINY), rounds=1, contenders=("ours", "onnxruntime"))


@pytest.mark.usefixtures("toys")
def test_ours_may_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "PROCESS", (*toy_contenders.PROCESS, "no job"))
    with pytest.raises(ContenderFailed, match=r"ours: .*JSONDecodeError"):
        bench.bench(checkpoint(TINY), rounds=1, contenders=("ours", "timm"))


def test_transformers_computes_the_same() -> None:
    pytest.importorskip("transformers")
    found = bench.bench(importer.load(DIGITS), rounds=1, contenders=("ours", "transformers, sdpa"))
    assert found.left_out == {} and found.difference < 1e-5
    assert found.versions.keys() >= {"torch", "transformers", "jax"}


def test_a_transformers_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by an export that scales a bias."""
    pytest.importorskip("transformers")
    right = same_model.export

    def wrong(model: NativeCheckpoint, destination: Path, layout: str) -> list[str]:
        params = {**model.params, "classifier/bias": model.params["classifier/bias"] + 1}
        return right(replace(model, params=params), destination, layout)

    monkeypatch.setattr(same_model, "export", wrong)
    with pytest.raises(BeitJaxError, match="transformers, sdpa computes something else than ours"):
        bench.bench(importer.load(DIGITS), rounds=1, contenders=("ours", "transformers, sdpa"))


@pytest.mark.parametrize("name", ["timm", "onnxruntime", "openvino"])
def test_others_compute_the_same(name: str) -> None:
    for package in needs.NEEDS[name]:
        pytest.importorskip(package)
    model = checkpoint(replace(TINY, position_bias="per_layer", layer_norm_eps=1e-6))
    found = bench.bench(model, rounds=1, contenders=("ours", name))
    assert found.left_out == {} and found.difference < 1e-5
