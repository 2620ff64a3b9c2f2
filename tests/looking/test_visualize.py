"""Pictures say what is true: their arrays, points and words against transformers, files and plain loops."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from PIL import Image
from tolerances import MODEL

from beit_jax.cli.main import main
from beit_jax.config import BeitConfig
from beit_jax.convert.parity import Stage, read_report
from beit_jax.errors import BeitJaxError
from beit_jax.images import ImageProcessor
from beit_jax.inference.predict import from_pretrained
from beit_jax.looking import interpret, visualize
from beit_jax.looking.interpret import ImageAttention, PositionBias, image_attention, rollout
from beit_jax.looking.written import png_info
from beit_jax.models.build import Model, build_model, param_shapes
from beit_jax.train.loop.log import Log
from beit_jax.train.loop.metrics_file import read_metrics
from beit_jax.tree import unflatten
from beit_jax.weights import NativeCheckpoint, save

DIGITS = Path(str(files("beit_jax") / "digits"))
GRID = (2, 3)


def photo(height: int = 40, width: int = 56) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_model(**options: Any) -> Model:
    """A model of two blocks and three heads on 2 x 3 patches of 8 x 4 pixels, no parameter at its initial value."""
    config = BeitConfig(
        **({"image_size": (16, 12), "patch_size": (8, 4)} | options),
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=16,
    )
    rng = np.random.default_rng(0)
    shapes = param_shapes(config).items()
    return build_model(
        config, unflatten({name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes})
    )


@pytest.fixture(scope="module")
def attention() -> ImageAttention:
    """Of one image in 2 x 3 patches of 8 x 4 pixels; nothing may write into it."""
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(7), (4, 5, 7)).astype(np.float32)  # 4 blocks, 5 heads, 7 tokens
    probabilities.flags.writeable = False
    return ImageAttention(rng.integers(0, 256, (16, 12, 3), dtype=np.uint8), probabilities, GRID)


def shown(panel: Any, x: float, y: float, image: int = -1) -> float:
    """The value that an image of a panel shows at a point in the panel's coordinates."""
    place = panel.transData.transform((x, y))
    value = panel.images[image].get_cursor_data(SimpleNamespace(x=place[0], y=place[1]))
    return float(np.ma.getdata(value))


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# --- Attention


@pytest.fixture(scope="module", params=["none", "both"])
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ImageAttention]:
    """transformers' attentions [depth, heads, n, n] of an image, and ours."""
    theirs = reference.random_model(**reference.TINY, **reference.BIAS[request.param], num_labels=5)
    model, processor = from_pretrained(reference.save(theirs, tmp_path_factory.mktemp("theirs") / "model"))
    found = image_attention(model, processor, photo())
    expected = reference.run(theirs, processor(photo())).attentions
    return np.stack([block[0].numpy() for block in expected]), found


def test_attention_maps_are_transformers_attentions(compared: tuple[Any, ImageAttention]) -> None:
    expected, found = compared
    depth, heads = expected.shape[:2]
    assert found.pools_patches  # as transformers' classifier does
    for block, patch in ((1, None), (1, "class"), (2, (2, 3)), (None, (4, 4))):
        figure = visualize.attention_maps(found, block=block, patch=patch)
        of_block = expected[depth - 1 if block is None else block - 1]
        if patch is None:
            rows = of_block[:, 1:].mean(axis=1)
            assert "the mean of all patches" in words(figure)
        else:
            rows = of_block[:, 0 if patch == "class" else 1 + 4 * (patch[0] - 1) + (patch[1] - 1)]
        assert len(figure.axes) == 1 + heads + 1
        for panel, row in zip(figure.axes[1:-1], rows, strict=True):
            picture = panel.images[1]
            assert_allclose(picture.get_array(), row[1:].reshape(4, 4), rtol=0.0, atol=MODEL)
            assert picture.get_clim() == (0.0, picture.get_array().max())
            told = panel.get_title().replace(" %", "").split()
            assert float(told[-1]) == pytest.approx(100 * row[0], abs=6e-3)
            assert float(told[-4]) == pytest.approx(100 * row[1:].max(), abs=6e-3)


