"""Data sets in files, found by the names that their publishers give them. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import math
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np

from kfe_optax.experiments.dataset import Dataset, Examples, check_size, image_dataset, text_dataset
from kfe_optax.experiments.errors import ExperimentError, require

Found = tuple[Examples, Examples | None] | str  # training and test images, one undivided set, or a text


def read_files(data_dir: str, length: int) -> Dataset:
    """Reads the data set at ``data_dir``, a file or a folder, whose formats are those of ``FORMATS``.

    A text is cut into sequences of ``length`` characters.

    Raises:
      ExperimentError: nothing is there, or it is damaged; the sentence names the file.
    """
    with _reading(data_dir, "data"):
        path = Path(data_dir).expanduser()
        for patterns, read in FORMATS.values():
            if (file := _search(path, patterns)) is not None:
                check_size(file.stat().st_size, f"'{file}'")
                found = read(file)
                if isinstance(found, str):
                    return text_dataset(found, length, str(file))
                return image_dataset(*found, str(file))
        what = "no data set of a known name in" if path.exists() else "nothing at"
    raise ExperimentError(
        f"There is {what} '{data_dir}'; set config.data_dir to one of {', '.join(FORMATS)}."
    )


def _search(place: Path, patterns: tuple[str, ...]) -> Path | None:
    """The file of one of these names that is ``place``, or is in it or up to two folders deeper, as torchvision has it."""
    if place.is_file():
        return place if any(fnmatch.fnmatch(place.name.lower(), name) for name in patterns) else None
    of_any_name = patterns[0].startswith("*")
    for depth in ("",) if of_any_name else ("", "*/", "*/*/"):
        found = sorted(path for name in patterns for path in place.glob(depth + name) if path.is_file())
        several = len({path if of_any_name else path.parent for path in found}) > 1
        names = ", ".join(str(path.relative_to(place)) for path in found)
        require(not several, f"'{place}' holds several data sets ({names}); name one in config.data_dir.")
        if found:
            return found[0]
    return None


@contextlib.contextmanager
def _reading(path: Path | str, form: str) -> Generator[None]:
    """Makes one sentence of whatever a path, a file system and damaged bytes can raise."""
    try:
        yield
    except ExperimentError:
        raise
    except Exception as error:
        words = f"'{path}' cannot be read as {form} ({type(error).__name__}: {error})"
        raise ExperimentError(f"{words}; fetch it again, or set config.data_dir to other data.") from error


def _read_idx(path: Path) -> Found:
    """The four files of MNIST or Fashion-MNIST, compressed or not."""

    def examples(part: str) -> Examples:
        images = path.with_name(path.name.removesuffix(".gz").replace("train", part))
        labels = images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))
        return _idx_array(images, 3), _idx_array(labels, 1)

    return examples("train"), examples("t10k")


def _idx_array(path: Path, rank: int) -> np.ndarray:
    """Unsigned bytes behind two zero bytes, their type, the number of axes and the extents."""
    packed = path if path.exists() else path.with_name(f"{path.name}.gz")
    with _reading(path, "an IDX file"), (open if packed == path else gzip.open)(packed, "rb") as file:
        kind, *shape = np.frombuffer(file.read(4 + 4 * rank), ">u4").tolist()
        if kind != 0x0800 + rank or len(shape) != rank:
            raise ValueError(f"it does not begin as {rank} axes of unsigned bytes do")
        size = math.prod(shape)
        check_size(4 * size, f"'{path}'")
        content = file.read(size + 1)
        if len(content) != size:
            more = " or more" * (len(content) > size)
            raise ValueError(f"it announces {size:,} values and holds {len(content):,}{more}")
        return np.frombuffer(content, np.uint8).reshape(shape)


def _read_npz(path: Path) -> Found:
    """Keras' four arrays, ``x_train`` and so on, under the usual names, or one undivided set."""
    with _reading(path, "an .npz of arrays"), path.open("rb") as file, np.load(file) as archive:

        def array(kinds: tuple[str, ...], places: tuple[str, ...] = ("{}",)) -> np.ndarray | None:
            for name in (place.format(kind) for kind in kinds for place in places):
                if name in archive:
                    check_size(archive.zip.getinfo(f"{name}.npy").file_size, f"'{name}' of '{path}'")
                    return archive[name]
            return None

        def examples(*places: str) -> Examples | None:
            images = array(("x", "X", "images", "image"), places)
            return None if images is None else (images, array(("y", "Y", "labels", "label"), places))

        train, test = examples("{}_train", "train_{}"), examples("{}_test", "test_{}")
        if train is not None and test is not None:
            return train, test
        if (images := array(("x", "X", "images", "image", "data", "faces", "arr_0"))) is not None:
            return (images, array(("y", "Y", "labels", "label", "target", "arr_1"))), None
        expected = "'x_train', 'y_train', 'x_test' and 'y_test', or one array 'images'"
        raise ValueError(f"it holds {', '.join(archive) or 'nothing'}, and not {expected}")


def _read_cifar(path: Path) -> Found:
    """CIFAR-10 or CIFAR-100, of which the fine labels, in records of bytes."""
    tens = path.stem != "train"
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] if tens else ["train.bin"]
    first = 1 if tens else 2  # a coarse label stands before CIFAR-100's fine one

    def examples(names: list[str]) -> Examples:
        parts = []
        for place in map(path.with_name, names):
            with _reading(place, f"a file of CIFAR-{10 if tens else 100}"):
                parts.append(np.fromfile(place, np.uint8).reshape(-1, first + 3072))
        records = np.concatenate(parts)
        return records[:, first:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, first - 1]

    return examples(names), examples([f"test{'_batch' * tens}.bin"])


def _read_svhn(path: Path) -> Found:
    """Street View House Numbers in their cropped form, whose label of a zero is 10."""
    from scipy.io import loadmat, whosmat

    def examples(path: Path) -> Examples:
        with _reading(path, "a MATLAB file of SVHN"), path.open("rb") as file:
            check_size(4 * sum(math.prod(shape) for _, shape, _ in whosmat(file)), f"'{path}'")
            found = loadmat(file, variable_names=("X", "y"))
            return found["X"].transpose(3, 0, 1, 2), found["y"] % 10

    return examples(path), examples(path.with_name("test_32x32.mat"))


def _read_text(path: Path) -> Found:
    with _reading(path, "a text in UTF-8"):
        return path.read_text(encoding="utf-8")


# Each with the names of the file that gives it away, in the order in which a folder is searched.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Path], Found]]] = {
    "the IDX files of MNIST": (("train-images[-.]idx3-ubyte", "train-images[-.]idx3-ubyte.gz"), _read_idx),
    "CIFAR-10's binary files": (("data_batch_1.bin",), _read_cifar),
    "CIFAR-100's": (("train.bin",), _read_cifar),
    "SVHN's train_32x32.mat": (("train_32x32.mat",), _read_svhn),
    "an .npz": (("*.npz",), _read_npz),
    "a .txt": (("*.txt",), _read_text),
}
