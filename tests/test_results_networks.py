"""Stored results of the chapter on training beyond `digits_qat`: whole, and paired as they say."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qgen_lab.qat import Recipe

RESULTS = Path(__file__).parent.parent / "book" / "results"
TINY_DIGITS = {"name": "digits", "size": 128}


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"{name}_run", RESULTS / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_folder(script, monkeypatch, folder, **settings):
    """Let a script write into `folder`, with smaller settings."""
    for name, value in {"HERE": folder, "PARTS": folder / "parts", **settings}.items():
        monkeypatch.setattr(script, name, value)
    return script


@pytest.mark.parametrize("name", ["cifar_resnet", "digits_bits", "bin_widths"])
def test_provenance_describes_the_script_as_it_stands(name):
    script, record = load_script(name), json.loads((RESULTS / name / "provenance.json").read_text())
    assert record["config"]["bits"] == list(script.BITS)
    if name != "digits_bits":
        assert Recipe(**record["config"]["recipe"]) == script.RECIPE
        assert record["config"]["data"] == script.DATA
        assert record["seeds"] == list(getattr(script, "SEEDS", [getattr(script, "SEED", None)]))


def test_every_cifar_run_is_there_once_with_equal_budget():
    script, runs = load_script("cifar_resnet"), pd.read_csv(RESULTS / "cifar_resnet/runs.csv")
    keys = [(bits, seed) for bits in script.BITS for seed in script.SEEDS]
    assert list(runs[["bits", "seed"]].itertuples(index=False, name=None)) == keys
    curves = pd.read_csv(RESULTS / "cifar_resnet/curves.csv")
    epochs = curves.groupby(["bits", "seed"]).epoch.agg(list)
    assert set(epochs.index) == {k for k, gone in zip(keys, runs.diverged, strict=True) if not gone}
    assert all(counted == list(range(1, script.RECIPE.epochs + 1)) for counted in epochs)
    lowest = curves.groupby(["bits", "seed"]).train_loss.min()
    kept = runs[~runs.diverged].set_index(["bits", "seed"]).train_loss
    np.testing.assert_allclose(kept.sort_index(), lowest.sort_index(), rtol=1e-5)


def test_cifar_losses_image_by_image_agree_with_their_mean():
    losses = np.load(RESULTS / "cifar_resnet/test_losses.npz")
    for run in pd.read_csv(RESULTS / "cifar_resnet/runs.csv").query("~diverged").itertuples():
        stored = losses[f"{run.bits}-{run.seed}"].astype(float)
        assert stored.shape == (10_000,)
        assert stored.mean() == pytest.approx(run.test_loss, rel=1e-3)


@pytest.mark.parametrize("name", ["cifar_resnet", "bin_widths"])
def test_every_layer_has_its_width(name):
    widths = pd.read_csv(RESULTS / name / "widths.csv")
    run = ["bits", "seed"] if name == "cifar_resnet" else ["model", "bits"]
    layers = widths.groupby(run).layer.agg(list)
    for _, same_model in layers.groupby(level=0) if run[0] == "model" else [("", layers)]:
        assert all(names == same_model.iloc[0] for names in same_model)
    assert (widths[["bin_width", "weight_std"]] > 0).all(axis=None)


def test_twins_trained_again_are_the_same():
    first, again = (
        pd.read_csv(RESULTS / name / "runs.csv") for name in ("digits_qat", "digits_bits")
    )
    key = ["condition", "bits", "seed"]
    again = again[again.bits == 32].set_index(key)
    assert len(again) == 2 * 8
    columns = ["train_loss", "test_loss", "test_accuracy"]
    pd.testing.assert_frame_equal(again[columns], first.set_index(key).loc[again.index, columns])


def test_cifar_script_still_runs(tmp_path, monkeypatch):
    script = load_script("cifar_resnet")
    recipe = dataclasses.replace(script.RECIPE, epochs=1)
    model = {"name": "resnet18", "base_width": 2, "in_channels": 1}
    in_folder(script, monkeypatch, tmp_path, BITS=(32, 2), SEEDS=(0,), RECIPE=recipe)
    in_folder(script, monkeypatch, tmp_path, MODEL=model, DATA=TINY_DIGITS)
    script.main([0])
    for table in ("runs", "curves", "widths"):
        stored = pd.read_csv(RESULTS / f"cifar_resnet/{table}.csv")
        assert pd.read_csv(tmp_path / f"{table}.csv").columns.tolist() == stored.columns.tolist()
    before = (tmp_path / "runs.csv").read_bytes()
    script.main([0])  # nothing is missing, so nothing is trained again
    assert (tmp_path / "runs.csv").read_bytes() == before


def test_bin_width_script_still_runs(tmp_path, monkeypatch):
    script = load_script("bin_widths")
    recipe = dataclasses.replace(script.RECIPE, epochs=1)
    models = {"ResNet-50": {"name": "resnet50", "base_width": 2, "in_channels": 1}}
    in_folder(script, monkeypatch, tmp_path, BITS=(4,), RECIPE=recipe)
    in_folder(script, monkeypatch, tmp_path, MODELS=models, DATA=TINY_DIGITS)
    script.main()
    stored = pd.read_csv(RESULTS / "bin_widths/widths.csv")
    assert pd.read_csv(tmp_path / "widths.csv").columns.tolist() == stored.columns.tolist()


def test_digits_script_still_runs(tmp_path, monkeypatch):
    script = load_script("digits_bits")
    in_folder(script, monkeypatch, tmp_path, BITS=(32, 1), SEEDS=(0,))
    tiny = {name: dataclasses.replace(r, epochs=1) for name, r in script.digits.RECIPES.items()}
    monkeypatch.setattr(script.digits, "RECIPES", tiny)
    monkeypatch.setattr(script.digits, "MODEL", script.digits.MODEL | {"width_multiplier": 4})
    script.main()
    stored = pd.read_csv(RESULTS / "digits_bits/runs.csv")
    assert pd.read_csv(tmp_path / "runs.csv").columns.tolist() == stored.columns.tolist()
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 2 * 2