def test_rollout_is_the_papers_computed_from_transformers_attentions(compared: tuple[Any, ImageAttention]) -> None:
    expected, found = compared
    tokens = expected.shape[-1]
    product_of_blocks = np.eye(tokens)
    for block in expected:
        weights = np.zeros((tokens, tokens))
        for i, j in product(range(tokens), repeat=2):
            weights[i, j] = 0.5 * np.mean([head[i, j] for head in block]) + 0.5 * (i == j)
        product_of_blocks = np.dot(weights / weights.sum(axis=1)[:, None], product_of_blocks)
    joint = rollout(found.probabilities)
    assert joint.dtype == np.float64 and joint.shape == (tokens, tokens)
    assert_allclose(joint, product_of_blocks, rtol=0.0, atol=MODEL)
    for patch, row in (
        (None, product_of_blocks[1:].mean(axis=0)),
        ("class", product_of_blocks[0]),
        ((2, 1), product_of_blocks[5]),
    ):
        picture = visualize.attention_rollout(found, patch=patch).axes[1].images[1]
        assert_allclose(picture.get_array(), row[1:].reshape(4, 4), rtol=0.0, atol=MODEL)


def test_rollout_by_hand() -> None:
    """Two tokens, one head. The last block's weights stand to the left: the other order gives another result."""
    first, last = [[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0]]
    # W = (A + I) / 2: [[1, 0], [.25, .75]] and [[.5, .5], [0, 1]]
    assert rollout(np.array([[first], [last]])).tolist() == [[0.625, 0.375], [0.25, 0.75]]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_rows_of_a_rollout_sum_to_one(depth: int, heads: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = rollout(rng.dirichlet(np.full(tokens, 0.1), (depth, heads, tokens)).astype(np.float32))
    assert_allclose(found.sum(axis=1), 1.0, rtol=0.0, atol=1e-12)
    assert (found >= 0).all() and (np.diag(found) >= 0.5**depth - 1e-7).all()


def test_patches_lie_where_they_are_in_the_image(attention: ImageAttention) -> None:
    """Row by row from the top left, over the same pixels: also where neither grid nor patches are square."""
    maps = visualize.attention_maps(attention, block=2, patch=(2, 1))
    rolled = visualize.attention_rollout(attention)
    for row, column in product((1, 2), (1, 2, 3)):
        token = 1 + 3 * (row - 1) + (column - 1)
        for head in range(5):
            assert shown(maps.axes[1 + head], column, row) == attention.probabilities[1, head, 4, token]
        assert shown(rolled.axes[1], column, row) == rollout(attention.probabilities)[0, token]
        pixels = attention.image[8 * (row - 1) : 8 * row, 4 * (column - 1) : 4 * column].mean(axis=2)
        x, y = column - 0.5 + 0.5 / 4, row - 0.5 + 0.5 / 8  # the middle of the patch's first pixel
        assert shown(maps.axes[1], x, y, image=0) == pixels[0, 0]
    assert np.array_equal(maps.axes[0].images[0].get_array(), attention.image)
    frames = [panel.patches[0].get_bbox().bounds for panel in maps.axes[:-1]]
    assert frames == [(0.5, 1.5, 1.0, 1.0)] * 6  # column 1, row 2
    assert not any(panel.patches for panel in rolled.axes[:-1])


def test_a_rollout_of_a_patch_shows_the_others_apart(attention: ImageAttention) -> None:
    picture = visualize.attention_rollout(attention, patch=(2, 2)).axes[1].images[1]
    row = rollout(attention.probabilities)[5, 1:]
    assert picture.get_clim() == (np.delete(row, 4).min(), np.delete(row, 4).max()) and row[4] > row.mean()


@pytest.mark.parametrize("crop", [None, (16, 12)])
def test_the_image_is_what_the_model_sees(crop: tuple[int, int] | None) -> None:
    processor = ImageProcessor(resize=(16, 12) if crop is None else 20, crop=crop, mean=(0.1, 0.2, 0.3))
    found = image_attention(random_model(), processor, photo())
    normalised = (found.image / 255 - [0.1, 0.2, 0.3]) / 0.5
    assert_allclose(normalised, processor(photo())[0], rtol=0.0, atol=1e-6)
    assert found.grid == GRID and found.probabilities.shape == (2, 3, 7, 7)


def test_greyscale_models_and_those_with_heads() -> None:
    grey = random_model(num_channels=1)
    processor = ImageProcessor(resize=(16, 12), num_channels=1, mean=None, std=None)
    found = image_attention(grey, processor, photo())
    assert np.array_equal(found.image / np.float32(255), np.repeat(processor(photo())[0], 3, axis=-1))
    options = {"task": "backbone", "out_indices": (0, 1), "position_bias": "per_layer"}
    model, processor = random_model(**options), ImageProcessor(resize=(16, 12))
    output = jax.jit(lambda model, x: model.beit(x, output_attentions=True))(model, processor(photo()))
    assert_allclose(image_attention(model, processor, photo()).probabilities, output.attentions[:, 0], atol=MODEL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block: expected 1 to 4, found 0"),
        ({"block": 5}, "block: expected 1 to 4, found 5"),
        ({"patch": (3, 1)}, "patch: expected a row 1 to 2 and a column 1 to 3, found 3 1"),
        ({"patch": (1, 0)}, "patch: expected a row 1 to 2 and a column 1 to 3, found 1 0"),
    ],
)
def test_blocks_and_patches_that_are_not_there(
    attention: ImageAttention, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BeitJaxError, match=message):
        visualize.attention_maps(attention, **options)


