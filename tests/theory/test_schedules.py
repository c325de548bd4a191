import numpy as np
import pytest

from qgen_lab.theory import schedules

RATE = 0.3
ALL = [
    schedules.constant(RATE, 60),
    schedules.stepped(RATE, [20, 30, 10]),
    schedules.exponential(RATE, 60, decades=4),
    schedules.inverse_time(RATE, 60, fold=50),
    schedules.cosine(RATE, 60),
    schedules.cooldown(RATE, 60),
    schedules.cooldown(RATE, 60, power=16),
]


@pytest.mark.parametrize("rates", ALL)
def test_a_schedule_begins_at_its_rate_and_never_rises(rates):
    assert rates.shape == (60,)
    assert rates[0] == pytest.approx(RATE)
    assert (np.diff(rates) <= 1e-15).all()
    assert (rates > 0).all()


def test_where_the_schedules_end():
    _, stepped, exponential, inverse, cosine, linear, steep = ALL
    assert stepped[[19, 20, 49, 50]] == pytest.approx([0.3, 0.03, 0.03, 0.003])
    assert exponential[-1] == pytest.approx(RATE * 10 ** (-4 * 59 / 60))
    assert np.ptp(exponential[1:] / exponential[:-1]) < 1e-12
    assert inverse[30] == pytest.approx(RATE / 26)
    assert cosine[30] == pytest.approx(RATE / 2)
    assert linear[-1] == pytest.approx(RATE / 60)
    assert steep[15] == pytest.approx(RATE * 0.75**16)


def test_a_cosine_ends_like_a_cooldown_of_power_two():
    cosine, square = schedules.cosine(1.0, 10_000), schedules.cooldown(1.0, 10_000, power=2)
    assert cosine[-100:] / square[-100:] == pytest.approx(np.pi**2 / 4, rel=1e-3)
