"""Programs that use jadam, drawn by a seed: what is trained, by which optimizer, and how."""

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jadam
from tests import reference

MEMBERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "adam": (jadam.adam, {}),
    "adam, no eps": (jadam.adam, {"eps": 0.0}),
    "adam, other rates": (jadam.adam, {"b1": 0.5, "b2": 0.95}),
    "adam, eps_root": (jadam.adam, {"eps_root": 1e-8}),
    "adamw": (jadam.adamw, {"weight_decay": 0.1}),
    "nadam": (jadam.nadam, {}),
    "nadam, dozat": (jadam.nadam, {"momentum_decay": 0.004}),
    "amsgrad": (jadam.amsgrad, {"eps": 0.0}),
    "amsgrad, corrected": (jadam.amsgrad, {"maximum": "corrected"}),
    "adamax": (jadam.adamax, {"eps": 0.0}),
    "radam": (jadam.radam, {}),
    "radam, nesterov": (jadam.radam, {"nesterov": True, "b2": 0.95}),
    "ademamix": (jadam.ademamix, {"eps": 0.0}),
    "ademamix, warm-up": (jadam.ademamix, {"warmup": 40, "b3": 0.999}),
}
LOW_RATES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "adam, low rates": (jadam.adam, {"b1": 0.1, "b2": 0.3}),
    "nadam, low rates": (jadam.nadam, {"b1": 0.4, "b2": 0.2}),
    "amsgrad, low rates": (jadam.amsgrad, {"b1": 0.3, "b2": 0.45}),
    "adamax, low rates": (jadam.adamax, {"b1": 0.2, "b2": 0.4}),
}
ALL = MEMBERS | LOW_RATES
OF_KERNEL = ("adam", "adamw", "nadam", "radam")  # what the members' names begin with
STORAGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    "bfloat16 m": {"mu_dtype": "bfloat16"},
    "bfloat16 v": {"nu_dtype": "bfloat16"},
    "float16 m": {"mu_dtype": "float16"},
    "params": {"mu_dtype": "params"},
    "8 bits": {"mu_dtype": "int8", "nu_dtype": "uint8", "min_size": 0},
    "4 bits": {"mu_dtype": "int4", "nu_dtype": "uint4", "min_size": 0},
}
FIRST_OF_4_BITS, FIRST_OF_ALL = 100, 1000
"""Seeds from the first on draw 4 bits, from the second on any storage, and rates under 1/2 too.
Those below draw what they drew before there were any, so that their results, which are kept, go on
counting."""
DTYPES = [  # of parameters and of gradients
    *[("float32", "float32")] * 5,
    *[("bfloat16", "bfloat16"), ("bfloat16", "float32")] * 2,
    ("float32", "bfloat16"),
    ("float16", "float16"),
    ("complex64", "complex64"),
    ("float64", "float64"),
]
SHAPES = [(), (3,), (0, 4), (130,), (5, 40), (8, 32), (16, 128), (1, 300), (2, 3, 33)]
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "none": lambda tx: tx,
    "compensated, int8": jadam.compensated_weights,
    "compensated, int16": lambda tx: jadam.compensated_weights(tx, residual_dtype="int16"),
    "stochastic": jadam.stochastic_rounding,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "clip": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "masked": lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda x: x.ndim > 0, tree)),
}
OF_16_BITS = ("compensated, int8", "compensated, int16", "stochastic")
WAYS = ("vmap", "devices", "shard_map", "donation", "without jit")


