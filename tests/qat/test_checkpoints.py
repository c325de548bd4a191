import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from qgen_lab.data import load_dataset
from qgen_lab.qat.checkpoints import Checkpoint, CheckpointRefused
from qgen_lab.qat.models import seeded
from qgen_lab.qat.quantizers import quantize_weights, registry
from qgen_lab.qat.recipes import Recipe
from qgen_lab.qat.schedules import Cooldown
from qgen_lab.qat.training import Diverged, fit

PLAIN = Recipe(epochs=3, batch_size=16, learning_rate=0.3, augmentation="crop")
RECIPES = {
    # The rate rises a thousandfold and more: the first epoch is the one to keep.
    "kept epoch": replace(PLAIN, learning_rate=0.03, schedule="exponential", gamma=1e4),
    "sharpness": replace(
        PLAIN,
        optimizer="adam",
        learning_rate=0.02,
        sharpness_radius=0.05,
        cooldown=Cooldown(2, 0.8),
        reestimate_batch_norm=True,
    ),
    "average": replace(PLAIN, optimizer="adamw", keep="last", average_codes_from=0.3),
    "autocast": replace(PLAIN, optimizer="rmsprop", precision="bfloat16", learning_rate=0.01),
}


class Killed(Exception):
    """Stands for the end of the process."""


def dropout_net(bits=2, seed=0, channels=4, quantizer="lsq"):
    """Everything random and everything with a state: batch norm, dropout, quantizers."""
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(16 * channels, 10),
        )
    return quantize_weights(model, bits, quantizer)


@cache
def digits(seed=0):
    return load_dataset("digits", validation=0.01, size=40, seed=seed)


def kill_at(model, step, kill):
    """Call `kill` at the beginning of a training step, counted from 1; 3 steps an epoch."""
    passes = []

    def count(model, inputs):
        passes.append(model.training)
        if model.training and sum(passes) == step:
            kill()

    model.register_forward_pre_hook(count)
    return model


def killed():
    raise Killed


def result(recipe, model=None, data=None, **options):
    """All that a run ends with but its seconds."""
    model = dropout_net() if model is None else model
    history = fit(model, data or digits(), recipe, seed=4, **options)
    frame = history.to_frame().drop(columns="seconds")
    ends = frame.to_dict("list"), history.kept_epoch, history.train, history.validation
    return {name: value.clone() for name, value in model.state_dict().items()}, ends


