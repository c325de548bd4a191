import os
import subprocess
import sys

import pytest
import torch

from qgen_lab._torchvision import _SCHEMAS, torchvision


def run(code):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True
    )


def test_its_python_half_works():
    model = torchvision.models.resnet18(num_classes=3).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    image = torchvision.transforms.functional.hflip(torch.arange(4.0).reshape(1, 2, 2))
    assert image.tolist() == [[[1, 0], [3, 2]]]


def test_the_two_operators_are_declared():
    for name in _SCHEMAS:
        schema = getattr(torch.ops.torchvision, name).default._schema
        assert [argument.name for argument in schema.arguments] == [
            "dets",
            "scores",
            "iou_threshold",
        ]


def test_it_recovers_from_a_plain_import_that_failed():
    done = run(
        "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"
        "from qgen_lab._torchvision import torchvision\n"
        "torchvision.models.resnet18(num_classes=2)"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torchvision.extension._has_ops(), reason="compiled operators are loaded here")
def test_operators_that_are_there_are_not_declared_again():
    # As beside a torch that the compiled operators fit.
    done = run(
        "import torch\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "library.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "from qgen_lab._torchvision import torchvision"
    )
    assert done.returncode == 0, done.stderr


def test_without_torchvision_the_message_says_what_to_do():
    done = run(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torchvision' else find(name, *a)\n"
        "import qgen_lab._torchvision"
    )
    assert "pip install torchvision" in done.stderr