@dataclass(frozen=True)
class Program:
    """A training, but for its gradients.

    Attributes:
        ways: of making one of its steps, whose results are those of a plain `jax.jit`.
    """

    seed: int
    member: str
    storage: str
    wrapper: str
    kernel: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], ...]
    nesting: str
    learning_rate: float
    ways: tuple[str, ...]

    def __str__(self) -> str:
        return " | ".join(f"{k} {v}" for k, v in asdict(self).items())

    @property
    def is_plain(self) -> bool:
        """Whether an update is the member's own."""
        return self.wrapper == "none" and self.member != "adamw"

    def optimizer(self, kernel: str | None = None) -> Any:
        """The transformation, with its own kernel or another."""
        make, options = ALL[self.member]
        options = options | STORAGES[self.storage]
        tx = make(self.learning_rate, kernel=kernel or self.kernel, **options)
        return WRAPPERS[self.wrapper](tx)

    def tree(self, leaves: list[Any]) -> Any:
        """The leaves as they are nested."""
        if self.nesting == "dictionary":
            return {f"layer {i}": {"w": leaf, "none": None} for i, leaf in enumerate(leaves)}
        return [(), *leaves] if self.nesting == "list" else (leaves[0], {"rest": leaves[1:]})

    def parameters(self) -> Any:
        """Where the training begins."""
        rng = np.random.default_rng(self.seed)
        dtype = self.dtypes[0]
        return self.tree([jnp.asarray(numbers(rng, shape, dtype), dtype) for shape in self.shapes])

    def bounds(self, steps: int) -> np.ndarray:
        """The largest |direction| that exact moments give after 1 to `steps` steps.

        In float64 by Cauchy and Schwarz: with direction = Σ aᵢ·gᵢ/√(Σ bᵢ·gᵢ²) it is √(Σ aᵢ²/bᵢ).
        Infinity where a member divides by no root.
        """
        options = {"b1": 0.9, "b2": 0.999} | ALL[self.member][1]
        b1, b2, kind = options["b1"], options["b2"], self.member.split(",")[0]
        if kind == "ademamix":
            taken = {k: v for k, v in options.items() if k in ("b1", "b2", "b3", "alpha", "warmup")}
            return reference.ademamix_bounds(steps, **taken)
        found = []
        for t in range(1, steps + 1):
            ages = np.arange(t, dtype=np.float64)
            if kind == "adamax":
                found.append((1 - b1) / reference.bias(b1, t) * np.sum((b1 / b2) ** ages))
                continue
            m, g = (1 - b1) * b1**ages, (ages == 0).astype(np.float64)
            if self.member == "nadam, dozat":
                a = reference.dozat_momentum(m, g, t, b1=b1)
            elif kind == "nadam" or options.get("nesterov"):
                a = reference.nesterov_momentum(m, g, t, b1=b1)
            else:
                a = m / reference.bias(b1, t)
            b = (1 - b2) * b2**ages / reference.bias(b2, t)
            is_root = kind != "radam" or reference.sma_length(t, b2) >= 5
            found.append(np.sqrt(np.sum(a * a / b)) if is_root else np.inf)
        return np.array(found)

    def gradients(self, number: int, steps: int) -> Any:
        """[steps, ...] for each leaf, all finite: one of the many sequences of a program."""
        rng = np.random.default_rng([self.seed, number])
        dtype = self.dtypes[1]
        # What sums squares or gradients of its own has no larger numbers, nor what lets some by.
        decades = 12 if self.wrapper in ("MultiSteps", "clip", "masked") else 45
        return self.tree(
            [
                jnp.asarray(hostile(rng, (steps, *shape), dtype, decades), dtype)
                for shape in self.shapes
            ]
        )


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Normal numbers, complex ones for a complex dtype."""
    x = rng.standard_normal(shape)
    return x + 1j * rng.standard_normal(shape) if dtype.startswith("complex") else x


def hostile(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, decades: int
) -> np.ndarray:
    """Each element with a manner of its own, which changes now and then."""
    steps, *rest = shape
    pieces = 1 + int(rng.integers(6))
    cuts = np.sort(rng.integers(0, steps, pieces - 1))
    which = np.searchsorted(cuts, np.arange(steps), side="right")

    def drawn(values: np.ndarray) -> np.ndarray:
        return values[which]

    calm = rng.random() < 0.3  # one scale for all, as in most trainings
    span = 2 if calm else decades
    scale = 10.0 ** drawn(rng.uniform(-span, min(span, 38), (pieces, *rest)))
    manner = drawn(rng.integers(0, 7, (pieces, *rest)))
    noise = numbers(rng, shape, dtype)
    sign = (-1.0) ** np.arange(steps).reshape(-1, *[1] * len(rest))
    largest = float(jnp.finfo(dtype).max)
    special = rng.choice([0.0, -0.0, 1.0, 1e-38, 1e-42, 2.0**63, largest, -largest], shape)
    if decades < 20:
        special = np.clip(special, -1e12, 1e12)
    sequence = np.select(
        [manner == 0, manner == 1, manner == 2, manner == 3, manner == 4],
        [
            scale * np.ones(shape),
            scale * sign,
            np.zeros(shape),
            scale * noise * (rng.random(shape) < 0.2),
            special,
        ],
        scale * noise,
    )
    if np.iscomplexobj(sequence):
        return np.clip(sequence.real, -largest, largest) + 1j * np.clip(
            sequence.imag, -largest, largest
        )
    return np.clip(sequence, -largest, largest)


def draw(seed: int) -> Program:
    """The program of a seed."""
    rng = random.Random(seed)
    dtypes = rng.choice(DTYPES)
    wrapper = rng.choice(["none"] * 8 + list(WRAPPERS))
    if wrapper in OF_16_BITS:
        dtypes = ("bfloat16", rng.choice(["bfloat16", "float32"]))
    kernel = rng.choice(["xla", "auto", "native"])
    members = list(ALL if seed >= FIRST_OF_ALL else MEMBERS)
    if kernel != "xla":
        members = [name for name in members if name.startswith(OF_KERNEL)]
    member = rng.choice(members)
    if member.startswith("radam") and "float16" in dtypes:
        dtypes = ("float32", "float32")  # its first steps, as large as gradients, leave the range
    older = [name for name in STORAGES if name != "4 bits"]
    storage = rng.choice(older + ["8 bits"] * 3)
    shapes = tuple(rng.sample(SHAPES, rng.randint(1, 3)))
    if seed >= FIRST_OF_4_BITS:
        storage = "4 bits" if seed < FIRST_OF_ALL else rng.choice(list(STORAGES))
    if storage == "4 bits":
        if dtypes[0] in ("complex64", "float64"):  # never in codes
            dtypes = ("float32", "float32")
        if not any(shape and shape[-1] >= 32 for shape in shapes):  # nor these
            shapes = (*shapes, (5, 40))
    if not any(np.prod(shape) for shape in shapes):
        shapes = (*shapes, (5, 40))
    return Program(
        seed=seed,
        member=member,
        storage=storage,
        wrapper=wrapper,
        kernel=kernel,
        dtypes=dtypes,
        shapes=shapes,
        nesting=rng.choice(["dictionary", "list", "tuple"]),
        learning_rate=rng.choice([1.0, 1e-3, 0.3]),
        ways=tuple(rng.sample(WAYS, 2)),
    )
