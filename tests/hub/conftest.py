"""Tests of published checkpoints run on request only: they download gigabytes."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "hub" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("hub"):
            item.add_marker(pytest.mark.skip(reason="needs a network; run: pytest -m hub"))
