import copy
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from qgen_lab.data import load_dataset
from qgen_lab.qat.averaging import CodeAverage
from qgen_lab.qat.batch_norm import reestimate_batch_norm
from qgen_lab.qat.batches import Source
from qgen_lab.qat.models import mlp, nin
from qgen_lab.qat.quantizers import LSQ, codes, parameter_groups, quantize_weights, step_sizes
from qgen_lab.qat.recipes import Recipe
from qgen_lab.qat.schedules import Cooldown, learning_rates
from qgen_lab.qat.training import Diverged, Evaluation, accuracy, evaluate, fit

SHORT = Recipe(epochs=2, batch_size=8, weight_decay=0.0)


@pytest.fixture
def classes():
    """Twenty samples of three classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(20, 4, generator=generator), torch.arange(20) % 3


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", validation=0.05, size=120)


def digits_nin(bits=None):
    model = nin(2, 8, in_channels=1, base_width=1, seed=0)
    return model if bits is None else quantize_weights(model, bits)


def state(model):
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


class Poison(nn.Module):
    """Hands on its input until the call `after`, from then on NaN."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def forward(self, x):
        self.after -= self.training
        return x if self.after >= 0 else x * math.nan


# Evaluation


def test_loss_and_accuracy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [math.log(7), 0.0]])
    identity = nn.Linear(2, 2, bias=False)
    identity.weight.data = torch.eye(2)
    result = evaluate(identity, (logits, torch.tensor([1, 0, 1])))
    # Probabilities of the true classes: 3/4, 1/2, 1/8; a tie goes to class 0.
    assert result.loss == pytest.approx((math.log(4 / 3) + math.log(2) + math.log(8)) / 3)
    assert result.metrics["accuracy"] == pytest.approx(2 / 3)
    assert result.size == 3
    assert repr(Evaluation(0.125, {"accuracy": 0.75}, 8)) == (
        "Evaluation(loss=0.125, accuracy=0.75, size=8)"
    )


@pytest.mark.parametrize("batch_size", [1, 3, 7, 19, 20, 100])
def test_the_mean_is_exact_whatever_the_batches(classes, batch_size):
    model = mlp(4, [5], 3, seed=0).double()
    inputs, targets = classes[0].double(), classes[1]
    result = evaluate(model, (inputs, targets), batch_size=batch_size)
    assert result.loss == pytest.approx(cross_entropy(model(inputs), targets).item(), rel=1e-12)
    assert result.metrics["accuracy"] == pytest.approx(accuracy(model(inputs), targets).item())


def test_metrics_give_a_mean_or_one_value_per_sample(classes):
    model = mlp(4, [], 3, seed=0)
    metrics = {
        "mean": lambda outputs, targets: (outputs.argmax(1) != targets).float().mean(),
        "each": lambda outputs, targets: outputs.argmax(1) != targets,
    }
    result = evaluate(model, classes, metrics=metrics, batch_size=6)
    assert result.metrics["mean"] == pytest.approx(result.metrics["each"])
    assert result.metrics["mean"] == pytest.approx(1 - evaluate(model, classes).metrics["accuracy"])


def test_evaluation_leaves_the_model_alone(digits):
    model = digits_nin()
    model[1].eval()
    before, modes = state(model), [module.training for module in model.modules()]
    evaluate(model, digits.test)
    assert torch.equal(state(model), before)
    assert [module.training for module in model.modules()] == modes


def test_dense_prediction():
    model = nn.Conv2d(3, 4, 1)
    data = torch.randn(6, 3, 5, 5), torch.randint(4, (6, 5, 5))
    assert evaluate(model, data, batch_size=4).loss == pytest.approx(
        cross_entropy(model(data[0]), data[1]).item()
    )
    assert len(fit(model, data, SHORT).epoch) == 2


# The loop against one written by hand

