"""Settings of every test: float32 products in full precision, and compiled programs kept between runs."""

import os

import hypothesis
import jax
import pytest

# Workers beside each other have a core each. torch's threads, as many as there are cores, would wait for each other
# busily: a test of many small operations takes six times as long. Read when torch is imported, which is later.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

jax.config.update("jax_default_matmul_precision", "highest")

# Examples that compile take as long as they take; a fixed seed makes a failure everyone's failure.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("project")


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("cacheprovider"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


ON_REQUEST = {"hub": "needs a network, downloads gigabytes", "slow": "takes minutes", "tpu": "needs libtpu"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What cannot run everywhere, or takes long, runs by its marker's name only."""
    for marker, reason in ON_REQUEST.items():
        skip = pytest.mark.skip(reason=f"{reason}; run: pytest -m {marker}")
        for item in items if marker not in config.getoption("markexpr") else ():
            if item.get_closest_marker(marker):
                item.add_marker(skip)
