"""The MNIST experiment: data, models, distortions, training, its command line, its presets."""

import hashlib
import itertools
import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from experiments.common.mnist import dataset, idx
from experiments.common.mnist.cnn import conv_3x3, conv_max_pool, max_pool
from experiments.mnist import presets, train
from experiments.mnist.augment import distort
from experiments.mnist.config import PRESETS, Config, parse
from experiments.mnist.optimizers import OPTIMIZERS, make_optimizer, make_schedule


@pytest.fixture(scope="module")
def small():
    """From the files themselves: TFDS takes half a minute to decode all images."""
    mnist = idx.read_all()
    train, test = mnist[:2], mnist[2:]
    return dataset.Mnist(*(array[:640] for array in train), *(array[:100] for array in test))


def assert_is_mnist(mnist, first):
    """All 70,000 images: shapes, how often each digit comes, the first one's pixels and digit."""
    assert mnist.train_images.shape == (60_000, 28, 28, 1)
    assert mnist.test_images.shape == (10_000, 28, 28, 1)
    assert all(images.dtype == np.uint8 for images in mnist[::2])
    histogram = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train_labels).tolist() == histogram
    histogram = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.test_labels).tolist() == histogram
    pixels = hashlib.sha256(mnist.train_images[0].tobytes()).hexdigest()
    assert (pixels[:16], mnist.train_labels[0]) == first


def test_the_files_are_the_real_mnist():
    """Whose first digit is the 5 that is in every picture of MNIST."""
    assert_is_mnist(idx.read_all(), first=("23ceaef5eb61f0e7", 5))


@pytest.mark.soak
def test_tfds_gives_the_real_mnist():
    """The same digits in TFDS's order, pixel for pixel; it decodes for half a minute."""
    mnist, files = dataset.load(), idx.read_all()
    assert_is_mnist(mnist, first=("3c1b849efd9cc03f", 4))
    for got, right in zip(mnist[::2], files[::2], strict=True):
        assert sorted(x.tobytes() for x in got) == sorted(x.tobytes() for x in right)


def test_tfds_gets_each_image_as_the_files_have_it(tmp_path, small):
    """Pixel for pixel through the PNG that TFDS stores, with its label."""
    builder = dataset.MNIST(data_dir=tmp_path, file_format="array_record")
    files = (dataset.FILES / name for name in (idx.TEST_IMAGES, idx.TEST_LABELS))
    examples = itertools.islice(builder._generate_examples(*files), 100)
    for (_, example), image, label in zip(
        examples, small.test_images, small.test_labels, strict=True
    ):
        np.testing.assert_array_equal(np.asarray(Image.open(example["image"])), image[..., 0])
        assert example["label"] == label


def test_a_flipped_bit_in_a_file_is_named(tmp_path):
    """TFDS' checksums are in force: a damaged file is found before anything is prepared."""
    files = shutil.copytree(dataset.FILES, tmp_path / "files")
    damaged = files / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match=r"restore it from git.*t10k-labels-idx1-ubyte\.gz"):
        dataset.prepare(files, tmp_path / "prepared")
    assert not (tmp_path / "prepared/mnist/3.0.1").exists()


