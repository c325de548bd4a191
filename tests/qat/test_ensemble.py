"""Ensembles against single runs of `fit`, engine by engine."""

from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, nll_loss

from qgen_lab.data import load_dataset
from qgen_lab.qat.ensemble import ENGINES, Member, fit_ensemble, group
from qgen_lab.qat.models import mlp, nin
from qgen_lab.qat.quantizers import LSQ, quantize_weights
from qgen_lab.qat.recipes import OPTIMIZERS, Recipe
from qgen_lab.qat.schedules import Cooldown
from qgen_lab.qat.training import evaluate, fit

# Loops that are not compiled are tried on a tiny case only.
FAST = ["batched"] if numba.config.DISABLE_JIT else ["batched", "jitted"]
RUN_HERE = ["sequential", *FAST]
SHORT = Recipe(epochs=2, batch_size=32)


def digits_nin(seed):
    return nin(2, 8, in_channels=1, base_width=1, seed=seed)


def double_nin(seed):
    return digits_nin(seed).double()


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", validation=0.1, size=97)


def pair(dataset, dtype=torch.float64):
    inputs, targets = dataset.batch()
    return inputs.to(dtype), targets


def single(build, data, member, **arguments):
    model = build(member.seed)
    if member.bits not in (None, 32):
        quantize_weights(model, member.bits, member.quantizer, per_channel=member.per_channel)
    return model, fit(model, data, member.recipe, seed=member.seed, **arguments)


