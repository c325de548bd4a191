import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgen_lab.qat.recipes import Recipe
from qgen_lab.qat.schedules import SCHEDULES, Cooldown, learning_rates

PLAIN = Recipe(epochs=10, learning_rate=0.5)
STEPPED = replace(PLAIN, schedule="multi-step", milestones=(2, 7, 30))


@pytest.mark.parametrize("steps", [1, 3])
def test_multi_step_equals_torch(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, STEPPED.milestones, gamma=0.1)
    expected = []
    for _ in range(STEPPED.epochs):
        expected += [schedule.get_last_lr()[0]] * steps
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(learning_rates(STEPPED, steps), expected, rtol=1e-15)


def test_constant_exponential_and_cosine_by_hand():
    np.testing.assert_array_equal(learning_rates(PLAIN, 4), np.full(40, 0.5))
    rates = learning_rates(replace(PLAIN, schedule="exponential", gamma=0.01), 4)
    np.testing.assert_allclose(rates, [0.5 * 0.01 ** (t / 40) for t in range(40)])
    rates = learning_rates(replace(PLAIN, schedule="cosine"), 4)
    np.testing.assert_allclose(rates, [0.5 * math.cos(math.pi * t / 80) ** 2 for t in range(40)])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("power", [1, 2.5])
def test_a_cooldown_multiplies_the_last_steps_of_any_schedule(schedule, power):
    recipe = replace(STEPPED, schedule=schedule)
    plain = learning_rates(recipe, 4)
    cooled = learning_rates(replace(recipe, cooldown=Cooldown(power, share=0.3)), 4)
    factors = [1.0] * 28 + [(1 - t / 12) ** power for t in range(12)]
    np.testing.assert_allclose(cooled, plain * factors, rtol=1e-14)


def test_a_short_cooldown_still_has_a_step_and_a_whole_one_takes_all():
    rates = learning_rates(replace(PLAIN, cooldown=Cooldown(share=1e-9)), 1)
    np.testing.assert_array_equal(rates, 0.5)  # one step, at the beginning of its way to zero
    rates = learning_rates(replace(PLAIN, cooldown=Cooldown(share=1.0)), 1)
    np.testing.assert_allclose(rates, np.linspace(0.5, 0.05, 10))


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    epochs=st.integers(1, 40),
    steps=st.integers(1, 7),
    milestones=st.sets(st.integers(1, 50), min_size=1),
    gamma=st.floats(1e-3, 1.0),
    power=st.floats(0.1, 8.0),
    share=st.floats(1e-6, 1.0),
)
def test_one_positive_rate_a_step_that_never_rises(
    schedule, epochs, steps, milestones, gamma, power, share
):
    recipe = Recipe(
        epochs=epochs,
        learning_rate=0.3,
        schedule=schedule,
        milestones=sorted(milestones),
        gamma=gamma,
        cooldown=Cooldown(power, share),
    )
    rates = learning_rates(recipe, steps)
    assert rates.shape == (epochs * steps,)
    assert rates[0] == 0.3
    assert (rates >= 0).all()
    assert (rates[1:] <= rates[:-1] * (1 + 1e-12)).all()


@pytest.mark.parametrize("power", [0, -1.0, math.inf, math.nan])
def test_cooldown_powers(power):
    with pytest.raises(ValueError, match="power must be positive"):
        Cooldown(power=power)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_cooldown_shares(share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got"):
        Cooldown(share=share)


def test_an_epoch_has_steps():
    with pytest.raises(ValueError, match="steps_per_epoch"):
        learning_rates(PLAIN, 0)
