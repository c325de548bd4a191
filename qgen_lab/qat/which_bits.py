"""How few bits a trained model can do with: one table, on validation data, nothing changed.

Bits are a choice, so validation data decide it. A few hundred samples tell the accuracy of one
model to some points only. All models here see the same samples, though, and most samples are right
or wrong in all of them: differences, taken sample by sample, are known far better.
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from qgen_lab.codebooks import check_bits
from qgen_lab.data import Dataset, Splits
from qgen_lab.qat.batch_norm import reestimate_batch_norm
from qgen_lab.qat.batches import Batches, Source
from qgen_lab.qat.divergence import Diverged
from qgen_lab.qat.ensemble.protocol import FULL_PRECISION
from qgen_lab.qat.evaluation import (
    Evaluation,
    Loss,
    Metrics,
    checked_metrics,
    evaluate,
    modes_restored,
)
from qgen_lab.qat.models import seeded
from qgen_lab.qat.packing import packed_bytes
from qgen_lab.qat.quantizers import Quantizer, quantize_weights, quantized_slots
from qgen_lab.qat.quantizers.choice import LayerChoice
from qgen_lab.qat.recipes import Recipe
from qgen_lab.qat.rounding import round_model
from qgen_lab.qat.training import fit

__all__ = ["BitsRow", "BitsTable", "Change", "which_bits"]

_Step = tuple[int, str, Callable[[int], nn.Module], int | None]
Part = Dataset | tuple[Tensor, Tensor] | Batches


@dataclass(frozen=True)
class Change:
    """A mean paired difference and the ends of its interval."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:+.2g} [{self.low:+.2g}, {self.high:+.2g}]"


@dataclass(frozen=True, eq=False, repr=False)
class BitsRow:
    """One model of a `BitsTable`.

    Attributes
    ----------
    bits : int
        Bits of the quantized weights, 32 for full precision.
    procedure : {"as it is", "re-estimated", "rounding", "training"}
        What was done to the model that was given; "re-estimated" are its batch-norm statistics, as
        rounding does it too.
    against : int or None
        The row that it is compared with: full precision after the same procedure.
    model : torch.nn.Module or None
        What came of it, with its quantizers on: ready for `pack`, `bake` or `evaluate`. None if
        training diverged; then all numbers are NaN.
    bytes : int or None
        Size of the packed file, or in full precision of the model's state.
    train : Evaluation
        On the training data.
    values : dict of str to ndarray of shape (samples,)
        Loss and metrics of each validation sample.
    seconds : float
        Wall time of the procedure.
    """

    bits: int
    procedure: str
    against: int | None
    model: nn.Module | None
    bytes: int | None
    train: Evaluation
    values: dict[str, NDArray]
    seconds: float

    def __repr__(self) -> str:
        return (
            f"BitsRow(bits={self.bits}, procedure={self.procedure!r}, "
            f"validation={self.validation}, bytes={self.bytes})"
        )

    @property
    def validation(self) -> Evaluation:
        """Means over the validation samples."""
        means = {name: float(values.mean()) for name, values in self.values.items()}
        return Evaluation(means.pop("loss"), means, len(self.values["loss"]))

    @property
    def generalization_gap(self) -> float:
        """Validation loss less training loss."""
        return self.validation.loss - self.train.loss