def test_titles_do_not_overlap() -> None:
    """Of twelve heads, in narrow panels, under an image with a long name and what a terminal would obey."""
    probabilities = np.random.default_rng(0).dirichlet(np.full(9, 0.05), (1, 12, 9))
    name = "a_name_$that$_is_longer_than_its_panel\x1b[31m.png"
    found = ImageAttention(np.zeros((64, 16, 3), np.uint8), probabilities, (4, 2), name)
    figure = visualize.attention_maps(found)
    figure.draw_without_rendering()
    boxes = [panel.title.get_window_extent() for panel in figure.axes[:-1]]
    boxes += [text.get_window_extent() for text in [figure._suptitle]]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    title = figure.axes[0].get_title()
    assert title.startswith("a_name_$that") and title.endswith(".png") and "\x1b" not in words(figure)


# --- Relative position bias


@pytest.mark.parametrize("kind", ["shared", "per_layer", "both"])
def test_position_bias_is_what_transformers_adds(kind: str, tmp_path: Path) -> None:
    theirs = reference.random_model(**reference.TINY, **reference.BIAS[kind], num_labels=5)
    added = {"shared": np.zeros((4, 17, 17)), "1": np.zeros((4, 17, 17)), "2": np.zeros((4, 17, 17))}
    for name, module in theirs.named_modules():
        if name.endswith("position_bias"):
            table = module((4, 4)).detach().numpy().reshape(4, 17, 17)
            layers = re.findall(r"[.](\d+)[.]", name)  # none in the name of the shared one
            for key in [str(int(layer) + 1) for layer in layers] or ["shared", "1", "2"]:
                added[key] = added[key] + table
    model, _ = from_pretrained(reference.save(theirs, tmp_path / "model"))
    default = "2" if kind == "per_layer" else "shared"
    for block, key in ((None, default), (1, "1"), (2, "2")):
        figure = visualize.position_bias(interpret.position_bias(model, block))
        for head, panel in enumerate(figure.axes[:-1]):
            assert_picture_of(panel, added[key][head])
            numbers = [float(line.split()[-1]) for line in panel.get_title().splitlines()[1:]]
            expected = [added[key][head, i, j] for i, j in ((0, 1), (1, 0), (0, 0))]
            assert numbers == pytest.approx(expected, rel=6e-3)