BY_HAND = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.8, weight_decay=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.05, (0.8, 0.999), weight_decay=0.01, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, (0.8, 0.999), weight_decay=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.05, momentum=0.8, weight_decay=0.01),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_optimizer_equals_a_loop_by_hand(classes, name):
    model = mlp(4, [5], 3, seed=0)
    twin = copy.deepcopy(model)
    recipe = Recipe(
        epochs=3,
        batch_size=8,
        optimizer=name,
        learning_rate=0.05,
        momentum=0.8,
        weight_decay=0.01,
        schedule="multi-step",
        milestones=(2,),
        gamma=0.5,
        keep="last",
    )
    history = fit(model, classes, recipe, seed=7)

    optimizer = BY_HAND[name](twin.parameters())
    generator = torch.Generator().manual_seed(7)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 if epoch < 2 else 0.025
        for indices in torch.randperm(20, generator=generator).split(8):
            optimizer.zero_grad()
            cross_entropy(twin(classes[0][indices]), classes[1][indices]).backward()
            optimizer.step()
    assert torch.equal(state(model), state(twin))
    assert history.learning_rate.tolist() == [0.05, 0.05, 0.025]


def test_one_sgd_step_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    recipe = Recipe(epochs=2, batch_size=1, learning_rate=0.1, momentum=0.5, weight_decay=0.2)
    data = torch.tensor([[1.0]]), torch.tensor([[0.0]])
    history = fit(model, data, recipe, loss=mse_loss)
    # Gradient 2 w + 0.2 w: 4.4, then the weight 1.56, momentum 0.5 * 4.4 + 3.432.
    assert model.weight.item() == pytest.approx(1.56 - 0.1 * 5.632)
    assert history.running_loss == pytest.approx([2.0**2, 1.56**2])
    assert history.train_loss == pytest.approx([1.56**2, 0.9968**2])


def test_the_running_loss_is_the_mean_over_samples(classes):
    losses = []

    def record(outputs, targets):
        value = cross_entropy(outputs, targets)
        if torch.is_grad_enabled():
            losses.append((value.item(), len(targets)))
        return value

    history = fit(mlp(4, [], 3, seed=0), classes, replace(SHORT, epochs=1), loss=record)
    assert [size for _, size in losses] == [8, 8, 4]
    assert history.running_loss[0] == pytest.approx(sum(v * n for v, n in losses) / 20)


# What a step makes smaller, and where: objective, sharpness, precision


def by_hand(model, data, recipe, seed, step):
    """The epochs of `fit` with plain SGD: `step(model, optimizer, inputs, targets, number)`."""
    optimizer = torch.optim.SGD(parameter_groups(model, recipe.weight_decay), lr=0.05, fused=True)
    generator = torch.Generator().manual_seed(seed)
    number = 0
    for _ in range(recipe.epochs):
        model.train()
        for indices in torch.randperm(len(data[1]), generator=generator).split(recipe.batch_size):
            step(model, optimizer, data[0][indices], data[1][indices], number)
            number += 1


HAND = Recipe(
    epochs=3, batch_size=8, learning_rate=0.05, momentum=0.0, weight_decay=0.01, keep="last"
)


def test_an_objective_is_minimised_and_the_loss_evaluated(classes):
    def penalised(model, inputs, outputs, targets):
        return cross_entropy(outputs, targets) + 0.3 * (outputs - inputs[:, :3]).square().mean()

    def step(model, optimizer, inputs, targets, number):
        optimizer.zero_grad()
        penalised(model, inputs, model(inputs), targets).backward()
        optimizer.step()

    model = mlp(4, [5], 3, seed=0)
    twin = copy.deepcopy(model)
    history = fit(model, classes, HAND, seed=2, objective=penalised)
    by_hand(twin, classes, HAND, 2, step)
    assert torch.equal(state(model), state(twin))
    assert history.train.loss == pytest.approx(cross_entropy(twin(classes[0]), classes[1]).item())
    assert history.running_loss[0] > history.train_loss[0] + 0.1  # the penalty


