"""One loop for every objective: input, step, log, evaluation, checkpoint, interruption.

A run is a directory: ``run.json`` (recipe, data, versions), ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``, with
several hosts ``hosts.jsonl`` (where the time of each went) and, at the end, ``model/``, a native checkpoint that
`classify`, `export` and `parity` take as it is, or the other results of the objective. A run that is started again with
the same directory continues from its last good checkpoint. On the same machines and mesh it ends in the same bits as a
run that never stopped: a batch follows from seed and step, and so does all randomness of a step.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from beit_jax.errors import BeitJaxError
from beit_jax.json_file import changes

from ..checkpoints.checkpointer import Checkpoints, SaveFailed
from ..costs.estimate import peak_flops
from ..data.batches import train_batches
from ..distributed.collectives import gather
from ..distributed.peers import Peers, Position
from ..distributed.sharding import batch_rows, put_batch
from ..recipe import Resume
from ..step.state import State, from_saved, to_saved
from .best import Best
from .contract import begin
from .dispatch import Dispatch
from .kernel_check import check_kernels
from .log import Log
from .plan import Plan
from .results import write_results
from .scores import Scores
from .timing import Clock, Phase, Timing, straggler
from .watch import INTERRUPTED, Interruption, Watchdog

PROFILED_FROM = 10  # steps after the start, when compilation and the first evaluations are over


class NotFinite(BeitJaxError):
    """Loss or gradients were not finite for too many steps in a row."""

    exit_code = 8


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        scores: of the last evaluation; empty if there was none.
        models: native checkpoints that were written: the run came to its end.
        best: the best evaluation, of a run that watches a score; and the directories of its models.
        stopped: why the run ended before its last step, where it did so by itself.
    """

    step: int
    steps: int
    scores: Mapping[str, float]
    timing: Timing
    models: tuple[Path, ...]
    exit_code: int = 0
    best: Best | None = None
    kept: tuple[Path, ...] = ()
    stopped: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {
            "step": self.step,
            "steps": self.steps,
            "scores": dict(self.scores),
            "timing": self.timing.as_dict(),
            "models": [str(path) for path in self.models],
            "best": None if self.best is None else self.best.as_dict() | {"models": [str(path) for path in self.kept]},
            "stopped": self.stopped,
        }

    def lines(self) -> list[str]:
        """For people."""
        end = "done" if self.step == self.steps else "stopped by a signal and saved; the same command goes on"
        end = end if self.stopped is None else f"stopped early: {self.stopped}"
        scores = [f"{name:<12} {value:.4f}" for name, value in self.scores.items()]
        scores += [] if self.best is None else [f"best         {self.best}{''.join(f', {path}' for path in self.kept)}"]
        models = [f"written      {path}" for path in self.models]
        return [f"step {self.step:,} of {self.steps:,}: {end}", *self.timing.lines(), *scores, *models]


def train(
    plan: Plan, out: str | Path, *, resume: Resume = "auto", quiet: bool = False, peers: Peers | None = None
) -> Outcome:
    """Carries a run out, or on. With several processes all of them call it.

    Args:
        out: directory of the run, which all hosts share; made if it does not exist.
        resume: "auto": continue what `out` holds, or begin; "must": continue only; "never": begin only.
        quiet: show nothing.
        peers: this process among those of the run, as `cluster.joined` gives it; of this run alone.

    Raises:
        BeitJaxError: `out` holds something else, or a run of another recipe or other data; no checkpoint in it is
            whole; the disk is full; too many unreadable images; hosts that differ; kernels that fail on this device.
        NotFinite: too many steps in a row without finite loss and gradients; the last checkpoint is before them.
    """
    out = Path(out)
    with ExitStack() as stack:
        peers = stack.enter_context(Peers.of_run()) if peers is None else peers
        check_kernels(plan)
        notes = begin(plan, out, resume, peers)
        run = _Run(plan, out, stack, quiet, peers)
        plan = run.plan  # frees what the first state was made of, unless the caller keeps it
        for note in (*notes, *plan.objective.notes):
            run.log.note(note)
        run.catch_up()
        while run.step < plan.steps and run.scores.stopped is None:
            run.advance()
            if run.interrupted():
                return run.outcome(exit_code=INTERRUPTED)
        return run.outcome(models=run.results())


