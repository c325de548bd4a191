"""Readers: from the files of each data set to arrays, with nothing chosen, split or normalised."""

import gzip
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split

from qgen_lab._torchvision import torchvision

Part = tuple[NDArray, NDArray]


class DatasetMissing(FileNotFoundError):
    """A data set is not where it was looked for; the message says where and what to do."""


class DatasetDamaged(ValueError):
    """A file of a data set is absent, cut short or altered; the message names it."""


class Arrays(NamedTuple):
    """What a reader returns: the parts of a data set as arrays.

    `train`, `test`, `validation` are pairs (inputs, targets): inputs are bytes (N, H, W, C) or
    float32 features (N, D); targets are class numbers (N,) or float32 (N, K). `classes` are the
    names in order, empty for regression. A part that the data set does not have is None.
    """

    train: Part
    test: Part | None
    classes: tuple[str, ...]
    validation: Part | None = None


def read_digits(root: Path, download: bool) -> Arrays:
    """Handwritten digits of 8x8 pixels, embedded in scikit-learn: 1,437 to train, 360 to test.

    Grey values 0..16 are scaled to 0..255. The split is stratified and always the same.
    """
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=360, stratify=digits.target, random_state=0
    )
    return Arrays((train_x, train_y), (test_x, test_y), tuple(map(str, digits.target_names)))


def read_diabetes(root: Path, download: bool) -> Arrays:
    """Diabetes progression, a regression embedded in scikit-learn: 353 to train, 89 to test.

    Ten features in their own units; the target has zero mean and unit variance over the 353. The
    split is always the same.
    """
    features, target = load_diabetes(return_X_y=True, scaled=False)
    train_x, test_x, train_y, test_y = train_test_split(
        features.astype(np.float32), target[:, None], test_size=89, random_state=0
    )
    mean, std = train_y.mean(), train_y.std()
    train_y, test_y = (((y - mean) / std).astype(np.float32) for y in (train_y, test_y))
    return Arrays((train_x, train_y), (test_x, test_y), ())


def read_cifar10(root: Path, download: bool) -> Arrays:
    """CIFAR-10, in torchvision's layout or as sheets: 50,000 to train, 10,000 to test."""
    return _read_cifar(root, download, torchvision.datasets.CIFAR10, CIFAR10_SHEETS)


def read_cifar100(root: Path, download: bool) -> Arrays:
    """CIFAR-100 with its 100 fine classes, in torchvision's layout or as sheets."""
    return _read_cifar(root, download, torchvision.datasets.CIFAR100, CIFAR100_SHEETS)