@pytest.mark.parametrize("bits", [None, 3])
def test_sharpness_aware_steps_equal_a_loop_by_hand(classes, bits):
    def step(model, optimizer, inputs, targets, number):
        own = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        before = [p.detach().clone() for p in own]
        norm = sum(p.grad.square().sum() for p in own).sqrt()
        for p in own:
            p.data += 0.4 * p.grad / norm
        optimizer.zero_grad()
        layer = model[1]
        kept = {name: value.clone() for name, value in layer.named_buffers()}
        cross_entropy(model(inputs), targets).backward()
        layer.load_state_dict(layer.state_dict() | kept)
        for p, value in zip(own, before, strict=True):
            p.data = value
        optimizer.step()

    recipe = replace(HAND, batch_size=10, sharpness_radius=0.4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    if bits:
        quantize_weights(model, bits)
    twin, plain = copy.deepcopy(model), copy.deepcopy(model)
    fit(model, classes, recipe, seed=2)
    by_hand(twin, classes, recipe, 2, step)
    torch.testing.assert_close(state(model), state(twin), rtol=1e-5, atol=1e-6)
    fit(plain, classes, replace(recipe, sharpness_radius=0.0), seed=2)
    assert not torch.allclose(state(model), state(plain), rtol=1e-3)


def test_sharpness_descends_to_the_flatter_minimum():
    # A minimum at 0 between steep walls, a flat one at 3: (w / 0.1)^2 / 2 and (w - 3)^2 / 2.
    def valleys(outputs, targets):
        w = outputs.mean()
        return torch.minimum((w / 0.1).square() / 2, (w - 3).square() / 2)

    ends = []
    for radius in (0.0, 0.5):
        model = nn.Linear(1, 1, bias=False)
        model.weight.data.fill_(0.01)
        recipe = Recipe(
            epochs=200,
            learning_rate=0.005,
            momentum=0.0,
            weight_decay=0.0,
            keep="last",
            sharpness_radius=radius,
            schedule="cosine",
        )
        fit(model, (torch.ones(2, 1), torch.zeros(2)), recipe, loss=valleys)
        ends.append(model.weight.item())
    assert abs(ends[0]) < 0.01  # stays
    assert ends[1] > 0.3  # leaves


def test_a_bad_gradient_is_found_with_a_sharpness_radius_too(classes):
    class Sharp(nn.Module):
        def forward(self, x):
            return x + (x * 0).abs().sqrt()

    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), Sharp(), nn.Linear(5, 3))
    with pytest.raises(Diverged, match="weights of layer '1'"):
        fit(model, classes, replace(SHORT, sharpness_radius=0.1))


def test_autocast_is_for_the_training_pass_alone(digits):
    class Watched(LSQ):
        def forward(self, weight):
            value = super().forward(weight)
            if self.training and value.requires_grad:
                value.register_hook(lambda grad: seen["gradient"].add(grad.dtype))
            seen["weight"].add(weight.dtype)
            seen["quantized"].add(value.dtype)
            return value

    def loss(outputs, targets):
        seen["loss"].add(outputs.dtype)
        return cross_entropy(outputs, targets)

    seen = {name: set() for name in ("gradient", "weight", "quantized", "loss", True, False)}
    model = quantize_weights(nin(1, 8, in_channels=1, base_width=1, seed=0), 4, Watched)
    layer = model[0]
    layer.register_forward_hook(lambda layer, _, outputs: seen[layer.training].add(outputs.dtype))
    recipe = Recipe(epochs=12, batch_size=32, precision="bfloat16")
    first = evaluate(model, digits.train)
    history = fit(model, digits, recipe, loss=loss)
    names = ("gradient", "weight", "quantized", "loss")
    assert {name: seen[name] for name in names} == {key: {torch.float32} for key in names}
    assert seen[True] == {torch.bfloat16}
    assert seen[False] == {torch.float32}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert history.train == evaluate(model, digits.train)
    assert history.train.loss < 0.9 * first.loss


def test_half_precision_needs_a_gpu(classes):
    with pytest.raises(ValueError, match=r"'float16' needs a GPU.*'bfloat16'"):
        fit(mlp(4, [], 3), classes, replace(SHORT, precision="float16"))


# The end of training


