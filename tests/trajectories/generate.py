"""Record what torch and Keras do, in float64, so that tests need neither of them.

    python tests/trajectories/generate.py

writes `recorded.npz` and `recorded.json` beside this file. Nothing here imports torch or Keras
before a trajectory is asked for, so a test can import it and compare live where they exist.

The gradients are given, not functions of the parameters: two implementations of one formula
differ by rounding alone. A plain NumPy float64 loop of the formulas below is within 1.2e-14 of
every recording (absolute, in the parameters); optax's order of weight decay rounds differently
and ends 1.4e-13 away. A difference above 1e-12 is a different formula.

What each library computes
--------------------------

Read in the sources of torch 2.13.0, Keras 3.15.1 and optax 0.2.8. `t` counts from 1, `p` is the
parameter, all moments start at 0, and where not said otherwise

    m = b1*m + (1-b1)*g        v = b2*v + (1-b2)*g^2
    c1 = 1 - b1^t              c2 = 1 - b2^t

Adam
    torch   p -= lr * (m/c1) / (sqrt(v/c2) + eps)
    optax   p -= lr * (m/c1) / (sqrt(v/c2 + eps_root) + eps)           torch's with eps_root = 0
    Keras   p -= lr * (sqrt(c2)/c1) * m / (sqrt(v) + eps)              "epsilon hat" of the paper:
            is torch's with eps/sqrt(c2) for eps, at t = 1 that is 31.6*eps for b2 = .999
    defaults of eps: torch and optax 1e-8, Keras 1e-7

L2 (torch `weight_decay` of Adam, Adamax, and of NAdam, RAdam unless decoupled)
    torch   g = g + wd*p, before everything else

AdamW (and torch `decoupled_weight_decay` of NAdam and RAdam, Keras `weight_decay` of any)
    torch   p = p*(1 - lr*wd), then the step
    Keras   p = p*(1 - lr*wd), then the step                           (JAX, TF: p - p*wd*lr)
    optax   p -= lr * (direction + wd*p), p from before the step       the same number
    defaults of wd: torch 1e-2, Keras 4e-3, optax 1e-4

AMSGrad
    torch   x = max(x, v)         p -= lr * (m/c1) / (sqrt(x/c2) + eps)       maximum of raw v,
                                                                              corrected afterwards
    Keras   x = max(x, v)         p -= lr * (sqrt(c2)/c1) * m / (sqrt(x) + eps)     as torch
    optax   x = max(x, v/c2)      p -= lr * (m/c1) / (sqrt(x + eps_root) + eps)     maximum of
            corrected v (of raw v, never corrected, with bias_correction_nu=False)

NAdam
    torch   u(s) = b1 * (1 - 0.5 * 0.96^(s*momentum_decay)),  momentum_decay = 4e-3
            U = u(1)*u(2)*...*u(t)
            p -= lr * (u(t+1)*m/(1 - U*u(t+1)) + (1 - u(t))*g/(1 - U)) / (sqrt(v/c2) + eps)
    Keras   the same with momentum_decay = 1: u(s) = b1 * (1 - 0.5 * 0.96^s)
            (eps is added to sqrt(v/c2), not "epsilon hat" as Keras's docstring says)
    optax   no schedule, u(s) = b1, so U = b1^t:
            p -= lr * (b1*m/(1 - b1^(t+1)) + (1-b1)*g/(1 - b1^t)) / (sqrt(v/c2 + eps_root) + eps)
    torch keeps U in float32 unless the default dtype is float64, which is set here.

AdaMax
    torch   x = max(b2*x, |g| + eps)     p -= (lr/c1) * m / x          eps is inside the maximum
    optax   x = max(b2*x, |g| + eps)     p -= lr * (m/c1) / x          as torch
    Keras   x = max(b2*x, |g|)           p -= lr * m / (c1 * (x + eps))

RAdam
    rho_inf = 2/(1-b2) - 1               rho = rho_inf - 2*t*b2^t/c2
    r = sqrt((rho-4)*(rho-2)*rho_inf / ((rho_inf-4)*(rho_inf-2)*rho))
    torch   rho > 5:   p -= lr * (m/c1) * r * sqrt(c2) / (sqrt(v) + eps)      "epsilon hat"
            else:      p -= lr * (m/c1)
    optax   rho >= 5:  p -= lr * (m/c1) * r / (sqrt(v/c2 + eps_root) + eps)
            else:      p -= lr * (m/c1)
    With b2 = .999 both begin to adapt at t = 6. Keras has no RAdam.
"""