def assert_equal(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


# Killed and resumed


@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_every_step_and_resumed(tmp_path, name):
    recipe = RECIPES[name]
    expected = result(recipe)
    assert name != "kept epoch" or expected[1][1] == 1
    passes = 2 if recipe.sharpness_radius else 1
    for step in range(1, 9 * passes + 1):
        path = tmp_path / f"{step}.pt"
        with pytest.raises(Killed):
            result(recipe, kill_at(dropout_net(), step, killed), checkpoint=path)
        assert_equal(result(recipe, checkpoint=path), expected)


@pytest.mark.parametrize("quantizer", registry)
def test_every_quantizer_goes_on(tmp_path, quantizer):
    def model():
        return dropout_net(quantizer=quantizer)

    with pytest.raises(Killed):
        result(PLAIN, kill_at(model(), 5, killed), checkpoint=tmp_path / "run.pt")
    resumed = result(PLAIN, model(), checkpoint=tmp_path / "run.pt")
    assert_equal(resumed, result(PLAIN, model()))


@pytest.mark.parametrize("step", [2, 5, 8])
def test_checkpoints_of_every_second_epoch_and_after_the_last(tmp_path, step):
    recipe, options = PLAIN, {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2}
    with pytest.raises(Killed):
        result(recipe, kill_at(dropout_net(), step, killed), **options)
    resumed = kill_at(dropout_net(), 1 + 9 - (6 if step > 6 else 0), killed)
    assert_equal(result(recipe, resumed, **options), result(recipe))
    result(recipe, kill_at(dropout_net(), 1, killed), **options)  # finished: no step is left


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_while_writing(tmp_path, monkeypatch, call):
    expected, plain = result(PLAIN), getattr(os, call)
    writes = 4 if call == "fsync" else 7  # the first file replaces none
    for number in range(1, writes + 1):
        path = tmp_path / f"{number}.pt"
        left = [number]

        def dies(*arguments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            plain(*arguments)

        monkeypatch.setattr(os, call, dies)
        with pytest.raises(Killed):
            result(PLAIN, checkpoint=path)
        monkeypatch.setattr(os, call, plain)
        assert_equal(result(PLAIN, checkpoint=path), expected)
        assert sorted(p.name for p in tmp_path.glob(f"{number}.*")) == [
            f"{number}.pt",
            f"{number}.pt.previous",
        ]


DIE = """
import os, signal, sys

sys.path.insert(0, sys.argv[1])
from test_checkpoints import RECIPES, dropout_net, kill_at, result

plain = os.replace

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def replace_and_die(source, target):
    plain(source, target)
    die()

for step in map(int, sys.argv[3:]):
    process = os.fork()
    if process == 0:
        model = dropout_net()
        if step == 0:  # in a write: the old file is moved, the new one is not yet in its place
            os.replace = replace_and_die
        else:
            kill_at(model, step, die)
        result(RECIPES["average"], model, checkpoint=sys.argv[2])
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def test_processes_killed_one_after_another(tmp_path):
    path = tmp_path / "run.pt"
    # Step 5 is in the second epoch; then the write after it; then the second epoch's last step.
    arguments = [sys.executable, "-c", DIE, str(Path(__file__).parent), str(path), "5", "0", "3"]
    # Sums depend on the number of threads: the same here and there.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.run(arguments, env=environment, capture_output=True, check=True)
    assert process.stdout.split() == [b"%d" % -signal.SIGKILL] * 3
    assert not path.exists()
    left = torch.load(path.with_name("run.pt.previous"), weights_only=True)
    assert len(left["state"]["epochs"]) == 1
    assert_equal(result(RECIPES["average"], checkpoint=path), result(RECIPES["average"]))


def test_a_loop_stopped_at_a_loss_is_finished(tmp_path):
    recipe = replace(PLAIN, stop_at_loss=100.0)
    path = tmp_path / "run.pt"
    expected = result(recipe, checkpoint=path)
    assert len(expected[1][0]["epoch"]) == 1
    assert_equal(result(recipe, kill_at(dropout_net(), 1, killed), checkpoint=path), expected)


def test_a_shuffling_loader_goes_on(tmp_path):
    inputs, targets = digits().train.batch()
    recipe = replace(PLAIN, augmentation="none")

    def loader():
        return DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)

    model = kill_at(dropout_net(), 8, killed)
    with pytest.raises(Killed):
        result(recipe, model, loader(), checkpoint=tmp_path / "run.pt")
    resumed = result(recipe, data=loader(), checkpoint=tmp_path / "run.pt")
    assert_equal(resumed, result(recipe, data=loader()))


class Rising:
    """An objective whose strength grows with its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model, inputs, outputs, targets):
        self.calls += 1
        return cross_entropy(outputs, targets) + 0.01 * self.calls * outputs.square().mean()

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def test_the_state_of_an_objective_travels(tmp_path):
    path, model = tmp_path / "run.pt", kill_at(dropout_net(), 5, killed)
    with pytest.raises(Killed):
        result(PLAIN, model, objective=Rising(), checkpoint=path)
    objective = Rising()
    resumed = result(PLAIN, objective=objective, checkpoint=path)
    assert_equal(resumed, result(PLAIN, objective=Rising()))
    assert objective.calls == 9


def test_epochs_before_the_kill_keep_their_seconds_and_are_not_reported_again(tmp_path):
    calls, path = [], tmp_path / "run.pt"
    model = kill_at(dropout_net(), 8, killed)
    with pytest.raises(Killed):
        fit(model, digits(), PLAIN, checkpoint=path, on_epoch=lambda n, m: calls.append(n))
    stored = torch.load(path, weights_only=True)["state"]["epochs"]
    history = fit(
        dropout_net(), digits(), PLAIN, checkpoint=path, on_epoch=lambda n, m: calls.append(n)
    )
    assert calls == [1, 2, 3]
    assert [row["seconds"] for row in stored] == history.seconds[:2].tolist()


def test_divergence_leaves_the_epochs_before(tmp_path):
    path = tmp_path / "run.pt"

    def spoil(epoch, model):
        if epoch == 2:
            model[5].bias.data[0] = torch.nan

    for _ in range(2):
        with pytest.raises(Diverged) as caught:
            fit(dropout_net(), digits(), PLAIN, checkpoint=path, on_epoch=spoil)
        assert caught.value.epoch == 3
        assert list(caught.value.history.epoch) == [1, 2]


# What is refused


@pytest.fixture
def path(tmp_path):
    """Checkpoints of a run that was killed in its third epoch."""
    with pytest.raises(Killed):
        result(PLAIN, kill_at(dropout_net(), 8, killed), checkpoint=tmp_path / "run.pt")
    return tmp_path / "run.pt"


@pytest.mark.parametrize("length", [0, 3, 1000, -1000, -1])
def test_a_truncated_checkpoint_gives_way_to_the_one_before(path, length):
    previous, content = path.with_name("run.pt.previous"), path.read_bytes()
    path.write_bytes(content[:length])
    with pytest.warns(RuntimeWarning, match=r"run\.pt is damaged.*run\.pt\.previous"):
        resumed = result(PLAIN, checkpoint=path)
    assert_equal(resumed, result(PLAIN))
    path.write_bytes(content[:length])
    previous.write_bytes(content[:length])
    with pytest.raises(CheckpointRefused, match=r"run\.pt and .*run\.pt\.previous: damaged"):
        result(PLAIN, checkpoint=path)
    previous.unlink()
    with pytest.raises(CheckpointRefused, match=r"run\.pt: damaged .*remove it to start anew"):
        result(PLAIN, checkpoint=path)


def test_a_flipped_byte_is_noticed_or_harmless(tmp_path):
    file = Checkpoint(tmp_path / "run.pt", {"seed": 3})
    for number in range(2):
        file.save({"number": number, "weights": torch.arange(50.0)})
    whole, content = file.path.read_bytes(), file.previous.read_bytes()
    noticed = 0
    for position in range(0, len(whole), 7):
        altered = bytearray(whole)
        altered[position] ^= 0x55
        file.path.write_bytes(altered)
        file.previous.write_bytes(content)
        try:
            state = file.load()  # bytes that only fill up to a boundary do no harm
            assert state["number"] == 1
        except RuntimeWarning:
            noticed += 1
            file.path.unlink()
            state = file.load()
            assert state["number"] == 0
        assert torch.equal(state["weights"], torch.arange(50.0))
    assert noticed > 20


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_what_would_execute_code_is_refused(path, tmp_path):
    torch.save({"format": 1, "run": {}, "state": Evil(tmp_path / "mark")}, path)
    with pytest.raises(CheckpointRefused, match="could execute code"):
        result(PLAIN, checkpoint=path)
    path.with_name("run.pt.previous").unlink()
    path.write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    with pytest.raises(CheckpointRefused, match="damaged"):
        result(PLAIN, checkpoint=path)
    assert not (tmp_path / "mark").exists()
    torch.save(Evil(tmp_path / "mark"), path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "mark").exists()  # it would have


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"recipe": replace(PLAIN, epochs=4)}, "recipe.epochs is 4 here and 3 there"),
        ({"recipe": replace(PLAIN, cooldown=Cooldown())}, "recipe.cooldown is {.* here and None"),
        ({"seed": 5}, "seed is 5 here and 4 there"),
        ({"model": lambda: dropout_net(seed=1)}, "model.initial weights"),
        ({"model": lambda: dropout_net(bits=3)}, "model.bits.0 is 3.0 here and 2.0 there"),
        (
            {"model": lambda: dropout_net(channels=5)},
            r"tensors.1.bias is 'float32 \(5,\)' here and 'float32 \(4,\)' there",
        ),
        ({"data": lambda: digits(seed=1)}, "training data.content.*; validation data.content"),
        ({"data": lambda: digits().train}, "validation data is None here"),
        ({"metrics": {}}, r"metrics is \[\] here and \['accuracy'\] there"),
        ({"loss": lambda outputs, targets: outputs.square().mean()}, "loss is .*lambda"),
        ({"objective": Rising()}, "objective is 'Rising' here and None there"),
    ],
)
def test_another_run_is_refused(path, change, difference):
    options = {"recipe": PLAIN, "seed": 4} | change
    model = options.pop("model", dropout_net)()
    data = options.pop("data", digits)()
    with pytest.raises(CheckpointRefused, match=f"another training run: .*{difference}"):
        fit(model, data, checkpoint=path, **options)
    assert_equal(result(PLAIN, checkpoint=path), result(PLAIN))  # it is still there


