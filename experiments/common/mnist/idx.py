"""The four original files of MNIST, which the repository has, and how they are read."""

import gzip
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILES = Path(__file__).parent / "files"
TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
TRAIN_LABELS = "train-labels-idx1-ubyte.gz"
TEST_IMAGES = "t10k-images-idx3-ubyte.gz"
TEST_LABELS = "t10k-labels-idx1-ubyte.gz"


class Mnist(NamedTuple):
    """Both splits in memory, 55 MB."""

    train_images: np.ndarray  # uint8[60000, 28, 28, 1]
    train_labels: np.ndarray  # int32[60000]
    test_images: np.ndarray  # uint8[10000, 28, 28, 1]
    test_labels: np.ndarray  # int32[10000]


def read_all() -> Mnist:
    """All four files, without tensorflow-datasets, whose import alone takes seconds."""
    return Mnist(
        read_images(FILES / TRAIN_IMAGES),
        read_labels(FILES / TRAIN_LABELS),
        read_images(FILES / TEST_IMAGES),
        read_labels(FILES / TEST_LABELS),
    )


def read_images(path: str | PathLike) -> np.ndarray:
    """The images of a file, uint8[n, 28, 28, 1]."""
    return _values(path, header=16).reshape(-1, 28, 28, 1)


def read_labels(path: str | PathLike) -> np.ndarray:
    """The labels of a file, int32[n]."""
    return _values(path, header=8).astype(np.int32)


def _values(path: str | PathLike, header: int) -> np.ndarray:
    """IDX: a header with the shape, 16 bytes for images and 8 for labels, then a byte a value."""
    return np.frombuffer(gzip.decompress(Path(path).read_bytes()), np.uint8, offset=header)
