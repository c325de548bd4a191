"""The table against the same steps by hand, its intervals against closed formulas and coverage."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from qgen_lab.data import load_dataset
from qgen_lab.qat import (
    BitsRow,
    BitsTable,
    Evaluation,
    Recipe,
    bits_per_layer,
    evaluate,
    fit,
    mlp,
    nin,
    packed_bytes,
    quantize_weights,
    reestimate_batch_norm,
    round_model,
    which_bits,
)

FEW = {"steps": 20, "constant_steps": 20}
RECIPE = Recipe(epochs=1, learning_rate=0.03)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", validation=0.1, size=300)


@pytest.fixture(scope="module")
def model(data):
    model = nin(1, 8, in_channels=1, base_width=1, seed=0)
    fit(model, data, Recipe(epochs=20))
    return model


@pytest.fixture(scope="module")
def table(model, data):
    return which_bits(model, data, bits=(2, 4), recipe=RECIPE, seed=3, **FEW)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def row_of(table, procedure, bits):
    (row,) = [row for row in table.rows if (row.procedure, row.bits) == (procedure, bits)]
    return row


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def table_of(*rows):
    """A table of made-up accuracies, sample by sample; the loss is their negative."""
    train = Evaluation(0.0, {"accuracy": 1.0}, 10)
    made = [
        BitsRow(32, "as it is", 0, None, size, train, {"loss": -hits, "accuracy": hits}, 0.0)
        for size, hits in rows
    ]
    return BitsTable(made)


class TestRows:
    def test_what_is_compared_with_what(self, table):
        frame = table.to_frame()
        assert frame.bits.tolist() == [32, 32, 2, 4, 32, 2, 4]
        assert frame.procedure.tolist() == [
            *("as it is", "re-estimated", "rounding", "rounding"),
            *("training", "training", "training"),
        ]
        assert frame.against.fillna(-1).tolist() == [-1, 0, 1, 1, 0, 4, 4]

    def test_the_model_stays_as_it_is(self, model, data):
        model.train()
        before, random = state(model), torch.get_rng_state()
        table = which_bits(model, data, bits=[3], recipe=RECIPE, **FEW)
        assert table.rows[0].model is model
        assert equal(state(model), before)
        assert all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), random)
        model.eval()

    @pytest.mark.parametrize("bits", [2, 4])
    def test_rounding_by_hand(self, table, model, data, bits):
        row, by_hand = row_of(table, "rounding", bits), copy.deepcopy(model)
        round_model(by_hand, data.train, bits, **FEW)
        assert equal(state(row.model), state(by_hand))
        assert row.bytes == packed_bytes(by_hand) < table.rows[0].bytes
        check_numbers(row, by_hand, data)

    @pytest.mark.parametrize("bits", [32, 2, 4])
    def test_training_by_hand(self, table, model, data, bits):
        row, by_hand = row_of(table, "training", bits), copy.deepcopy(model)
        if bits < 32:
            quantize_weights(by_hand, bits, "uniform")
        fit(by_hand, data.train, RECIPE, seed=3)
        assert equal(state(row.model), state(by_hand))
        check_numbers(row, by_hand, data)

    def test_the_model_as_it_is(self, table, model, data):
        check_numbers(table.rows[0], model, data)
        sizes = [value.numel() * value.element_size() for value in state(model).values()]
        assert table.rows[0].bytes == row_of(table, "training", 32).bytes == sum(sizes)

    def test_what_new_batch_norm_statistics_do_by_themselves(self, table, model, data):
        """The control of rounding, which re-estimates them; none where there are none."""
        by_hand = reestimate_batch_norm(copy.deepcopy(model), data.train)
        assert equal(state(row_of(table, "re-estimated", 32).model), state(by_hand))
        kept = which_bits(model, data, [2], method="nearest", batch_norm="kept").to_frame()
        assert kept.bits.tolist() == [32, 2]
        assert kept.against.fillna(-1).tolist() == [-1, 0]

    def test_options_reach_rounding_and_training(self, model, data):
        chosen = {"per_channel": True, "exclude": "0", "quantizer": "lsq"}
        some = data.train.take(slice(0, 50))
        table = which_bits(
            model, data, [3], recipe=RECIPE, method="nearest", calibration=some, **chosen
        )
        rounded, trained = copy.deepcopy(model), copy.deepcopy(model)
        round_model(rounded, some, 3, "nearest", **chosen)
        fit(quantize_weights(trained, 3, **chosen), data.train, RECIPE)
        assert equal(state(row_of(table, "rounding", 3).model), state(rounded))
        assert equal(state(row_of(table, "training", 3).model), state(trained))
        assert len(bits_per_layer(rounded)) == len(bits_per_layer(trained)) > 0

    def test_a_training_that_diverges_leaves_a_row_without_numbers(self, model, data):
        wild = replace(RECIPE, learning_rate=1e30)
        table = which_bits(model, data, [2], recipe=wild, **FEW)
        frame = table.to_frame()
        lost = frame[frame.procedure == "training"]
        assert lost[["validation_loss", "train_accuracy", "loss_change"]].isna().all(axis=None)
        assert lost.bytes.isna().all()
        assert frame[frame.procedure != "training"].validation_loss.notna().all()
        assert table.smallest(1.0).bits == 2
        assert "nan" in repr(table)


def check_numbers(row, model, data):
    expected = evaluate(model, data.validation)
    assert row.validation.loss == pytest.approx(expected.loss, rel=1e-5)
    assert row.validation.metrics == pytest.approx(expected.metrics)
    assert row.train == evaluate(model, data.train)
    gap = expected.loss - row.train.loss
    assert row.generalization_gap == pytest.approx(gap, rel=1e-4, abs=1e-6)


def rows_of(table):
    return table.to_frame().drop(columns="seconds")


class TestData:
    def test_datasets_tensors_and_loaders_give_one_table(self, model, data):
        train, validation = data.train.batch(), data.validation.batch()
        options = {"bits": [3], "method": "nearest", "batch_norm": "kept"}
        expected = rows_of(which_bits(model, data, **options))
        loaders = DataLoader(TensorDataset(*train), 64), DataLoader(TensorDataset(*validation), 7)
        for parts in [(data.train, data.validation), (train, validation), loaders]:
            found = rows_of(which_bits(model, parts, **options))
            assert found.columns.equals(expected.columns)
            numbers = expected.select_dtypes("number").columns
            np.testing.assert_allclose(
                found[numbers].astype(float), expected[numbers].astype(float), rtol=1e-3, atol=1e-6
            )

    def test_samples_in_another_order_are_not_pairs(self, model, data):
        generator = torch.Generator().manual_seed(0)
        pairs = TensorDataset(*data.validation.batch())
        shuffled = DataLoader(pairs, 64, shuffle=True, generator=generator)
        with pytest.raises(ValueError, match="another order in each pass"):
            which_bits(model, (data.train, shuffled), [3], method="nearest")

    def test_a_regression_has_a_loss_and_no_accuracy(self):
        data = load_dataset("diabetes", validation=0.2)
        model = mlp(10, [8], 1, seed=0)
        fit(model, data, Recipe(epochs=2, learning_rate=1e-3), loss=mse_loss)
        table = which_bits(model, data, [2, 8], loss=mse_loss, method="nearest")
        assert not [name for name in table.to_frame() if "accuracy" in name]
        assert table.to_frame().loss_change.notna().sum() == 2
        with pytest.raises(ValueError, match="'accuracy' is not known; the names are: loss"):
            table.smallest(0.1)

    def test_metrics_of_ones_own(self, model, data):
        def brier(outputs, targets):
            wanted = torch.nn.functional.one_hot(targets, 10)
            return (outputs.softmax(1) - wanted).square().sum(1)  # one value a sample

        table = which_bits(model, data, [2], metrics={"brier": brier}, method="nearest")
        row = row_of(table, "rounding", 2)
        expected = evaluate(row.model, data.validation, metrics={"brier": brier})
        assert row.validation.metrics == pytest.approx(expected.metrics)


class TestIntervals:
    def test_of_losses_are_student_s(self, table):
        row, against = (table.rows[number].values["loss"] for number in (5, 4))
        interval = stats.ttest_rel(row, against).confidence_interval(0.9)
        found = table.difference(5, 4, "loss", level=0.9)
        assert found.estimate == pytest.approx(row.mean() - against.mean())
        assert (found.low, found.high) == pytest.approx(tuple(interval))

    @pytest.mark.parametrize(("lost", "won", "samples"), [(9, 2, 100), (0, 0, 50), (30, 0, 60)])
    def test_of_accuracies_are_bonett_s_and_price_s(self, lost, won, samples):
        """Their equation by hand, with Student's t in place of the normal law."""
        found = difference_of(lost, won, samples)
        n = samples + 2
        down, up = (lost + 1) / n, (won + 1) / n
        error = np.sqrt((down + up - (up - down) ** 2) / (n - 1))
        half = stats.t.ppf(0.975, n - 1) * error
        assert found.estimate == pytest.approx((won - lost) / samples)
        assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half))
        assert found.low < found.estimate < found.high

    @pytest.mark.parametrize("disagree", [(0.01, 0), (0.02, 0), (0.05, 0), (0.03, 0.01)])
    def test_of_accuracies_cover_what_they_promise(self, disagree):
        """Exactly, by all outcomes of 100 samples."""
        samples, (lost, won) = 100, np.indices((40, 40)).reshape(2, -1)
        counts = np.stack([lost, won, samples - lost - won], axis=1)
        chances = stats.multinomial.pmf(counts, samples, [*disagree, 1 - sum(disagree)])
        truth, covered = disagree[1] - disagree[0], 0.0
        for chance, outcome in zip(chances, counts, strict=True):
            if chance > 1e-7:
                found = difference_of(*outcome[:2], samples)
                covered += chance * (found.low <= truth <= found.high)
        assert 0.94 < covered <= 1

    def test_are_much_closer_than_those_of_single_models(self, table):
        hits = table.rows[0].values["accuracy"]
        single = 1.96 * hits.std() / len(hits) ** 0.5
        found = table.difference(4, 0)
        assert found.high - found.low < 2 * single

    def test_frame_and_difference_agree(self, table):
        frame = table.to_frame()
        found = table.difference(5, 4)
        columns = ["accuracy_change", "accuracy_change_low", "accuracy_change_high"]
        assert frame.loc[5, columns].tolist() == [found.estimate, found.low, found.high]
        assert frame.loc[0, columns].isna().all()


