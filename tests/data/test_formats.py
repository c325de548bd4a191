"""Every format and every way in which its files can be wrong, on tiny folders written here."""

import gzip
import hashlib
import json
import pickle
import re
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image

from qgen_lab._torchvision import torchvision
from qgen_lab.data import DatasetDamaged, DatasetMissing, formats, load_dataset

RNG = np.random.default_rng(0)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def cut_short(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def assert_equal(data, images, labels):
    np.testing.assert_array_equal(data.inputs, images)
    np.testing.assert_array_equal(data.targets, labels)


def test_the_two_errors_are_caught_as_what_they_are():
    assert issubclass(DatasetMissing, FileNotFoundError)
    assert issubclass(DatasetDamaged, ValueError)


class TestSheets:
    """Three sheets of 2x2 images of 8x8 pixels; the last is the test set."""

    IMAGES = RNG.integers(0, 256, (12, 8, 8, 3), np.uint8)
    LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2], np.uint8)
    NAMES = ("train_1.webp", "train_2.webp", "test.webp")

    @pytest.fixture(params=["cifar10", "cifar100"])
    def name(self, request):
        return request.param

    @pytest.fixture
    def folder(self, tmp_path, name, monkeypatch):
        sheets = {"cifar10": formats.CIFAR10_SHEETS, "cifar100": formats.CIFAR100_SHEETS}[name]
        folder = tmp_path / sheets.folder
        folder.mkdir()
        checksums = {}
        for k, file in enumerate(self.NAMES):
            images = self.IMAGES[4 * k : 4 * k + 4]
            rows = [np.concatenate(images[i : i + 2], axis=1) for i in (0, 2)]
            Image.fromarray(np.concatenate(rows)).save(folder / file, lossless=True, exact=True)
            checksums[file] = hashlib.sha256(images.tobytes()).hexdigest()
        np.save(folder / sheets.labels, self.LABELS)
        if sheets.classes is None:
            (folder / "label_names.json").write_text(json.dumps({"fine": ["x", "y", "z"]}))
        small = formats.Sheets(
            folder=sheets.folder,
            checksums=checksums,
            labels=sheets.labels,
            labels_checksum=hashlib.sha256(self.LABELS.tobytes()).hexdigest(),
            classes=sheets.classes and ("x", "y", "z"),
            columns=2,
            side=8,
        )
        monkeypatch.setattr(formats, f"{name.upper()}_SHEETS", small)
        return folder

    def test_read_from_the_shelf_and_from_the_folder_itself(self, folder, name):
        for root in (folder.parent, folder, str(folder)):
            splits = load_dataset(name, root=root)
            assert_equal(splits.train, self.IMAGES[:8], self.LABELS[:8])
            assert_equal(splits.test, self.IMAGES[8:], self.LABELS[8:])
            assert splits.train.classes == ("x", "y", "z")

    def test_a_truncated_sheet(self, folder, name):
        cut_short(folder / "train_2.webp")
        with pytest.raises(DatasetDamaged, match=r"train_2\.webp cannot be decoded"):
            load_dataset(name, root=folder)

    def test_an_altered_sheet(self, folder, name):
        with Image.open(folder / "test.webp") as image:
            pixels = np.array(image)
        pixels[3, 3, 0] ^= 1
        Image.fromarray(pixels).save(folder / "test.webp", lossless=True, exact=True)
        with pytest.raises(DatasetDamaged, match=r"test\.webp has a wrong checksum"):
            load_dataset(name, root=folder)

    def test_a_sheet_of_another_size(self, folder, name):
        Image.new("RGB", (8, 16)).save(folder / "train_1.webp", lossless=True)
        with pytest.raises(DatasetDamaged, match=r"train_1\.webp decodes to \(16, 8, 3\)"):
            load_dataset(name, root=folder)

    def test_a_missing_sheet(self, folder, name):
        (folder / "train_2.webp").unlink()
        with pytest.raises(DatasetDamaged, match=r"lacks train_2\.webp"):
            load_dataset(name, root=folder)

    @pytest.mark.parametrize("damage", [cut_short, lambda path: path.write_bytes(b"")])
    def test_truncated_labels(self, folder, name, damage):
        (path,) = folder.glob("*.npy")
        damage(path)
        with pytest.raises(DatasetDamaged, match=path.name):
            load_dataset(name, root=folder)

    def test_altered_labels(self, folder, name):
        (path,) = folder.glob("*.npy")
        np.save(path, self.LABELS[::-1])
        with pytest.raises(DatasetDamaged, match=f"{path.stem}.*wrong checksum"):
            load_dataset(name, root=folder)

    def test_labels_are_never_unpickled(self, folder, name):
        (path,) = folder.glob("*.npy")
        np.save(path, np.array([Path("x")], object), allow_pickle=True)
        with pytest.raises(DatasetDamaged, match="cannot be read"):
            load_dataset(name, root=folder)


