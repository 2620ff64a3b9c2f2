"""The processes of a run watch each other: which one failed, was lost or hangs, and after which step all of them stop.

JAX alone ends the other processes 100 s after one was killed and five minutes after one raised an exception; it never
ends them when one hangs. Here every process writes once a second that it is alive and where it is, and reads what the
other processes wrote. They write into the key-value store of JAX's coordination service. The store needs no devices and
no collectives, so it still works while a collective waits for a process that will never arrive.

Process 0 holds the store. When process 0 is killed, JAX ends the others at once; its message names "the leader task".

The store has no public name in JAX. It is looked up when a run of several processes begins. Where it cannot be found,
nobody watches: JAX's own limits end the run, and a stop is agreed by a collective after every step.
"""

import faulthandler
import itertools
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import jax

from beit_jax.errors import BeitJaxError, printable
from beit_jax.json_file import changes
from beit_jax.terminal import say

from .collectives import gather

HUNG = 9
"""Exit code of a run in which a process stood still."""
LOST = 10
"""Exit code of a process that had to end because another one failed or is gone."""
FAREWELL = 5.0  # seconds that process 0 stays for the others to read why the run ends
WAITING = ("compile", "step")  # phases in which a process may be waiting for the others


class Store(Protocol):
    """Text under keys, the same for all processes."""

    def set(self, key: str, value: str) -> None:
        """Writes an entry, and replaces the one that is there."""

    def under(self, prefix: str) -> dict[str, str]:
        """All entries whose keys begin with `prefix`, which ends in a slash; their keys come without the prefix."""


class CoordinationStore:
    """The store of JAX's coordination service, which `jax.distributed.initialize` started.

    Args:
        client: the service's client, as `coordination_store` finds it.

    Raises:
        jax.errors.JaxRuntimeError: from every method: process 0 cannot be reached.
    """

    _runs = itertools.count()

    def __init__(self, client: Any) -> None:
        self._set, self._get = client.key_value_set, client.key_value_dir_get
        # Keys live as long as the service does, so each run of this process has its own prefix.
        self._root = f"beit-jax/{next(self._runs)}/"

    def set(self, key: str, value: str) -> None:
        self._set(self._root + key, value, allow_overwrite=True)

    def under(self, prefix: str) -> dict[str, str]:
        return {key.removeprefix(self._root + prefix): value for key, value in self._get(self._root + prefix)}


def coordination_store() -> Store | None:
    """The store of this run; None, with one line that says what cannot be watched, where JAX does not offer it."""
    try:
        from jax._src import distributed  # the store has no public name; Orbax takes it from here as well

        return CoordinationStore(distributed.global_state.client)
    except (ImportError, AttributeError) as error:
        if jax.process_index() == 0:
            say(
                f"warning: this version of JAX ({jax.__version__}) does not offer its key-value store "
                f"({printable(error)}): lost and hanging processes are not named, and JAX itself ends the run"
            )
        return None


@dataclass(frozen=True)
class Position:
    """Where a process is.

    Attributes:
        step: steps done.
        phase: one of `timing.PHASES` or "restore"; "start" before the loop.
        beats: signs of progress so far, as the watchdog counts them. Every process counts the same ones.
    """

    step: int = 0
    phase: str = "start"
    beats: int = 0


@dataclass(frozen=True)
class End:
    """Why a run ends.

    Attributes:
        process, host: the process at fault, and its host.
        why: the rest of a line that begins with those two.
    """

    process: int
    host: str
    kind: Literal["failed", "lost", "hung"]
    why: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} {self.why}"


