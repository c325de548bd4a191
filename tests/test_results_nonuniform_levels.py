"""Stored runs with even and uneven levels: whole, paired, and made by the script as it stands."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

FOLDER = Path(__file__).parent.parent / "book" / "results" / "nonuniform_levels"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("nonuniform_levels_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_provenance_describes_the_script_as_it_stands(script):
    record = json.loads((FOLDER / "provenance.json").read_text())
    today = {
        "cells": script.CELLS,
        "widths": script.WIDTHS,
        "model": script.MODEL,
        "conditions": script.CONDITIONS,
    }
    today = json.loads(json.dumps(today))
    assert {name: record["config"][name] for name in today} == today
    for name, recipe in script.RECIPES.items():
        stored = record["config"]["recipes"][name]
        known = json.loads(json.dumps(dataclasses.asdict(recipe)))
        assert {field: known[field] for field in stored} == stored


def test_every_cell_has_every_seed(script):
    runs = pd.read_csv(FOLDER / "runs.csv")
    found = set(zip(runs.condition, runs.quantizer, runs.bits, runs.seed, strict=True))
    expected = {(c, q, b, s) for c in script.CONDITIONS for q, b in script.CELLS
                for s in script.SEEDS}  # fmt: skip
    assert found == expected
    assert len(runs) == len(expected)
    figures = runs[~runs.diverged][["train_loss", "test_loss", "test_accuracy", "relative_noise"]]
    assert np.isfinite(figures).all(axis=None)


def test_one_run_writes_its_row(script, tmp_path, monkeypatch):
    recipe = dataclasses.replace(script.RECIPES["few-images"], epochs=1, milestones=(1,))
    settings = {
        "HERE": tmp_path,
        "PARTS": tmp_path / "parts",
        "SEEDS": (0,),
        "CONDITIONS": {"few-images": {"size": 64}},
        "RECIPES": {"few-images": recipe},
        "CELLS": [("full precision", 32), ("Lloyd-Max, learned", 2), ("even, held", 3)],
    }
    for name, value in settings.items():
        monkeypatch.setattr(script, name, value)
    script.main([0])
    runs = pd.read_csv(tmp_path / "runs.csv").set_index("quantizer")
    assert runs.relative_noise["full precision"] == 0
    assert (runs.relative_noise.drop("full precision") > 0.05).all()
    assert json.loads((tmp_path / "provenance.json").read_text())["seeds"] == [0]
