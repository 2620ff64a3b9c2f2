"""Rules over names of parameters."""

import pytest

from beit_jax.errors import BeitJaxError
from beit_jax.tree import first_match

RULES = [(r".*/bias", "bias"), (r"(.*/)?head/.*", "head"), (r"a/.*", "a")]


def test_the_first_rule_that_matches_wins() -> None:
    assert first_match(RULES, "head/bias") == "bias"
    assert first_match(RULES, "head/kernel") == "head"
    assert first_match(RULES, "a/head/kernel") == "head"
    assert first_match(RULES, "a/kernel") == "a"


@pytest.mark.parametrize("name", ["head", "b/a/kernel", "a/bias_table\n", "bias"])
def test_a_pattern_matches_whole_names_and_a_name_without_rule_is_an_error(name: str) -> None:
    with pytest.raises(BeitJaxError, match="none of 3 rules covers") as caught:
        first_match(RULES, name)
    assert "\n" not in str(caught.value)
