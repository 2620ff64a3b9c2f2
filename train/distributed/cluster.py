"""Joins the processes of a run: on TPU VMs, on GKE, under SLURM, or by hand."""

import importlib.util
import os
import re
import socket
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import jax

from beit_jax.errors import BeitJaxError, printable
from beit_jax.terminal import say

from ..recipe import HostOptions
from .peers import LOST, Peers

# The variables that `srun` sets for every task, and JAX reads.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_CHIPS = ("accel[0-9]*", "vfio/[0-9]*")  # below /dev


@contextmanager
def joined(options: HostOptions) -> Iterator[Peers]:
    """Joins this process to its run, and yields it among the others. Enter this before any other use of JAX.

    A single process raises its errors. With several, an error is printed and reported to the others, and this process
    ends here: an orderly end of Python would wait for processes that wait for this one.

    Raises:
        BeitJaxError: options contradict each other, or JAX does not understand the environment.
    """
    _check(options)
    _start(options)
    try:
        with Peers.of_run(options.silence) as peers:
            if peers.count > 1:
                say(f"process {peers.index} of {peers.count} on {peers.host}")
            yield peers
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        os._exit(_reported(error))


def launcher(environment: Mapping[str, str], devices: Path = Path("/dev")) -> str | None:
    """The launcher of several processes: "slurm", or "tpu" where there are chips and their library; or None."""
    if all(name in environment for name in _SLURM) and int(environment["SLURM_NTASKS"]) > 1:
        return "slurm"
    chips = any(next(devices.glob(pattern), None) is not None for pattern in _CHIPS)
    wanted = environment.get("JAX_PLATFORMS", "") in ("", "tpu", "tpu,cpu")
    if chips and wanted and importlib.util.find_spec("libtpu") is not None:
        return "tpu"
    return None


def _check(options: HostOptions) -> None:
    by_hand = {"coordinator": options.coordinator, "processes": options.processes, "process": options.process}
    missing = [name for name, value in by_hand.items() if value is None]
    if missing and len(missing) < len(by_hand):
        raise BeitJaxError(f"--hosts.{missing[0]}: missing; give coordinator, processes and process together")
    if not missing and options.alone:
        raise BeitJaxError("--hosts.alone: contradicts --hosts.coordinator; leave one of them out")
    if options.coordinator is not None:
        port = re.fullmatch(r".+:(\d{1,5})", options.coordinator)
        if port is None or not 0 < int(port[1]) < 65536:
            raise BeitJaxError(f"--hosts.coordinator: expected HOST:PORT, found {printable(options.coordinator)}")
    if options.processes is not None and options.process is not None:
        if options.processes < 1:
            raise BeitJaxError(f"--hosts.processes: expected 1 or more, found {options.processes}")
        if not 0 <= options.process < options.processes:
            raise BeitJaxError(f"--hosts.process: expected 0 to {options.processes - 1}, found {options.process}")
    for name in ("wait", "silence"):
        if not 1.0 <= getattr(options, name) <= 86400.0:
            raise BeitJaxError(f"--hosts.{name}: expected 1 to 86400 seconds, found {getattr(options, name):g}")


def _start(options: HostOptions) -> None:
    found = None if options.alone or options.coordinator is not None else launcher(os.environ)
    if options.coordinator is None and found is None:
        return
    # This program handles signals itself: its processes agree on the last step.
    jax.config.update("jax_enable_preemption_service", False)
    with _deadline(options, options.coordinator or f"the address that {found} gives"):
        try:
            jax.distributed.initialize(
                options.coordinator,
                options.processes,
                options.process,
                cluster_detection_method=None if found else "deactivate",
                # This program explains the failures that it notices. JAX's longer limits are for the rest.
                initialization_timeout=int(options.wait) + 60,
                heartbeat_timeout_seconds=int(3 * options.silence) + 40,
            )
        except (ValueError, RuntimeError) as error:
            reason = printable(str(error).partition("\n")[0], 300)
            raise BeitJaxError(
                f"--hosts: this process could not join a run ({found or options.coordinator}: {reason}); "
                "give --hosts.coordinator, processes and process, or --hosts.alone"
            ) from None


@contextmanager
def _deadline(options: HostOptions, address: str) -> Iterator[None]:
    """Ends the process with a line when others do not arrive: JAX would abort with a trace of its own code."""
    which = "" if options.process is None else f" as process {options.process} of {options.processes}"

    def give_up() -> None:
        say(
            f"error: {socket.gethostname()}{which}: the processes of this run did not meet at {address} within "
            f"{options.wait:g} s; start the same command on every host, and let the port through"
        )
        os._exit(LOST)

    timer = threading.Timer(options.wait, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reported(error: BaseException) -> int:
    """Prints an error, and returns its exit code."""
    if isinstance(error, BeitJaxError):
        say(f"error: {error}")
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return 130
    say("".join(traceback.format_exception(error)).rstrip())
    return 1