def test_a_missing_file_is_named(tmp_path):
    """At once, where TFDS would try to download it."""
    with pytest.raises(ValueError, match=r"-ubyte\.gz: no such file, restore it from git"):
        dataset.prepare(tmp_path, tmp_path / "prepared")


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("h", "w", "c", "o", "size"),
    [(6, 10, 1, 3, 5), (6, 10, 2, 3, 5), (8, 12, 16, 24, 3)],
)
def test_the_fast_convolution_is_the_convolution(h, w, c, o, size):
    """Convolution and pooling equal nnx.Conv and nnx.max_pool: values, and all gradients.

    Tolerance: the transforms of Winograd's 6x6 tiles multiply by up to 16 along each axis and
    cancel again, so that roundings weigh more than in a direct sum. Of the largest value, 2e-6
    was measured in outputs and 9e-6 in kernel gradients, sums over every tile; 3e-5 leaves room
    for other orders of summation.
    """
    conv = nnx.Conv(c, o, (size, size), rngs=nnx.Rngs(0))
    conv.bias[...] = jax.random.normal(jax.random.key(1), (o,))
    x = jax.random.normal(jax.random.key(2), (3, h, w, c))
    g = jax.random.normal(jax.random.key(3), (3, h // 2, w // 2, o))

    def fast(conv, x):
        x = x.transpose(1, 2, 0, 3)
        y = conv_max_pool(conv, x) if size == 5 else max_pool(conv_3x3(conv, x))
        return y.transpose(2, 0, 1, 3)

    def plain(conv, x):
        return nnx.max_pool(conv(x), (2, 2), (2, 2))

    def both(f):
        return jax.jit(
            lambda conv, x: (f(conv, x), jax.grad(lambda *a: jnp.sum(f(*a) * g), (0, 1))(conv, x))
        )

    results = [jax.tree.leaves(both(f)(conv, x)) for f in (fast, plain)]
    for got, right in zip(*results, strict=True):
        assert jnp.max(jnp.abs(got - right)) <= 3e-5 * jnp.max(jnp.abs(right))


@pytest.mark.usefixtures("quick_compilation")
def test_a_pool_of_equal_values_has_one_gradient():
    """A black background, where all four are equal, does not count four times."""
    conv = nnx.Conv(1, 2, (5, 5), rngs=nnx.Rngs(0))
    x = jnp.zeros((4, 4, 1, 1))
    grads = jax.jit(jax.grad(lambda conv: jnp.sum(conv_max_pool(conv, x))))(conv)
    np.testing.assert_array_equal(grads.bias[...], 4.0)
    np.testing.assert_array_equal(grads.kernel[...], 0.0)


@pytest.mark.usefixtures("either_compilation")
def test_training_lowers_the_loss(small, tmp_path):
    """The default model and optimizer learn."""
    config = Config(epochs=3, validation=100, out=tmp_path)
    result = train.train_and_test(config, small)
    first, second, third = (epoch["epoch/loss"] for epoch in result["epochs"])
    assert third < second < first
    assert result["test"]["accuracy"] > 0.7


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mlp", 784 * 128 + 128 + 128 * 10 + 10),
        ("cnn", 5 * 5 * 1 * 32 + 32 + 5 * 5 * 32 * 64 + 64 + 3136 * 10 + 10),
        (
            "vgg",
            (25 * 32 + 32)
            + (9 * 32 * 64 + 64)
            + (9 * 64 * 64 + 64)
            + (9 * 64 * 128 + 128)
            # a scale and a bias for each feature that is normed
            + 2 * (32 + 64 + 64 + 128)
            + (4 * 4 * 128 * 10 + 10),
        ),
    ],
)
def test_a_step_keeps_the_state_as_it_is(name, size):
    """Each model under all options: its parameters' number, and dtypes that no step changes."""
    config = replace(PRESETS["best"], model=name)
    tx = config.make_optimizer(1e-3)
    graphdef, state = nnx.eval_shape(lambda: train.initial_state(config, tx))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == size
    options = {"augment": 1.0, "label_smoothing": 0.1, "ema": 0.99}
    step = train.make_step(graphdef, tx, 8, **options)
    images = jax.ShapeDtypeStruct((20, 28, 28, 1), jnp.uint8)
    labels, batch = (jax.ShapeDtypeStruct((n,), jnp.int32) for n in (20, 8))
    made = jax.eval_shape(step, state, images, labels, batch, jax.random.key(0))
    kept = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, made.state)]
    assert kept[0] == kept[1]


@pytest.mark.usefixtures("quick_compilation")
def test_the_average_and_the_smooth_labels(small):
    """One step's average is d·old + (1-d)·new; the smooth loss is that of the written labels."""
    config = Config(model="mlp", ema=0.75)
    tx = config.make_optimizer(1e-3)
    graphdef, state = train.initial_state(config, tx)
    step = train.make_step(graphdef, tx, 32, ema=0.75, label_smoothing=0.2)
    made = jax.jit(step)(state, small.train_images, small.train_labels, jnp.arange(32))
    averages, old, new = map(jax.tree.leaves, (made.state.average, state.params, made.state.params))
    for average, before, after in zip(averages, old, new, strict=True):
        np.testing.assert_allclose(average, 0.75 * before + 0.25 * after, rtol=1e-6, atol=1e-8)
    logits = np.random.default_rng(0).standard_normal((3, 10)).astype(np.float32)
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    smooth = 0.8 * np.eye(10)[[1, 5, 9]] + 0.02
    loss = train.smooth_loss(jnp.asarray(logits), jnp.array([1, 5, 9]), 0.2)
    # float32 sums of thirty terms.
    assert float(loss) == pytest.approx(-(smooth * log_p).sum(-1).mean(), rel=1e-6)