def difference_of(lost, won, samples):
    reference = np.r_[np.ones(lost), np.zeros(samples - lost)]
    values = np.r_[np.zeros(lost), np.ones(won), np.zeros(samples - lost - won)]
    return table_of((1, reference), (1, values)).difference(1, 0)


class TestSmallest:
    def test_is_sure(self):
        as_it_is = np.ones(1000)
        slightly, clearly = as_it_is.copy(), as_it_is.copy()
        slightly[:5], clearly[:40] = 0, 0
        table = table_of((400, as_it_is), (100, slightly), (50, clearly))
        assert table.smallest(0.02).bytes == 100
        assert table.smallest(0.006).bytes == 400  # 0.005 less, but not surely
        assert table.smallest(0.1).bytes == 50

    def test_is_against_the_model_as_it_is(self, table):
        """However bad its twin that was trained on."""
        row = table.smallest(0.05)
        assert table.difference(table.rows.index(row), 0).low >= -0.05 or row is table.rows[0]


def test_it_prints_as_a_table(table):
    text, html = repr(table), table._repr_html_()
    assert len(text.splitlines()) == 1 + 7 + 1
    assert max(map(len, text.splitlines())) < 120
    for part in ("rounding", "training", "accuracy change", f"{table.rows[2].bytes:,}"):
        assert part in text
        assert part in html
    assert "On 144 validation samples" in text
    assert "BitsRow(bits=2, procedure='rounding', validation=Evaluation(" in repr(table.rows[2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": ()}, ValueError, r"bits is empty: give some, such as \(2, 3, 4, 8\)"),
        ({"bits": 4}, TypeError, "bits = 4: give several"),
        ({"bits": (2, 17)}, ValueError, "bits = 17: use a whole number from 1 to 16"),
        ({"bits": (2.5,)}, ValueError, r"bits = 2\.5: use a whole number"),
        ({"method": "best"}, ValueError, "'best' is not known; the names are: nearest"),
        ({"quantizer": "best"}, ValueError, "'best' is not known; the names are:"),
        ({"recipe": "digits-nin"}, TypeError, "recipe must be a Recipe"),
        ({"exclude": "nothing"}, ValueError, "exclude='nothing' matches no layer"),
    ],
)
def test_bad_arguments(model, data, change, error, message):
    with pytest.raises(error, match=message):
        which_bits(model, data, **{"bits": [2]} | change)


def test_bad_data(model, data):
    with pytest.raises(ValueError, match=r"no validation set.*validation=0\.1"):
        which_bits(model, replace(data, validation=None))
    for nothing_to_choose_on in (data.train, data.train.batch(), 3):
        with pytest.raises(TypeError, match=r"Splits, or a pair \(train, validation\)"):
            which_bits(model, nothing_to_choose_on)
    with pytest.raises(TypeError, match="data must be"):
        which_bits(model, (data.train, 3))
    with pytest.raises(ValueError, match="one sample: give two or more"):
        which_bits(model, (data.train, data.validation.take([0])))


def test_a_quantized_model_is_refused(table, data):
    with pytest.raises(ValueError, match="quantized already: give it as it was in full precision"):
        which_bits(table.rows[2].model, data)


def test_the_bar_says_what_is_done(model, data, capsys):
    which_bits(model, data, [2], method="nearest")
    assert capsys.readouterr().err == ""
    which_bits(model, data, [2], method="nearest", progress=True)
    assert "rounding, 2 bits" in capsys.readouterr().err