def test_damaged_class_names(tmp_path):
    sheets = formats.CIFAR100_SHEETS
    path = tmp_path / "label_names.json"
    for content in ("{", '{"coarse": []}', '{"fine": 3}'):
        path.write_text(content)
        with pytest.raises(DatasetDamaged, match=r"label_names\.json"):
            sheets._class_names(path)


class TestOfficialCifar:
    """Pickled batches as torchvision reads them, five images each."""

    @pytest.fixture(params=["CIFAR10", "CIFAR100"])
    def source(self, request):
        return getattr(torchvision.datasets, request.param)

    @pytest.fixture
    def folder(self, tmp_path, source, monkeypatch):
        folder = tmp_path / source.base_folder
        folder.mkdir()
        self.images, self.labels = {}, {}
        labels_key = "labels" if source.__name__ == "CIFAR10" else "fine_labels"

        def write(name, content):
            pickled = pickle.dumps(content, protocol=2)
            (folder / name).write_bytes(pickled)
            return hashlib.md5(pickled).hexdigest()

        def listed(names):
            checksums = []
            for name, _ in names:
                images = RNG.integers(0, 256, (5, 32, 32, 3), np.uint8)
                rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(5, -1)
                self.images[name], self.labels[name] = images, [0, 1, 2, 1, 0]
                content = {"data": rows, labels_key: self.labels[name]}
                checksums.append([name, write(name, content)])
            return checksums

        monkeypatch.setattr(source, "train_list", listed(source.train_list))
        monkeypatch.setattr(source, "test_list", listed(source.test_list))
        md5 = write(source.meta["filename"], {source.meta["key"]: ["x", "y", "z"]})
        monkeypatch.setattr(source, "meta", {**source.meta, "md5": md5})
        return folder

    def load(self, source, root):
        return load_dataset(source.__name__.lower(), root=root)

    def test_read_from_the_shelf_and_from_the_folder_itself(self, folder, source):
        for root in (folder.parent, folder):
            splits = self.load(source, root)
            for part, listed in (
                (splits.train, source.train_list),
                (splits.test, source.test_list),
            ):
                names = [name for name, _ in listed]
                images = np.concatenate([self.images[name] for name in names])
                assert_equal(part, images, np.concatenate([self.labels[name] for name in names]))
            assert splits.train.classes == ("x", "y", "z")

    @pytest.mark.parametrize("damage", [cut_short, flip_a_byte])
    def test_damaged_batches_are_never_unpickled(self, folder, source, damage, monkeypatch):
        monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("unpickled"))
        name, _ = source.test_list[0]
        damage(folder / name)
        with pytest.raises(DatasetDamaged, match=f"{name} has a wrong checksum: cut short"):
            self.load(source, folder)

    def test_a_missing_batch(self, folder, source):
        (folder / source.meta["filename"]).unlink()
        with pytest.raises(DatasetDamaged, match=f"lacks {source.meta['filename']}"):
            self.load(source, folder)