def test_codes_are_averaged_from_their_share_of_the_steps_on(classes):
    recipe = replace(HAND, average_codes_from=4 / 9)  # of 9 steps: from the fifth on

    def step(model, optimizer, inputs, targets, number):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        if number >= 4:
            average.update()

    model = quantize_weights(mlp(4, [5], 3, seed=0), 2)
    last, twin = copy.deepcopy(model), copy.deepcopy(model)
    history = fit(model, classes, recipe, seed=2)
    average = CodeAverage(twin)
    by_hand(twin, classes, recipe, 2, step)
    average.round()
    assert average.updates == 5
    assert torch.equal(state(model), state(twin))
    assert history.train == evaluate(model, classes)
    iterate = fit(last, classes, replace(recipe, average_codes_from=None), seed=2)
    assert not torch.equal(state(model), state(last))
    np.testing.assert_array_equal(history.train_loss, iterate.train_loss)  # of the iterates


def test_an_average_has_at_least_the_last_step(classes):
    model = quantize_weights(mlp(4, [5], 3, seed=0), 2)
    twin = copy.deepcopy(model)
    fit(model, classes, replace(HAND, average_codes_from=0.999))
    fit(twin, classes, HAND)
    for name, code in codes(twin).items():
        assert torch.equal(codes(model)[name], code)


def test_batch_norm_is_estimated_anew_at_the_end(digits):
    recipe = Recipe(epochs=3, batch_size=32, learning_rate=0.5, reestimate_batch_norm=True)
    model, twin = digits_nin(bits=4), digits_nin(bits=4)
    history = fit(model, digits, recipe)
    moving = fit(twin, digits, replace(recipe, reestimate_batch_norm=False))
    assert not torch.equal(state(model), state(twin))
    reestimate_batch_norm(twin, digits.train)
    assert torch.equal(state(model), state(twin))
    assert history.kept_epoch == moving.kept_epoch
    assert history.train == evaluate(twin, digits.train) != moving.train
    assert history.validation == evaluate(twin, digits.validation)


