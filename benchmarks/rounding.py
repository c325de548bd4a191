"""Wall time to round finished layers, beside Brevitas's GPTQ and what the machine must compute.

Layers have random weights, and inputs with a power-law spectrum in a random basis; 3-bit uniform
grid. All methods run in one process, interleaved; times are medians over the rounds, `floor` the
time that the products alone take: in `cooled` those of all steps, in `compensated` the factors of
the Gram matrix and the updates, both at this machine's speed for a product of that size and dtype.
`error` is the squared output error over that of `compensated`.

    python benchmarks/rounding.py [--rounds N] [--threads N]

Brevitas counts where it is installed. It asks for an older setuptools than the book's: give it an
environment of its own, `pip install . brevitas`. Its algorithm runs as it is, in float64 and in its
own float32, on our Gram matrix; only the grid is put in. `equal` is its share of codes that are
ours. `tie` is about rows with another code: how far, at most, the first one's target lies from a
threshold, in steps; targets are computed from the equal codes before, by a linear solve.
"""

import argparse
import importlib.metadata
import importlib.util
import inspect
import platform
import statistics
import time
from types import SimpleNamespace

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from qgen_lab.codebooks import uniform
from qgen_lab.qat import resnet18
from qgen_lab.qat.rounding import LayerProblem, methods

SIZES = {"16 x 144": (16, 144), "256 x 432": (256, 432), "128 x 1152": (128, 1152)}
HAS_BREVITAS = importlib.util.find_spec("brevitas") is not None
STEP = 0.6  # nearly the one of least error for 8 levels and weights of variance 1


def layer(outputs: int, inputs: int) -> LayerProblem:
    """Random weights, and the Gram matrix of four samples an input."""
    rng = torch.Generator().manual_seed(inputs)
    basis, x = torch.randn(2, inputs, inputs, generator=rng, dtype=torch.float64)
    spread = torch.arange(1, inputs + 1) ** -0.5
    x = torch.cat([x, *torch.randn(3, inputs, inputs, generator=rng, dtype=torch.float64)])
    x = x * spread @ torch.linalg.qr(basis)[0]
    weight = torch.randn(outputs, inputs, generator=rng, dtype=torch.float64)
    levels = torch.tensor(uniform(3, 3.5 * STEP).levels)
    return LayerProblem(weight, x.mT @ x, levels[None])


def brevitas_gptq(problem: LayerProblem, dtype: torch.dtype) -> Tensor:
    """Brevitas's GPTQ, columns ordered, on our grid."""
    from brevitas.graph.gptq import GPTQ

    class OnOurGrid(GPTQ):
        def get_quant_weights(self, i, i1, permutation_list):
            column = permutation_list[0][i1 + i]
            return problem.nearest(self.layer.weight[:, column, None]).T

    linear = nn.Linear(*reversed(problem.weight.shape), bias=False, dtype=torch.float64)
    linear.weight.data.copy_(problem.weight)
    linear.weight_quant = SimpleNamespace(requires_quant_input=False)
    gptq = OnOurGrid(linear, "layer", True, 1, False, num_blocks=100, dtype=dtype)
    gptq.H = problem.gram[None].to(dtype, copy=True)
    gptq.single_layer_update()
    return problem.nearest(linear.weight)


METHODS = {
    **methods,
    "coordinate, greedy": lambda *problem: methods["coordinate"](*problem, greedy=True),
}
if HAS_BREVITAS:
    METHODS["Brevitas, float64"] = lambda problem, _: brevitas_gptq(problem, torch.float64)
    METHODS["Brevitas, float32"] = lambda problem, _: brevitas_gptq(problem, torch.float32)


