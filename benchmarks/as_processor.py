"""Runs a command as on another x86-64 processor, so far as programs ask which one it is.

    python benchmarks/as_processor.py avx2 python benchmarks/speed.py --only forward
    python benchmarks/as_processor.py amd-avx2 beit-jax bench

Libraries and compilers that choose their code by the processor then take the code for the other one, and find its
caches: "avx2" is this one without AVX-512 and AMX, "amd-avx2" an EPYC of Zen 3, "amd-avx512" one of Zen 5, on a
processor that has AVX-512. The instructions still run at the speed of this machine: it says which code is faster here,
and not how fast the other processor is.

Needs Linux, a C++ compiler, and a processor that lets `cpuid` fault (`cpuid_fault` in /proc/cpuinfo). What was compiled
for a processor is kept apart, in $XDG_CACHE_HOME/beit-jax/as/NAME. glibc has asked before the command begins: it copies
memory as always, and says the size of this machine's caches.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from beit_jax.errors import BeitJaxError
from beit_jax.kernels.cpu import library

NAMES = ("avx2", "amd-avx2", "amd-avx512")
SOURCE = Path(__file__).with_suffix(".cpp")


def environment(name: str) -> dict[str, str]:
    """The variables under which a program finds that processor.

    Raises:
        BeitJaxError: this machine cannot do it, or its compiler fails.
    """
    needed = {"cpuid_fault", *(["avx512f"] if name.endswith("avx512") else [])}
    lacking = sorted(needed - library.processor().flags)
    compiler = library.compiler()
    if lacking or compiler is None:
        raise BeitJaxError(f"{name}: this machine has no {lacking[0] if lacking else 'C++ compiler'}; take another one")
    cache = (library.directory().parent / "as" / name).absolute()
    if set(str(cache)) & set(" :"):
        raise BeitJaxError(
            f"{cache}: the dynamic linker cannot preload from there; set XDG_CACHE_HOME to a folder whose name has no "
            "spaces and colons"
        )
    made = cache / "as_processor.so"
    try:
        library.build(compiler, ("-std=c++17", "-O2", "-shared", "-fPIC", str(SOURCE), "-ldl"), made)
    except OSError as error:
        raise BeitJaxError(f"{cache}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written") from None
    except subprocess.SubprocessError as error:
        found = library.complaint(error)
        raise BeitJaxError(f"{compiler} cannot compile {SOURCE.name}: {found}; name another compiler in CXX") from None
    return {
        "AS_PROCESSOR": name,
        "LD_PRELOAD": " ".join(filter(None, (str(made), os.environ.get("LD_PRELOAD")))),
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or arguments[0] not in NAMES:
        print(f"usage: as_processor.py {{{','.join(NAMES)}}} COMMAND ...", file=sys.stderr)
        raise SystemExit(2)
    name, *command = arguments
    program = shutil.which(command[0])
    try:
        if program is None:
            raise BeitJaxError(f"{command[0]}: no such program")
        os.execve(program, command, os.environ | environment(name))
    except BeitJaxError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        print(f"{program}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main(sys.argv[1:])
