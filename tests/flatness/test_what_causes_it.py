"""The stored experiment of the chapter "What causes it?": whole, and its script as it stands."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qgen_lab import qat
from qgen_lab.data import load_dataset
from qgen_lab.flatness.function import weight_function

FOLDER = Path(__file__).parents[2] / "book" / "results" / "what_causes_it"
TABLES = ("runs", "curves", "sharpness", "widths")


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("what_causes_it_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclass asks where it lives
    spec.loader.exec_module(module)
    return module


def test_provenance_describes_the_script_as_it_stands(script):
    record = json.loads((FOLDER / "provenance.json").read_text())
    today = {
        "conditions": script.CONDITIONS,
        "validation": script.VALIDATION,
        "arms": {name: dataclasses.asdict(arm) for name, arm in script.ARMS.items()},
        "left_out": script.LEFT_OUT,
        "sharpness": {
            "sigma": script.SIGMA,
            "radius": script.RADIUS,
            "draws": script.DRAWS,
            "images": script.IMAGES,
        },
    }
    assert {name: record["config"][name] for name in today} == json.loads(json.dumps(today))
    assert record["seeds"] == list(script.SEEDS)


def test_every_run_is_there_once_and_has_its_figures(script):
    runs = pd.read_csv(FOLDER / "runs.csv")
    keys = [(c, a, s) for c in script.CONDITIONS for a in script.arms_of(c) for s in script.SEEDS]
    assert list(runs[["condition", "arm", "seed"]].itertuples(index=False, name=None)) == keys
    assert np.isfinite(runs.select_dtypes("number")).all(axis=None)
    deployed = pd.read_csv(FOLDER / "sharpness.csv").query("around == 'deployed'")
    assert len(deployed) == len(runs) * len(script.SIGMA)


def test_curves_belong_to_full_precision(script):
    curves = pd.read_csv(FOLDER / "curves.csv")
    assert set(curves.arm) == {"full"}
    for condition, recipe in script.RECIPES.items():
        epochs = curves[curves.condition == condition].groupby("seed").epoch
        assert (epochs.max() == recipe.epochs).all()
        assert (epochs.size() == recipe.epochs).all()


def test_noise_has_the_bin_widths_that_it_is_given(script, monkeypatch):
    monkeypatch.setattr(script, "widths_of", lambda condition, seed, bits: {"3": 0.7})
    model = script.build("few-images", script.ARMS["noise-2"], seed=0)
    spread = model[3].parametrizations.weight.original.std(correction=0).item()
    assert {n: d.item() for n, d in qat.bin_widths(model).items()} == {
        "3": pytest.approx(0.7 * spread, rel=1e-5)
    }


def test_uphill_has_its_length_and_is_the_steepest(script):
    generator = torch.Generator().manual_seed(0)
    weights, gradient = (
        {name: torch.randn(2, 3, 1, 1, generator=generator) for name in "ab"} for _ in range(2)
    )
    for scales in script.weight_scales(weights).values():
        there = script.uphill(weights, scales, gradient, 0.3)
        step = {name: there[name] - weights[name] for name in weights}
        length = math.sqrt(sum((step[n] / scales[n]).square().sum().item() for n in step))
        assert length == pytest.approx(0.3, rel=1e-5)
        first_order = sum((step[n] * gradient[n]).sum().item() for n in step)
        for _ in range(20):
            other = {n: torch.randn(w.shape, generator=generator) for n, w in weights.items()}
            norm = math.sqrt(sum(d.square().sum().item() for d in other.values()))
            rise = sum((0.3 / norm * scales[n] * d * gradient[n]).sum() for n, d in other.items())
            assert rise.item() < first_order


def test_places_agree_where_nothing_is_added(script):
    data = load_dataset("digits", size=300).train
    model = qat.nin(2, 4, in_channels=1, base_width=1, seed=0)
    qat.quantize_weights(model, 2)
    qat.fit(model, data, qat.Recipe(epochs=1, reestimate_batch_norm=True, keep="last"))
    few = data.take(torch.arange(script.IMAGES))
    function = weight_function(model, few, loss="cross_entropy")
    through = script.loss_through(model, function, script.floats(model)).item()
    assert through == pytest.approx(qat.evaluate(model, few).loss, rel=1e-4)
    assert through == pytest.approx(script.loss_at(function, function.weights).item(), rel=1e-4)
    plain = script.without_quantizers(model, data)
    assert not qat.bin_widths(plain)
    assert torch.equal(plain[0].weight, script.floats(model)["0"])


def test_script_still_runs(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(script, "SEEDS", (0,))
    monkeypatch.setattr(script, "DRAWS", 1)
    kept = ("full", "lsq-2", "noise-2", "penalty-2", "sam-0.15-lsq-2")
    monkeypatch.setattr(script, "ARMS", {name: script.ARMS[name] for name in kept})
    short = {name: dataclasses.replace(recipe, epochs=1) for name, recipe in script.RECIPES.items()}
    monkeypatch.setattr(script, "RECIPES", short)
    script.main()
    for table in TABLES:
        columns = pd.read_csv(tmp_path / f"{table}.csv").columns.tolist()
        assert columns == pd.read_csv(FOLDER / f"{table}.csv").columns.tolist()
    assert len(pd.read_csv(tmp_path / "runs.csv")) == sum(map(len, map(script.arms_of, short)))
    before = (tmp_path / "runs.csv").read_bytes()
    script.main()  # nothing is missing, so nothing is trained again
    assert (tmp_path / "runs.csv").read_bytes() == before