import importlib.util
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HERE = Path(__file__).parent

# Exact in float32, so that a float32 run starts from the very same numbers. The last is zero:
# there the parameter is the sum of the updates and hides nothing of them.
INITIAL = np.array([1.0, -1.0, 0.5, -0.25, 2.0, -3.0, 0.125, 0.0])
STEPS = np.array([*range(1, 20), *range(20, 1001, 10)])


class Case(NamedTuple):
    library: str  # "torch" or "keras"
    optimizer: str  # the class in torch.optim or keras.optimizers
    options: dict[str, Any]  # its keyword arguments; everything a formula needs is named


_TORCH = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
_TORCH_2 = {**_TORCH, "lr": 2e-3}  # the default of NAdam and Adamax
_KERAS = {"learning_rate": 1e-3, "beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-7}
_DECOUPLED = {"weight_decay": 1e-2, "decoupled_weight_decay": True}
_SCHEDULED = {**_TORCH_2, "momentum_decay": 4e-3}

CASES: dict[str, Case] = {
    "torch_adam": Case("torch", "Adam", _TORCH),
    "torch_adam_b_0.8_0.99": Case("torch", "Adam", {**_TORCH, "betas": (0.8, 0.99)}),
    "torch_adam_b2_0.99999": Case("torch", "Adam", {**_TORCH, "betas": (0.9, 0.99999)}),
    "torch_adam_eps_1e-6": Case("torch", "Adam", {**_TORCH, "eps": 1e-6}),
    "torch_adam_l2": Case("torch", "Adam", {**_TORCH, "weight_decay": 1e-2}),
    "torch_amsgrad": Case("torch", "Adam", {**_TORCH, "amsgrad": True}),
    "torch_adamw": Case("torch", "AdamW", {**_TORCH, "weight_decay": 1e-2}),
    "torch_adamw_amsgrad": Case(
        "torch", "AdamW", {**_TORCH, "weight_decay": 1e-2, "amsgrad": True}
    ),
    "torch_nadam": Case("torch", "NAdam", _SCHEDULED),
    "torch_nadamw": Case("torch", "NAdam", {**_SCHEDULED, **_DECOUPLED}),
    "torch_adamax": Case("torch", "Adamax", _TORCH_2),
    "torch_adamax_eps_1e-6": Case("torch", "Adamax", {**_TORCH_2, "eps": 1e-6}),
    "torch_radam": Case("torch", "RAdam", _TORCH),
    "torch_radam_eps_1e-6": Case("torch", "RAdam", {**_TORCH, "eps": 1e-6}),
    "torch_radamw": Case("torch", "RAdam", {**_TORCH, **_DECOUPLED}),
    "keras_adam": Case("keras", "Adam", _KERAS),
    "keras_amsgrad": Case("keras", "Adam", {**_KERAS, "amsgrad": True}),
    "keras_adamw": Case("keras", "AdamW", {**_KERAS, "weight_decay": 4e-3}),
    "keras_nadam": Case("keras", "Nadam", _KERAS),
    "keras_adamax": Case("keras", "Adamax", _KERAS),
}


def _noise(stream: int, steps: int) -> np.ndarray:
    """Uniform on [-1, 1) in steps of 2^-23: splitmix64, the same bits on every machine."""
    z = np.arange(1, steps + 1, dtype=np.uint64) + np.uint64(1_000_003 * stream)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0


def gradients(steps: int = 1000) -> np.ndarray:
    """Gradients of 8 parameters, one row a step, float64 but each exact in float32.

    The recording carries a copy: compare against that one.
    """
    t = np.arange(1, steps + 1)
    decades = np.array([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2])
    decade = decades[((_noise(7, steps) + 1.0) * 4.5).astype(np.int64)]
    sign = np.where(_noise(8, steps) < 0.0, -1.0, 1.0)
    columns = [
        np.full(steps, 0.3),  # constant
        np.where(t % 2 == 1, 0.05, -0.05),  # alternating sign
        np.where((t == 1) | (_noise(1, steps) > 0.9), _noise(2, steps), 0.0),  # 95% exact zeros
        _noise(3, steps) * np.where(t <= 500, 1.0, 0.01),  # shrinks 100x midway
        _noise(4, steps) * 1e-6,
        _noise(5, steps) * 1e3,
        sign * decade * (5.5 + 4.5 * _noise(6, steps)),  # magnitudes from 1e-6 to 1e3
        0.005 + _noise(9, steps) * 0.01,  # a mean and noise, as in training
    ]
    return np.stack(columns, axis=1).astype(np.float32).astype(np.float64)


def torch_trajectory(name: str, options: dict[str, Any], gradients: np.ndarray) -> np.ndarray:
    """Parameters after each of STEPS by `torch.optim.<name>` on the CPU, [len(STEPS), 8]."""
    import torch

    before = torch.get_default_dtype()
    # NAdam holds its product of momenta in the default dtype: in float32, it ends 4e-11 away.
    torch.set_default_dtype(torch.float64)
    try:
        parameter = torch.nn.Parameter(torch.tensor(INITIAL))
        optimizer = getattr(torch.optim, name)([parameter], **options)
        every = []
        for gradient in gradients:
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
            every.append(parameter.detach().numpy().copy())
    finally:
        torch.set_default_dtype(before)
    return _selected(every)


def keras_trajectory(name: str, options: dict[str, Any], gradients: np.ndarray) -> np.ndarray:
    """Parameters after each of STEPS by `keras.optimizers.<name>`, [len(STEPS), 8].

    Keras takes its backend once, at its first import: torch where that is installed, because
    JAX holds float64 only under `jax_enable_x64`. KERAS_BACKEND overrides; TypeError where it
    did not run in float64.
    """
    if importlib.util.find_spec("torch"):
        os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    before = keras.config.floatx()
    keras.config.set_floatx("float64")  # the learning rate and the step count take it too
    try:
        parameter = keras.Variable(INITIAL, dtype="float64")
        optimizer = getattr(keras.optimizers, name)(**options)
        every = []
        with warnings.catch_warnings():
            # On torch tensors Keras 3.15 itself calls np.array in a way that NumPy 2 deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            for gradient in gradients:
                optimizer.apply([keras.ops.convert_to_tensor(gradient, "float64")], [parameter])
                every.append(np.array(keras.ops.convert_to_numpy(parameter)))
    finally:
        keras.config.set_floatx(before)
    return _selected(every)


def trajectory(case: str, gradients: np.ndarray) -> np.ndarray:
    """Run one of CASES; ImportError where its library is missing."""
    library, name, options = CASES[case]
    run = {"torch": torch_trajectory, "keras": keras_trajectory}[library]
    return run(name, options, gradients)


def _selected(every: list[np.ndarray]) -> np.ndarray:
    parameters = np.stack(every)
    if parameters.dtype != np.float64:
        raise TypeError(f"ran in {parameters.dtype}, wanted float64")
    return parameters[STEPS - 1]


def recorded() -> dict[str, np.ndarray]:
    """The recording: "gradients", "initial", "steps", and one array a case."""
    with np.load(HERE / "recorded.npz") as arrays:
        return dict(arrays)


def main() -> None:
    given = gradients()
    arrays = {"gradients": given, "initial": INITIAL, "steps": STEPS}
    arrays.update({case: trajectory(case, given) for case in CASES})
    np.savez_compressed(HERE / "recorded.npz", allow_pickle=False, **arrays)

    import keras
    import torch

    about = {
        "command": "python tests/trajectories/generate.py",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "keras": keras.__version__,
        },
        "keras_backend": keras.config.backend(),
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "dtype": "float64",
        "cases": {case: made._asdict() for case, made in CASES.items()},
    }
    (HERE / "recorded.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
