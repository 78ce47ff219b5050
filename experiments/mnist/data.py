"""MNIST through tensorflow-datasets (TFDS), without TensorFlow and without a network."""

import fcntl
import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

# The four original files: TFDS takes them for its own downloads, by its own checksums.
FILES = Path(__file__).parent / "data"
PREPARED = Path(__file__).parents[2] / "runs" / "tfds"


class Mnist(NamedTuple):
    """Both splits in memory, 55 MB: reading them each epoch would cost 3.5 s."""

    train_images: np.ndarray  # uint8[60000, 28, 28, 1]
    train_labels: np.ndarray  # int32[60000]
    test_images: np.ndarray  # uint8[10000, 28, 28, 1]
    test_labels: np.ndarray  # int32[10000]


# Not registered, so that the name `mnist` goes on meaning TFDS' own class.
class MNIST(tfds.image_classification.MNIST, skip_registration=True):
    """TFDS' MNIST with its three uses of TensorFlow replaced: gunzip, read, encode as PNG."""

    # TFDS looks for its checksums beside the code: at the parent's, not here.
    url_infos = tfds.image_classification.MNIST.url_infos

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        path = dl_manager.download(
            {
                "train_images": self.URL + "train-images-idx3-ubyte.gz",
                "train_labels": self.URL + "train-labels-idx1-ubyte.gz",
                "test_images": self.URL + "t10k-images-idx3-ubyte.gz",
                "test_labels": self.URL + "t10k-labels-idx1-ubyte.gz",
            }
        )
        return {
            "train": self._generate_examples(path["train_images"], path["train_labels"]),
            "test": self._generate_examples(path["test_images"], path["test_labels"]),
        }

    def _generate_examples(self, images: os.PathLike, labels: os.PathLike) -> Iterator:
        # IDX: a header of 16 bytes before images and 8 before labels, then one byte a value.
        pixels = np.frombuffer(gzip.decompress(Path(images).read_bytes()), np.uint8, offset=16)
        digits = np.frombuffer(gzip.decompress(Path(labels).read_bytes()), np.uint8, offset=8)
        for i, (image, digit) in enumerate(zip(pixels.reshape(-1, 28, 28), digits, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, format="PNG")
            png.seek(0)
            yield i, {"image": png, "label": int(digit)}


def prepare(files: Path = FILES, data_dir: Path = PREPARED) -> Path:
    """Turns the four files into a TFDS folder, about 5 s; only the first time.

    TFDS writes beside the final folder and renames at the end: a killed prepare is done again.

    Raises:
        ValueError: a file is missing, or is not the one that TFDS has the checksum of.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two first runs at the same time: the second waits
        builder = MNIST(data_dir=data_dir, file_format="array_record")
        for url in MNIST.url_infos.values():
            # Without a network TFDS would try to download what is missing, for minutes.
            if not (files / url.filename).is_file():
                raise ValueError(f"{files / url.filename}: no such file, restore it from git")
        config = tfds.download.DownloadConfig(
            manual_dir=files, try_download_gcs=False, force_checksums_validation=True
        )
        try:
            builder.download_and_prepare(download_config=config)
        except NonMatchingChecksumError as error:
            raise ValueError(
                f"a file in {files} is not the original, restore it from git. TFDS says: {error}"
            ) from error
    return data_dir


def load(data_dir: Path | None = None) -> Mnist:
    """Reads `mnist` from a prepared TFDS folder: by default the one made of the project's files.

    Raises:
        ValueError: the folder has no `mnist`, one that only TensorFlow reads, a part of it, or a
            damaged one.
    """
    if data_dir is None:
        data_dir = prepare()
    expected = f"--data-dir: expected a TFDS folder with mnist in array_record, got {data_dir}"
    if not (data_dir / "mnist").is_dir():
        raise ValueError(f"{expected}, which has no folder mnist")
    try:
        sources = tfds.data_source(
            "mnist", split=["train", "test"], data_dir=data_dir, download=False
        )
        sizes = [len(source) for source in sources]
        splits = [source.__getitems__(range(len(source))) for source in sources]
    except Exception as error:  # of many kinds: TFDS, its protobufs and array_record have their own
        redo = f"; {PREPARED} can be deleted, to be made again" if data_dir == PREPARED else ""
        raise ValueError(f"{expected}{redo}. TFDS says: {error}") from error
    if sizes != [60_000, 10_000]:
        raise ValueError(f"{expected} with {sizes} images instead of [60000, 10000]")
    arrays = []
    for examples in splits:
        arrays.append(np.stack([example["image"] for example in examples]))
        arrays.append(np.array([example["label"] for example in examples], np.int32))
    return Mnist(*arrays)