def distance(model, other):
    """Largest difference of two models' states."""
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    pairs = zip(*(state.values() for state in states), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def assert_same_history(history, expected, tolerance=1e-6):
    frame, other = history.to_frame(), expected.to_frame()
    assert list(frame) == list(other)
    np.testing.assert_allclose(
        frame.drop(columns="seconds"), other.drop(columns="seconds"), rtol=0, atol=tolerance
    )
    assert history.kept_epoch == expected.kept_epoch
    assert history.train.loss == pytest.approx(expected.train.loss, abs=tolerance)
    assert history.train.size == expected.train.size


RATES = {"sgd": 0.1, "adam": 0.01, "adamw": 0.02, "rmsprop": 0.002}
EIGHT = [
    Member(SHORT, None, seed=0),
    Member(SHORT, 32, seed=1),
    Member(replace(SHORT, weight_decay=0.01), 8, seed=2),
    Member(replace(SHORT, momentum=0.0), 4, seed=3, per_channel=True),
    Member(replace(SHORT, schedule="cosine"), 4, seed=4),
    Member(replace(SHORT, cooldown=Cooldown(2.0, 0.5)), 3, seed=5),
    Member(replace(SHORT, schedule="multi-step", milestones=(1,)), 2, seed=6, per_channel=True),
    Member(replace(SHORT, keep="last"), 1, seed=7),
]
ENDS = [
    Member(replace(SHORT, keep="last", average_codes_from=0.4, reestimate_batch_norm=True), 2),
    Member(replace(SHORT, keep="last", average_codes_from=0.99), 1, seed=1, per_channel=True),
    Member(replace(SHORT, reestimate_batch_norm=True), 4, seed=2),
    Member(replace(SHORT, keep="last", average_codes_from=0.0), None, seed=3),
]


@pytest.fixture(scope="module", params=sorted(OPTIMIZERS))
def eight_single_runs(digits, request):
    """Members of one optimizer, and the model and history of each by `fit`."""
    # 97 samples are three batches of 32 and one left over, which batch norm makes fit skip:
    # 17 epochs are 51 steps.
    changes = {"epochs": 17, "optimizer": request.param}
    members = [
        replace(member, recipe=replace(member.recipe, learning_rate=rate, **changes))
        for member, rate in zip(EIGHT, np.linspace(1, 2, 8) * RATES[request.param], strict=True)
    ]
    return members, [single(double_nin, pair(digits.train), member) for member in members]


@pytest.mark.parametrize("engine", FAST)
def test_eight_models_train_as_eight_single_runs(digits, eight_single_runs, engine):
    members, runs = eight_single_runs
    ensemble = fit_ensemble(double_nin, members, pair(digits.train), engine=engine)
    assert ensemble.engine == engine
    assert ensemble.diverged == [None] * 8
    for model, history, (twin, expected) in zip(
        ensemble.models, ensemble.histories, runs, strict=True
    ):
        assert_same_history(history, expected)
        assert distance(model, twin) < 1e-6
        assert not any(module.training for module in model.modules())


def test_the_sequential_engine_calls_fit(digits):
    ensemble = fit_ensemble(digits_nin, EIGHT, digits, engine="sequential")
    for member, model, history in zip(EIGHT, ensemble.models, ensemble.histories, strict=True):
        twin, expected = single(digits_nin, digits, member)
        assert_same_history(history, expected, tolerance=0)
        assert distance(model, twin) == 0


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_one_step_in_single_precision(digits, engine, optimizer):
    recipe = Recipe(epochs=1, batch_size=97, optimizer=optimizer, learning_rate=1e-3, keep="last")
    members = [Member(recipe, bits, seed) for seed, bits in enumerate([None, 4, 1])]
    ensemble = fit_ensemble(digits_nin, members, digits.train, engine=engine)
    for member, model, history in zip(members, ensemble.models, ensemble.histories, strict=True):
        start = single(digits_nin, digits.train, replace_rate(member))[0]
        twin, expected = single(digits_nin, digits.train, member)
        # Adam and RMSprop divide by the gradient's size: what rounding does to a gradient
        # near zero they make a part of a step. All but few weights move alike.
        moves = [weights_of(model) - weights_of(start), weights_of(twin) - weights_of(start)]
        differ = (moves[0] - moves[1]).abs() > 0.01 * moves[1].abs().max()
        assert differ.double().mean() < 0.01
        assert history.running_loss == pytest.approx(expected.running_loss, rel=1e-5)


def replace_rate(member):
    """The same member, hardly moved."""
    return replace(member, recipe=replace(member.recipe, learning_rate=1e-30, weight_decay=0.0))


def weights_of(model):
    return torch.cat([parameter.detach().double().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("engine", FAST)
def test_validation_data_and_metrics(digits, engine):
    metrics = {"error": lambda outputs, targets: outputs.argmax(1) != targets}
    (member,) = members = [Member(SHORT, 4, seed=3)]
    ensemble = fit_ensemble(digits_nin, members, digits, metrics=metrics, engine=engine)
    _, expected = single(digits_nin, digits, member, metrics=metrics)
    assert_same_history(ensemble.histories[0], expected, tolerance=1e-4)
    kept = evaluate(ensemble.models[0], digits.validation, metrics=metrics)
    assert kept.loss == pytest.approx(ensemble.histories[0].validation.loss, abs=1e-5)
    assert kept.metrics == pytest.approx(ensemble.histories[0].validation.metrics)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_compiled_loops_on_a_tiny_case(optimizer):
    """The only test of them that also runs where nothing is compiled."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(7, 2, 3, 5, generator=generator).double(), torch.arange(7) % 3
    recipe = Recipe(epochs=2, batch_size=4, optimizer=optimizer, learning_rate=0.01)
    members = [Member(recipe, bits, seed) for seed, bits in enumerate([None, 3, 1])]

    def build(seed):
        return nin(2, 2, num_classes=3, in_channels=2, base_width=1, seed=seed).double()

    ensemble = fit_ensemble(build, members, data, engine="jitted")
    for member, model, history in zip(members, ensemble.models, ensemble.histories, strict=True):
        twin, expected = single(build, data, member)
        # RMSprop divides what rounding leaves of a zero gradient, 1e-17, by little more than 1e-8.
        assert_same_history(history, expected)
        assert distance(model, twin) < 1e-6


def test_a_step_below_its_floor_is_put_back_in_any_precision():
    for dtype in (torch.float32, torch.float64):
        quantizer = LSQ(torch.ones(4, 3, dtype=dtype), bits=4)
        quantizer.step.data.fill_(-1.0)
        quantizer(torch.ones(4, 3, dtype=dtype))
        assert quantizer.step == quantizer.floor


def test_averages_and_statistics_at_the_end(digits):
    data = pair(digits.train)
    ensemble = fit_ensemble(double_nin, ENDS, data, engine="batched")
    for member, model, history in zip(ENDS, ensemble.models, ensemble.histories, strict=True):
        twin, expected = single(double_nin, data, member)
        assert_same_history(history, expected, 1e-10)
        assert distance(model, twin) < 1e-10


def regression_net(seed):
    return mlp(5, [6], 2, seed=seed).double()


def test_layers_with_bias_other_losses_and_bits_by_layer():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    data = inputs, inputs[:, :2] ** 2
    recipe = Recipe(epochs=5, batch_size=16, learning_rate=0.05)
    members = [Member(recipe, bits, seed) for seed, bits in enumerate([None, {"1": 3}, 2])]
    ensemble = fit_ensemble(regression_net, members, data, mse_loss, engine="batched")
    for member, model, history in zip(members, ensemble.models, ensemble.histories, strict=True):
        twin, expected = single(regression_net, data, member, loss=mse_loss)
        assert_same_history(history, expected, 1e-10)
        assert distance(model, twin) < 1e-10


def image_net(seed):
    """Kernels and strides that differ by direction, biases, norm of features."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(0, 1)), nn.GELU())
    head = nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5), nn.Tanh())
    model = nn.Sequential(body, nn.BatchNorm2d(4), nn.Identity(), head, nn.Linear(5, 3))
    model(torch.zeros(2, 2, 5, 6))
    return model.double()


def test_kernels_of_any_shape():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 2, 5, 6, generator=generator, dtype=torch.float64)
    data = inputs, torch.arange(20) % 3
    recipe = Recipe(epochs=3, batch_size=8, learning_rate=0.05)
    members = [Member(recipe, bits, seed) for seed, bits in enumerate([None, 3])]
    state = torch.get_rng_state()
    ensemble = fit_ensemble(image_net, members, data, engine="batched")
    for member, model, history in zip(members, ensemble.models, ensemble.histories, strict=True):
        twin, expected = single(image_net, data, member)
        assert_same_history(history, expected, 1e-10)
        assert distance(model, twin) < 1e-10
    torch.set_rng_state(state)