class Peers:
    """This process among those of its run, a context manager. A single process only remembers a request to stop.

    Args:
        store: where the processes write for each other; None for a single process, and where JAX offers no store:
            then the methods that all processes call together use collectives, and nothing is watched.
        index, count: the number of this process, and how many there are.
        silence: seconds without a sign of life after which a process counts as lost.
        end: ends the process with an exit code, past everything that could wait for other processes.
    """

    def __init__(
        self,
        store: Store | None = None,
        index: int = 0,
        count: int = 1,
        *,
        silence: float = 20.0,
        host: str | None = None,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.index, self.count, self.host = index, count, host or socket.gethostname()
        self.where: Callable[[], Position] = Position
        """Called once a second."""
        self.saved: Callable[[], int | None] = lambda: None
        """Returns the last step that is saved. The line that says why the run ended names it."""
        self._store, self._silence, self._end_process = store, silence, end
        self._pause = min(1.0, silence / 10)
        self._lock = threading.Lock()
        self._requested: str | None = None
        self._step, self._reported, self._last_step = 0, False, threading.Event()
        self._stop_after = 0
        self._beat = 0
        self._silent: dict[str, tuple[str, float]] = {}
        self._leaving = threading.Event()
        self._ended = False

    @classmethod
    def of_run(cls, silence: float = 20.0) -> Self:
        """This process among those that JAX counts."""
        count = jax.process_count()
        return cls(coordination_store() if count > 1 else None, jax.process_index(), count, silence=silence)

    def __enter__(self) -> Self:
        if self._store is not None:
            self._say("beat", asdict(self.where()) | {"host": self.host, "beat": 0})
            self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Writes an error for the other processes, which then end. The caller should end this one without waiting."""
        if self._store is None:
            return
        if error is not None:
            if _may_be_of_others(error):
                self._leaving.wait(self._silence + FAREWELL)  # if one is, the watch finds out and ends this process
            self.fail(_described(error))
        self._leaving.set()
        self._thread.join()
        if error is None:  # from now on, silence of this process is no loss
            self._say("done", True)

    # --- What the main thread says and asks ---

    def request(self, signal: str) -> None:
        """Asks for an end of the run: all processes stop after the same step."""
        self._requested = signal

    def begin(self, step: int) -> None:
        """Says how many steps were done before the loop's first."""
        with self._lock:
            self._step = step

    def stops_after(self, step: int) -> bool:
        """True if the run stops after `step`. All processes ask after every step, and get the same answer."""
        if self._store is None:
            return any(gather(self._requested is not None))
        with self._lock:
            self._step = step
            undecided = self._reported and not self._last_step.is_set()
        if undecided:  # this process has written its step: it must not go on before all have
            self._last_step.wait()
        return self._last_step.is_set() and step >= self._stop_after

    def compare(self, facts: Mapping[str, Any], *, patience: float) -> None:
        """Compares facts with those of process 0.

        Args:
            facts: values that JSON has.
            patience: seconds to wait for processes that have not written their facts.

        Raises:
            BeitJaxError: here and in process 0: facts differ, naming process, host and the first different fact; or a
                process wrote nothing in time.
        """
        own = {"host": self.host, "facts": json.loads(json.dumps(dict(facts)))}
        compared: Iterable[int] = range(self.count)
        if self._store is None:
            answers = dict(enumerate(gather(own)))
        else:
            self._say("facts", own)
            # Process 0 waits for everyone: nothing is written before all agreed.
            needed = range(self.count) if self.index == 0 else (0,)
            answers = self._answers("facts", needed, patience) | {self.index: own}
            compared = range(self.count) if self.index == 0 else (self.index,)
        for index in compared:
            for name, first, found in changes(answers[0]["facts"], answers[index]["facts"]):
                raise BeitJaxError(
                    f"process {index} on {printable(answers[index]['host'])}: {printable(name)} is {printable(found)}, "
                    f"{printable(first)} in process 0; start the same command, code and data on every host"
                )

    def hung(self, minutes: float) -> None:
        """Tells the others how long this process waited, and for which process, as far as that can be seen."""
        if self._store is None:
            return
        self._ended = True  # what this process writes must not end it before its stacks are printed
        with _while_the_store_lives():
            for culprit in self._behind():
                culprit = replace(culprit, why=f"{culprit.why} for {minutes:.2g} minutes")
                say(f"error: {culprit}")
                self._publish(culprit)
            self._farewell()

    def fail(self, why: str, *, stay: bool = True) -> None:
        """Tells the others that this process ends.

        Args:
            stay: wait until the others have read it.
        """
        if self._store is None:
            return
        with _while_the_store_lives():
            self._publish(End(self.index, self.host, "failed", f"failed: {why}"))
            if stay:
                self._farewell()

    # --- What the watch does once a second ---

    def _watch(self) -> None:
        while not self._leaving.wait(self._pause):
            try:
                self.look()
            except jax.errors.JaxRuntimeError as error:
                reason = printable(str(error).partition("\n")[0], 200)
                self._leave(End(0, "the leading host", "lost", f"cannot be reached ({reason})"))

    def look(self) -> None:
        """One round: writes where this process is, and reads what the others wrote."""
        store = self._store
        assert store is not None
        self._beat += 1
        self._say("beat", asdict(self.where()) | {"host": self.host, "beat": self._beat})
        if self._requested is not None:
            self._say("stop", self._requested)
        for text in store.under("end/").values():
            self._leave(End(**json.loads(text)))
        if not self._last_step.is_set() and store.under("stop/"):
            self._agree_on_last_step(store)
        if self.index == 0:
            for lost in self._lost(store):
                self._publish(lost)
                self._leave(lost)

    def _agree_on_last_step(self, store: Store) -> None:
        """Agrees on the last step: the one after the largest step that any process has done.

        No process gets beyond that step: once a process has written its own step, it waits for the agreement before it
        begins another.
        """
        if not self._reported:
            with self._lock:
                self._reported = True
                step = self._step
            self._say("at", step)
        positions = store.under("at/")
        if len(positions) == self.count:
            self._stop_after = 1 + max(int(step) for step in positions.values())
            self._last_step.set()

    def _lost(self, store: Store) -> list[End]:
        """The processes whose beat has not changed for too long.

        Time is counted in rounds of this process: while the whole machine sleeps, no time passes.
        """
        done, lost = store.under("done/"), []
        for index, text in store.under("beat/").items():
            before, silent = self._silent.get(index, ("", 0.0))
            silent = silent + self._pause if text == before else 0.0
            self._silent[index] = text, silent
            if silent >= self._silence and index not in done and int(index) != self.index:
                why = f"gave no sign of life for {silent:.0f} s: killed, or its machine or network is gone"
                lost.append(End(int(index), json.loads(text)["host"], "lost", why))
        return lost

    def _behind(self) -> list[End]:
        """The processes that the others wait for: those furthest behind, unless they are in a phase of waiting."""
        assert self._store is not None
        beats = {int(index): json.loads(text) for index, text in self._store.under("beat/").items()}
        order = {index: (at["step"], at["phase"] in WAITING, at["beats"]) for index, at in beats.items()}
        last = min(order.values())
        if all(value == last for value in order.values()):
            return [End(self.index, self.host, "hung", f"and all others stand still in {beats[self.index]['phase']}")]
        return [
            End(index, at["host"], "hung", f"stands still in {at['phase']} after step {at['step']:,}")
            for index, at in beats.items()
            if order[index] == last
        ]

    # --- Ending ---

    def _publish(self, end: End) -> None:
        assert self._store is not None
        self._store.set(f"end/{end.process}", json.dumps(asdict(end)))

    def _leave(self, end: End) -> None:
        """Says why the run ends, and ends this process."""
        if self._ended or (end.process == self.index and end.kind == "failed"):
            return  # this process is already ending, and has said more
        self._ended = True
        if end.kind == "hung":
            faulthandler.dump_traceback(2, all_threads=True)
        step = self.saved()
        saved = "nothing was saved" if step is None else f"step {step:,} is saved, the same command goes on from it"
        say(f"error: {end}; {saved}")
        with _while_the_store_lives():
            self._farewell(but=end.process)
        self._end_process(HUNG if end.kind == "hung" else LOST)

    def _farewell(self, but: int | None = None) -> None:
        """Says goodbye. Process 0, which holds the store, waits for all others, `but` for one that may be dead."""
        assert self._store is not None
        self._say("bye", True)
        others = {str(index) for index in range(self.count) if index != but}
        for _ in range(round(FAREWELL / 0.1)):
            if self.index != 0 or others <= self._store.under("bye/").keys():
                return
            self._leaving.wait(0.1)

    # --- The store ---

    def _say(self, topic: str, value: Any) -> None:
        assert self._store is not None
        self._store.set(f"{topic}/{self.index}", json.dumps(value))

    def _answers(self, topic: str, needed: Iterable[int], patience: float) -> dict[int, Any]:
        assert self._store is not None
        for _ in range(max(1, round(patience / 0.1))):
            answers = {int(index): json.loads(text) for index, text in self._store.under(f"{topic}/").items()}
            if all(index in answers for index in needed):
                return answers
            self._leaving.wait(0.1)
        absent = ", ".join(str(index) for index in needed if index not in answers)
        raise BeitJaxError(f"process {absent}: nothing was heard for {patience:.0f} s; look at its output")


@contextmanager
def _while_the_store_lives() -> Iterator[None]:
    """Ignores that the store is gone: then no process is left that could read why this one ends."""
    with suppress(jax.errors.JaxRuntimeError):
        yield


def _may_be_of_others(error: BaseException) -> bool:
    """True if the error may be only the consequence of another process being gone."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def _described(error: BaseException) -> str:
    if isinstance(error, BeitJaxError):
        return str(error)
    return printable(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", 300)
