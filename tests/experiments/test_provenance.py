import json

import numpy as np
import pytest
import torch

import qgen_lab
from qgen_lab.experiments.provenance import git_revision, provenance, write_json


def test_record_is_whole_and_survives_json(tmp_path):
    record = provenance("python run.py", {"epochs": 3}, seeds=np.arange(2), seconds=12.34)
    write_json(record, tmp_path / "provenance.json")
    assert json.loads((tmp_path / "provenance.json").read_text()) == record
    assert record["seeds"] == [0, 1]
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["qgen_lab"] == qgen_lab.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["device"]


def test_revision_outside_a_checkout_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))  # tmp may lie in a checkout
    monkeypatch.setattr(qgen_lab, "__file__", str(tmp_path / "__init__.py"))
    assert git_revision() == "unknown"


def test_config_that_is_not_json_is_refused():
    with pytest.raises(TypeError):
        provenance("command", {"model": object()}, seeds=[0], seconds=1.0)
