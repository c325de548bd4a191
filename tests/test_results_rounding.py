"""Stored roundings of trained networks: whole, paired, and made by the script as it stands."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from qgen_lab.codebooks import uniform

FOLDER = Path(__file__).parent.parent / "book" / "results" / "rounding_after_training"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("rounding_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_provenance_describes_the_script_as_it_stands(script):
    config = json.loads((FOLDER / "provenance.json").read_text())["config"]
    kinds = {name: dataclasses.asdict(kind) for name, kind in script.KINDS.items()}
    known = json.loads(json.dumps(kinds))
    # Recipes may have gained fields since then, which are at their defaults.
    for name, stored in config["kinds"].items():
        recipe = stored.pop("recipe")
        assert recipe.items() <= known[name].pop("recipe").items()
        assert stored == known[name]
    assert config["layers"]["methods"] == script.LAYER_METHODS
    assert config["power_laws"] == {"exponents": list(script.EXPONENTS), **script.POWER_LAW}


def test_every_network_is_there_trained_and_rounded(script):
    networks = pd.read_csv(FOLDER / "networks.csv")
    expected = [
        (*key, choice.get("quantizer"), choice.get("step"), choice.get("batch_norm"))
        for key in script.roundings(script.KINDS)
        for choice in (
            [{}] if key[-1] == "trained" else script.choices(script.KINDS[key[0]], key[-1])
        )
    ]
    columns = ["network", "seed", "bits", "method", "quantizer", "step", "batch_norm"]
    found = networks[columns].astype(object).where(networks[columns].notna(), None)
    assert list(found.itertuples(index=False, name=None)) == expected
    figures = ["train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    assert np.isfinite(networks[figures]).all(axis=None)


def test_every_layer_of_every_network_is_there(script):
    layers = pd.read_csv(FOLDER / "layers.csv")
    spectra = np.load(FOLDER / "spectra.npz")
    assert set(layers.network) == set(script.KINDS)
    assert set(layers.network + "/" + layers.layer) == set(spectra)
    rows = layers.groupby(["network", "layer"])
    assert (rows.size() == len(script.BITS) * len(script.LAYER_METHODS)).all()
    for (network, layer), inputs in rows.inputs.first().items():
        values = spectra[f"{network}/{layer}"]
        assert len(values) == inputs
        assert values.mean() == pytest.approx(1, rel=1e-4)
        assert (np.diff(values) <= 0).all()


def test_no_method_leaves_more_error_than_nearest_rounding_on_its_own_inputs():
    for name in ("layers", "power_laws"):
        table = pd.read_csv(FOLDER / f"{name}.csv")
        key = [c for c in ("network", "layer", "exponent", "seed", "bits") if c in table]
        errors = table.pivot(index=key, columns="method", values="error")
        assert (errors.le(errors["nearest"] * (1 + 1e-5), axis=0)).all(axis=None)


def test_isotropic_inputs_leave_nothing_to_gain():
    laws = pd.read_csv(FOLDER / "power_laws.csv")
    errors = laws[laws.exponent == 0].pivot(
        index=["bits", "seed"], columns="method", values="error"
    )
    np.testing.assert_allclose(errors, errors[["nearest"] * errors.shape[1]], rtol=1e-4)


def test_floor_is_the_second_moment_of_a_ball(script):
    points = np.random.default_rng(0).standard_normal((200_000, 3))
    radius = (3 / (4 * np.pi)) ** (1 / 3)  # of volume one
    points /= np.linalg.norm(points, axis=1, keepdims=True) / radius
    points *= np.random.default_rng(1).uniform(size=(200_000, 1)) ** (1 / 3)
    assert script.unit_ball_moment(3) == pytest.approx((points**2).mean(), rel=0.01)
    assert script.unit_ball_moment(1) == pytest.approx(1 / 12)
    assert script.unit_ball_moment(10**6) == pytest.approx(1 / (2 * np.pi * np.e), rel=1e-3)
    gram, weight = torch.diag(torch.tensor([4.0, 1.0])).double(), torch.tensor([[1.0, 2.0]])
    floor = 2 * script.unit_ball_moment(2) * 0.5**2 * 2 / (4 + 4)
    assert script.output_floor(gram, uniform(3, 1.75), weight) == pytest.approx(floor)


def test_script_still_runs(script, tmp_path, monkeypatch):
    tiny = dataclasses.replace(
        script.KINDS["digits NiN"],
        data={"name": "digits", "size": 64},
        model=script.NIN | {"width_multiplier": 4},
        recipe=dataclasses.replace(script.KINDS["digits NiN"].recipe, epochs=1),
        seeds=(0,),
        variants=({"batch_norm": "folded"},),
    )
    settings = {
        "HERE": tmp_path,
        "PARTS": tmp_path / "parts",
        "KINDS": {"digits NiN": tiny},
        "BITS": (2,),
        "EXPONENTS": (0.0, 1.0),
        "POWER_LAW": {"inputs": 8, "outputs": 4, "seeds": 1},
    }
    for name, value in settings.items():
        monkeypatch.setattr(script, name, value)
    script.main(["train"], ["digits NiN"])
    assert not (tmp_path / "networks.csv").exists()
    script.main(list(script.STAGES), ["digits NiN"])
    for table in ("networks", "layers", "power_laws"):
        stored = pd.read_csv(FOLDER / f"{table}.csv")
        assert list(pd.read_csv(tmp_path / f"{table}.csv")) == list(stored)
    networks = pd.read_csv(tmp_path / "networks.csv")
    assert len(networks) == 2 + len(script.METHODS) + len(script.VARIED)
    before = (tmp_path / "networks.csv").read_bytes()
    script.main(list(script.STAGES), ["digits NiN"])  # nothing is missing, so nothing is redone
    assert (tmp_path / "networks.csv").read_bytes() == before