@pytest.mark.usefixtures("quick_compilation")
def test_distortions(small):
    """None at strength 0; else another for each image and key, about the same ink, in place."""
    images = jnp.asarray(small.train_images[:50]).astype(jnp.float32) / 255
    f = jax.jit(distort)
    # Coordinates are measured from the centre and back, which rounds them by 1e-6.
    np.testing.assert_allclose(f(jax.random.key(0), images, 0.0), images, atol=1e-5)
    one, other = (f(jax.random.key(seed), images, 1.0) for seed in (0, 1))
    assert one.shape == images.shape
    assert one.dtype == images.dtype
    assert jnp.abs(one - other).max((1, 2, 3)).min() > 0.1
    same = f(jax.random.key(0), jnp.broadcast_to(images[:1], images.shape), 1.0)
    assert jnp.abs(same[1:] - same[:1]).max((1, 2, 3)).min() > 0.1
    # Areas change by a tenth along each axis at most, and more only where the field bends.
    ink = one.sum((1, 2, 3)) / images.sum((1, 2, 3))
    assert 0.6 < ink.min() < 0.95 < 1.05 < ink.max() < 1.6
    assert 0.9 < ink.mean() < 1.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_makes_a_step(name, standard_promotion):
    """Of the parameters' shapes and dtypes; optax's own are not for strict promotion."""
    tx = make_optimizer(name, 1e-3)
    params = {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.float32)}
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    assert updates == params


def test_schedules():
    """A constant; a cosine from the rate to 0; a rise from 0 before it."""
    rates = {
        name: [float(make_schedule(name, 0.5, 100, 0.1)(step)) for step in (0, 5, 10, 50, 100)]
        for name in ("constant", "cosine", "warmup-cosine")
    }
    assert rates["constant"] == [0.5] * 5
    cosine = [0.25 * (1 + np.cos(np.pi * step / 100)) for step in (0, 5, 10, 50, 100)]
    assert rates["cosine"] == pytest.approx(cosine, rel=1e-6, abs=1e-7)
    late = 0.25 * (1 + np.cos(np.pi * 40 / 90))
    assert rates["warmup-cosine"] == pytest.approx([0, 0.25, 0.5, late, 0], rel=1e-6, abs=1e-7)


def scalars(folder):
    """What TensorBoard would read: records of a length, two checksums and an event."""
    found = []
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    return found