class TestFashionMnist:
    LABELS = MappingProxyType({"train": np.arange(60_000) % 10, "t10k": np.arange(10_000) % 10})

    @pytest.fixture
    def folder(self, tmp_path):
        """The unpacked files; all images black but the last pixel of the last."""
        folder = tmp_path / "FashionMNIST" / "raw"
        folder.mkdir(parents=True)
        for prefix, labels in self.LABELS.items():
            n = len(labels)
            header = np.array([0x801, n], ">i4").tobytes()
            content = header + labels.astype(np.uint8).tobytes()
            (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(content)
            header = np.array([0x803, n, 28, 28], ">i4").tobytes()
            content = header + bytes(n * 28 * 28 - 1) + b"\x07"
            (folder / f"{prefix}-images-idx3-ubyte").write_bytes(content)
        return folder

    def check(self, splits):
        assert splits.train.inputs.shape == (60_000, 28, 28, 1)
        assert splits.test.inputs.shape == (10_000, 28, 28, 1)
        for part, labels in zip((splits.train, splits.test), self.LABELS.values(), strict=True):
            np.testing.assert_array_equal(part.targets, labels)
            assert part.inputs.sum() == part.inputs[-1, -1, -1, 0] == 7
        assert splits.train.classes[:2] == ("T-shirt/top", "Trouser")

    def test_unpacked_files(self, folder):
        for root in (folder.parents[1], folder.parent, folder):
            self.check(load_dataset("fashion_mnist", root=root, normalization="none"))

    def test_packed_files_are_verified(self, folder, monkeypatch):
        resources = []
        for path in sorted(folder.iterdir()):
            packed = folder / f"{path.name}.gz"
            packed.write_bytes(gzip.compress(path.read_bytes(), 1))
            path.unlink()
            resources.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
        self.check(load_dataset("fashion_mnist", root=folder))
        flip_a_byte(folder / "t10k-labels-idx1-ubyte.gz")
        with pytest.raises(
            DatasetDamaged, match=r"t10k-labels-idx1-ubyte\.gz has a wrong checksum"
        ):
            load_dataset("fashion_mnist", root=folder)

    def test_damaged_files(self, folder):
        labels = folder / "t10k-labels-idx1-ubyte"
        whole = labels.read_bytes()
        labels.write_bytes(whole[:-1] + b"\x0a")
        with pytest.raises(DatasetDamaged, match="t10k labels go up to 10"):
            load_dataset("fashion_mnist", root=folder)
        labels.write_bytes(b"\x01" + whole[1:])
        with pytest.raises(DatasetDamaged, match="t10k-labels-idx1-ubyte is not 10000 bytes"):
            load_dataset("fashion_mnist", root=folder)
        cut_short(folder / "train-images-idx3-ubyte")
        with pytest.raises(DatasetDamaged, match="train-images-idx3-ubyte is not 60000 x 28 x 28"):
            load_dataset("fashion_mnist", root=folder)
        (folder / "train-images-idx3-ubyte").unlink()
        with pytest.raises(DatasetDamaged, match="lacks train-images-idx3-ubyte"):
            load_dataset("fashion_mnist", root=folder)


class TestImageFolder:
    @pytest.fixture
    def root(self, tmp_path):
        for part, count in {"train": 3, "test": 2}.items():
            for k, name in enumerate(("ant", "bee")):
                for i in range(count):
                    self.write(tmp_path / part / name / f"{i}.png", (8, 6), 100 * k + i)
        return tmp_path

    def write(self, path, size, value, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = size
        array = np.full((height, width, 3), value, np.uint8)
        Image.fromarray(array).convert(mode).save(path)

    def load(self, root, **arguments):
        return load_dataset("image_folder", root=root, **arguments)

    def test_images_and_classes(self, root):
        (root / "train" / "bee" / "notes.txt").write_text("not an image")
        splits = self.load(root)
        assert splits.train.classes == ("ant", "bee")
        assert splits.train.inputs.shape == (6, 6, 8, 3)
        assert splits.train.inputs[:, 0, 0, 0].tolist() == [0, 1, 2, 100, 101, 102]
        assert splits.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
        assert splits.test.targets.tolist() == [0, 0, 1, 1]
        assert splits.validation is None

    @pytest.mark.parametrize("folder", ["val", "validation"])
    def test_a_validation_folder(self, root, folder):
        self.write(root / folder / "bee" / "0.png", (8, 6), 9)
        splits = self.load(root)
        assert splits.validation.targets.tolist() == [1]
        assert torch.equal(splits.validation.mean, splits.train.mean)
        with pytest.raises(ValueError, match="has a validation folder"):
            self.load(root, validation=0.3)

    def test_without_a_test_folder_there_is_no_test_part(self, root):
        for path in sorted((root / "test").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (root / "test").rmdir()
        assert self.load(root, validation=1 / 3).test is None

    def test_grey_and_palette_images_become_colour(self, root):
        self.write(root / "train" / "ant" / "grey.png", (8, 6), 50, mode="L")
        self.write(root / "train" / "ant" / "palette.png", (8, 6), 51, mode="P")
        assert self.load(root).train.inputs.shape == (8, 6, 8, 3)

    def test_sizes_must_agree_or_be_made_to(self, root):
        self.write(root / "train" / "ant" / "odd.png", (5, 9), 0)
        with pytest.raises(ValueError, match=r"odd\.png is \(9, 5\): pass resize"):
            self.load(root)
        assert self.load(root, resize=4).train.inputs.shape == (7, 4, 4, 3)
        assert self.load(root, resize=(4, 6)).test.inputs.shape == (4, 4, 6, 3)

    def test_sizes_must_agree_between_parts(self, root):
        for path in (root / "test").rglob("*.png"):
            self.write(path, (9, 9), 0)
        with pytest.raises(ValueError, match=r"differ in size.*pass resize"):
            self.load(root)

    def test_resizing_covers_and_cuts_at_the_centre(self, tmp_path):
        stripes = np.zeros((4, 12, 3), np.uint8)
        stripes[:, 4:8] = 200
        for name in ("ant", "bee"):
            (tmp_path / "train" / name).mkdir(parents=True)
            Image.fromarray(stripes).save(tmp_path / "train" / name / "0.png")
        assert (self.load(tmp_path, resize=4).train.inputs == 200).all()

    @pytest.mark.parametrize("resize", [0, -3, (4, 0), (1, 2, 3)])
    def test_bad_resize(self, root, resize):
        with pytest.raises(ValueError, match=r"resize = .*positive side"):
            self.load(root, resize=resize)

    @pytest.mark.parametrize("damage", [cut_short, lambda path: path.write_bytes(b"nothing")])
    def test_a_damaged_image(self, root, damage):
        path = root / "train" / "bee" / "1.png"
        Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8)).save(path)
        damage(path)
        with pytest.raises(DatasetDamaged, match=r"bee/1\.png cannot be decoded"):
            self.load(root)

    def test_a_class_that_training_lacks(self, root):
        self.write(root / "test" / "wasp" / "0.png", (8, 6), 0)
        with pytest.raises(ValueError, match="train has not: \\['wasp'\\]"):
            self.load(root)

    def test_empty_folders(self, root, tmp_path_factory):
        (root / "train" / "cow").mkdir()
        with pytest.raises(DatasetMissing, match=r"no image files in .*train/cow"):
            self.load(root)
        empty = tmp_path_factory.mktemp("empty")
        with pytest.raises(DatasetMissing, match="is empty"):
            self.load(empty)
        (empty / "train" / "ant").mkdir(parents=True)
        with pytest.raises(DatasetMissing, match="no image files below"):
            self.load(empty)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "image_folder"])