def assert_picture_of(panel: Any, added: np.ndarray, grid: tuple[int, int] = (4, 4)) -> None:
    """The array, and the picture at the offset's coordinates, is the bias between every two patches."""
    places = list(product(range(grid[0]), range(grid[1])))
    array, offsets = panel.images[0].get_array(), set()
    for (i, (row, column)), (j, (other_row, other_column)) in product(enumerate(places), repeat=2):
        dy, dx = other_row - row, other_column - column  # from the attending patch to the attended one
        assert array[dy + grid[0] - 1, dx + grid[1] - 1] == np.float32(added[1 + i, 1 + j])
        offsets.add((dy, dx))
    assert array.size == len(offsets)
    for dy, dx in offsets:
        assert shown(panel, dx, dy) == array[dy + grid[0] - 1, dx + grid[1] - 1]


@pytest.mark.parametrize("kind", ["shared", "per_layer", "both"])
def test_position_bias_of_a_grid_that_is_not_square(kind: str) -> None:
    model = random_model(position_bias=kind)
    block = jax.tree.map(lambda leaf: leaf[1], model.blocks)
    parts = [block.attention.layer_bias(GRID, 1), model.shared_bias(GRID, 1)]
    found = interpret.position_bias(model, 2)
    figure = visualize.position_bias(found)
    for head, panel in enumerate(figure.axes[:-1]):
        assert_picture_of(panel, sum(np.asarray(part.written[0, head]) for part in parts if part is not None), GRID)
    assert found.table == {"shared": "shared", "per_layer": "block 2", "both": "block 2 + shared"}[kind]
    assert found.table in figure._suptitle.get_text()


def test_one_range_of_colours_around_zero_for_all_heads() -> None:
    offsets = np.zeros((2, 3, 5), np.float32)
    offsets[1, 0, 4] = -3.0
    figure = visualize.position_bias(PositionBias(offsets, *np.zeros((3, 2)), "shared"))
    assert [panel.images[0].get_clim() for panel in figure.axes[:-1]] == [(-3.0, 3.0)] * 2
    assert shown(figure.axes[1], 2, -1) == -3.0  # one row up, two columns to the right


def test_models_without_position_bias_and_blocks_that_are_not_there() -> None:
    with pytest.raises(BeitJaxError, match="no relative position bias"):
        interpret.position_bias(random_model())
    with pytest.raises(BeitJaxError, match="block: expected 1 to 2, found 3"):
        interpret.position_bias(random_model(position_bias="shared"), 3)


# --- Training curves