@pytest.mark.usefixtures("quick_compilation")
def test_all_that_a_run_writes(small, tmp_path, monkeypatch, capsys):
    """Numbers, metrics, events and pictures; of 540 images three batches of 150 were seen."""
    monkeypatch.setattr(train, "load", lambda data_dir: small)
    out = tmp_path / "new"
    config = Config(model="mlp", epochs=2, batch_size=150, validation=100, out=out)
    train.main(config)
    result = json.loads((out / "result.json").read_text())
    assert result["config"]["batch_size"] == 150
    assert [epoch["images"] for epoch in result["epochs"]] == [450, 450]
    assert result["test"]["images"] == 100
    assert f"{result['test']['accuracy']:.2%}" in capsys.readouterr().out
    names = {"result.json", "metrics.jsonl", "checkpoints", "tensorboard", "lock"}
    names |= {f"{x}.{kind}" for x in ("curves", "mistakes", "confusion") for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == names

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    written = [(row["step"], name, row[name]) for row in rows for name in row if "/" in name]
    assert [name for *_, name, _ in written].count("validation/accuracy") == 2
    for (step, name, value), event in zip(written, scalars(out / "tensorboard"), strict=True):
        assert event == (step, name, pytest.approx(value, rel=1e-6))  # float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch-size 0", "--batch-size: expected 1 to 55000, got 0"),
        ("--batch-size 60001 --validation 0", "--batch-size: expected 1 to 60000, got 60001"),
        ("--learning-rate nan", "--learning-rate: expected a number above 0, got nan"),
        ("--epochs 0", "--epochs: expected 1 or more, got 0"),
        ("--epochs two", "two"),
        ("--seed -1", "--seed: expected 0 or more, got -1"),
        ("--validation 60000", "--validation: expected 0 to 59900, in hundreds, got 60000"),
        ("--dropout 1", "--dropout: expected 0 or more and below 1, got 1.0"),
        ("--ema 1", "--ema: expected 0 or more and below 1, got 1.0"),
        ("--b1 1", "--b1: expected 0 or more and below 1, got 1.0"),
        ("--keep 0", "--keep: expected 1 or more, got 0"),
        ("--saves 30", "--saves: expected 1 to 20, got 30"),
        (f"--out {__file__}", f"--out: expected a folder, got {__file__}"),
        ("--optimizer adm", "--optimizer"),
        ("--model resnet", "--model"),
        ("--preset better", "--preset"),
        ("--optimizer sgd --b1 0.5", "--b1: --optimizer sgd has no b1; these have: adam,"),
        ("--weight-decay 0.1", "--weight-decay: --optimizer adam has no weight_decay; these have"),
        ("--optimizer optax.adam --mu-dtype int8", "--mu-dtype: only jadam's optimizers have"),
        ("--mu-dtype int8", "mu_dtype, nu_dtype: expected both codes"),
        ("--epocs 2", "--epocs"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message, capsys):
    """The argument, what was expected and what came."""
    with pytest.raises(SystemExit) as exit_:
        parse(arguments.split())
    assert exit_.value.code != 0
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    # tyro breaks a long line, after a hyphen too.
    assert message.replace(" ", "") in error.replace(" ", "")


def test_a_preset_is_where_options_start_from():
    """Without one: the CNN with Adam's defaults, 4 epochs. With one: all else as it has it."""
    assert parse([]) == Config(model="cnn", optimizer="adam", learning_rate=1e-3, epochs=4)
    assert parse(["--seed", "1", "--preset", "mlp"]) == replace(PRESETS["mlp"], seed=1)
    mlp, cnn = PRESETS["mlp"], PRESETS["cnn"]
    assert (mlp.model, mlp.learning_rate, mlp.batch_size, mlp.epochs) == ("mlp", 1e-3, 32, 5)
    assert (cnn.learning_rate, cnn.batch_size) == (5e-4, 64)


def test_finished_runs_are_collected(tmp_path, monkeypatch):
    """Mean and Student's interval of their accuracies, in the JSON file and in the README."""
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- presets: begin -->\n<!-- presets: end -->\nb\n")
    runs = tmp_path / "runs"

    def finish(preset, seed, accuracy):
        out = runs / f"{preset}-{seed}"
        out.mkdir(parents=True)
        result = {
            "test": {"accuracy": accuracy},
            "config": replace(PRESETS[preset], seed=seed, out=out).as_json(),
            "epochs": [{"validation/accuracy": 0.98}],
            **{"parameters": 7, "machine": {}, "versions": {}},
        }
        (out / "result.json").write_text(json.dumps(result))

    for seed, accuracy in enumerate((0.97, 0.98, 0.99)):
        finish("mlp", seed, accuracy)
    asked = presets.Presets(collect=True, runs=runs, out=tmp_path, readme=readme)
    presets.main(asked)
    found = json.loads((tmp_path / "presets.json").read_text())["presets"]
    assert found.keys() == {"mlp"}
    assert found["mlp"]["seeds"] == [0, 1, 2]
    # t = 4.303 at 2 degrees of freedom, of tables; the standard error is 0.01/√3.
    half = 4.303 * 0.01 / 3**0.5
    assert found["mlp"]["interval_95"] == pytest.approx([0.98 - half, 0.98 + half], rel=1e-4)
    assert "| 98.00% | 95.52% to 100.48% | 97.00%, 98.00%, 99.00% |" in readme.read_text()

    monkeypatch.setitem(presets.PRESETS, "mlp", replace(PRESETS["mlp"], epochs=6))
    with pytest.raises(ValueError, match=r"result\.json: made with --epochs 5, the preset has 6"):
        presets.main(asked)


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