@pytest.mark.parametrize("engine", RUN_HERE)
def test_a_model_that_diverges_goes_alone(digits, engine):
    data = pair(digits.train)
    steady = Member(SHORT, 4, seed=0)
    wild = Member(replace(SHORT, learning_rate=1e200, epochs=2), None, seed=1)
    ensemble = fit_ensemble(double_nin, [steady, wild, steady], data, engine=engine)
    alone = fit_ensemble(double_nin, [steady], data, engine=engine)
    assert [problem is None for problem in ensemble.diverged] == [True, False, True]
    for i in (0, 2):
        assert_same_history(ensemble.histories[i], alone.histories[0], 1e-12)
        assert distance(ensemble.models[i], alone.models[0]) < 1e-12
    with pytest.raises(type(ensemble.diverged[1])) as caught:
        single(double_nin, data, wild)
    problem = ensemble.diverged[1]
    assert (problem.epoch, problem.step) == (caught.value.epoch, caught.value.step)
    assert problem.layer == caught.value.layer
    assert ensemble.histories[1] is problem.history
    assert ensemble.to_frame()["diverged"].tolist() == [False, True, False]


@pytest.mark.parametrize("engine", RUN_HERE)
def test_a_model_stops_at_its_loss(digits, engine):
    recipe = Recipe(epochs=6, batch_size=32, learning_rate=0.1)
    losses = fit_ensemble(digits_nin, [Member(recipe)], digits.train).histories[0].train_loss
    bound = float(np.sort(losses)[2])
    members = [Member(replace(recipe, stop_at_loss=bound)), Member(recipe)]
    ensemble = fit_ensemble(digits_nin, members, digits.train, engine=engine)
    lengths = [len(history.epoch) for history in ensemble.histories]
    assert lengths == [int(np.argmax(losses <= bound)) + 1, 6]
    first = evaluate(ensemble.models[0], digits.train)
    assert first.loss == pytest.approx(ensemble.histories[0].train.loss, abs=1e-5)


@pytest.mark.parametrize("engine", FAST)
def test_workers_and_groups_change_nothing(digits, engine, monkeypatch):
    members = [
        Member(replace(SHORT, optimizer=name), 3, seed)
        for seed, name in enumerate(["sgd", "adam", "sgd", "rmsprop", "adam"])
    ]
    data = pair(digits.train)
    one = fit_ensemble(double_nin, members, data, engine=engine)
    monkeypatch.setitem(group.GROUP_BYTES, "cpu", 500_000)
    two = fit_ensemble(double_nin, members, data, engine=engine, workers=2)
    for a, b in zip(one.models, two.models, strict=True):
        assert distance(a, b) < 1e-12


def test_worker_processes_of_the_sequential_engine(digits):
    wild = Member(replace(SHORT, learning_rate=1e200), None, seed=1)
    members = [Member(SHORT, 4), wild, Member(SHORT, 2, seed=2)]
    one, two = (
        fit_ensemble(digits_nin, members, digits, engine="sequential", workers=workers)
        for workers in (1, 2)
    )
    for a, b in zip(one.models[::2], two.models[::2], strict=True):
        assert distance(a, b) == 0
    assert_same_history(two.histories[2], one.histories[2], 0)
    assert two.diverged[1].layer == one.diverged[1].layer


