"""Training checkpoints: a checkpoint is exactly what was saved, or it does not exist.

Orbax writes the arrays. Its v1 functions save to one directory, load from it, and keep no state. This module alone
decides what to keep, when a step counts as saved, and what happens after a failure. Orbax' v0 `CheckpointManager` would
decide differently: it deletes by count, reports the failure of one save in place of the next one, and cannot work
beside an empty directory whose name is a number.

A step is written to ``N.tmp-1``, read back, compared with the digests of the arrays on the device (`digests`), flushed
to the disk, and only then renamed to ``N``. Then older steps are deleted. So everything that has the name of a step was
complete once, and the digests of its files show any later change before a file is parsed. ``N`` is an ordinary Orbax
checkpoint of nested dicts, with a ``manifest.json``.

Arrays are read whole into host memory and then placed as the run needs them: the number of devices and the mesh may
change between runs. In a run of several processes, each process takes the digests of the boxes of arrays that it holds.
The first process compares them, commits the step, and decides which step is restored. All processes call every method
together.
"""

import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as orbax
from orbax.checkpoint import v1 as ocp

from beit_jax.errors import BeitJaxError, printable
from beit_jax.lock import exclusive
from beit_jax.tree import flatten, unflatten

from ..distributed.collectives import from_first, gather, is_first
from . import digests
from .digests import ArrayRecord, Damaged, Manifest
from .snapshot import HostMemory, Snapshot, check_same, named, place
from .step_files import StepFiles

T = TypeVar("T")
FAILURES = 3  # saves in a row that may fail before a run is told to stop
LOOKS = (0.0, 0.2, 0.8, 2.0, 2.0)  # seconds before each look for a file that another host wrote
LOCK = "lock"
_STATE = "state"  # Orbax's name for the tree of arrays, of which a checkpoint could hold several

# Orbax logs the traceback of every error, several times, before it raises it. Where several arrays fail, Orbax raises
# the first error, and asyncio logs the others whenever it finds that nobody handled them.
logging.getLogger("absl").addFilter(lambda record: "/orbax/checkpoint/" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "/orbax/checkpoint/" not in record.getMessage())


class SaveFailed(BeitJaxError):
    """A step could not be saved; the steps saved before are intact.

    Attributes:
        step: the step that is missing.
        retry: True: warn, go on, and save the current step now. False: the run should end.
    """

    exit_code = 6

    def __init__(self, message: str, step: int, retry: bool):
        super().__init__(message)
        self.step, self.retry = step, retry


class AllDamaged(BeitJaxError):
    """There are checkpoints, but none of them is what was saved."""

    exit_code = 7


@dataclass(frozen=True)
class Restored(Generic[T]):
    """A checkpoint that was read back to the devices."""

    step: int
    state: T
    extra: dict[str, Any]


