"""Follow one learned step through one training run: `python book/results/step_kick/run.py`.

The run is the 8-bit network of `digits_qat` with label noise and seed 1, and the layer is the one
whose step is thrown up in it. It was chosen because it shows the event, not as a typical run.
"""

import time
from pathlib import Path

import pandas as pd
import torch

from qgen_lab.data import load_dataset
from qgen_lab.experiments.provenance import provenance, write_json
from qgen_lab.qat import Recipe, fit, nin, quantize_weights, step_sizes

HERE = Path(__file__).parent
BITS, SEED, LAYER = 8, 1, "12"
RECIPE = Recipe(
    epochs=45, batch_size=64, learning_rate=0.05, schedule="multi-step", milestones=(30, 40)
)


def follow(recipe: Recipe) -> pd.DataFrame:
    """Step over weight spread and number of clipped weights, before each update."""
    model = nin(depth=2, width_multiplier=32, base_width=1, in_channels=1, seed=SEED)
    quantize_weights(model, BITS)
    layer, rows = model.get_submodule(LAYER), []

    def record(model, inputs):
        if model.training:
            weight = layer.parametrizations.weight.original.detach()
            step = step_sizes(model)[LAYER]
            codes = weight / step
            clipped = (codes >= 2 ** (BITS - 1) - 1) | (codes <= -(2 ** (BITS - 1)))
            rows.append((len(rows), float(step / weight.std()), int(clipped.sum())))

    model.register_forward_pre_hook(record)
    fit(model, load_dataset("digits", seed=SEED, label_noise=0.25), recipe, seed=SEED)
    return pd.DataFrame(rows, columns=["update", "relative_step", "clipped"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = {"bits": BITS, "layer": LAYER, "label_noise": 0.25, "recipe": vars(RECIPE)}
    start = time.perf_counter()
    frame = follow(RECIPE)
    seconds = time.perf_counter() - start
    frame.to_csv(HERE / "steps.csv", index=False, float_format="%.4g")
    command = "python book/results/step_kick/run.py"
    write_json(provenance(command, config, [SEED], seconds), HERE / "provenance.json")
