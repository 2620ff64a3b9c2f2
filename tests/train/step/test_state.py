"""The state as training checkpoints name its parts: runs of earlier versions are read by the same names."""

import jax
import numpy as np
import optax
import pytest

from beit_jax.train.step.division import Division
from beit_jax.train.step.state import State, from_saved, initial_state, to_saved, whole

FIXED = {"layer": {"bias": np.full(3, 2.0, np.float32)}}
PARAMS, FROZEN = {"layer": {"kernel": np.ones((2, 3), np.float32)}}, {"teacher": {"scale": np.zeros(4, np.float32)}}


def state(*, average: bool, frozen: bool, fixed: bool = False) -> State:
    return initial_state(
        PARAMS,
        optax.scale_by_adam(),
        average=average,
        frozen=FROZEN if frozen else None,
        fixed=FIXED if fixed else None,
    )


def names(tree: object) -> set[str]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths}


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_saved_and_back(average: bool, frozen: bool, fixed: bool) -> None:
    first = state(average=average, frozen=frozen, fixed=fixed)
    saved = to_saved(first)
    again = from_saved(saved, jax.eval_shape(lambda: first))
    assert jax.tree.structure(again) == jax.tree.structure(first)
    jax.tree.map(np.testing.assert_array_equal, again, first)
    assert len(names(saved)) == len(names(first)), "nothing is saved twice"


def test_one_network_lies_where_earlier_versions_kept_it() -> None:
    expected = {
        "step",
        "bad",
        "skipped",
        "params/layer/kernel",
        "opt/count",
        "opt/mu/layer/kernel",
        "opt/nu/layer/kernel",
    }
    assert names(to_saved(state(average=False, frozen=False))) == expected
    assert names(to_saved(state(average=True, frozen=False))) == expected | {"ema/layer/kernel"}
    assert names(to_saved(state(average=False, frozen=True))) == expected | {"ema/teacher/scale"}
    assert names(to_saved(state(average=False, frozen=False, fixed=True))) == expected | {"fixed/layer/bias"}
    both = names(to_saved(state(average=True, frozen=True)))
    assert both == expected | {"ema/layer/kernel", "frozen/teacher/scale"}


def test_a_whole_state_has_all_parameters_and_their_average() -> None:
    found = whole(state(average=True, frozen=True, fixed=True), Division().join)
    assert names(found.params) == names(found.average) == {"layer/kernel", "layer/bias"}
    assert found.fixed == {} and found.frozen is FROZEN