@dataclass(frozen=True)
class Sheets:
    """A folder of lossless WebP sheets, one per batch of images, and labels beside them.

    Image i of a sheet is at row `i // columns`, column `i % columns` of a square grid of `columns`
    by `columns` images of `side` pixels. `checksums` are sha256 of the decoded images of each
    sheet, bytes in the order (N, H, W, C), by file name; the last sheet is the test set.
    `labels_checksum` is that of the labels, bytes, training set first.
    """

    folder: str
    checksums: dict[str, str]
    labels: str
    labels_checksum: str
    classes: tuple[str, ...] | None = None  # None: "fine" in label_names.json
    columns: int = 100
    side: int = 32

    @property
    def files(self) -> list[str]:
        """Names of all files that are read."""
        return [*self.checksums, self.labels, *(() if self.classes else ("label_names.json",))]

    def read(self, folder: Path) -> Arrays:
        """Read and verify the folder."""
        _require_files(folder, self.files)
        labels = self._labels(folder / self.labels)
        classes = self.classes or self._class_names(folder / "label_names.json")
        per_sheet = self.columns**2
        n_train = per_sheet * (len(self.checksums) - 1)
        images = np.empty((n_train + per_sheet, self.side, self.side, 3), np.uint8)
        for k, (name, checksum) in enumerate(self.checksums.items()):
            images[k * per_sheet : (k + 1) * per_sheet] = self._sheet(folder / name, checksum)
        return Arrays(
            (images[:n_train], labels[:n_train]), (images[n_train:], labels[n_train:]), classes
        )

    def _sheet(self, path: Path, checksum: str) -> NDArray[np.uint8]:
        sheet = _read_image(path)
        grid, side = self.columns, self.side
        if sheet.shape != (grid * side, grid * side, 3):
            raise DatasetDamaged(
                f"{path} decodes to {sheet.shape}, not to {grid * side} pixels square in colour;"
                f" {_REPLACE}"
            )
        images = sheet.reshape(grid, side, grid, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        _verify(path, images, checksum)
        return images

    def _labels(self, path: Path) -> NDArray[np.uint8]:
        try:
            labels = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DatasetDamaged(f"{path} cannot be read ({error}); {_REPLACE}") from error
        _verify(path, labels, self.labels_checksum)
        return labels

    def _class_names(self, path: Path) -> tuple[str, ...]:
        try:
            return tuple(json.loads(path.read_text())["fine"])
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetDamaged(f"{path} cannot be read ({error}); {_REPLACE}") from error


CIFAR10_SHEETS = Sheets(
    folder="cifar-10",
    checksums={
        "train_1.webp": "fc115a3de050d667b88cbd5b0b9612ebf996c54230fe7758f3a14bb5af9a1c27",
        "train_2.webp": "89e609b642f687bc796fa3bfa4211005582a0e8131d463d996d11ddb297d312e",
        "train_3.webp": "93a365823e61729490a8801d80864ccd0ab1e8c98f19d71af65644d1c5f1486e",
        "train_4.webp": "809eb95ecd057a36516318f5023ea619009dd70dd38193db9da43125a928e6fa",
        "train_5.webp": "d05b7d66d216d6df882cc760cdc0ff2f1f0437abf699ed16005c021ef0add9cb",
        "test.webp": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
    },
    labels="labels.npy",
    labels_checksum="3edb456524d5918aefded81f5aef7c32efab2a788211df998a4eb0c8957baa1f",
    classes=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
)

CIFAR100_SHEETS = Sheets(
    folder="cifar-100",
    checksums={
        "train_1.webp": "08eeff2b6aa69642ea629ba6f6e2ca196951fc57b474a397ef8df596bc00fa0b",
        "train_2.webp": "e414d34879999a7fda8ed96461c2a393b8252a429f6524ee06cd38035710fb4e",
        "train_3.webp": "87fe8825dcbf73a1a6c96f1f67bf451d110b51112f94b2605ecf10fff834b860",
        "train_4.webp": "4771187e2bd10e553f6043b33d36258da8b2da10e25b3935be49fd1eaa17c289",
        "train_5.webp": "00b13e05a09815850dd06dde3d36ea3cf4bffda9f172920e0e40845ade48f4dd",
        "test.webp": "d3095d123e93a0bf89623544a9d4b9ef4bd9655fb375ab7a6e8ee71c86295a31",
    },
    labels="fine_labels.npy",
    labels_checksum="a49bd3f0c69e94320ab4020aa53e08c4a5826a6e782f50129cbc396695456189",
)


def read_fashion_mnist(root: Path, download: bool) -> Arrays:
    """Fashion-MNIST in torchvision's layout: 60,000 to train, 10,000 to test, 28x28 grey pixels.

    The packed files (`.gz`) are read and verified where they are; official checksums exist for
    them alone, so of unpacked files only headers, lengths and labels are checked.
    """
    source = torchvision.datasets.FashionMNIST
    checksums = dict(source.resources)
    names = [*checksums, *(name.removesuffix(".gz") for name in checksums)]
    folders = [root / "FashionMNIST" / "raw", root / "raw", root]
    folder = _find(folders, names)
    if folder is None:
        _download(source, "Fashion-MNIST", root, folders, download)
        folder = folders[0]

    def read(prefix: str, n: int) -> Part:
        images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", checksums, (n, 28, 28))
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", checksums, (n,))
        if labels.max() >= len(source.classes):
            raise DatasetDamaged(f"{folder}: {prefix} labels go up to {labels.max()}; {_REPLACE}")
        return images[..., None], labels

    return Arrays(read("train", 60_000), read("t10k", 10_000), tuple(source.classes))


def read_image_folder(
    root: Path, download: bool, resize: int | tuple[int, int] | None = None
) -> Arrays:
    """Image files in one folder a class, below `train` and optionally `validation` and `test`.

    `val` is read as `validation`. Classes are the folders below `train`, in alphabetical order.
    Images become RGB bytes; all must have one size, or are scaled to cover `resize` (a side, or
    height and width) and cut at the centre. Nothing is downloaded.
    """
    sides = (resize, resize) if isinstance(resize, int) else resize
    if sides is not None and not (len(sides) == 2 and all(side > 0 for side in sides)):
        raise ValueError(f"resize = {resize!r}: use a positive side, or a pair (height, width)")
    train = root / "train"
    classes = tuple(sorted(path.name for path in train.glob("*/") if path.is_dir()))
    if not classes:
        raise DatasetMissing(
            f"no image folder at {root} ({_state(root)}): it needs train/<class>/<image files>;"
            " pass its path as root or set QGEN_DATA"
        )
    parts = {"train": train, "test": root / "test", "validation": root / "validation"}
    if not parts["validation"].is_dir():
        parts["validation"] = root / "val"
    read = {
        name: _read_class_folders(folder, classes, sides)
        for name, folder in parts.items()
        if folder.is_dir()
    }
    present = set(read["train"][1])
    if absent := [name for k, name in enumerate(classes) if k not in present]:
        raise DatasetMissing(f"no image files in {train / absent[0]}: add some or delete it")
    sizes = {name: images.shape[1:3] for name, (images, _) in read.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"images below {root} differ in size, {sizes}: pass resize=(height, width)"
        )
    return Arrays(read["train"], read.get("test"), classes, read.get("validation"))


_REPLACE = "replace it, or delete the folder and get the data set again"


def _read_cifar(root: Path, download: bool, source: type, sheets: Sheets) -> Arrays:
    """The official batches if they are there, else the sheets, else a download."""
    batches = dict([*source.train_list, *source.test_list])
    batches[source.meta["filename"]] = source.meta["md5"]
    official = [root / source.base_folder, *([root] if root.name == source.base_folder else [])]
    folder = _find(official, batches)
    if folder is None:
        compact = [root / sheets.folder, root]
        if (found := _find(compact, sheets.files)) is not None:
            return sheets.read(found)
        _download(source, sheets.folder.upper(), root, official + compact, download)
        folder = official[0]
    _require_files(folder, batches)
    for name, md5 in batches.items():
        _verify_file(folder / name, md5)  # before anything is unpickled
    train, test = (source(folder.parent, train=train) for train in (True, False))
    return Arrays(
        *((np.ascontiguousarray(part.data), np.array(part.targets)) for part in (train, test)),
        classes=tuple(train.classes),
    )


def _read_class_folders(
    folder: Path, classes: tuple[str, ...], sides: tuple[int, int] | None
) -> Part:
    """All images below `folder`, in the order of their paths, and their class numbers."""
    paths = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in _IMAGE_SUFFIXES)
    if strange := {path.parent.name for path in paths} - set(classes):
        raise ValueError(f"{folder} has classes that train has not: {sorted(strange)}")
    if not paths:
        raise DatasetMissing(f"no image files below {folder}: add some or delete the folder")
    images = [_read_image(path, sides) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"images differ in size: {paths[0]} is {images[0].shape[:2]} pixels, {path} is"
                f" {image.shape[:2]}: pass resize=(height, width)"
            )
    return np.stack(images), np.array([classes.index(path.parent.name) for path in paths])


