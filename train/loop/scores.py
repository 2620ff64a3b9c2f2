"""The evaluations of a run: their scores, the best of them, and when there is no use in going on."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit_jax.atomic import check_destination
from beit_jax.weights.native import NATIVE

from ..distributed.collectives import from_first
from ..step.state import State
from .best import Best, evaluations, replayed
from .log import Log
from .metrics_file import METRICS, read_metrics
from .results import BEST, best_kept, best_name, write_results
from .watch import Watchdog

if TYPE_CHECKING:
    from .plan import Plan


class Scores:
    """Evaluates, logs, and keeps the best model beside the last one. All processes call every method together.

    What was evaluated before is read from the log, which ends with the step that the run goes on from. So a run that
    was killed and goes on keeps the same model, and stops after the same step, as a run that never stopped.

    Args:
        out: directory of the run; its log is open.
        step: that the run begins with, or goes on from.

    Attributes:
        last: scores of the last evaluation of this process; empty before.
        best: the best evaluation; None for a run that watches no score.
        kept: directories of the best model, as far as this run wrote some.

    Raises:
        BeitJaxError: the place of the best model holds something else.
    """

    def __init__(self, plan: "Plan", out: Path, log: Log, watchdog: Watchdog, step: int) -> None:
        self._plan, self._out, self._log, self._watchdog = plan, out, log, watchdog
        self._every = max(1, round(plan.recipe.run.eval_every_epochs * plan.steps_per_epoch))
        self.last: dict[str, float] = {}
        self.best = plan.watched
        self.kept: tuple[Path, ...] = ()
        self._done: set[int] = set()
        if step:
            past: dict[str, Any] = from_first(lambda: self._past(step))
            self._done = set(past["done"])
            self.best = None if self.best is None else Best(**past["best"])
            self.kept = tuple(out / name for name in past["kept"])
            if past["anew"]:
                log.note(past["anew"])
        elif self.best is not None:
            from_first(self._check_place)

    @property
    def stopped(self) -> str | None:
        """Why there is no use in going on: so many evaluations in a row without a better score. None: go on."""
        patience = self._plan.recipe.run.patience
        if self.best is None or patience is None or self.best.since < patience:
            return None
        return f"{self.best.since} evaluations in a row without a better {self.best.score} (--run.patience {patience})"

    def due(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        return step == self._plan.steps or step % self._every == 0

    def missing(self, step: int) -> bool:
        """Whether the evaluation after this step, which is saved, was not made. The last one is made in any case."""
        return 0 < step < self._plan.steps and self.due(step) and step not in self._done

    def evaluate(self, state: State, step: int) -> None:
        """Evaluates the state after a step, and keeps its models if no earlier ones were as good."""
        plan = self._plan
        if plan.validation is None:
            return
        whole = plan.whole(state)
        self.last = plan.objective.scores(
            whole, plan.validation, plan.processor, plan.mesh, lambda images: self._watchdog.beat()
        )
        pictures = plan.objective.pictures(whole, plan.validation)
        if step not in self._done:
            self._compare(state, step)
            self._done.add(step)
        # After the model: a run that is killed between the two evaluates this step again.
        self._log.write(step, self.last)
        for name, picture in pictures.items():
            self._log.picture(step, name, picture)

    def _compare(self, state: State, step: int) -> None:
        if self.best is None:
            return
        score = self.best.score
        self.best = self.best.after(step, from_first(lambda: self.last[score]))
        if self.best.step == step:
            facts = {"step": step, "scores": self.last, BEST: self.best.as_dict()}
            self.kept = write_results(self._plan, state, self._out, facts, best_name)

    def _check_place(self) -> None:
        check_destination(self._out / BEST, overwrite=True, contents=NATIVE, keep_others=True)

    def _past(self, step: int) -> dict[str, Any]:
        """What the log says of the steps up to this one, in the first process."""
        records = read_metrics(self._out / METRICS)
        done = sorted({int(record["step"]) for record in evaluations(records)})
        if self.best is None:
            return {"done": done, "best": None, "anew": "", "kept": ()}
        best = replayed(self.best, records)
        self._check_place()
        if not self._plan.result_names:
            return {"done": done, "best": vars(best), "anew": "", "kept": ()}
        kept, names = best_kept(self._out), sorted(map(best_name, self._plan.result_names))
        of_step = int(kept["step"]) if kept.get("score") == best.score else -1
        if best.value is None and 0 < of_step < step:  # the log was lost, the model was not
            best = Best(best.score, best.direction, float(kept["value"]), of_step)
        ahead = of_step >= step and of_step not in done  # of an evaluation that will be made again
        if best.value is None or of_step == best.step or ahead:
            return {"done": done, "best": vars(best), "anew": "", "kept": [] if best.value is None else names}
        anew = f"{self._out / BEST}: not the best model by {best.score} so far; it is the best one from now on"
        return {"done": done, "best": vars(self.best), "anew": anew, "kept": ()}