def test_batch_norm_is_estimated_anew_on_tensors_and_iterables(classes):
    recipe = replace(HAND, batch_size=20, reestimate_batch_norm=True)
    for data in (classes, [classes]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        history = fit(model, data, recipe)
        hidden = model[0](classes[0])
        torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
        torch.testing.assert_close(model[1].running_var, hidden.var(0))
        assert history.train == evaluate(model, classes)


# What is kept, and when training stops


def test_the_model_of_lowest_training_loss_is_kept(classes):
    weights = {}
    model = mlp(4, [8], 3, seed=0)
    recipe = Recipe(epochs=8, batch_size=8, learning_rate=2.5)
    history = fit(model, classes, recipe, on_epoch=lambda n, m: weights.update({n: state(m)}))
    assert history.kept_epoch == history.epoch[history.train_loss.argmin()] < 8
    assert torch.equal(state(model), weights[history.kept_epoch])
    assert evaluate(model, classes) == history.train
    assert history.train.loss == history.train_loss.min()
    assert not model.training

    last = mlp(4, [8], 3, seed=0)
    history = fit(last, classes, replace(recipe, keep="last"))
    assert history.kept_epoch == 8
    assert torch.equal(state(last), weights[8])


def test_buffers_and_steps_are_kept_too(digits):
    kept = {}
    model = digits_nin(bits=2)
    recipe = Recipe(epochs=6, batch_size=32, learning_rate=0.5)
    history = fit(model, digits, recipe, on_epoch=lambda n, m: kept.update({n: state(m)}))
    assert torch.equal(state(model), kept[history.kept_epoch])
    assert evaluate(model, digits.train).loss == pytest.approx(history.train.loss, rel=1e-6)


def test_training_stops_at_a_loss(classes):
    long = Recipe(epochs=50, batch_size=8)
    model = mlp(4, [16], 3, seed=0)
    history = fit(model, classes, replace(long, stop_at_loss=0.5))
    assert history.train_loss[-1] <= 0.5 < history.train_loss[:-1].min()
    assert history.kept_epoch == len(history.epoch) < 50


def rates_of_steps(data, recipe):
    """The distance of each step of plain SGD where the gradient is always one."""
    model, positions = nn.Linear(1, 1, bias=False).double(), []
    model.register_forward_pre_hook(
        lambda model, _: positions.append(model.weight.item()) if model.training else None
    )
    recipe = replace(recipe, momentum=0.0, weight_decay=0.0, keep="last")
    fit(model, data, recipe, loss=lambda outputs, targets: outputs.mean())
    return -np.diff([*positions, model.weight.item()])


COOLED = Recipe(
    epochs=5, batch_size=8, schedule="multi-step", milestones=(1, 3), cooldown=Cooldown(2, 0.5)
)


def test_each_step_has_its_own_rate():
    ones = torch.ones(20, 1, dtype=torch.float64), torch.zeros(20)
    rates = learning_rates(COOLED, 3)
    np.testing.assert_allclose(rates_of_steps(ones, COOLED), rates, rtol=1e-9)
    history = fit(nn.Linear(1, 1).double(), ones, COOLED, loss=lambda outputs, _: outputs.mean())
    np.testing.assert_array_equal(history.learning_rate, rates[::3])


def test_without_a_known_length_each_epoch_has_its_own_rate():
    class Batches:
        def __iter__(self):
            return iter([(torch.ones(4, 1, dtype=torch.float64), torch.zeros(4))] * 3)

    rates = learning_rates(COOLED, 1)
    np.testing.assert_allclose(rates_of_steps(Batches(), COOLED), rates.repeat(3), rtol=1e-9)


def test_weight_decay_spares_the_steps(digits):
    recipe = Recipe(epochs=1, learning_rate=1e-3, momentum=0.0, keep="last")
    without, strong = digits_nin(bits=4), digits_nin(bits=4)
    start = step_sizes(without)
    fit(without, digits, replace(recipe, batch_size=1000, weight_decay=0.0))
    fit(strong, digits, replace(recipe, batch_size=1000, weight_decay=1.0))
    # One step from the same weights: the same gradients, so the same steps.
    for name, step in step_sizes(strong).items():
        assert torch.equal(step, step_sizes(without)[name])
        assert not torch.equal(step, start[name])
    assert strong[1].weight.sum() < without[1].weight.sum()  # batch norm decays


# Randomness


@pytest.mark.parametrize("bits", [None, 4])
def test_a_seed_repeats_bit_for_bit(digits, bits):
    recipe = replace(SHORT, batch_size=32, augmentation="crop")
    runs = {}
    for name, seed in {"first": 1, "again": 1, "other": 2}.items():
        torch.manual_seed(len(runs))
        model = digits_nin(bits)
        history = fit(model, digits, recipe, seed=seed)
        runs[name] = (state(model), history.to_frame().drop(columns="seconds"))
    assert torch.equal(runs["first"][0], runs["again"][0])
    assert runs["first"][1].equals(runs["again"][1])
    assert not torch.equal(runs["first"][0], runs["other"][0])


def test_dropout_repeats_and_global_state_is_untouched(classes):
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
    twin = copy.deepcopy(model)
    fit(model, classes, SHORT, seed=5)
    torch.rand(3)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(twin, classes, SHORT, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)  # noqa: NPY002
    assert torch.equal(state(model), state(twin))


def test_kernels_keep_their_layout(digits):
    model = digits_nin()
    fit(model, digits, SHORT, on_epoch=lambda _, m: nn.utils.parameters_to_vector(m.parameters()))
    assert all(parameter.is_contiguous() for parameter in model.parameters())


# Kinds of data, loss and model


def test_regression():
    splits = load_dataset("diabetes", validation=0.2)
    model = mlp(splits.train.inputs.shape[1], [8], 1, seed=0)
    recipe = Recipe(epochs=30, batch_size=32, learning_rate=0.01)
    metrics = {"absolute": lambda outputs, targets: (outputs - targets).abs()}
    history = fit(model, splits, recipe, loss=mse_loss, metrics=metrics)
    targets = splits.train.batch()[1]
    assert history.train.loss < targets.var()
    assert set(history.train.metrics) == {"absolute"}
    assert evaluate(model, splits.test, loss=mse_loss).metrics == {}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_networks_train(digits, bits):
    model = digits_nin(bits)
    first, before = evaluate(model, digits.train), step_sizes(model)
    history = fit(model, digits, Recipe(epochs=12, batch_size=32))
    assert history.train.loss < 0.9 * first.loss  # six seeds reached 0.28 to 0.80
    assert all((step_sizes(model)[name] != step).any() for name, step in before.items())
    assert history.validation.size == len(digits.validation)
    assert history.validation.loss == pytest.approx(evaluate(model, digits.validation).loss)


def test_tensors_loader_and_list_train_alike(classes):
    recipe = replace(SHORT, batch_size=20)
    models = [mlp(4, [5], 3, seed=0) for _ in range(3)]
    sources = [classes, DataLoader(TensorDataset(*classes), batch_size=20), [classes]]
    losses = [
        fit(model, data, recipe).train_loss for model, data in zip(models, sources, strict=True)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_a_shuffling_loader_repeats(classes):
    ends = []
    for _ in range(2):
        loader = DataLoader(TensorDataset(*classes), batch_size=8, shuffle=True)
        model = mlp(4, [5], 3, seed=0)
        fit(model, loader, SHORT, seed=3)
        ends.append(state(model))
    assert torch.equal(*ends)


def shuffled(data, model, recipe):
    return Source(data, model).shuffled(recipe, torch.Generator())


def test_a_single_sample_left_over_is_no_trouble_for_batch_norm(digits):
    model = nin(3, 8, in_channels=1, base_width=1, seed=0)  # 1x1 images at the end
    data = digits.train.take(torch.arange(33))
    recipe = replace(SHORT, batch_size=16)
    history = fit(model, data, recipe)
    assert history.train.size == 33
    assert Source(data, model).steps(recipe) == len(list(shuffled(data, model, recipe))) == 2
    model = mlp(64, [], 10)  # without batch norm
    assert Source(data, model).steps(recipe) == len(list(shuffled(data, model, recipe))) == 3
    for size in (1, 2, 32):
        assert Source(data.take(torch.arange(size)), digits_nin()).steps(recipe) == -(-size // 16)


def test_history(digits):
    history = fit(digits_nin(), digits, replace(SHORT, batch_size=64))
    frame = history.to_frame()
    assert list(frame) == [
        "epoch",
        "learning_rate",
        "running_loss",
        "train_loss",
        "train_accuracy",
        "validation_loss",
        "validation_accuracy",
        "seconds",
    ]
    assert list(frame.epoch) == [1, 2]
    assert (frame.seconds > 0).all()
    assert repr(history).startswith(f"History(epochs=2, kept_epoch={history.kept_epoch}, train=Ev")


def test_progress_only_when_asked_for(classes, capsys):
    fit(mlp(4, [], 3), classes, SHORT)
    assert capsys.readouterr() == ("", "")
    fit(mlp(4, [], 3), classes, SHORT, progress=True)
    assert "epoch 2/2" in capsys.readouterr().err


# Divergence


def test_divergence_names_the_layer_whose_output_is_not_finite(classes):
    model = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.ReLU(), Poison(4)), nn.Linear(5, 3))
    with pytest.raises(Diverged, match=r"nan in epoch 2, step 2.*output of layer '1.1'") as caught:
        fit(model, classes, SHORT)
    error = caught.value
    assert (error.epoch, error.step, error.layer) == (2, 2, "1.1")
    assert list(error.history.epoch) == [1]
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.layer) == (str(error), "1.1")


