"""The kernels as other processors have them: the tests of this one's again, with narrower registers."""

import subprocess
import sys
from pathlib import Path

import pytest

from beit_jax.kernels.cpu import library

TESTS = Path(__file__).with_name("test_cpu.py")
RUN = """
import sys
import pytest

class Target:
    def pytest_collection(self):
        from beit_jax.kernels.cpu import library
        library.FLAGS += ("-march=" + sys.argv[1],)

raise SystemExit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", sys.argv[2]], plugins=[Target()]))
"""


@pytest.mark.skipif(
    library.compiler() is None or "avx512f" not in library.processor().flags,
    reason="no compiler, or no wider registers",
)
@pytest.mark.parametrize(
    "target", ["x86-64-v3", pytest.param("x86-64", marks=pytest.mark.thorough)], ids=["AVX2", "SSE2"]
)
def test_kernels_with_narrower_registers(target: str) -> None:
    run = subprocess.run([sys.executable, "-c", RUN, target, str(TESTS)], capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-4000:] + run.stderr[-1000:]
