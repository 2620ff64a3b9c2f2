"""Classification: one label for an image, several, or numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from beit_jax.choices import ProblemType
from beit_jax.config import BeitConfig
from beit_jax.errors import BeitJaxError, printable
from beit_jax.images.processor import ImageProcessor
from beit_jax.models.build import Model
from beit_jax.terminal import Advance
from beit_jax.tree import Nested

from ..adapting import AdaptableRecipe
from ..augmentation.mixing import erase, mix, normalise
from ..data.datasets import Dataset
from ..evaluation.accuracy import evaluate_classification
from ..evaluation.mean_loss import VALIDATION_LOSS, MeanLoss
from ..evaluation.multilabel import evaluate_multilabel
from ..evaluation.regression import evaluate_regression
from ..initial.parameters import keeps_classifier
from ..recipe import AugmentOptions, require
from ..step.criterion import Batch, Criterion, Metrics
from ..step.state import Initial, State
from .class_weights import balanced, balanced_positives, class_weights
from .labelled import LabelledImages, LabelledRecipe
from .objective import Result, Shapes, WholeModel
from .outputs import Outputs

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .objective import Images, Sources

_EVALUATIONS: Mapping[ProblemType, Any] = {
    "multi_label_classification": evaluate_multilabel,
    "regression": evaluate_regression,
}
SCORES: Mapping[ProblemType, tuple[str, ...]] = {
    "single_label_classification": ("accuracy", "accuracy_top5"),
    "multi_label_classification": ("map", "map_micro", "f1", "f1_micro", "exact_match"),
    "regression": ("r2", "mae", "rmse"),
}
"""The scores of a run beside the validation loss; the first is the one to compare runs by."""


_SAID: Mapping[ProblemType, str] = {
    "single_label_classification": "one class of every image",
    "multi_label_classification": "several classes of an image",
    "regression": "numbers",
}


@dataclass(frozen=True)
class ClassifyOptions:
    """What the outputs of a classifier are, and what each class weighs."""

    problem_type: ProblemType | None = None
    """What the outputs are; by default what the data say. Data of one class for each image can be learned as
    multi_label_classification: every class for itself."""
    class_weights: str | None = None
    """Weights of classes in the loss: "balanced", by the training split, or a JSON file {"class": weight}. Where
    several classes hold, of the images that have the class (torch's pos_weight)."""
    standardise: bool = True
    """Learn numbers less their mean and over their deviation, both of the training split. The result gives them as the
    data do."""


@dataclass(frozen=True)
class ClassificationRecipe(LabelledRecipe, AdaptableRecipe):
    """A run that trains a classifier."""

    objective: ClassVar[str] = "classification"

    classify: ClassifyOptions = field(default_factory=ClassifyOptions)


@dataclass(frozen=True)
class Classification(LabelledImages[ClassificationRecipe], WholeModel[ClassificationRecipe]):
    """A model learns to classify images, or to tell numbers of them.

    Values are learned standardised (`outputs.Outputs`). Parameters of a state are those that are learned so; scores and
    results are of parameters that give values as the data do.

    Attributes:
        outputs: what the model's outputs are; None until images say so.
    """

    outputs: Outputs | None = field(default=None, compare=False)

    @classmethod
    def configure(cls, recipe: "Recipe", labels: tuple[str, ...], sources: "Sources") -> BeitConfig:
        config = super().configure(recipe, labels, sources)
        problem = cast(ClassificationRecipe, recipe).classify.problem_type
        return replace(config, problem_type=_recorded(problem or "single_label_classification", config.num_labels))

    def fitted(self, images: "Images") -> "Classification":
        assert isinstance(images, Dataset)
        outputs = outputs_of(images, self.recipe.classify, self.recipe.augment)
        problem = _recorded(outputs.problem_type, self.config.num_labels)
        return self.replaced(config=replace(self.config, problem_type=problem), outputs=outputs)

    def batch(self, size: int) -> Shapes:
        target = self._outputs.target
        return super().batch(size) | {"label": jax.ShapeDtypeStruct((size, *target.shape), target.dtype)}

    @property
    def criterion(self) -> Criterion:
        return classification(self.recipe, self.config, self._outputs)

    def initial(self, key: Key[Array, ""]) -> Initial:
        found, start = super().initial(key), self.sources.start
        if start is None or start.config.task != self.config.task or not keeps_classifier(start.config, self.config):
            return found
        return replace(found, params=self._outputs.standardised(cast(Nested, found.params)))

    def scores(
        self, state: State, images: "Images", processor: ImageProcessor, mesh: Mesh, advance: Advance
    ) -> dict[str, float]:
        model = self.graph, self._outputs.in_units(state.params)
        batches, labels = self.evaluation_batches(images, processor), self.config.labels
        of_rows = self._outputs.losses
        if self._outputs.problem_type == "single_label_classification":
            found = evaluate_classification(model, batches, labels, mesh=mesh, losses=of_rows, advance=advance)
            mean = math.nan if found.loss is None else found.loss
            return {"accuracy": found.top1, "accuracy_top5": found.top5, VALIDATION_LOSS: mean}
        loss = MeanLoss()

        def observe(found: np.ndarray, label: np.ndarray) -> None:
            loss.add(*(np.asarray(values) for values in of_rows(jnp.asarray(found), label)))

        evaluate: Any = _EVALUATIONS[self._outputs.problem_type]
        scores = evaluate(model, batches, labels, mesh=mesh, observe=observe, advance=advance).of_a_run()
        return {**scores, VALIDATION_LOSS: loss.mean}

    @property
    def score_names(self) -> tuple[str, ...]:
        return (*SCORES[self._outputs.problem_type], VALIDATION_LOSS)

    def results(self, state: State) -> dict[str, Result]:
        average = self._outputs.in_units(state.average) if state.average else {}
        return super().results(replace(state, params=self._outputs.in_units(state.params), average=average))

    @property
    def _outputs(self) -> Outputs:
        return Outputs.of(self.config) if self.outputs is None else self.outputs


def _recorded(problem: ProblemType, outputs: int) -> ProblemType | None:
    """The kind that a configuration has. transformers refuses to be told that one of a single class holds."""
    return None if problem == "single_label_classification" and outputs == 1 else problem


def classification(recipe: LabelledRecipe, config: BeitConfig, outputs: Outputs | None = None) -> Criterion:
    """Labels of images: ``image`` uint8 [b, h, w, 3] and ``label``, a `targets.Label` for each.

    One class for an image: cross entropy with targets that are a distribution, which serves mixed, smoothed and plain
    labels. Source: microsoft/unilm@768a3c8 beit/run_class_finetuning.py and engine_for_finetuning.py. Classes of which
    several hold: the mean binary cross entropy of all images and classes. Numbers: the mean squared error of all
    images and numbers. Source of both: transformers 5.23 loss/loss_utils.py, `ForSequenceClassificationLoss`.

    Args:
        outputs: by default one of the classes of `config`, each with the same weight.
    """
    augment = recipe.augment
    learned = Outputs.of(config) if outputs is None else outputs

    def prepare(batch: Batch, key: Key[Array, ""]) -> Batch:
        erase_key, mix_key = jax.random.split(key)
        images = erase(erase_key, normalise(batch["image"], recipe.data), augment.erasing)
        targets = learned.targets(batch["label"], augment.smoothing)
        images, mixed = mix(mix_key, images, targets, augment)
        return {"image": images} | learned.prepared(mixed)

    def loss(
        model: Model, batch: Batch, key: Key[Array, ""] | None, teacher: Nested | None
    ) -> tuple[Float[Array, ""], Metrics]:
        logits = model(batch["image"], key=key, remat=recipe.model.remat).logits
        assert logits is not None
        return learned.loss(logits, batch)

    return Criterion(prepare, loss)


def outputs_of(images: Dataset, options: ClassifyOptions, augment: AugmentOptions) -> Outputs:
    """What a model learns of these training images. Weights and standardisation count what their records say.

    Raises:
        BeitJaxError: the data say something else than the options ask for; options that what they say has no use for.
    """
    target, asked = images.target, options.problem_type
    problem = target.problem_type if asked is None else asked
    every_class_for_itself = (target.problem_type, problem) == (
        "single_label_classification",
        "multi_label_classification",
    )
    if problem != target.problem_type and not every_class_for_itself:
        found = f"{_SAID[target.problem_type]} ({printable(target.feature)})"
        raise BeitJaxError(
            f"--classify.problem-type {problem}: expected data that say {_SAID[problem]}, found {found}; leave the "
            "option out, or prepare the data again (beit-jax prepare table)"
        )
    if problem != "regression":
        require(options.standardise, "classify.standardise", "True, classes are no numbers", options.standardise)
        weights = class_weights(options.class_weights, target.names, lambda: _balance(images, problem))
        return Outputs(target, problem, weights)
    smoothing, file = augment.smoothing, options.class_weights
    require(file is None, "classify.class_weights", "none, numbers have no classes", file)
    require(smoothing == 0, "augment.smoothing", "0, numbers have no classes to smooth between", smoothing)
    if not options.standardise:
        return Outputs(target, problem)
    numbers = np.asarray([label for label in images.said()], np.float64)
    std = numbers.std(axis=0)
    return Outputs(
        target,
        problem,
        mean=numbers.mean(axis=0).astype(np.float32),
        std=np.where(std > 0, std, 1.0).astype(np.float32),
    )


def _balance(images: Dataset, problem: ProblemType) -> np.ndarray:
    counts, read = np.zeros(len(images.labels), np.int64), 0
    single = images.target.problem_type == "single_label_classification"
    for label in images.said():
        read += 1
        if single:
            counts[label] += 1
        else:
            counts += label
    return balanced(counts) if problem == "single_label_classification" else balanced_positives(counts, read)