@pytest.mark.parametrize("quantized", [False, True])
def test_divergence_names_the_layer_whose_weights_are_not_finite(classes, quantized):
    model = mlp(4, [5, 5], 3, seed=0)
    if quantized:
        quantize_weights(model, 4)

    def spoil(epoch, model):
        parameter = next(p for name, p in model.named_parameters() if name.startswith("3."))
        parameter.data[0] = math.nan

    with pytest.raises(Diverged, match="weights of layer '3'") as caught:
        fit(model, classes, SHORT, on_epoch=spoil)
    assert (caught.value.epoch, caught.value.step, caught.value.layer) == (2, 1, "3")


def test_a_bad_gradient_is_found_in_the_next_step(classes):
    class Sharp(nn.Module):
        def forward(self, x):
            return x + (x * 0).abs().sqrt()  # adds nothing, but its slope is not a number

    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), Sharp(), nn.Linear(5, 3))
    with pytest.raises(Diverged, match="weights of layer '1'") as caught:
        fit(model, classes, SHORT)
    assert (caught.value.epoch, caught.value.step, caught.value.history) == (1, 2, None)


def test_divergence_in_the_inputs_and_in_the_loss(classes):
    inputs, targets = classes
    with pytest.raises(Diverged, match="first not finite: the inputs") as caught:
        fit(mlp(4, [], 3), (inputs / 0.0, targets), SHORT)
    assert caught.value.layer == "inputs"
    with pytest.raises(Diverged, match="the loss itself") as caught:
        fit(mlp(4, [], 3), classes, SHORT, loss=lambda o, t: cross_entropy(o, t) + math.inf)
    assert caught.value.layer == "loss"