def test_a_model_that_was_trained_on_is_not_the_start(path):
    model = kill_at(dropout_net(), 2, killed)
    with pytest.raises(Killed):
        result(PLAIN, model)
    with pytest.raises(CheckpointRefused, match="initial weights"):
        result(PLAIN, model, checkpoint=path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"weight": torch.ones(3)}, tmp_path / "run.pt")
    with pytest.raises(CheckpointRefused, match="not a checkpoint of fit"):
        result(PLAIN, checkpoint=tmp_path / "run.pt")


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        result(PLAIN, checkpoint=tmp_path)
    for every in (0, 1.5):
        with pytest.raises(ValueError, match="checkpoint_every must be"):
            result(PLAIN, checkpoint=tmp_path / "run.pt", checkpoint_every=every)


def test_only_plain_values_are_stored(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"labels": {1, 2}}

        def set_extra_state(self, state):
            pass

    path = tmp_path / "run.pt"
    with pytest.raises(TypeError, match=r"\['labels'\] is a set"):
        fit(Odd(64, 10), (torch.randn(8, 64), torch.arange(8)), Recipe(epochs=1), checkpoint=path)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made(tmp_path):
    path = tmp_path / "runs" / "one" / "run.pt"
    result(replace(PLAIN, epochs=1), checkpoint=path)
    assert path.exists()
