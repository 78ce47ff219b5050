"""MNIST through tensorflow-datasets (TFDS), without TensorFlow and without a network."""

import fcntl
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from .idx import (
    FILES,
    TEST_IMAGES,
    TEST_LABELS,
    TRAIN_IMAGES,
    TRAIN_LABELS,
    Mnist,
    read_images,
    read_labels,
)

PREPARED = Path(__file__).parents[3] / "runs" / "tfds"


# Not registered, so that the name `mnist` keeps meaning TFDS' own class.
class MNIST(tfds.image_classification.MNIST, skip_registration=True):
    """TFDS' MNIST with its three uses of TensorFlow replaced: gunzip, read, encode as PNG."""

    # TFDS looks for its checksums beside the code: at the parent's, not here.
    url_infos = tfds.image_classification.MNIST.url_infos

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        path = dl_manager.download(
            {
                "train_images": self.URL + TRAIN_IMAGES,
                "train_labels": self.URL + TRAIN_LABELS,
                "test_images": self.URL + TEST_IMAGES,
                "test_labels": self.URL + TEST_LABELS,
            }
        )
        return {
            "train": self._generate_examples(path["train_images"], path["train_labels"]),
            "test": self._generate_examples(path["test_images"], path["test_labels"]),
        }

    def _generate_examples(self, images: os.PathLike, labels: os.PathLike) -> Iterator:
        examples = zip(read_images(images), read_labels(labels), strict=True)
        for i, (image, digit) in enumerate(examples):
            png = io.BytesIO()
            Image.fromarray(image[..., 0]).save(png, format="PNG")
            png.seek(0)
            yield i, {"image": png, "label": int(digit)}


def prepare(files: Path = FILES, data_dir: Path = PREPARED) -> Path:
    """Turns the four files into a TFDS folder: about 5 s, and only the first time.

    TFDS takes the files for its own downloads and checks them by its own checksums. It writes
    beside the final folder and renames at the end, so that a killed prepare is done again.

    Raises:
        ValueError: a file is missing, or is not the one that TFDS has the checksum of.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two first runs the second waits
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

    All images are read at once: reading them again in each epoch would cost 3.5 s.

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