class TestMissing:
    def test_no_folder(self, name, tmp_path):
        root = tmp_path / "nowhere"
        with pytest.raises(
            DatasetMissing, match=f"{re.escape(str(root))}.*does not exist"
        ) as caught:
            load_dataset(name, root=root)
        assert "QGEN_DATA" in str(caught.value)
        assert not root.exists()

    def test_an_empty_folder(self, name, tmp_path):
        with pytest.raises(DatasetMissing, match=f"{re.escape(str(tmp_path))}.*is empty"):
            load_dataset(name, root=tmp_path)


OURS = {"CIFAR10": "cifar10", "CIFAR100": "cifar100", "FashionMNIST": "fashion_mnist"}


@pytest.mark.parametrize("name", OURS)
class TestDownload:
    @pytest.mark.parametrize("error", [OSError("no network"), RuntimeError("wrong file")])
    def test_it_is_asked_for_and_may_fail(self, name, error, tmp_path, monkeypatch):
        asked = []

        def download(self):
            asked.append(self.root)
            raise error

        monkeypatch.setattr(getattr(torchvision.datasets, name), "download", download)
        with pytest.raises(DatasetMissing, match="pass download=True"):
            load_dataset(OURS[name], root=tmp_path)
        assert not asked
        with pytest.raises(DatasetMissing, match=f"could not be downloaded to .*: {error}"):
            load_dataset(OURS[name], root=tmp_path, download=True)
        assert [Path(root) for root in asked] == [tmp_path]
