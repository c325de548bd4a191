"""One model after another, by `fit`: supports whatever `fit` supports."""

from tqdm import tqdm

from qgen_lab.qat.ensemble.protocol import Cohort, Outcome
from qgen_lab.qat.training import Diverged, fit


class Sequential:
    """The reference: every other engine gives what this one gives."""

    name = "sequential"

    def refuses(self, cohort: Cohort) -> str | None:
        """Only more than one worker: `fit` draws from PyTorch's one global random state."""
        return "it has one worker only" if cohort.workers > 1 else None

    def fit(self, cohort: Cohort, bar: tqdm) -> list[Outcome]:
        """Call `fit` for each member."""
        outcomes = []
        epochs = cohort.members[0].recipe.epochs
        for number, (model, member) in enumerate(
            zip(cohort.models, cohort.members, strict=True), start=1
        ):
            try:
                history = fit(
                    model,
                    cohort.data,
                    member.recipe,
                    cohort.loss,
                    cohort.metrics,
                    seed=member.seed,
                    progress=False,
                )
                outcomes.append(Outcome(history))
            except Diverged as problem:
                model.eval()
                outcomes.append(Outcome(problem.history, problem))
            bar.set_description(f"model {number}/{len(cohort)}")
            bar.update(epochs)
        return outcomes
