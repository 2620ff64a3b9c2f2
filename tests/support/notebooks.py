"""Notebooks of colab/: a `.py` file (jupytext's percent format) to read and change, an `.ipynb` with its outputs.

After a change of a `.py` file, run it and keep what it shows:

    python tests/support/notebooks.py            # all, or: python tests/support/notebooks.py 2_own_images

A notebook runs in an empty directory, in a kernel of this Python that can connect to nothing but this machine, with
IPython's own defaults: what the user's configuration says does not count.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

COLAB = Path(__file__).parents[2] / "colab"
TIMEOUT = 600  # seconds of a cell

# Bars of downloads and loading, and the remark that they could be prettier, are nothing to keep.
_QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}

_OFFLINE = """
import ipaddress
import socket


def _local(host):
    try:
        return host in ("", "localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _guard(name, host_of):
    given = getattr(socket.socket, name)

    def guarded(self, address, *rest):
        if self.family != socket.AF_UNIX and not _local(host_of(address)):
            raise OSError(f"a notebook's default needs no network, but connects to {address}")
        return given(self, address, *rest)

    setattr(socket.socket, name, guarded)


_guard("connect", lambda address: address[0])
_guard("connect_ex", lambda address: address[0])
"""


def names() -> list[str]:
    """All notebooks, in order, without suffix."""
    return sorted(path.stem for path in COLAB.glob("*.py"))


def source(name: str) -> NotebookNode:
    """The notebook as its `.py` file has it: no outputs, and ids that do not change from one reading to the next."""
    return of_cells(jupytext.read(COLAB / f"{name}.py").cells)


def of_cells(cells: list[NotebookNode]) -> NotebookNode:
    """A notebook for any Python 3."""
    for number, cell in enumerate(cells, start=1):
        cell["id"] = f"cell-{number:02}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


code_cell = nbformat.v4.new_code_cell


def kept(name: str) -> NotebookNode:
    """The notebook as its `.ipynb` file has it, with outputs."""
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


class _ThisPython(KernelSpecManager):
    """Knows one kernel, this interpreter's, whatever is installed for the user."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def execute(notebook: NotebookNode, directory: Path, **environment: str) -> NotebookNode:
    """Runs all cells in `directory` and fills in their outputs.

    Args:
        environment: variables of the kernel, beside this process's own.

    Raises:
        CellExecutionError: a cell failed.
    """
    with TemporaryDirectory() as settings:
        startup = Path(settings) / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "offline.py").write_text(_OFFLINE, encoding="utf-8")
        manager = AsyncKernelManager(
            kernel_spec_manager=_ThisPython(), connection_file=str(Path(settings) / "kernel.json"), transport="ipc"
        )
        client = NotebookClient(notebook, km=manager, timeout=TIMEOUT, record_timing=False)
        client.resources = {"metadata": {"path": str(directory)}}
        client.execute(cleanup_kc=True, env=os.environ | _QUIET | {"IPYTHONDIR": settings} | environment)
    for output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            output.data.pop("image/jpeg", None)  # Pillow's images show themselves twice
    return notebook


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    """Of all cells, in order."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text(notebook: NotebookNode) -> str:
    """All that was printed, and all values shown as text."""
    return "\n".join(_text(output) for output in outputs(notebook))


def _text(output: NotebookNode) -> str:
    if output.output_type == "stream":
        return str(output.text)
    return str(output.get("data", {}).get("text/plain", ""))


def pictures(notebook: NotebookNode) -> list[str]:
    """PNG files, as base64."""
    found: list[Any] = [output.get("data", {}).get("image/png") for output in outputs(notebook)]
    return [picture for picture in found if picture]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; by default all")
    for name in parser.parse_args().names or names():
        began = time.monotonic()
        with TemporaryDirectory() as directory:
            done = execute(source(name), Path(directory))
        nbformat.write(done, COLAB / f"{name}.ipynb")
        print(f"{name}: {len(pictures(done))} pictures, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
