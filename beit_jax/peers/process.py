"""One implementation doing one thing again and again, in a process of its own, which `beit_jax.peers.race` starts.

    python -m beit_jax.peers.process '{"contender": "ours", "kind": "forward", ...}'

It answers with a line of JSON once it is ready, and then, for every number that it reads, with the seconds of so many
calls. Between them it sleeps: contenders take turns on an idle machine. What the first calls gave goes to a file, by
which the other side sees that all compute the same.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from beit_jax.peers.forward import FORWARD
from beit_jax.peers.job import Call, Job


def serve(job: Job, contenders: Mapping[str, Callable[[Job], Call]]) -> None:
    """Does the job, with the contender of this table, until standard input ends."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if hasattr(os, "sched_setaffinity"):  # some libraries start as many threads as there are cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-job.threads :])
    clock = time.process_time if job.cpu_time else time.perf_counter
    call = contenders[job.contender](job)
    start = time.perf_counter()
    outputs = [call()]
    seconds = time.perf_counter() - start
    outputs += [call() for _ in range(job.outputs - 1)]
    np.save(job.output, np.stack([_host(output) for output in outputs]))
    call()
    print(json.dumps({"first_call_seconds": seconds, "peak_bytes": peak_bytes(job.accelerator)}), flush=True)
    for line in sys.stdin:
        taken = []
        for _ in range(int(line)):
            start = clock()
            call()
            taken.append(clock() - start)
        print(json.dumps(taken), flush=True)


def peak_bytes(accelerator: bool) -> int:
    """The most memory of the GPU, or else of the process, so far."""
    if not accelerator:
        return _peak_of_process()
    if "torch" in sys.modules:
        import torch

        return int(torch.cuda.max_memory_allocated())
    import jax

    return int((jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"])


def _peak_of_process() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # no Linux: there a process starts with the peak of the one that started it
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _host(output: Any) -> np.ndarray:
    """float32, whatever device and dtype it has."""
    return np.asarray(output.detach().float().cpu() if hasattr(output, "detach") else output, np.float32)


if __name__ == "__main__":
    serve(Job(**json.loads(sys.argv[1])), FORWARD)