def test_auto_names_what_it_measured(digits):
    ensemble = fit_ensemble(digits_nin, EIGHT, digits.train)
    assert ensemble.engine == min(ensemble.measured, key=ensemble.measured.get)
    assert ensemble.measured.keys() <= ENGINES.keys()
    assert repr(ensemble).startswith("Ensemble(8 models, 0 diverged, engine=")
    frame = ensemble.to_frame()
    assert frame["bits"].tolist() == [32, 32, 8, 4, 4, 3, 2, 1]
    assert frame["train_loss"].tolist() == [h.train.loss for h in ensemble.histories]


def test_auto_takes_what_supports_the_members(digits):
    members = [Member(replace(SHORT, epochs=1, augmentation="flip"), 4)]
    ensemble = fit_ensemble(digits_nin, members, digits.train)
    assert (ensemble.engine, ensemble.measured) == ("sequential", {})


def test_the_start_is_left_as_it_was(digits):
    state = torch.get_rng_state()
    fit_ensemble(digits_nin, [Member(SHORT, 2)], digits.train)
    assert torch.equal(torch.get_rng_state(), state)


# Refusals


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return x + self.layer(x)


def residual_net(seed):
    return nn.Sequential(nn.Flatten(), Residual(), nn.Linear(64, 10))


@pytest.mark.parametrize(
    ("build", "member", "reason"),
    [
        (residual_net, Member(SHORT), "layer '1' is a Residual"),
        (lambda seed: residual_net(seed)[1], Member(SHORT), "not an nn.Sequential"),
        (digits_nin, Member(replace(SHORT, augmentation="flip")), "recipe.augmentation is 'flip'"),
        (
            lambda seed: nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten()),
            Member(SHORT),
            "layer '0' has groups",
        ),
        (
            lambda seed: nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False)),
            Member(SHORT),
            "has no running statistics",
        ),
    ],
)
def test_the_batched_engine_says_what_it_does_not_support(digits, build, member, reason):
    with pytest.raises(ValueError, match=reason):
        fit_ensemble(build, [member], digits.train, engine="batched")


@pytest.mark.parametrize(
    ("build", "recipe", "loss", "reason"),
    [
        (digits_nin, SHORT, nll_loss, "loss is not"),
        (digits_nin, ENDS[0].recipe, cross_entropy, "average_codes_from"),
        (lambda seed: mlp(64, [4], 10), SHORT, cross_entropy, "are not Conv2d"),
        (
            lambda seed: nn.Sequential(
                nn.Conv2d(1, 10, 3),
                nn.BatchNorm2d(10),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            ),
            SHORT,
            cross_entropy,
            "without bias",
        ),
    ],
)
def test_the_jitted_engine_says_what_it_does_not_support(digits, build, recipe, loss, reason):
    with pytest.raises(ValueError, match=reason):
        fit_ensemble(build, [Member(recipe)], digits.train, loss, engine="jitted")


def test_bad_arguments(digits):
    def call(members, **arguments):
        return fit_ensemble(digits_nin, members, digits.train, **arguments)

    with pytest.raises(ValueError, match="members is empty"):
        call([])
    with pytest.raises(TypeError, match="Member objects"):
        call([SHORT])
    with pytest.raises(TypeError, match="must be a Recipe"):
        Member(4)
    with pytest.raises(ValueError, match=r"share recipe.epochs, got \[1, 2\]"):
        call([Member(SHORT), Member(replace(SHORT, epochs=1))])
    with pytest.raises(ValueError, match="'auto' or one of"):
        call([Member(SHORT)], engine="magic")
    with pytest.raises(ValueError, match="workers must be a positive integer, got 0"):
        call([Member(SHORT)], workers=0)
    with pytest.raises(ValueError, match="can be pickled"):
        fit_ensemble(
            lambda seed: digits_nin(seed),
            [Member(SHORT)],
            digits.train,
            engine="sequential",
            workers=2,
        )
    with pytest.raises(ValueError, match="of one architecture"):
        fit_ensemble(
            lambda seed: nin(1, 8 + seed, in_channels=1, base_width=1),
            [Member(SHORT, seed=0), Member(SHORT, seed=1)],
            digits.train,
            engine="batched",
        )
    with pytest.raises(ValueError, match="does not take inputs of shape"):
        fit_ensemble(lambda seed: nin(1, 8), [Member(SHORT)], digits.train, engine="batched")
    with pytest.raises(ValueError, match="labels must lie in"):
        fit_ensemble(
            lambda seed: nin(1, 8, num_classes=4, in_channels=1, base_width=1),
            [Member(SHORT)],
            digits.train,
            cross_entropy,
            engine="batched",
        )
