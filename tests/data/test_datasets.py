import dataclasses
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from qgen_lab.data import Arrays, Dataset, DatasetMissing, load_dataset, readers
from qgen_lab.data.datasets import _stratified


@pytest.fixture
def blocks(monkeypatch):
    """A registered data set with 100, 60 and 40 training images of three classes."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [100, 60, 40]))
    # The first pixel of an image is its number, the second its class.
    images = rng.integers(0, 256, (200, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.arange(200), labels
    test = (images[:30].copy(), labels[:30].copy())
    arrays = Arrays((images, labels), test, ("a", "b", "c"))
    monkeypatch.setitem(readers, "blocks", lambda root, download: arrays)
    return arrays


def numbers(data):
    return data.inputs[:, 0, 0, 0].tolist()


def truth(data):
    return data.inputs[:, 0, 1, 0].long()


def images(n=10, channels=3):
    x = torch.randint(0, 256, (n, 4, 5, channels), generator=torch.Generator().manual_seed(0))
    return Dataset(
        x.to(torch.uint8), torch.arange(n) % 2, ("a", "b"), torch.arange(channels) / 10, 0.5
    )


def features(n=10):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return Dataset(x, x[:, :2].clone(), mean=torch.tensor([0.1, 0.2, 0.3]), std=torch.tensor(2.0))


class TestDataset:
    def test_a_batch_is_normalised_as_defined(self):
        data = images()
        x, y = data.batch()
        slow = np.empty((10, 3, 4, 5), np.float32)
        for n, channel in np.ndindex(10, 3):
            values = data.inputs[n, :, :, channel].numpy() / 255
            slow[n, channel] = (values - channel / 10) / 0.5
        np.testing.assert_allclose(x, slow, rtol=1e-6, atol=1e-6)
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, data.targets)

    def test_features_are_normalised_as_defined(self):
        data = features()
        x, y = data.batch([3, 1])
        torch.testing.assert_close(x, (data.inputs[[3, 1]] - torch.tensor([0.1, 0.2, 0.3])) / 2)
        assert torch.equal(y, data.targets[[3, 1]])

    @pytest.mark.parametrize("data", [images(), features()])
    @pytest.mark.parametrize(
        "indices", [[2, 0], np.array([2, 0]), torch.tensor([2, 0]), slice(2, 5), np.arange(10) > 6]
    )
    def test_batch_and_take_agree(self, data, indices):
        taken = data.take(indices)
        for one, other in zip(taken.batch(), data.batch(indices), strict=True):
            assert torch.equal(one, other)
        assert len(taken) == len(other)
        assert taken.classes == data.classes

    @pytest.mark.parametrize("data", [images(), features()])
    def test_what_comes_out_shares_no_memory(self, data):
        inputs, targets = data.inputs.clone(), data.targets.clone()
        taken = data.take(slice(0, 4))
        for tensor in (taken.inputs, taken.targets, *data.batch(), *next(data.batches(4))):
            tensor.zero_()
        assert torch.equal(data.inputs, inputs)
        assert torch.equal(data.targets, targets)

    @pytest.mark.parametrize("data", [images(), features()])
    def test_batches_go_through_everything_once(self, data):
        batches = list(data.batches(4))
        assert [len(y) for _, y in batches] == [4, 4, 2]
        for k, whole in enumerate(data.batch()):
            assert torch.equal(torch.cat([batch[k] for batch in batches]), whole)

    def test_shuffling_is_a_seeded_permutation(self):
        data = images(50)

        def epoch(generator):
            return torch.cat([x for x, _ in data.batches(8, True, generator)])

        one, again = (epoch(torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(one, again)
        assert not torch.equal(one, data.batch()[0])
        order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
        assert torch.equal(one, data.batch(order)[0])
        generator = torch.Generator().manual_seed(3)
        assert not torch.equal(epoch(generator), epoch(generator))

    def test_augmentation_comes_before_normalisation(self):
        data = images(64)
        x, y = next(data.batches(64, False, torch.Generator().manual_seed(0), "flip"))
        plain = data.batch()[0]
        mirrored = (x == plain.flip(3)).flatten(1).all(1)
        assert (mirrored | (x == plain).flatten(1).all(1)).all()
        assert 0 < mirrored.sum() < 64
        assert torch.equal(y, data.targets)

    def test_to_moves_everything_and_keeps_bytes(self):
        moved = images().to("meta")
        for tensor in (moved.inputs, moved.targets, moved.mean, moved.std):
            assert tensor.device.type == "meta"
        assert moved.inputs.dtype == torch.uint8

    def test_it_is_frozen_and_readable(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            images().targets = None
        assert repr(images()) == "Dataset(10 images 4x5x3, 2 classes, on cpu)"
        assert repr(features()) == "Dataset(10 rows of 3 features, regression, on cpu)"

    def test_bad_arguments(self):
        data = images()
        with pytest.raises(ValueError, match="batch_size = 0"):
            data.batches(0)
        with pytest.raises(ValueError, match="'crop-flip', 'flip', 'none'"):
            data.batches(4, augmentation="mirror")
        with pytest.raises(ValueError, match="need a generator"):
            data.batches(4, shuffle=True)
        with pytest.raises(ValueError, match="need a generator"):
            data.batches(4, augmentation="flip")
        with pytest.raises(ValueError, match="for images"):
            features().batches(4, augmentation="flip")

    def test_bad_tensors(self):
        x, y = images().inputs, images().targets
        with pytest.raises(ValueError, match="10 inputs but 9 targets"):
            Dataset(x, y[:9])
        with pytest.raises(ValueError, match=r"uint8 images of shape \(N, H, W, C\)"):
            Dataset(x.float(), y)
        with pytest.raises(ValueError, match="int64 class numbers"):
            Dataset(x, y.float())


class TestEmbedded:
    def test_digits(self):
        splits = load_dataset("digits")
        assert (len(splits.train), splits.validation, len(splits.test)) == (1437, None, 360)
        assert splits.train.inputs.shape == (1437, 8, 8, 1)
        assert splits.train.inputs.dtype == torch.uint8
        assert splits.train.inputs.max() == 255
        assert splits.train.classes == tuple("0123456789")
        # 16 grey values become bytes one to one; every digit of the source is there once.
        source = load_digits()
        both = torch.cat([splits.train.inputs, splits.test.inputs]).flatten(1).numpy()
        rounded = np.round(both.astype(float) * 16 / 255).astype(int)
        labels = torch.cat([splits.train.targets, splits.test.targets]).numpy()
        ours = sorted(map(tuple, np.column_stack([rounded, labels])))
        theirs = sorted(map(tuple, np.column_stack([source.data.astype(int), source.target])))
        assert ours == theirs
        share = torch.bincount(splits.test.targets) / torch.bincount(splits.train.targets)
        assert ((share - 360 / 1437).abs() < 0.02).all()

    def test_the_test_set_depends_on_no_argument(self):
        one = load_dataset("digits").test
        other = load_dataset("digits", seed=9, size=50, validation=0.2, label_noise=0.5).test
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)

    def test_diabetes(self):
        splits = load_dataset("diabetes")
        assert splits.train.inputs.shape == (353, 10)
        assert splits.test.inputs.shape == (89, 10)
        assert splits.train.targets.shape == (353, 1)
        assert splits.train.targets.dtype == torch.float32
        assert splits.train.classes == ()
        x, y = splits.train.batch()
        for value in (x, y):
            torch.testing.assert_close(
                value.mean(0), torch.zeros(value.shape[1]), rtol=0, atol=1e-5
            )
            torch.testing.assert_close(value.std(0, correction=0), torch.ones(value.shape[1]))
        assert not torch.isclose(splits.test.targets.mean(), torch.tensor(0.0), atol=1e-6)


class TestChoices:
    def test_the_parts_do_not_overlap_and_keep_their_order(self, blocks):
        splits = load_dataset("blocks", validation=0.25, size=100)
        train, validation = numbers(splits.train), numbers(splits.validation)
        assert (len(train), len(validation)) == (100, 50)
        assert not set(train) & set(validation)
        assert train == sorted(train)
        assert torch.equal(splits.train.targets, truth(splits.train))
        assert torch.equal(splits.validation.targets, truth(splits.validation))

    def test_without_choices_the_whole_set_comes_as_it_is(self, blocks):
        splits = load_dataset("blocks")
        assert numbers(splits.train) == list(range(200))
        np.testing.assert_array_equal(splits.test.inputs, blocks.test[0])

    @pytest.mark.parametrize("size", [10, 20, 100, 150])
    def test_stratification_is_exact_where_it_can_be(self, blocks, size):
        splits = load_dataset("blocks", validation=0.25, size=size, seed=4)
        assert torch.bincount(splits.validation.targets).tolist() == [25, 15, 10]
        counts = torch.bincount(splits.train.targets)
        torch.testing.assert_close(
            counts.double(), size * torch.tensor([0.5, 0.3, 0.2]).double(), rtol=0, atol=0.5 + 1e-6
        )

    @settings(max_examples=50)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 60))
    def test_every_beginning_of_the_stratified_order_has_the_proportions(self, labels, size):
        labels = np.array(labels)
        order = _stratified(labels, np.arange(len(labels)), np.random.default_rng(0).random(60))
        assert sorted(order) == list(range(len(labels)))
        size = min(size, len(labels))
        for label in np.unique(labels):
            share = np.mean(labels == label)
            assert abs(np.sum(labels[order[:size]] == label) - size * share) < 5

    def test_seeds(self, blocks):
        arguments = {"validation": 0.2, "size": 80, "label_noise": 0.3}
        one, again = (load_dataset("blocks", seed=1, **arguments) for _ in range(2))
        other = load_dataset("blocks", seed=2, **arguments)
        assert numbers(one.train) == numbers(again.train)
        assert torch.equal(one.train.targets, again.train.targets)
        assert numbers(one.train) != numbers(other.train)
        assert numbers(one.validation) != numbers(other.validation)

    def test_a_smaller_size_is_a_subset(self, blocks):
        large = load_dataset("blocks", validation=0.1, size=120)
        small = load_dataset("blocks", validation=0.1, size=30)
        assert set(numbers(small.train)) < set(numbers(large.train))

    def test_the_choices_are_independent(self, blocks):
        plain = load_dataset("blocks", validation=0.2, size=100)
        noisy = load_dataset("blocks", validation=0.2, size=100, label_noise=0.4)
        assert numbers(plain.train) == numbers(noisy.train)
        assert numbers(plain.validation) == numbers(noisy.validation)
        whole = load_dataset("blocks", validation=0.2, label_noise=0.4)
        assert numbers(whole.validation) == numbers(noisy.validation)
        # An image that is mislabelled in both has the same wrong label in both.
        wrong = dict(zip(numbers(whole.train), whole.train.targets.tolist(), strict=True))
        same = [
            wrong[number] == label
            for number, label, true in zip(
                numbers(noisy.train), noisy.train.targets.tolist(), truth(noisy.train), strict=True
            )
            if label != true and wrong[number] != true
        ]
        assert len(same) > 10
        assert all(same)

    @pytest.mark.parametrize("share", [0.0, 0.013, 0.5, 1.0])
    def test_label_noise_is_exact_and_only_in_training(self, blocks, share):
        splits = load_dataset("blocks", validation=0.2, label_noise=share)
        changed = splits.train.targets != truth(splits.train)
        assert changed.sum() == round(share * 160)
        assert set(splits.train.targets.tolist()) <= {0, 1, 2}
        assert torch.equal(splits.validation.targets, truth(splits.validation))
        assert torch.equal(splits.test.targets, truth(splits.test))
        # The reader's own arrays stay true.
        np.testing.assert_array_equal(blocks.train[1], blocks.train[0][:, 0, 1, 0])

    def test_wrong_labels_are_uniform_over_the_other_classes(self):
        true = load_dataset("digits").train.targets
        wrong = load_dataset("digits", label_noise=1.0).train.targets
        counts = torch.bincount((wrong - true) % 10, minlength=10)
        assert counts[0] == 0
        expected = 1437 / 9
        # Chi-squared with 8 degrees of freedom: above 26.1 once in a thousand.
        assert ((counts[1:] - expected).square() / expected).sum() < 26.1

    def test_normalisation_is_that_of_the_kept_training_part(self, blocks):
        splits = load_dataset("blocks", validation=0.3, size=60)
        values = splits.train.inputs.double().flatten(0, 2) / 255
        torch.testing.assert_close(splits.train.mean, values.mean(0).float())
        torch.testing.assert_close(splits.train.std, values.std(0, correction=0).float())
        for part in (splits.validation, splits.test):
            assert torch.equal(part.mean, splits.train.mean)
            assert torch.equal(part.std, splits.train.std)

    def test_other_normalisations(self, blocks):
        plain = load_dataset("blocks", normalization="none")
        x, _ = plain.test.batch()
        torch.testing.assert_close(x, plain.test.inputs.permute(0, 3, 1, 2) / 255)
        given = load_dataset("blocks", normalization=([0.1, 0.2, 0.3], [1, 2, 3]))
        torch.testing.assert_close(given.test.mean, torch.tensor([0.1, 0.2, 0.3]))
        torch.testing.assert_close(given.train.std, torch.tensor([1.0, 2.0, 3.0]))

    def test_a_constant_channel_is_only_centred(self, blocks):
        blocks.train[0][..., 2] = 7
        x, _ = load_dataset("blocks").train.batch()
        torch.testing.assert_close(x[:, 2], torch.zeros_like(x[:, 2]))

    def test_splits_move_as_a_whole(self, blocks):
        splits = load_dataset("blocks").to("meta")
        assert splits.train.inputs.device.type == splits.test.inputs.device.type == "meta"
        assert splits.validation is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"validation": 1.0}, "validation = 1.0: use 0, or a share"),
            ({"validation": -0.1}, "validation = -0.1"),
            ({"validation": 0.001}, "validation = 0.001"),
            ({"validation": float("nan")}, "validation = nan"),
            ({"size": 0}, "size = 0: use a whole number from 1 to 200"),
            ({"size": 201}, "size = 201"),
            ({"size": 10.5}, "size = 10.5"),
            ({"size": 150, "validation": 0.5}, "from 1 to 100"),
            ({"label_noise": 1.1}, "label_noise = 1.1"),
            ({"label_noise": -0.1}, "label_noise = -0.1"),
            ({"normalization": "whiten"}, "'standard', 'none'"),
            ({"normalization": ([0.0], [1.0])}, "3 values each"),
            ({"normalization": ([0, 0, 0], [1, 0, 1])}, "std positive"),
            ({"resize": 8}, "resize = 8 is for image_folder"),
        ],
    )
    def test_bad_arguments(self, blocks, arguments, message):
        with pytest.raises(ValueError, match=message):
            load_dataset("blocks", **arguments)

    def test_a_regression_has_no_label_noise_but_a_size_and_a_validation_part(self):
        with pytest.raises(ValueError, match="needs classes"):
            load_dataset("diabetes", label_noise=0.1)
        splits = load_dataset("diabetes", size=100, validation=0.2)
        assert (len(splits.train), len(splits.validation)) == (100, 71)

    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(ValueError, match="'mnist': use one of cifar10, cifar100, diabetes"):
            load_dataset("mnist")


class TestWhereFilesAre:
    def missing(self, path):
        return pytest.raises(DatasetMissing, match=re.escape(str(path)))

    def test_the_environment_variable_then_the_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("QGEN_DATA", str(tmp_path / "shelf"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        with self.missing(tmp_path / "shelf"):
            load_dataset("cifar10")
        with self.missing(tmp_path / "given"):
            load_dataset("cifar10", root=tmp_path / "given")
        monkeypatch.delenv("QGEN_DATA")
        with self.missing(tmp_path / "cache" / "qgen-lab"):
            load_dataset("cifar10")
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        with self.missing(tmp_path / "home" / ".cache" / "qgen-lab"):
            load_dataset("cifar10")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_real_set(name):
    if not os.environ.get("QGEN_DATA"):
        pytest.skip("QGEN_DATA is not set: no real data to read")
    try:
        splits = load_dataset(name)
    except DatasetMissing as error:
        pytest.skip(str(error))
    classes = {"cifar10": 10, "cifar100": 100}[name]
    assert splits.train.inputs.shape == (50_000, 32, 32, 3)
    assert splits.test.inputs.shape == (10_000, 32, 32, 3)
    assert torch.bincount(splits.train.targets).tolist() == [50_000 // classes] * classes
    assert torch.bincount(splits.test.targets).tolist() == [10_000 // classes] * classes
    # Widely published figures of the training set.
    mean, std = {
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    }[name]
    torch.testing.assert_close(splits.train.mean, torch.tensor(mean), rtol=0, atol=6e-5)
    torch.testing.assert_close(splits.train.std, torch.tensor(std), rtol=0, atol=6e-5)
    assert splits.train.classes[0] == {"cifar10": "airplane", "cifar100": "apple"}[name]
