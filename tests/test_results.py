"""Stored results: each says where it came from, is whole, and compares like with like."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qgen_lab.qat import Recipe

RESULTS = Path(__file__).parent.parent / "book" / "results"
DIGITS = RESULTS / "digits_qat"


def load_script():
    spec = importlib.util.spec_from_file_location("digits_qat_run", DIGITS / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script():
    return load_script()


@pytest.fixture(scope="module")
def runs():
    return pd.read_csv(DIGITS / "runs.csv")


@pytest.fixture(scope="module")
def keys(script):
    return [(c, b, s) for c in script.CONDITIONS for b in script.BITS for s in script.SEEDS]


experiments = sorted(
    path for path in RESULTS.iterdir() if path.is_dir() and path.name != "published"
)


@pytest.mark.parametrize("folder", experiments, ids=lambda path: path.name)
def test_every_stored_result_says_where_it_came_from(folder):
    record = json.loads((folder / "provenance.json").read_text())
    for field in ("command", "config", "seeds", "seconds", "date", "revision", "versions"):
        assert record[field] is not None, field


def test_provenance_describes_the_script_as_it_stands(script):
    record = json.loads((DIGITS / "provenance.json").read_text())
    today = {"bits": script.BITS, "model": script.MODEL, "conditions": script.CONDITIONS}
    today = json.loads(json.dumps(today))
    assert {name: record["config"][name] for name in today} == today
    # Fields that recipes gained since then are at their defaults.
    stored = {name: Recipe(**recipe) for name, recipe in record["config"]["recipes"].items()}
    assert stored == script.RECIPES
    assert record["seeds"] == list(script.SEEDS)


def test_every_run_is_there_once(runs, keys):
    assert list(runs[["condition", "bits", "seed"]].itertuples(index=False, name=None)) == keys


def test_no_figure_is_missing_but_where_a_run_diverged(runs):
    whole = runs[~runs.diverged].drop(columns=[c for c in runs if "true" in c or "wrong" in c])
    assert np.isfinite(whole.select_dtypes("number")).all(axis=None)
    noisy = runs[~runs.diverged & (runs.condition == "label-noise")]
    assert np.isfinite(noisy.wrong_labels_learned).all()


def test_every_run_of_a_condition_had_the_same_budget(script, runs):
    curves = np.load(DIGITS / "curves.npz")
    for condition, recipe in script.RECIPES.items():
        assert recipe.stop_at_loss is None
        shape = (len(script.BITS), len(script.SEEDS), 4, recipe.epochs)
        assert curves[condition].shape == shape
        diverged = runs[runs.condition == condition].diverged.to_numpy().reshape(shape[:2])
        np.testing.assert_array_equal(np.isnan(curves[condition]).all(axis=(2, 3)), diverged)


def test_kept_model_is_the_one_of_lowest_clean_training_loss(script, runs):
    curves = np.load(DIGITS / "curves.npz")
    for condition in script.CONDITIONS:
        rows = runs[(runs.condition == condition) & ~runs.diverged]
        for row in rows.itertuples():
            train, running, test, _ = curves[condition][
                script.BITS.index(row.bits), script.SEEDS.index(row.seed)
            ]
            assert train[row.kept_epoch - 1] == train.min()
            assert row.train_loss == pytest.approx(train.min(), rel=1e-4)
            assert row.running_loss == pytest.approx(running[row.kept_epoch - 1], rel=1e-4)
            assert row.test_loss == pytest.approx(test[row.kept_epoch - 1], rel=1e-4)


def test_losses_image_by_image_agree_with_their_mean(script, runs):
    losses = np.load(DIGITS / "test_losses.npz")
    for condition in script.CONDITIONS:
        means = losses[condition].astype(float).mean(axis=2).ravel()
        stored = runs[runs.condition == condition].test_loss
        np.testing.assert_allclose(means, stored, rtol=2e-3)


def test_every_layer_of_every_quantized_run_has_its_step(script, runs):
    steps = pd.read_csv(DIGITS / "steps.csv")
    layers = steps.groupby(["condition", "bits", "seed"]).layer.nunique()
    quantized = runs[(runs.bits < 32) & ~runs.diverged]
    assert set(layers.index) == set(
        quantized[["condition", "bits", "seed"]].itertuples(index=False, name=None)
    )
    assert layers.nunique() == 1
    assert (steps.step > 0).all()


def test_script_still_runs(tmp_path, monkeypatch):
    script = load_script()
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(script, "BITS", (32, 2))
    monkeypatch.setattr(script, "SEEDS", (0,))
    monkeypatch.setattr(script, "MODEL", script.MODEL | {"width_multiplier": 4})
    short = {name: dataclasses.replace(recipe, epochs=1) for name, recipe in script.RECIPES.items()}
    monkeypatch.setattr(script, "RECIPES", short)
    script.main([0])
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert len(runs) == 3 * 2
    assert runs.columns.tolist() == pd.read_csv(DIGITS / "runs.csv").columns.tolist()
    twins = runs[runs.condition == "label-noise"].set_index(["bits", "seed"])
    assert (twins.train_loss > twins.true_train_loss).all()
    whole = json.loads((tmp_path / "provenance.json").read_text())
    assert whole["seeds"] == [0]
    before = (tmp_path / "runs.csv").read_bytes()
    script.main([0])  # nothing is missing, so nothing is trained again
    assert (tmp_path / "runs.csv").read_bytes() == before


def test_published_gaps_are_the_printed_ones_not_recomputed():
    table = pd.read_csv(RESULTS / "published" / "table1_generalization_gap.csv")
    off = (table.gap - (table.test_loss - table.train_loss)).abs()
    assert len(table) == 20
    assert off.max() < 0.011
    assert (off > 1e-6).sum() == 7  # five disagree, two are rounded to two digits