def _print_warning(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


class Checkpoints:
    """The checkpoints of one run, a context manager. Inside the context, no other run writes to the directory.

    Entering creates a missing directory, and removes what killed processes left behind. Leaving waits for the save that
    is under way.

    Args:
        directory: on a disk that all processes share.
        keep: the number of steps that stay; older ones are deleted once a newer one is verified.
        warn: called with one line for each problem that was found and repaired.

    Raises:
        BeitJaxError: on entering: another run uses the directory, or some process does not see it.
    """

    def __init__(self, directory: Path, *, keep: int, warn: Callable[[str], None] = _print_warning):
        self._directory, self._keep, self._warn = directory.absolute(), keep, warn
        self._files = StepFiles(self._directory)
        self._memory = HostMemory()
        self._newest: int | None = None
        self._attempts = self._failures = 0
        self._pending: tuple[int, Future[str | None]] | None = None

    @property
    def newest(self) -> int | None:
        """The last step that is known to be saved. A save under way counts once `poll` or `wait` saw its end."""
        return self._newest

    def committed(self) -> int | None:
        """The last step that is complete in the directory, also if this process does not know it yet."""
        return max(self._files.steps(), default=None)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            owner = from_first(lambda: self._open(stack))
            self._check_shared(owner)
            self._newest = from_first(lambda: max(self._files.steps(), default=None))
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            self._held = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error, other processes may be gone: waiting for them would only hide the error.
        patient = error is None or jax.process_count() == 1
        with self._held:
            try:
                if patient:
                    self.wait()
            except SaveFailed as failure:
                if error is None:
                    raise
                self._warn(str(failure))
            finally:
                self._thread.shutdown(wait=patient)

    def save(self, step: int, state: object, extra: Mapping[str, Any]) -> None:
        """Saves in the background. On return the state was copied: its buffers may be donated, and `extra` changed.

        Only one save is under way at a time; the next call waits for it.

        Args:
            state: a pytree of arrays, stored as nested dicts under the names of its fields, keys and positions.
            extra: values that JSON has.

        Raises:
            SaveFailed: an earlier save failed, and this one was not begun; call again to begin it. A failure of this
                save is raised by `poll`, `wait` or the next call.
            BeitJaxError: a value of the state is not finite, or the step does not come after the newest one.
        """
        self.wait()
        if self._newest is not None and step <= self._newest:
            raise BeitJaxError(
                f"{self._directory}: step {step} does not come after step {self._newest}, which is saved here; "
                "continue from that one or choose another directory"
            )
        stored = json.loads(json.dumps(dict(extra), allow_nan=False))
        snapshot = self._memory.snapshot(named(state))
        if bad := sorted(set(chain(*gather(snapshot.not_finite())))):
            raise BeitJaxError(
                f"{self._directory}: step {step}: {printable(bad[0])}: not finite, as {len(bad)} of "
                f"{len(snapshot.values)} tensors; not saved, earlier checkpoints are kept"
            )
        self._pending = step, self._begin(step, snapshot, stored)

    def poll(self) -> None:
        """Looks whether the save under way has ended, without waiting. It is cheap enough for every step.

        With several processes it does nothing: they would notice the end at different steps, but must act together.
        They learn of a failure at the next `save` or `wait`.

        Raises:
            SaveFailed: the save failed.
        """
        if self._pending is not None and self._pending[1].done() and jax.process_count() == 1:
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is under way.

        Raises:
            SaveFailed: the save failed.
        """
        if self._pending is None:
            return
        step, saving = self._pending
        error = saving.exception()
        self._pending = None
        reasons = list(filter(None, gather(_reason(error))))
        if reasons:
            raise self._failure(step, reasons[0]) from error
        self._newest, self._failures = step, 0
        if (trouble := saving.result()) is not None:
            self._warn(trouble)

    def restore(self, abstract: T) -> Restored[T] | None:
        """Restores the newest undamaged checkpoint. Damaged ones are renamed to ``N.bad``, with a warning.

        Args:
            abstract: a pytree of `jax.ShapeDtypeStruct`, with shardings where they matter.

        Returns:
            The restored checkpoint; None where nothing was ever saved.

        Raises:
            AllDamaged: there are checkpoints, and all are damaged.
            BeitJaxError: the newest undamaged checkpoint holds another state: other names, shapes or dtypes.
        """
        self.wait()
        wanted = named(abstract)
        step = from_first(lambda: self._newest_good(wanted))
        if step is None:
            return None
        path = self._files.path(step)
        manifest = digests.read_manifest(path)
        arrays = _read(path, manifest.arrays)
        try:
            digests.check_arrays(arrays, manifest.arrays)
        except Damaged as damage:  # the files are what they were, so the disk is not at fault
            raise AllDamaged(f"{path}: {damage}, though its files are intact; use the versions that saved it") from None
        self._newest = step
        leaves = [place(arrays.pop(name), leaf) for name, leaf in wanted.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(abstract), leaves), manifest.extra)

    def _open(self, stack: ExitStack) -> str:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            owner = stack.enter_context(exclusive(self._directory / LOCK, self._directory, remove=False))
            for path, size in self._files.remove_leftovers():
                self._warn(f"{path}: left behind by a killed process, removed ({size:,} bytes)")
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            raise BeitJaxError(f"{self._directory}: no place for checkpoints ({printable(reason)})") from None
        return owner

    def _check_shared(self, owner: str) -> None:
        """Checks that every process sees the lock file: otherwise each would write only a part of a checkpoint."""
        lock = self._directory / LOCK
        seen = gather(_appears(lock, owner))
        if not all(seen):
            raise BeitJaxError(
                f"{self._directory}: process {seen.index(False)} does not see what process 0 wrote here; "
                "choose a directory that all hosts share"
            )

    def _begin(self, step: int, snapshot: Snapshot, extra: dict[str, Any]) -> Future[str | None]:
        # Collectives must run in main threads, so only a single process can take digests in the background.
        shared = digests.merge(gather(snapshot.records())) if jax.process_count() > 1 else None
        self._attempts += 1
        temporary = self._files.temporary(step, self._attempts)
        try:
            from_first(lambda: self._check_space(sum(value.nbytes for value in snapshot.values.values())))
            writing = _write(temporary, snapshot.values)
        except Exception as error:
            self._give_up(temporary)
            failed: Future[str | None] = Future()
            failed.set_exception(error)
            return failed
        manifest = Manifest(step, extra, shared or {}, {})
        return self._thread.submit(self._finish, temporary, writing, snapshot, manifest)

    def _check_space(self, need: int) -> None:
        if need > shutil.disk_usage(self._directory).free:
            raise BeitJaxError(f"{need:,} bytes are needed")

    def _finish(
        self, temporary: Path, writing: ocp.AsyncResponse[None], snapshot: Snapshot, manifest: Manifest
    ) -> str | None:
        """Runs in the thread. Returns a warning if something failed after the step was saved."""
        try:
            arrays = manifest.arrays or digests.merge([snapshot.records()])
            writing.result()
            if not is_first():
                return None
            self._commit(temporary, replace(manifest, arrays=arrays))
        except BaseException:
            self._give_up(temporary)
            raise
        try:
            list(self._files.remove_leftovers())  # failed saves may have gone on writing for a while
            self._files.delete_old(self._keep)
        except OSError as error:
            return f"{error.filename}: {error.strerror}; what is not needed any more could not be deleted"
        return None

    def _commit(self, temporary: Path, manifest: Manifest) -> None:
        digests.check_arrays(_read(temporary, manifest.arrays), manifest.arrays)
        digests.write_manifest(temporary, replace(manifest, files=digests.describe_files(temporary)))
        digests.synchronise(temporary)
        temporary.rename(self._files.path(manifest.step))
        digests.synchronise_entry(self._directory)

    def _give_up(self, temporary: Path) -> None:
        self._memory.release()  # Orbax may still read from it
        if is_first():
            self._files.discard(temporary)

    def _failure(self, step: int, reason: str) -> SaveFailed:
        self._failures += 1
        free = shutil.disk_usage(self._directory).free
        last = "there is none before it" if self._newest is None else f"the last one is step {self._newest}"
        return SaveFailed(
            f"{self._files.path(step)}: not saved ({reason}); {free:,} bytes are free, {last}, "
            f"failure {self._failures} of {FAILURES} in a row",
            step,
            retry=self._failures < FAILURES,
        )

    def _newest_good(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> int | None:
        for step in reversed(self._files.steps()):
            path = self._files.path(step)
            try:
                manifest = digests.read_manifest(path)
                digests.check_files(path, manifest.files)
                if manifest.step != step:
                    raise Damaged(f"it is step {manifest.step} under another's name")
            except Damaged as damage:
                self._warn(f"{path}: damaged ({damage}); renamed to {self._files.quarantine(step)}")
                continue
            check_same(path, manifest.arrays, wanted)
            return step
        if bad := self._files.bad():
            raise AllDamaged(
                f"{self._directory}: every checkpoint is damaged ({printable(', '.join(bad))}); "
                "put one back from a backup, or remove them to start again from the beginning"
            )
        return None


def _appears(lock: Path, owner: str) -> bool:
    """True once the first process's lock file can be seen here; network file systems may take a moment."""
    for pause in LOOKS:
        time.sleep(pause)
        if lock.is_file() and lock.read_text() == owner:
            return True
    return False


def _reason(error: BaseException | None) -> str | None:
    if error is None:
        return None
    text = str(error) if isinstance(error, BeitJaxError) else f"{type(error).__name__}: {error}"
    return printable(text if len(text) <= 200 else f"...{text[-200:]}", 300)  # what is wrong stands at the end


def _write(path: Path, values: Mapping[str, Any]) -> ocp.AsyncResponse[None]:
    """Begins to write; all processes call it together. Trained weights hardly compress, so they are not compressed."""
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    with context:
        return ocp.save_async(path, unflatten(values), checkpointable_name=_STATE)


def _read(path: Path, records: Mapping[str, ArrayRecord]) -> dict[str, np.ndarray]:
    """Reads all arrays of a checkpoint, whole, into host memory.

    All processes must call `ocp.load` together, but the first process reads alone when it compares. So the arrays are
    read by a handler.
    """
    arguments = {name: orbax.RestoreArgs(restore_type=np.ndarray) for name in records}
    item, restore_args = unflatten(dict.fromkeys(records, 0)), unflatten(arguments)
    with closing(orbax.PyTreeCheckpointHandler()) as handler:
        return flatten(handler.restore(path / _STATE, args=orbax.args.PyTreeRestore(item, restore_args)))
