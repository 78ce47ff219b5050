"""Which programs there are, what each needs, and how far its losses may be apart."""

import hashlib
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
VERSION = metadata.version("jadam")
RESULTS = HERE / "results" / "clients.json"


@dataclass(frozen=True)
class Client:
    """A program in `programs`, with its own environment.

    Attributes:
        name: of the program's file and of that of its pins.
        title: of the program, in the table.
        shown: the packages whose versions stand in the table.
        requirements: what the pins are made from, beside jax, optax and what jadam needs.
        x64: whether it runs in float64.
        tolerance: how far a loss may be from optax's, relative to the run's largest. In float64
            1e-6: roundings of 1e-16 grow over some hundred steps. In float32 1e-2: they are 1e-7.
        python: the version of its environment.
        expected: tests that fail with jadam alone, and why; for a program that is tests.
    """

    name: str
    title: str
    shown: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    x64: bool = False
    python: str = "3.11"
    expected: dict[str, str] = field(default_factory=dict)

    @property
    def is_tests(self) -> bool:
        """Whether it says which tests passed, and not what the losses were."""
        return self.name.endswith("_tests")

    @property
    def tolerance(self) -> float:
        """Of a loss."""
        return 1e-6 if self.x64 else 1e-2

    @property
    def program(self) -> Path:
        """What is run."""
        return HERE / "programs" / f"{self.name}.py"

    @property
    def pins(self) -> Path:
        """The environment, package by package."""
        return HERE / "pins" / f"{self.name}.txt"


_WIDE = "moments of bfloat16 parameters are in float32 unless `mu_dtype` says otherwise"
_REAL = "m is complex where the parameter is, and real where it is real, whatever `mu_dtype` says"
_DTYPES = {"10": _WIDE, "11": _WIDE} | dict.fromkeys(
    ("7", "8", "19", "20", "25", "26", "28", "29", "43", "44"), _REAL
)
_CORRECTION = (
    "two of optax's own functions are compared, both with a 1 - b2ᵗ in float32, which is off by "
    "7e-6; jadam's, in one of them, is not"
)

CLIENTS = [
    Client(
        "optax_tests",
        "optax's own tests: alias, wrappers, accumulation, masking, combining, injection, trees",
        ("optax",),
        ("pytest", "absl-py", "flax", "scikit-learn", "dm-tree"),
        expected={
            f"_src/alias_test.py::AliasTest::test_explicit_dtype{place}": reason
            for place, reason in _DTYPES.items()
        }
        | {
            "_src/transform_test.py::TransformTest::test_rms_match_adam": _CORRECTION,
            "contrib/_schedule_free_test.py::ScheduleFreeTest::test_schedule_free_adamw": (
                _CORRECTION
            ),
            "transforms/_combining_test.py::ExtraArgsTest::test_extra_args": (
                "an integer is its parameter, which jadam refuses"
            ),
        },
    ),
    Client("muon_mixed", "`optax.contrib.muon`, other parameters by Adam", ("optax",), x64=True),
    Client(
        "linen_transformer",
        "Linen: `TrainState`, scanned layers, logical axes on 8 devices",
        ("flax",),
        ("flax",),
    ),
    Client(
        "nnx_scanned", "NNX: scanned layers, sharding metadata on 8 devices", ("flax",), ("flax",)
    ),
    Client("nnx_lora", "NNX: LoRA, `wrt=nnx.LoRAParam`", ("flax",), ("flax",)),
    Client(
        "equinox_mlp",
        "the optimizer goes through `eqx.filter_jit`",
        ("equinox",),
        ("equinox",),
        True,
    ),
    Client("diffrax_ode", "a neural ODE", ("diffrax",), ("diffrax", "equinox"), True),
    Client("optimistix_minimise", "`OptaxMinimiser`", ("optimistix",), ("optimistix",), True),
    Client("blackjax_vi", "mean-field variational inference", ("blackjax",), ("blackjax",), True),
    Client("numpyro_svi", "`SVI` with a chain", ("numpyro",), ("numpyro",), True),
    Client("haiku_cnn", "a convolutional network with state", ("dm-haiku",), ("dm-haiku",), True),
    Client("keras_fit", "`model.fit` on JAX, by an adapter of 25 lines", ("keras",), ("keras",)),
    Client(
        "tunix_sft",
        "`PeftTrainer`, sharding metadata on 8 devices, accumulation",
        ("google-tunix",),
        ("google-tunix",),
    ),
    Client(
        "maxtext_factory",
        "MaxText's optimizer factory: masks, frozen parameters, steps skipped on spikes",
        ("maxtext",),
        # What its optimizers import; MaxText's own requirements are those of a TPU.
        (
            *("maxtext", "flax", "aqtp", "qwix", "omegaconf", "pydantic", "orbax-checkpoint"),
            *("packaging", "psutil", "pathwaysutils", "jinja2", "huggingface_hub", "transformers"),
            *("grain", "drjax", "pillow", "tokamax", "tiktoken", "sentencepiece", "sympy"),
        ),
        python="3.12",
    ),
]


def versions(client: Client) -> dict[str, str]:
    """Of what the table shows, from the pins, and jadam's."""
    pinned = dict(line.split("==") for line in client.pins.read_text().split() if "==" in line)
    return {name: pinned[name] for name in (*client.shown, "jax", "optax")} | {"jadam": VERSION}


def key(client: Client) -> str:
    """What a recorded result is for: the pins, the program and its helpers, and jadam's version."""
    files = (client.pins, client.program, HERE / "swap.py")
    parts = (*(path.read_bytes() for path in files), VERSION.encode())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