@dataclass
class _Run:
    """A run in progress: what the loop goes on with, and what has to be closed at its end."""

    plan: Plan
    out: Path
    stack: ExitStack
    quiet: bool
    peers: Peers

    def __post_init__(self) -> None:
        plan, enter, run, peers = self.plan, self.stack.enter_context, self.plan.recipe.run, self.peers
        self.dispatch = Dispatch(plan.step, plan.mesh)
        self.clock = Clock()
        self.step = 0  # until it is known: others ask where this process is while it restores
        enter(Interruption(peers.request, lambda name: peers.fail(f"stopped by a second {name}", stay=False)))
        self.watchdog = enter(Watchdog(run.hang_minutes, hung=peers.hung))
        self.checkpoints = enter(Checkpoints(self.out / "checkpoints", keep=run.keep))
        peers.where = lambda: Position(self.step, self.watchdog.phase_name, self.watchdog.beats)
        peers.saved = self.checkpoints.committed
        with self.watchdog.phase("restore"), self.clock.measure("checkpoint"):
            restored = self.checkpoints.restore(to_saved(plan.abstract_state))
            self.state: State = (
                plan.first_state() if restored is None else from_saved(restored.state, plan.abstract_state)
            )
        plan = self.plan = plan.begun()
        self.first = self.step = self.saved = int(self.state.step)
        peers.begin(self.step)
        self.bad = int(self.state.bad)
        self.last: Mapping[str, jax.Array] | None = None
        self.log = enter(
            Log(
                self.out,
                total_steps=plan.steps,
                start_step=self.step,
                process_index=jax.process_index(),
                quiet=self.quiet,
            )
        )
        if restored is not None:
            self.log.note(f"continuing after step {self.step:,}")
        self.scores = Scores(plan, self.out, self.log, self.watchdog, self.step)
        self.rows = batch_rows(plan.mesh, plan.recipe.data.batch_size)
        self.batches = enter(
            train_batches(
                plan.training,
                plan.recipe.data,
                plan.objective.transform,
                seed=run.seed,
                start_step=self.step,
                rows=self.rows,
            )
        )
        self.expected = _described(plan.objective.batch(len(self.rows)))
        self.named = 0  # unreadable records
        self.warned: set[str] = set()  # names of the warnings that were printed
        self.warn_after = max(round(plan.recipe.optim.warmup_epochs * plan.steps_per_epoch), plan.steps // 10)
        self.operations, devices = plan.objective.flops, plan.mesh.devices
        peak = peak_flops(devices.flat[0].device_kind)
        self.peak = None if peak is None else peak * devices.size
        self.pending: list[Mapping[str, jax.Array]] = []
        enter(jax.set_mesh(plan.mesh))

    def advance(self) -> None:
        """One step, and what is due after it."""
        run, plan = self.plan.recipe.run, self.plan
        self._profile()
        with self.watchdog.phase("input"), self.clock.measure("input"):
            batch = put_batch(self._next_batch(), plan.mesh)
            self._name_bad_records()
        compiling = self.step == self.first
        if compiling:
            self.log.compiling(self.step + 1)
        phase: Phase = "compile" if compiling else "step"
        with self.watchdog.phase(phase), self.clock.measure(phase, images=plan.recipe.data.batch_size):
            self.state, metrics = self.dispatch(self.state, batch)
            if compiling:
                jax.block_until_ready(metrics)
            self._watch_finite()  # of the step before: this one is on its way
        self.last = metrics
        self.pending.append(metrics)
        self.step += 1
        self.log.advance(self.step)
        last = self.step == plan.steps
        if last:
            self._watch_finite()  # no other step does
        if last or self.step % run.log_every == 0:
            self._record()
        if last or self.step % run.save_every == 0:
            self._save()
        if self.scores.due(self.step):
            self._evaluate()
        self._poll()

    def catch_up(self) -> None:
        """The evaluation that was due after the step that the run goes on from, if the run was killed before it."""
        if self.scores.missing(self.step):
            self._evaluate()

    def interrupted(self) -> bool:
        """Returns True if a signal asked to stop; then the state is saved."""
        if not self.peers.stops_after(self.step) or self.step == self.plan.steps or self.scores.stopped is not None:
            return False
        self._record()
        self._wait_until_saved()
        return True

    def results(self) -> tuple[Path, ...]:
        """Writes the models of a run that came to its end."""
        self._watch_finite()  # early stopping may end it after any step
        self._wait_until_saved()
        if not self.scores.last:  # nothing to evaluate, or the run had come to its end before
            self._evaluate()
        with self.clock.measure("checkpoint"):
            return write_results(self.plan, self.state, self.out, {"step": self.step, "scores": self.scores.last})

    def outcome(self, *, models: tuple[Path, ...] = (), exit_code: int = 0) -> Outcome:
        """How the run stands."""
        return Outcome(
            self.step,
            self.plan.steps,
            self.scores.last,
            self.clock.timing(),
            models,
            exit_code,
            self.scores.best,
            self.scores.kept,
            self.scores.stopped,
        )

    def _next_batch(self) -> dict[str, np.ndarray]:
        """This host's part of the batch of this step, with the tokens that are stored for it, if the run has such.

        Raises:
            BeitJaxError: it is not what was compiled for. Without this check other hosts would go on with it.
        """
        positions = self.step * self.plan.recipe.data.batch_size + self.rows
        batch = self.plan.objective.extend(next(self.batches), positions)
        for name, expected, found in changes(self.expected, _described(batch)):
            raise BeitJaxError(
                f"batch of step {self.step + 1}: expected {name} {expected}, found {found}; look at the data"
            )
        return batch

    def _name_bad_records(self) -> None:
        for reason in list(self.batches.bad.reasons.values())[self.named :]:
            self.log.note(f"warning: {reason}; another image stands in for it")
            self.named += 1

    def _watch_finite(self) -> None:
        """Counts the last step, once, when its result is known, and gives up after too many bad ones in a row."""
        if self.last is None:
            return
        self.bad = 0 if bool(self.last["finite"]) else self.bad + 1
        self.last = None
        if self.bad >= self.plan.recipe.optim.max_bad_steps:
            self.checkpoints.wait()
            raise NotFinite(
                f"loss or gradients were not finite in steps {self.step - self.bad + 1} to {self.step}, all of them "
                f"skipped; the last checkpoint is of step {self.saved}. Lower --optim.lr, or look at these batches"
            )

    def _record(self) -> None:
        """Logs the means of the metrics since the last record, over the steps that were not skipped."""
        with self.clock.measure("other"):
            metrics = [entry for entry in jax.device_get(self.pending) if entry["finite"]]
            skipped = float(self.state.skipped)
            interval = self.clock.interval()
            hosts = gather({"host": self.peers.host, **interval.seconds}) if self.peers.count > 1 else []
        self.pending.clear()
        means = {name: float(np.mean([entry[name] for entry in metrics])) for name in metrics[0]} if metrics else {}
        means.pop("finite", None)
        self.log.host_times(self.step, hosts)
        self.log.write(self.step, means | interval.rates(self.operations, self.peak) | {"skipped": skipped})
        if (slow := straggler(hosts)) is not None:
            self._once("hosts", slow)
        for warning in self.plan.objective.warnings(means) if self.step > self.warn_after else ():
            self._once(warning.partition(" ")[0], warning)

    def _once(self, name: str, warning: str) -> None:
        """Warns, the first time: what is true stays true for many records."""
        if name not in self.warned:
            self.log.note(f"warning: step {self.step:,}: {warning}")
        self.warned.add(name)

    def _save(self) -> None:
        """Begins a checkpoint of this step, unless there is one."""
        while self.saved != self.step:
            with self.watchdog.phase("checkpoint"), self.clock.measure("checkpoint"), self._forgiving():
                self.checkpoints.save(self.step, to_saved(self.state), {"recipe": self.plan.recipe.name})
                self.saved = self.step

    def _poll(self) -> None:
        """Saves this step if the last one that should be saved was not."""
        with self._forgiving():
            self.checkpoints.poll()
            return
        self._save()

    def _wait_until_saved(self) -> None:
        """Waits until this step is saved."""
        while self.checkpoints.newest != self.step:
            self._save()
            with self.watchdog.phase("checkpoint"), self.clock.measure("checkpoint"), self._forgiving():
                self.checkpoints.wait()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Passes over a save that failed, if it may be tried again: `saved` says that it is not."""
        try:
            yield
        except SaveFailed as failure:
            if not failure.retry:
                raise
            self.log.note(f"warning: {failure}")
            self.saved = self.first

    def _evaluate(self) -> None:
        with self.watchdog.phase("evaluation"), self.clock.measure("evaluation"):
            self.scores.evaluate(self.state, self.step)

    def _profile(self) -> None:
        """Starts and stops the profiler's trace, if one is wanted."""
        steps, done = self.plan.recipe.run.profile_steps, self.step - self.first
        if steps and done == PROFILED_FROM:
            jax.profiler.start_trace(str(self.out / "profile"))
        if steps and done == PROFILED_FROM + steps:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()


def _described(batch: Mapping[str, np.ndarray | jax.ShapeDtypeStruct]) -> dict[str, str]:
    """Dtype and shape of every array, as people read them."""
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in batch.items()}
