"""The MNIST experiment: its data, its fast convolution, its training, its command line."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from flax import nnx

from experiments.mnist import data, train
from experiments.mnist.model import CNN, conv_max_pool


@pytest.fixture(scope="module")
def mnist():
    return data.load()


@pytest.fixture(scope="module")
def small(mnist):
    return data.Mnist(*(array[:640] for array in mnist[:2]), *(array[:200] for array in mnist[2:]))


def test_the_data_are_the_real_mnist(mnist):
    """All 70,000 images, pixel for pixel and label for label, as the files have them."""
    assert mnist.train_images.shape == (60_000, 28, 28, 1)
    assert mnist.test_images.shape == (10_000, 28, 28, 1)
    assert all(images.dtype == np.uint8 for images in mnist[::2])
    histogram = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train_labels).tolist() == histogram
    histogram = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test_labels).tolist() == histogram
    first = hashlib.sha256(mnist.train_images[0].tobytes()).hexdigest()
    assert (first[:16], mnist.train_labels[0]) == ("3c1b849efd9cc03f", 4)


def test_a_flipped_bit_in_a_file_is_named(tmp_path):
    """TFDS' checksums are in force: a damaged file is found before anything is prepared."""
    files = shutil.copytree(data.FILES, tmp_path / "files")
    damaged = files / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"restore it from git.*t10k-labels-idx1-ubyte\.gz"):
        data.prepare(files, tmp_path / "prepared")
    assert not (tmp_path / "prepared/mnist/3.0.1").exists()


def test_a_missing_file_is_named(tmp_path):
    """At once, where TFDS would try to download it."""
    with pytest.raises(ValueError, match=r"-ubyte\.gz: no such file, restore it from git"):
        data.prepare(tmp_path, tmp_path / "prepared")


@pytest.mark.parametrize(("h", "w", "c", "o"), [(28, 28, 1, 32), (14, 14, 32, 64), (6, 10, 2, 3)])
def test_the_fast_convolution_is_the_convolution(h, w, c, o):
    """conv_max_pool equals nnx.Conv and nnx.max_pool: values, and gradients of input and weights.

    Tolerance: the transforms of Winograd's F(2x2, 5x5) multiply by up to 16 along each axis and
    cancel again, so that roundings weigh more than in a direct sum. Of the largest value, 2e-6
    was measured in outputs and 9e-6 in kernel gradients, sums over every tile; 3e-5 leaves room
    for other orders of summation.
    """
    conv = nnx.Conv(c, o, (5, 5), rngs=nnx.Rngs(0))
    conv.bias[...] = jax.random.normal(jax.random.key(1), (o,))
    x = jax.random.normal(jax.random.key(2), (3, h, w, c))
    g = jax.random.normal(jax.random.key(3), (3, h // 2, w // 2, o))

    def fast(conv, x):
        return conv_max_pool(conv, x.transpose(1, 2, 0, 3)).transpose(2, 0, 1, 3)

    def plain(conv, x):
        return nnx.max_pool(conv(x), (2, 2), (2, 2))

    outputs = [jax.jit(f)(conv, x) for f in (fast, plain)]
    gradients = [
        jax.jit(jax.grad(lambda conv, x, f=f: jnp.sum(f(conv, x) * g), (0, 1)))(conv, x)
        for f in (fast, plain)
    ]
    for got, right in zip(*map(jax.tree.leaves, zip(outputs, gradients, strict=True)), strict=True):
        assert jnp.max(jnp.abs(got - right)) <= 3e-5 * jnp.max(jnp.abs(right))


def test_a_pool_of_equal_values_has_one_gradient():
    """A black background, where all four are equal, does not count four times."""
    conv = nnx.Conv(1, 2, (5, 5), rngs=nnx.Rngs(0))
    x = jnp.zeros((4, 4, 1, 1))
    grads = jax.jit(jax.grad(lambda conv: jnp.sum(conv_max_pool(conv, x))))(conv)
    np.testing.assert_array_equal(grads.bias[...], 4.0)
    np.testing.assert_array_equal(grads.kernel[...], 0.0)


def test_training_lowers_the_loss_and_a_seed_repeats_bit_for_bit(small):
    """One seed, one result, but for the clock."""

    def numbers():
        result = train.train_and_test(train.Config(epochs=3, batch_size=32), small)
        return result["test"], [(e["loss"], e["accuracy"]) for e in result["epochs"]]

    test, epochs = first = numbers()
    assert epochs[2][0] < epochs[1][0] < epochs[0][0]
    assert test["accuracy"] > 0.7
    assert numbers() == first


def test_the_model_has_the_parameters_of_its_description():
    """5*5*1*32 + 32 + 5*5*32*64 + 64 + 3136*10 + 10."""
    model = CNN(rngs=nnx.Rngs(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 83_466


def test_the_numbers_are_written_to_json(small, tmp_path, monkeypatch, capsys):
    """The file gets its name when all is in it; of 640 images four batches of 150 were seen."""
    monkeypatch.setattr(train, "load", lambda data_dir: small)
    out = tmp_path / "new" / "result.json"
    train.main(train.Config(epochs=1, batch_size=150, out=out))
    result = json.loads(out.read_text())
    assert result["config"]["batch_size"] == 150
    assert [epoch["images"] for epoch in result["epochs"]] == [600]
    assert result["test"]["images"] == 200
    assert f"{result['test']['accuracy']:.2%}" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size: expected 1 to 60000, got 0"),
        (["--batch-size", "60001"], "--batch-size: expected 1 to 60000, got 60001"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number above 0, got nan"),
        (["--epochs", "0"], "--epochs: expected 1 or more, got 0"),
        (["--epochs", "two"], "two"),
        (["--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["--out", "/tmp"], "--out: expected a file to write, got the folder /tmp"),
        (["--epocs", "2"], "--epocs"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, capsys):
    """The argument, what was expected and what came."""
    with pytest.raises(SystemExit) as exit_:
        tyro.cli(train.Config, args=arguments)
    assert exit_.value.code != 0
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_the_command_names_a_wrong_data_dir(tmp_path):
    """As one line on stderr with a failing exit status, and no traceback."""
    command = [sys.executable, "-m", "experiments.mnist", "--data-dir", str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert (
        f"--data-dir: expected a TFDS folder with mnist in array_record, got {tmp_path}"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
