"""Settings of every test: workers, products in full precision, quick compilation, programs kept between runs."""

import gc
import os
import subprocess
import sys

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


GIBIBYTES_OF_A_WORKER = 4


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns a worker for each core, as long as each has memory; 0, so no worker beside this process, for one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    workers = min(cores, memory // GIBIBYTES_OF_A_WORKER)
    return workers if workers > 1 else 0


# Tests compile thousands of small programs and run each a few times. XLA's new emitters and LLVM's optimizations take
# eight times as long to compile such a program, which computes the same sums either way. .ci/run compiles parity's
# thorough tests and forward passes as users do.
QUICK_FLAG = "--xla_cpu_use_fusion_emitters=false"


def compile_quickly(config: pytest.Config) -> None:
    """Sets XLA's flags for this process and all that it starts, unless the environment has set flags."""
    if "XLA_FLAGS" in os.environ or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if config.cache.get("xla/flag", None) != [jax.__version__, QUICK_FLAG]:
        # XLA ends a process over a flag that it does not know, and another release may not know this one.
        probe = [sys.executable, "-c", "import jax; jax.devices()"]
        environment = os.environ | {"XLA_FLAGS": QUICK_FLAG, "JAX_PLATFORMS": "cpu"}
        if subprocess.run(probe, env=environment, capture_output=True).returncode:
            return
        config.cache.set("xla/flag", [jax.__version__, QUICK_FLAG])
    os.environ["XLA_FLAGS"] = QUICK_FLAG
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("cacheprovider"):
        compile_quickly(config)
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spares Python's garbage collector the modules and tests, which stay until the end, and most of its small rounds.

    Tracing makes so many objects that the collector took a seventh of the time of tests that compile.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


ON_REQUEST = {
    "hub": "needs a network, downloads gigabytes",
    "slow": "takes minutes",
    "thorough": "takes longer",
    "exact": "compares the bits of two programs (with XLA_FLAGS= before it)",
    "tpu": "needs libtpu",
    "gpu": "needs XLA's compiler for GPUs",
}
# A worker takes whole files, in this order: no worker is left with a long file when the others have ended. Longer tests
# count too, which `-m thorough` runs.
LONGEST_FIRST = (
    "test_documents",
    "test_loop",
    "test_unsupervised",
    "test_hosts",
    "test_newcomer",
    "test_notebooks",
    "test_pretraining",
    "test_segmentation_training",
    "test_vqkd",
    "test_adapters_cli",
    "test_best",
    "test_sharded_pretraining",
    "test_sharding",
    "test_step",
    "test_finetuning",
    "test_step_time",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first, and skips what cannot run everywhere or takes long unless its marker is named."""
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    asked = config.getoption("markexpr")
    for item in items:
        markers = [marker for marker in ON_REQUEST if item.get_closest_marker(marker)]
        if "slow" in markers and "thorough" in markers:
            markers.remove("thorough")  # slow cases of a thorough test run with the other slow ones
        for marker in markers:
            if marker not in asked:
                item.add_marker(pytest.mark.skip(reason=f"{ON_REQUEST[marker]}; run: pytest -m {marker}"))