@dataclass(frozen=True, eq=False, repr=False)
class BitsTable:
    """Bits against validation loss, metrics, generalization gap and bytes, from `which_bits`.

    It prints as a table; changes have 95% intervals, see `difference`.

    Attributes
    ----------
    rows : list of BitsRow
        The model as it is, the rounded ones, and if asked for those that were trained.
    """

    rows: list[BitsRow]

    def difference(
        self, row: int, against: int, measure: str = "accuracy", level: float = 0.95
    ) -> Change:
        """How a row differs from another on the validation data, sample by sample.

        Parameters
        ----------
        row, against : int
            Numbers of two rows.
        measure : str
            "loss" or the name of a metric.
        level : float
            Confidence level.

        Returns
        -------
        Change
            Mean of ``row - against`` with its interval.

        Raises
        ------
        ValueError
            If the measure is unknown, or `level` not between 0 and 1.

        Notes
        -----
        Student's t on the paired differences. Where a measure is 0 or 1 for each sample, as
        accuracy is, two samples are added, one won and one lost (Bonett and Price 2012, doi
        10.3102/1076998611411915): a few samples of difference, or none, still have an interval that
        covers. It speaks of other samples for these very models, not of models that were trained
        with other seeds, whose spread can be larger.
        """
        known = self.rows[0].values
        if measure not in known:
            raise ValueError(f"measure={measure!r} is not known; the names are: {', '.join(known)}")
        if not 0 < level < 1:
            raise ValueError(f"level={level!r}: a confidence level lies between 0 and 1")
        values, reference = (self.rows[number].values[measure] for number in (row, against))
        return _paired_change(values, reference, level)

    def smallest(self, tolerance: float, metric: str = "accuracy") -> BitsRow:
        """Fewest bytes that surely cost at most `tolerance`, against the model as it is.

        Parameters
        ----------
        tolerance : float
            Loss of the metric that is acceptable; 0.01 is one point of accuracy.
        metric : str
            A metric of which more is better.

        Returns
        -------
        BitsRow
            Of all rows whose 95% interval lies above ``-tolerance``, that of fewest bytes; the
            model as it is, if there is no other.
        """
        sure = [
            row
            for number, row in enumerate(self.rows)
            if number == 0 or self.difference(number, 0, metric).low >= -tolerance
        ]
        return min(sure, key=lambda row: row.bytes)

    def to_frame(self) -> pd.DataFrame:
        """One row a model; changes are against the row whose number `against` gives."""
        frame = pd.DataFrame([self._row(number) for number in range(len(self.rows))])
        return frame.astype({"against": "Int64", "bytes": "Int64"})

    def _row(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        columns = {"bits": row.bits, "procedure": row.procedure}
        for split, found in (("validation", row.validation), ("train", row.train)):
            columns[f"{split}_loss"] = found.loss
            columns |= {f"{split}_{name}": value for name, value in found.metrics.items()}
        columns |= {"generalization_gap": row.generalization_gap, "bytes": row.bytes}
        columns["against"] = row.against
        for measure in row.values:
            change = self._change(number, measure) or Change(np.nan, np.nan, np.nan)
            columns[f"{measure}_change"] = change.estimate
            columns[f"{measure}_change_low"] = change.low
            columns[f"{measure}_change_high"] = change.high
        return columns | {"seconds": row.seconds}

    def _change(self, number: int, measure: str) -> Change | None:
        against = self.rows[number].against
        return None if against is None else self.difference(number, against, measure)

    def _readable(self) -> pd.DataFrame:
        """The same in fewer columns of text."""
        frame = self.to_frame()
        columns = {"bits": frame.bits, "procedure": frame.procedure}
        for measure in reversed(self.rows[0].values):
            columns[measure] = frame[f"validation_{measure}"].map("{:.4g}".format)
            changes = [self._change(number, measure) or "" for number in frame.index]
            columns[f"{measure} change"] = changes
        columns["gap"] = frame.generalization_gap.map("{:.3g}".format)
        columns["bytes"] = ["" if pd.isna(size) else f"{size:,}" for size in frame.bytes]
        columns["against"] = ["" if pd.isna(number) else number for number in frame.against]
        return pd.DataFrame(columns)

    @property
    def _caption(self) -> str:
        return (
            f"On {self.rows[0].validation.size} validation samples; changes are against the row "
            "that is named last, with 95% intervals over samples."
        )

    def __repr__(self) -> str:
        return f"{self._readable().to_string()}\n{self._caption}"

    def _repr_html_(self) -> str:
        return f"{self._readable().to_html()}<p>{self._caption}</p>"


def which_bits(
    model: nn.Module,
    data: Splits | tuple[Part, Part],
    bits: Iterable[int] = (2, 3, 4, 8),
    *,
    method: str = "cooled",
    per_channel: bool = False,
    quantizer: str | Callable[[Tensor, int, int | None], Quantizer] = "uniform",
    layers: LayerChoice | None = None,
    exclude: LayerChoice | None = None,
    calibration: Part | None = None,
    batch_norm: str = "re-estimated",
    recipe: Recipe | None = None,
    loss: Loss = cross_entropy,
    metrics: Metrics | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **options,
) -> BitsTable:
    """Try a trained model on fewer bits: rounded, and if a recipe is given, trained under them.

    Rounding is `round_model`. Training is `quantize_weights` and `fit`, from the weights that the
    model has; beside it the model is trained on in full precision by the same recipe, so that what
    more training does is not taken for what few bits do.

    Parameters
    ----------
    model : torch.nn.Module
        Trained, in full precision. It stays as it is; copies are rounded and trained.
    data : Splits, or pair (train, validation)
        Each part as for `evaluate`. ``(data.train, data.test)`` decides on test data, which are
        then no test any more.
    bits : iterable of int
        From 1 to 16.
    method : str
        How to round: a name in `methods`, as for `round_model`.
    per_channel, quantizer, layers, exclude
        What to quantize and how, for rounding and for training: as for `quantize_weights`.
    calibration : Dataset, (inputs, targets) tensors, or iterable of such batches, optional
        Data to round on; by default the training data. Some hundred to thousand samples save time.
    batch_norm : {"re-estimated", "folded", "kept"}
        As for `round_model`. What re-estimation does by itself stands in a row of its own, with
        which rounding is compared.
    recipe : Recipe, optional
        How to train.
    loss, metrics : callable, dict of str to callable
        As for `fit`; each a mean over samples.
    seed : int
        Of the training.
    progress : bool, optional
        Show a progress bar. By default only on a terminal.
    **options
        Of `round_model`.

    Returns
    -------
    BitsTable
        It holds all models, so that none has to be made again.

    Raises
    ------
    ValueError
        If there are no bits or they are out of range; if the model is quantized; if the data have
        no validation set, fewer than two samples in it, or another order in each pass; or as in
        `round_model` and `fit`.
    TypeError
        If an argument is of a wrong kind.

    Notes
    -----
    A training that diverges leaves a row of NaN.

    Examples
    --------
    >>> from qgen_lab.data import load_dataset
    >>> from qgen_lab.qat import Recipe, fit, nin, which_bits
    >>> data = load_dataset("digits", validation=0.2)
    >>> model = nin(1, 8, in_channels=1, base_width=1, seed=0)
    >>> history = fit(model, data, Recipe(epochs=2))
    >>> table = which_bits(model, data, bits=(2, 4))
    >>> [row.bits for row in table.rows]
    [32, 32, 2, 4]
    """
    wanted = _checked(bits)
    if quantized_slots(model):
        raise ValueError("model is quantized already: give it as it was in full precision")
    if recipe is not None and not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, such as recipes['qgen-nin'], got {recipe!r}")
    train, validation = _parts(data)
    calibration = train if calibration is None else calibration
    shared = {"quantizer": quantizer, "layers": layers, "exclude": exclude}
    reestimated = batch_norm == "re-estimated" and Source(calibration, model).has_batch_norm

    def as_it_is(bits: int) -> nn.Module:
        return model

    def rounded(bits: int) -> nn.Module:
        found = copy.deepcopy(model)
        if bits == FULL_PRECISION:
            return reestimate_batch_norm(found, calibration)
        given = shared | options | {"batch_norm": batch_norm, "progress": False}
        round_model(found, calibration, bits, method, per_channel, **given)
        return found

    def trained(bits: int) -> nn.Module:
        found = copy.deepcopy(model)
        if bits != FULL_PRECISION:
            quantize_weights(found, bits, per_channel=per_channel, **shared)
        fit(found, train, recipe, loss, metrics={}, seed=seed, progress=False)
        return found

    # Bits, procedure, what does it, and the row to compare with: the last in full precision.
    plan = [(FULL_PRECISION, "as it is", as_it_is, None)]
    if reestimated:
        plan.append((FULL_PRECISION, "re-estimated", rounded, 0))
    twin = len(plan) - 1
    plan += [(bits, "rounding", rounded, twin) for bits in wanted]
    if recipe is not None:
        plan.append((FULL_PRECISION, "training", trained, 0))
        twin = len(plan) - 1
        plan += [(bits, "training", trained, twin) for bits in wanted]
    return BitsTable(_rows(plan, _Judge(train, validation, loss, metrics), progress))


def _rows(plan: list[_Step], judge: "_Judge", progress: bool | None) -> list[BitsRow]:
    """Make and measure one model after another."""
    rows: list[BitsRow] = []
    with tqdm(plan, disable=None if progress is None else not progress, unit="model") as bar:
        for bits, procedure, make, against in bar:
            bar.set_description(f"{procedure}, {bits} bits")
            start = time.perf_counter()
            try:
                model = make(bits)
            except Diverged:
                model = None
            seconds = time.perf_counter() - start
            numbers = _no_numbers(rows[0]) if model is None else judge.numbers(model)
            rows.append(BitsRow(bits, procedure, against, model, *numbers, seconds))
    return rows


def _checked(bits: Iterable[int]) -> list[int]:
    if not isinstance(bits, Iterable) or isinstance(bits, str):
        raise TypeError(f"bits = {bits!r}: give several, such as (2, 3, 4, 8)")
    wanted = [check_bits(each) for each in bits]
    if not wanted:
        raise ValueError("bits is empty: give some, such as (2, 3, 4, 8)")
    return wanted


def _parts(data: Any) -> tuple[Part, Part]:
    """Training and validation data."""
    if isinstance(data, Splits):
        if data.validation is None:
            raise ValueError(
                "data has no validation set, and test data are not for choosing: set one apart "
                "by load_dataset(..., validation=0.1), or give a pair (train, validation)"
            )
        return data.train, data.validation
    is_pair = isinstance(data, tuple) and len(data) == 2
    if not is_pair or any(isinstance(part, Tensor) for part in data):
        raise TypeError(
            "data must be Splits, or a pair (train, validation) of Datasets, pairs of tensors or "
            f"loaders, so that there is something to choose on; got {type(data).__name__}"
        )
    return data


class _Judge:
    """Measures models on the same data."""

    def __init__(self, train: Part, validation: Part, loss: Loss, metrics: Metrics | None) -> None:
        self.train, self.validation = train, validation
        self.loss, self.metrics = loss, metrics
        self.first_targets: NDArray | None = None

    def numbers(self, model: nn.Module) -> tuple[int, Evaluation, dict[str, NDArray]]:
        """Bytes, training loss and metrics, and those of each validation sample."""
        size = packed_bytes(model) if quantized_slots(model) else _state_bytes(model)
        return size, evaluate(model, self.train, self.loss, self.metrics), self.values(model)

    @torch.no_grad()
    def values(self, model: nn.Module) -> dict[str, NDArray]:
        """Loss and metrics of each validation sample, in evaluation mode."""
        source = Source(self.validation, model)
        with modes_restored(model), seeded(0, source.device):
            metrics = checked_metrics(model, source, self.loss, self.metrics)
            measures = {"loss": self.loss, **metrics, "targets": lambda _, targets: targets}
            found: dict[str, list[Tensor]] = {name: [] for name in measures}
            model.eval()
            for inputs, targets in source.batches():
                samples = list(zip(model(inputs).split(1), targets.split(1), strict=True))
                for name, measure in measures.items():
                    found[name] += [torch.as_tensor(measure(*s)).double().mean() for s in samples]
        values = {name: torch.stack(each).cpu().numpy() for name, each in found.items()}
        self._check_order(values.pop("targets"))
        return values

    def _check_order(self, targets: NDArray) -> None:
        if len(targets) < 2:
            raise ValueError("the validation set has one sample: give two or more")
        if self.first_targets is None:
            self.first_targets = targets
        if not np.array_equal(targets, self.first_targets):
            raise ValueError(
                "the validation data come in another order in each pass: do not shuffle them"
            )


def _no_numbers(row: BitsRow) -> tuple[None, Evaluation, dict[str, NDArray]]:
    """What a training that diverged leaves, shaped as another row."""
    train = Evaluation(np.nan, dict.fromkeys(row.train.metrics, np.nan), row.train.size)
    return None, train, {name: np.full_like(each, np.nan) for name, each in row.values.items()}


def _state_bytes(model: nn.Module) -> int:
    tensors = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _paired_change(values: NDArray, reference: NDArray, level: float) -> Change:
    difference = values - reference
    estimate = float(difference.mean())
    if np.isin([values, reference], (0, 1)).all():
        difference = np.append(difference, [1, -1])  # Bonett and Price: one more won, one more lost
    n = len(difference)
    half = stats.t.ppf((1 + level) / 2, n - 1) * difference.std(ddof=1) / n**0.5
    low, high = difference.mean() + np.array([-half, half])
    return Change(estimate, float(low), float(high))