def furthest_tie(problem: LayerProblem, ours: Tensor, theirs: Tensor) -> float:
    """Largest distance, over rows that differ, from the first differing target to a threshold."""
    order = problem.gram.diagonal().argsort(descending=True, stable=True)
    gram = problem.gram[order][:, order]
    gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    change = (ours - problem.weight)[:, order]
    differs = (ours != theirs)[:, order]
    distances = [0.0]
    for row in differs.any(1).nonzero().flatten():
        first = differs[row].int().argmax()
        refit = torch.linalg.solve(gram[first:, first:], gram[first:, :first] @ change[row, :first])
        target = problem.weight[row, order[first]] - refit[0]
        distances.append((problem.thresholds[0] - target).abs().min().item() / STEP)
    return max(distances)


def floor(method: str, outputs: int, inputs: int) -> float:
    """Seconds of the products that a method cannot do without."""
    if method == "cooled":
        option = {n: p.default for n, p in inspect.signature(methods[method]).parameters.items()}
        falls = (1 + option["reheats"]) * option["steps"]
        left = torch.randn(len(option["rates"]) * outputs, inputs)
        return (option["constant_steps"] + falls) * product_seconds(left)
    if method == "compensated" or method.startswith("Brevitas"):
        dtype = torch.float32 if method.endswith("32") else torch.float64
        square = torch.randn(inputs, inputs, dtype=dtype)
        # Two factorizations and an inverse, 4/3 n^3; updates, m n^2; a product, 2 n^3.
        return product_seconds(square) * (2 / 3 + outputs / (2 * inputs))
    return float("nan")


def product_seconds(left: Tensor) -> float:
    """Median seconds of `left @ square`."""
    right = torch.randn(left.shape[1], left.shape[1], dtype=left.dtype)
    return statistics.median(seconds(torch.mm, left, right)[0] for _ in range(20))


def seconds(call, *arguments) -> tuple[float, Tensor]:
    start = time.perf_counter()
    answer = call(*arguments)
    return time.perf_counter() - start, answer


def measure(problem: LayerProblem, rounds: int) -> pd.DataFrame:
    """Each method on one layer."""
    times = {name: [] for name in METHODS}
    answers = {}
    for _ in range(rounds):
        for name, method in METHODS.items():
            taken, answers[name] = seconds(method, problem, problem.weight)
            times[name].append(taken)
    ours = answers["compensated"]
    rows = {}
    for name, answer in answers.items():
        taken, least = statistics.median(times[name]), floor(name, *problem.weight.shape)
        rows[name] = {
            "seconds": taken,
            "ratio to compensated": taken / statistics.median(times["compensated"]),
            "floor, s": least,
            "ratio to floor": taken / least,
            "error": (problem.error(answer).sum() / problem.error(ours).sum()).item(),
        }
        if name.startswith("Brevitas"):
            rows[name]["equal"] = (answer == ours).double().mean().item()
            rows[name]["tie"] = furthest_tie(problem, ours, answer)
    return pd.DataFrame.from_dict(rows, orient="index")


def whole_network() -> pd.DataFrame:
    """Seconds of each method for layers of the sizes of ResNet-18's, base width 16."""
    kinds = nn.Conv2d | nn.Linear
    weights = [part.weight for part in resnet18(base_width=16).modules() if isinstance(part, kinds)]
    total = pd.Series(0.0, METHODS).drop("coordinate, greedy")
    for weight in tqdm(weights, disable=None):
        problem = layer(len(weight), weight[0].numel())
        for name in total.index:
            total[name] += seconds(METHODS[name], problem, problem.weight)[0]
    return total.to_frame("seconds").assign(ratio=total / total["compensated"])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    brevitas = importlib.metadata.version("brevitas") if HAS_BREVITAS else "not installed, left out"
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, Brevitas: {brevitas}, "
        f"{arguments.threads} threads"
    )
    for size, (outputs, inputs) in SIZES.items():
        table = measure(layer(outputs, inputs), arguments.rounds)
        print(f"\n{size} (outputs x inputs), {arguments.rounds} rounds")
        print(table.to_string(na_rep="-", float_format=lambda number: f"{number:.4g}"))
    print("\nAll layers of ResNet-18, base width 16, once")
    print(whole_network().to_string(float_format=lambda number: f"{number:.4g}"))


if __name__ == "__main__":
    main()