RECORDS = [
    (20, {"loss": 4.5, "accuracy": 0.125, "learning_rate": 1e-3, "images_per_second": 100.0, "grad_norm": 2.0}),
    (40, {"loss": float("nan"), "accuracy": 0.25, "learning_rate": 5e-4, "images_per_second": 90.5, "grad_norm": 0.0}),
    (40, {"accuracy": 0.5, "accuracy_top5": 0.75}),  # of validation, by training's names
    (60, {"images_per_second": 95.0, "skipped": 20.0}),  # no step was finite
    (80, {"loss": 3.25, "accuracy": 0.5, "learning_rate": 0.0, "images_per_second": 80.0, "grad_norm": 1.0}),
    (80, {"validation_loss": 3.5, "validation_perplexity": 7.0, "accuracy": 0.625}),
]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A directory with the metrics that a run logs."""

    def make(name: str, records: Any = RECORDS) -> Path:
        (tmp_path / name).mkdir(parents=True)
        with Log(tmp_path / name, total_steps=80, quiet=True, tensorboard=False) as log:
            for step, metrics in records:
                log.write(step, metrics)
        return tmp_path / name

    return make


def drawn(figure: Figure) -> dict[str, list[tuple[str, str, list[tuple[float, float]]]]]:
    """By title: label, style and points of every line that has points."""
    return {
        panel.get_title(): [
            (line.get_label(), line.get_linestyle(), [tuple(point) for point in line.get_xydata().tolist()])
            for line in panel.lines
            if len(line.get_xydata())
        ]
        for panel in figure.axes
    }


def test_curves_are_exactly_the_points_of_the_file(make_run: Callable[..., Path]) -> None:
    runs = {name: read_metrics(make_run(name) / "metrics.jsonl") for name in ("first", "second")}
    runs["second"] = runs["second"][:1]
    found = drawn(visualize.training_curves(runs))
    assert list(found) == ["loss", "learning_rate", "accuracy", "images_per_second", "perplexity"]
    (first, one, loss), (_, dashed, validation), (second, _, single) = found["loss"]
    assert (first, second, one, dashed) == ("first", "second", "-", "--")
    assert loss[0] == (20, 4.5) and loss[2] == (80, 3.25) and len(loss) == 3
    assert loss[1][0] == 40 and np.isnan(loss[1][1])  # a gap
    assert validation == [(80, 3.5)] and single == [(20, 4.5)]
    assert found["accuracy"][:2] == [
        ("first", "-", [(20, 0.125), (40, 0.25), (80, 0.5)]),
        ("first", "--", [(40, 0.5), (80, 0.625)]),
    ]
    assert found["learning_rate"][0][2] == [(20, 1e-3), (40, 5e-4), (80, 0.0)]
    assert found["images_per_second"][0][2] == [(20, 100.0), (40, 90.5), (60, 95.0), (80, 80.0)]
    assert found["perplexity"] == [("first", "--", [(80, 7.0)])]


def test_axes_of_curves(make_run: Callable[..., Path]) -> None:
    records = read_metrics(make_run("run") / "metrics.jsonl")
    figure = visualize.training_curves({"run": records}, metrics=["validation_loss", "accuracy_top5"], log=["loss"])
    assert [panel.get_title() for panel in figure.axes] == ["loss", "accuracy_top5"]
    assert [panel.get_yscale() for panel in figure.axes] == ["log", "linear"]
    for panel in figure.axes:
        low, high = panel.get_xlim()
        assert panel.get_xlabel() == "step" and low == 0 and high >= 80
    assert {panel.get_yscale() for panel in visualize.training_curves({"run": records}).axes} == {"linear"}


def test_names_of_runs_are_shown_as_they_are(make_run: Callable[..., Path]) -> None:
    """Neither hidden, as matplotlib hides names with an underscore, nor set as mathematics, nor obeyed."""
    records = read_metrics(make_run("run") / "metrics.jsonl")
    figure = visualize.training_curves({"_hidden": records, r"$\frac$": records, "\x1b[31mred": records[:1]})
    figure.draw_without_rendering()
    texts = figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == ["_hidden", r"$\frac$", r"\x1b[31mred", "validation"]
    colours = [handle.get_color() for handle in figure.legends[0].get_lines()[:3]]
    assert len(set(colours)) == 3
    assert [line.get_color() for line in figure.axes[0].lines if line.get_linestyle() == "-"] == colours


def test_many_runs_have_colours_of_their_own(make_run: Callable[..., Path]) -> None:
    records = read_metrics(make_run("run") / "metrics.jsonl")[:1]
    figure = visualize.training_curves({f"run {i}": records for i in range(25)}, metrics=["loss"])
    assert len({line.get_color() for line in figure.axes[0].lines}) == 25
    assert "validation" not in words(figure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["los"]}, "metrics: expected some of accuracy, accuracy_top5, grad_norm, .*, found los"),
        ({"log": ["grad_norm"]}, "log: expected some of loss, learning_rate, .*, found grad_norm"),
        ({"log": ["learning_rate"]}, "log: learning_rate is 0 at step 80, which has no logarithm"),
    ],
)
def test_curves_that_cannot_be_drawn(
    make_run: Callable[..., Path], options: dict[str, list[str]], message: str
) -> None:
    records = read_metrics(make_run("run") / "metrics.jsonl")
    with pytest.raises(BeitJaxError, match=message):
        visualize.training_curves({"run": records}, **options)


def test_runs_without_anything_usual(make_run: Callable[..., Path]) -> None:
    with pytest.raises(BeitJaxError, match="run: no metrics yet"):
        visualize.training_curves({"run": read_metrics(make_run("empty", []) / "metrics.jsonl")})
    with pytest.raises(BeitJaxError, match="no runs given"):
        visualize.training_curves({})
    records = read_metrics(make_run("odd", [(1, {"oddity": 1.0})]) / "metrics.jsonl")
    with pytest.raises(BeitJaxError, match="choose some of oddity"):
        visualize.training_curves({"odd": records})
    assert drawn(visualize.training_curves({"odd": records}, metrics=["oddity"])) == {
        "oddity": [("odd", "--", [(1, 1)])]
    }


def test_a_line_that_is_being_written_is_passed_over(make_run: Callable[..., Path]) -> None:
    path = make_run("run") / "metrics.jsonl"
    whole = read_metrics(path)
    with path.open("a") as file:
        file.write('{"step": 100, "lo')
    assert str(read_metrics(path)) == str(whole) and len(whole) == 6


DAMAGE = [
    ("nonsense\n", r'line 7: expected a JSON object with a "step"'),
    ("[" * 100_000 + "\n", r'line 7: expected a JSON object with a "step"'),
    ('{"loss": 1.0}\n', r'line 7: expected a JSON object with a "step"'),
    ('{"step": true}\n', "line 7: step: expected a number or null, found true"),
    ('{"step": 1, "loss": "low"}\n', 'line 7: loss: expected a number or null, found "low"'),
    ('{"step": 1, "loss": [1]}\n', r"line 7: loss: expected a number or null, found \[1\]"),
    ('{"step": 1, "loss": NaN}\n', "line 7: loss: expected a number or null, found NaN"),
    ('{"step": 1, "\\u001b[31m": {}}\n', r"line 7: \\x1b\[31m: expected a number"),
    ('{"step": 1, "loss": 1' + "0" * 400 + "}\n", "line 7: loss: expected a number or null, found 1000"),
    ("\x00\xff\n", r'line 7: expected a JSON object with a "step"'),
]


@pytest.mark.parametrize(("line", "message"), DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_metrics_are_one_line(make_run: Callable[..., Path], line: str, message: str) -> None:
    path = make_run("run") / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(line.encode("latin-1"))
    with pytest.raises(BeitJaxError, match=message) as error:
        read_metrics(path)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value) and len(str(error.value)) < 400


# --- Parity

STAGES = [
    Stage("embeddings", 0.0, 0.0, 0.5),
    Stage("block 1", 2e-6, 1e-7, 3.0),
    Stage("block 2", 5e-3, 1e-4, 250.0),
    Stage("$logits_\x1b[31m", float("nan"), float("nan"), 2.0),
]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "parity.json"
    path.write_text(json.dumps([stage.as_dict() for stage in STAGES]))
    return path


def test_parity_errors_are_those_of_the_report(report: Path) -> None:
    figure = visualize.parity_errors(read_report(report))
    figure.draw_without_rendering()
    (panel,) = figure.axes
    lines = {line.get_label(): line.get_xydata() for line in panel.lines}
    for label, attribute in (("largest error", "max_error"), ("mean error", "mean_error"), ("tolerance", "tolerance")):
        expected = [(place, getattr(stage, attribute)) for place, stage in enumerate(STAGES)]
        assert np.array_equal(lines[label], expected, equal_nan=True)
    assert np.array_equal(lines["different"], [(2, 5e-3), (3, np.nan)], equal_nan=True)
    assert panel.get_yscale() == "log" and panel.get_title() == "Parity: first difference at block 2"
    names = [label.get_text() for label in panel.get_xticklabels()]
    assert names == ["embeddings", "block 1", "block 2", r"$logits_\x1b[31m"]
    assert {(text.get_text(), text.get_position()[0]) for text in panel.texts} == {
        ("equal to the bit", 0), ("not finite", 3),
    }  # fmt: skip


def test_parity_without_differences() -> None:
    figure = visualize.parity_errors([stage.as_dict() for stage in STAGES[:2]])
    assert figure.axes[0].get_title() == "Parity: all stages agree with PyTorch"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["largest error", "mean error", "tolerance"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "expected a JSON array, found a dict"),
        ("[]", "expected a list of stages"),
        ("[1]", "stage 1: name: expected a string, found null"),
        ('[{"name": "a", "max_error": "1"}]', 'stage 1: max_error: expected a number, found "1"'),
        ('[{"name": "a", "max_error": true}]', "stage 1: max_error: expected a number, found true"),
    ],
)
def test_damaged_reports_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(BeitJaxError, match=rf"report.json: {message}.*; give what beit-jax parity --json printed"):
        read_report(tmp_path / "report.json")


def test_whole_numbers_in_a_report_are_numbers(tmp_path: Path) -> None:
    stage = STAGES[1].as_dict() | {"max_error": 0, "mean_error": 0, "scale": 10**400}
    (tmp_path / "report.json").write_text(json.dumps([stage]))
    assert read_report(tmp_path / "report.json")[0]["max_error"] == 0.0


# --- The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint, and in its directory an image."""
    directory = tmp_path_factory.mktemp("checkpoint")
    config = random_model(position_bias="both").config
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in param_shapes(config).items()}
    save(directory, NativeCheckpoint(config, ImageProcessor(resize=(16, 12)), params))
    photo().save(directory / "photo.png")
    return directory


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["plot", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["plot", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


def test_pictures_of_a_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = checkpoint / "photo.png"
    model, processor = from_pretrained(checkpoint)
    expected = image_attention(model, processor, image)
    arguments = ["attention", checkpoint, image, "--block", 1, "--patch", 2, 3, "-o", tmp_path / "a.png", "--json"]
    found = json.loads(command(capsys, *arguments))
    assert found["output"] == str(tmp_path / "a.png") and (found["block"], found["patch"]) == (1, [2, 3])
    assert found["to_class_token"] == pytest.approx(expected.probabilities[0, :, 6, 0].tolist())
    found = json.loads(command(capsys, "rollout", checkpoint, image, "-o", tmp_path / "r.png", "--json"))
    shares = rollout(expected.probabilities)[:, 1:].reshape(-1, 2, 3)
    assert_allclose(found["shares"], shares[1:].mean(axis=0), atol=1e-9)
    assert found["of"] == "the mean of all patches, which the model pools"
    of_class = ["rollout", checkpoint, image, "--class-token", "-o", tmp_path / "r.png", "--json"]
    assert_allclose(json.loads(command(capsys, *of_class))["shares"], shares[0], atol=1e-9)
    found = json.loads(command(capsys, "position-bias", checkpoint, "--block", 2, "-o", tmp_path / "b.png", "--json"))
    assert found["table"] == "block 2 + shared" and found["offsets"] == [3, 5]
    assert found["cls_to_cls"] == interpret.position_bias(model, 2).cls_to_cls.tolist()
    for name in "arb":
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert (
                picture.format == "PNG"
                and min(picture.size) > 300
                and len(picture.convert("RGB").getcolors(1 << 24)) > 50
            )


def test_pictures_of_runs_and_parity(
    make_run: Callable[..., Path], report: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [make_run("a/run"), make_run("b/run", RECORDS[:1]), make_run("b/other")]
    monkeypatch.chdir(runs[2])
    found = json.loads(command(capsys, "curves", runs[0], runs[1], ".", "--json"))
    assert [entry["label"] for entry in found["runs"]] == [str(runs[0]), str(runs[1]), "other"]
    assert [(entry["records"], entry["last_step"]) for entry in found["runs"]] == [(6, 80), (1, 20), (6, 80)]
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(command(capsys, "parity", report, "--json"))
    assert found == {"output": "parity.png", "stages": 4, "different": ["block 2", "$logits_\x1b[31m"]}


@pytest.mark.parametrize(("name", "start"), [("p.png", b"\x89PNG"), ("p.SVG", b"<?xml"), ("p.pdf", b"%PDF")])
def test_the_ending_says_the_format(
    name: str, start: bytes, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(capsys, "parity", report, "-o", tmp_path / name) == f"written      {tmp_path / name}\n"
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parity", "parity.json", "-o", "p.jpg"], "p.jpg: expected a name ending in .png, .svg or .pdf"),
        (["curves", "run", "-o", "p"], "p: expected a name ending in .png, .svg or .pdf"),
        (["curves", "run", "-o", "nowhere/p.png"], "the directory nowhere does not exist; create it first"),
        (
            ["curves", "nowhere"],
            "nowhere/metrics.jsonl: cannot be read (No such file or directory); give the directory",
        ),
        (["curves", "\x1b[31m"], r"\x1b[31m/metrics.jsonl: cannot be read"),
        (["curves", "run", "./run"], "run: given twice; name every run once"),
        (["curves"], "no runs given; name at least one directory"),
        (["parity", "nowhere.json"], "nowhere.json: no such file"),
        (["parity", "run/metrics.jsonl"], "metrics.jsonl: not JSON"),
        (["attention", "CHECKPOINT", "nowhere.png"], "nowhere.png: no such file"),
        (["attention", "nowhere", "IMAGE"], "nowhere: no such file or directory"),
        (["attention", "CHECKPOINT", "IMAGE", "--block", "3"], "block: expected 1 to 2, found 3"),
        (["rollout", "CHECKPOINT", "IMAGE", "--patch", "1", "4"], "found 1 4"),
        (["position-bias", "CHECKPOINT", "--block", "0"], "block: expected 1 to 2, found 0"),
    ],
)
def test_mistakes_are_one_line_and_leave_everything(
    arguments: list[str], message: str, checkpoint: Path, make_run: Callable[..., Path], report: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    make_run("run")
    monkeypatch.chdir(tmp_path)
    for name in ("attention", "rollout", "position-bias", "curves", "parity"):
        Image.new("L", (1, 1)).save(f"{name}.png", pnginfo=png_info())  # an earlier picture of ours
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    stand_in = {"CHECKPOINT": str(checkpoint), "IMAGE": str(checkpoint / "photo.png")}
    assert message in error(capsys, *(stand_in.get(word, word) for word in arguments))
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_model_without_position_bias(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = random_model().config
    params = {name: np.zeros(shape, np.float32) for name, shape in param_shapes(config).items()}
    save(tmp_path, NativeCheckpoint(config, ImageProcessor(resize=(16, 12)), params))
    assert "this model has no relative position bias" in error(capsys, "position-bias", tmp_path)


def test_every_picture_says_that_matplotlib_is_missing(
    attention: ImageAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    bias = PositionBias(np.zeros((1, 3, 3), np.float32), *np.zeros((3, 1)), "shared")
    for draw in (
        lambda: visualize.attention_maps(attention),
        lambda: visualize.attention_rollout(attention),
        lambda: visualize.position_bias(bias),
        lambda: visualize.training_curves({"run": [{"step": 1, "loss": 2.0}]}),
        lambda: visualize.parity_errors([STAGES[0].as_dict()]),
    ):
        with pytest.raises(BeitJaxError, match="matplotlib is not installed; pip install 'beit-jax"):
            draw()


def test_without_matplotlib(report: Path, tmp_path: Path) -> None:
    hidden = (
        "import sys; sys.modules['matplotlib'] = None; from beit_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", hidden, "plot", "parity", str(report), "-o", str(tmp_path / "p.png")]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "error: matplotlib is not installed; pip install 'beit-jax[plot]'\n"
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize("kind", ["attention", "rollout", "position-bias", "curves", "parity"])
def test_help_teaches_with_an_example(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["plot", kind, "--help"])
    assert f"beit-jax plot {kind} " in capsys.readouterr().out.split("Try:")[1]