def test_divergence_of_the_clean_pass(digits):
    model = digits_nin()
    model[1].running_var.fill_(-1.0)
    model[1].momentum = 0.0
    with pytest.raises(
        Diverged, match=r"clean pass after the epoch.*output of layer '1'"
    ) as caught:
        fit(model, digits, SHORT)
    assert caught.value.step == 0


def test_a_huge_rate_diverges(classes):
    with pytest.raises(Diverged, match="smaller learning rate"):
        fit(mlp(4, [5], 3, "relu"), classes, replace(SHORT, epochs=20, learning_rate=1e20))


# Bad arguments


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.randn(4, 3), torch.tensor([0, 1, 2, 3])), r"labels must lie in 0..2; got 0..3"),
        ((torch.randn(4, 3), torch.tensor([0, 1, 2, -1])), r"labels must lie in 0..2; got -1..2"),
        (
            (torch.randn(4, 5), torch.tensor([0, 1, 2, 0])),
            r"does not take inputs of shape \(4, 5\)",
        ),
        ((torch.randn(4, 3), torch.tensor([0, 1, 2])), "4 inputs for 3 targets"),
        ((torch.empty(0, 3), torch.empty(0, dtype=torch.int64)), "empty"),
        ([], "empty"),
        ((torch.randn(4, 3), torch.randn(4)), "does not take outputs"),
    ],
)
def test_data_that_do_not_fit(data, message):
    model = nn.Linear(3, 3)
    for use in (lambda: fit(model, data, SHORT), lambda: evaluate(model, data)):
        with pytest.raises(ValueError, match=message):
            use()
    assert model.weight.grad is None


def test_targets_of_another_shape_are_refused():
    data = torch.randn(4, 3), torch.randn(4)  # mse_loss would compare all pairs
    with pytest.raises(ValueError, match="one shape and type"):
        fit(nn.Linear(3, 1), data, SHORT, loss=mse_loss)


def test_an_objective_per_sample_is_refused(classes):
    def each(model, inputs, outputs, targets):
        return cross_entropy(outputs, targets, reduction="none")

    with pytest.raises(ValueError, match=r"objective must return one number .* shape \(8,\)"):
        fit(mlp(4, [], 3), classes, SHORT, objective=each)


def test_a_loss_per_sample_is_refused(classes):
    def each(outputs, targets):
        return cross_entropy(outputs, targets, reduction="none")

    with pytest.raises(ValueError, match="one number per batch"):
        fit(mlp(4, [], 3), classes, SHORT, loss=each)


def test_wrong_kinds(classes, digits):
    model = mlp(4, [], 3)
    with pytest.raises(TypeError, match="recipe must be a Recipe"):
        fit(model, classes, "qgen-nin")
    for data in (classes[0], 3, iter([classes])):
        with pytest.raises(TypeError, match="data must be"):
            fit(model, data, SHORT)
    with pytest.raises(TypeError, match="a batch must be"):
        fit(model, [classes[0]], SHORT)
    with pytest.raises(TypeError, match=r"data\.test"):
        evaluate(digits_nin(), digits)
    with pytest.raises(ValueError, match="no parameters"):
        fit(nn.ReLU(), classes, SHORT)


def test_augmentation_needs_a_dataset(classes):
    with pytest.raises(ValueError, match="augmentation"):
        fit(mlp(4, [], 3), classes, replace(SHORT, augmentation="crop"))