_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tiff"})


def _read_image(path: Path, sides: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """RGB bytes (H, W, 3), scaled to cover `sides` (height, width) and cut at the centre."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DatasetDamaged(f"{path} cannot be decoded ({error}); {_REPLACE}") from error
    if sides is not None:
        image = ImageOps.fit(image, sides[::-1], Image.Resampling.BILINEAR)
    return np.asarray(image)


def _read_idx(
    folder: Path, name: str, checksums: dict[str, str], shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Bytes of `shape` in the idx format: a magic number, the shape in big-endian, the bytes."""
    packed, path = folder / f"{name}.gz", folder / name
    if packed.is_file():
        _verify_file(packed, checksums[packed.name])
        content = gzip.decompress(packed.read_bytes())
    else:
        _require_files(folder, [name])
        content = path.read_bytes()
    header = np.array([0x800 + len(shape), *shape], ">i4").tobytes()
    if content[: len(header)] != header or len(content) != len(header) + np.prod(shape):
        raise DatasetDamaged(
            f"{path} is not {' x '.join(map(str, shape))} bytes in the idx format (it has"
            f" {len(content)} bytes with its header); {_REPLACE}"
        )
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _find(folders: Iterable[Path], names: Iterable[str]) -> Path | None:
    """The first of `folders` that holds at least one of the files `names`."""
    names = list(names)
    return next((f for f in folders if any((f / name).is_file() for name in names)), None)


def _require_files(folder: Path, names: Iterable[str]) -> None:
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise DatasetDamaged(f"{folder} lacks {', '.join(absent)}; add it, or get the set again")


def _verify(path: Path, array: NDArray, checksum: str) -> None:
    """Compare the sha256 of decoded bytes."""
    if hashlib.sha256(np.ascontiguousarray(array)).hexdigest() != checksum:
        raise DatasetDamaged(f"{path} has a wrong checksum: its content is altered; {_REPLACE}")


def _verify_file(path: Path, md5: str) -> None:
    """Compare the md5 of a file."""
    if not torchvision.datasets.utils.check_integrity(path, md5):
        raise DatasetDamaged(f"{path} has a wrong checksum: cut short or altered; {_REPLACE}")


def _download(source: type, title: str, root: Path, looked: list[Path], download: bool) -> None:
    """Have torchvision download a set that was not found, if `download` allows it."""
    if not download:
        places = ", ".join(str(folder) for folder in dict.fromkeys(looked))
        raise DatasetMissing(
            f"{title} not found. Looked in {places} ({root} {_state(root)}). Pass its folder as"
            " root, set the environment variable QGEN_DATA, or pass download=True"
        )
    try:
        source(root, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise DatasetMissing(f"{title} could not be downloaded to {root}: {error}") from error


def _state(folder: Path) -> str:
    if not folder.is_dir():
        return "does not exist"
    return "exists" if any(folder.iterdir()) else "is empty"
