"""The state dicts of torch.optim.Adam, AdamW, NAdam, Adamax and RAdam; torch is not imported."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jadam import _validate
from jadam._search import Maximum, check_flushed, check_maximum, states_in
from jadam._types import PyTree
from jadam.migrate._foreign import (
    Address,
    Host,
    Key,
    Name,
    Table,
    addresses,
    check_product,
    common,
    count_of,
    departing,
    filled,
    host_array,
    keys_of,
    largest_ratio,
    listed,
    mapping,
    momentum_product,
    update_count,
)


class _Group(NamedTuple):
    """What of a group of parameters has to fit, and its place."""

    where: str
    amsgrad: bool
    adamax: bool
    b1: float
    b2: float
    momentum_decay: float | None


class _Parameter(NamedTuple):
    """A parameter's number in `state`, and its group."""

    number: Key
    group: _Group


def _group(where: str, group: Mapping[str, Any]) -> _Group:
    """A group, as far as it says which algorithm it is.

    Raises:
        TypeError: an option is of a wrong type.
        ValueError: an option is out of range, or the algorithm is not the family's.
    """

    def flag(option: str) -> bool:
        value = group.get(option, False)
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{where}[{option!r}]: expected True or False, got {value!r}")
        return bool(value)

    def number(check: Callable[..., Any], place: str, value: Any, **bounds: float) -> float:
        return float(check(place, host_array(place, value), **bounds))

    if "betas" not in group:
        raise ValueError(f"{where}['betas'] is missing: expected a group of the Adam family")
    betas = _as_many(2, f"{where}['betas']", listed(f"{where}['betas']", group["betas"]))
    b1, b2 = (
        number(_validate.decay_rate, f"{where}['betas'][{i}]", b) for i, b in enumerate(betas)
    )
    if flag("maximize"):
        raise ValueError(
            f"{where}['maximize']: expected False, since jadam minimizes; negate the gradients "
            "and set it to False"
        )
    decay = None
    if "momentum_decay" in group:
        place = f"{where}['momentum_decay']"
        decay = number(_validate.in_range, place, group["momentum_decay"], above=0.0)
    others = {"amsgrad", "momentum_decay", "decoupled_weight_decay"}  # Adamax has none of them
    return _Group(where, flag("amsgrad"), others.isdisjoint(group), b1, b2, decay)


def _as_many(expected: int, where: str, found: list[Any]) -> list[Any]:
    if len(found) != expected:
        raise ValueError(f"{where}: expected {expected}, got {len(found)}")
    return found


def _parameters(state_dict: Any, names: Iterable[str] | None) -> dict[Key, _Parameter]:
    """The parameters of a torch optimizer, by number and by name.

    Raises:
        TypeError: an entry of the state dict is not what torch has there.
        ValueError: an entry is missing, not expected or there twice.
    """
    if set(mapping("state_dict", state_dict)) != {"state", "param_groups"}:
        found = ", ".join(map(repr, state_dict))
        raise ValueError(f"state_dict: expected the keys 'state' and 'param_groups', got {found}")
    parameters: list[_Parameter] = []
    labels: list[Key] = []
    for i, group in enumerate(listed("state_dict['param_groups']", state_dict["param_groups"])):
        where = f"state_dict['param_groups'][{i}]"
        if "params" not in mapping(where, group):
            raise ValueError(f"{where}['params'] is missing")
        numbers = keys_of(f"{where}['params']", group["params"])
        parameters += [_Parameter(number, _group(where, group)) for number in numbers]
        place = f"{where}['param_names']"
        labels += _as_many(len(numbers), place, keys_of(place, group.get("param_names", numbers)))
    if names is not None:
        labels = _as_many(len(parameters), "names", keys_of("names", names))
    by_key: dict[Key, _Parameter] = {}
    for label, parameter in zip(labels, parameters, strict=True):
        for key in (label, parameter.number):
            if by_key.setdefault(key, parameter) is not parameter:
                raise ValueError(f"{parameter.group.where}['params']: {key!r} is there twice")
    return by_key


def _fitting(parameters: Mapping[Key, _Parameter], address: Address, adamax: bool) -> _Parameter:
    """A leaf's parameter, whose group is of the algorithm that the leaf's state is for."""
    if address.key not in parameters:
        known = ", ".join(map(repr, parameters))
        raise ValueError(f"{address.where}: expected one of {known}, got {address.key!r}")
    parameter = parameters[address.key]
    group, has_maximum = parameter.group, "nu_max" in address.parameter.moments
    if group.amsgrad != has_maximum:
        raise ValueError(
            f"{group.where}['amsgrad']: expected {has_maximum}, since {address.parameter.state} "
            f"has {'a' if has_maximum else 'no'} nu_max, got {group.amsgrad}"
        )
    if group.adamax != adamax:
        expected, got = ("Adamax" if x else "Adam" for x in (adamax, group.adamax))
        raise ValueError(
            f"{group.where}: expected a group of {expected}, as adamax={adamax} says, got one of "
            f"{got}"
        )
    return parameter


def _check_alike(groups: Mapping[str, list[_Group]]) -> None:
    """One state of jadam goes on with one b1, b2 and momentum decay."""
    for of_state in groups.values():
        for option in ("b1", "b2", "momentum_decay"):
            common({f"{group.where}: {option}": getattr(group, option) for group in of_state})


def _fields(adamax: bool) -> dict[str, str]:
    second = "exp_inf" if adamax else "exp_avg_sq"
    return {"mu": "exp_avg", "nu": second, "nu_max": "max_exp_avg_sq"}


def from_torch(
    state_dict: Mapping[str, Any],
    like: PyTree,
    name: Name,
    *,
    names: Sequence[str] | None = None,
    maximum: Maximum = None,
    adamax: bool = False,
) -> PyTree:
    """The state that goes on where torch's Adam, AdamW, NAdam, Adamax or RAdam stopped.

    Moments are rounded once to the dtypes that `like` has. The hyperparameters in `param_groups`
    are not migrated: make jadam's transformation with them. It then takes torch's steps, with

    - Adam, AdamW: `jadam.adam`, `jadam.adamw`. With amsgrad: `jadam.amsgrad`.
    - NAdam: `jadam.nadam(..., momentum_decay=0.004)`.
    - Adamax: `jadam.adamax`.
    - RAdam: `jadam.radam`, but torch adds eps before v's bias correction.
    - weight_decay without decoupling: after `optax.add_decayed_weights` in a chain.

    Args:
        state_dict: of `optimizer.state_dict()`; tensors on the CPU, or any arrays.
        like: `tx.init(params)`, or `jax.eval_shape` of it. What in it is neither Adam's nor a
            schedule's count stays. Arrays go to its devices.
        name: the function from a path in `params`, such as "fc1.kernel", to the parameter's name
            in torch, "fc1.weight", or its number; or to that and the axes of torch's array in the
            order that jadam's has: ("fc1.weight", (1, 0)) for a matrix, which `torch.nn.Linear`
            has transposed, ("conv.weight", (2, 3, 1, 0)) for a convolution.
        names: the parameters' names in the order of `param_groups`: those of
            `model.named_parameters()`. Default: what `state_dict` has, if the optimizer was made
            with named parameters, else numbers.
        maximum: must be "raw" where there is AMSGrad, the maximum that torch keeps; go on with
            `jadam.amsgrad(..., maximum="raw")`.
        adamax: whether it is Adamax.

    Raises:
        TypeError: an entry is not what torch has there, or a leaf of `like` holds codes.
        ValueError: an entry is missing, not expected, of a wrong shape or out of range; a moment
            is one that no gradients make beside another (NaN in one alone, a first beyond ten
            times what `betas` allow, a maximum below the second); steps or options differ;
            `maximize` is set; `amsgrad` or `adamax` do not fit.

    >>> import jax.numpy as jnp, numpy as np, jadam
    >>> entry = {"step": 7, "exp_avg": np.ones((2, 3)), "exp_avg_sq": np.ones((2, 3))}
    >>> group = {"params": [0], "betas": (0.9, 0.999), "amsgrad": False}
    >>> like = jadam.adam(1e-3).init({"kernel": jnp.ones((3, 2))})
    >>> state = jadam.migrate.from_torch(
    ...     {"state": {0: entry}, "param_groups": [group]},
    ...     like,
    ...     lambda path: (path.replace("kernel", "weight"), (1, 0)),
    ...     names=["weight"],
    ... )
    >>> int(state[0].count), state[0].mu["kernel"].shape
    (7, (3, 2))
    """
    parameters, states = _parameters(state_dict, names), states_in("like", like)
    check_maximum((found.state for found in states), maximum, "raw", "torch")
    entries: dict[str, Any] = {}
    for number, entry in mapping("state_dict['state']", state_dict["state"]).items():
        where = f"state_dict['state'][{number!r}]"
        entries |= {f"{where}[{field!r}]": x for field, x in mapping(where, entry).items()}
    table, fields = Table(entries), _fields(adamax)

    counts: dict[str, int] = {}
    groups: dict[str, list[_Group]] = {}
    moments: list[list[jax.Array]] = []
    for address in addresses(states, name):
        number, group = _fitting(parameters, address, adamax)
        groups.setdefault(address.parameter.state, []).append(group)
        entry = f"state_dict['state'][{number!r}]"
        step, product = f"{entry}['step']", f"{entry}['mu_product']"
        counts[step] = update_count(step, table.take(step))
        if group.momentum_decay is not None:
            given = table.take(product)
            check_product(product, given, counts[step], group.b1, group.momentum_decay)
        places = {field: f"{entry}[{fields[field]!r}]" for field in address.parameter.moments}
        # Ten times: betas may have been others before, and float16 rounds coarsely.
        power = 1 if adamax else 2
        limit = 10 * largest_ratio(group.b1, group.b2, max(counts[step], 1), power)
        moments.append(table.moments(address, places, limit=limit, power=power))
    _check_alike(groups)
    table.check_all_taken()
    return filled(like, moments, common(counts) if counts else 0)


def to_torch(
    state: PyTree,
    state_dict: Mapping[str, Any],
    name: Name,
    *,
    names: Sequence[str] | None = None,
    maximum: Maximum = None,
    adamax: bool = False,
) -> dict[str, Any]:
    """The state dict with which a torch optimizer goes on: `from_torch` the other way.

    Args:
        state: jadam's state, in any chain.
        state_dict: `optimizer.state_dict()` of the torch optimizer that goes on, also a new one.
            Its `param_groups` stay.
        name: as in `from_torch`, as are the other arguments.

    Returns:
        The mapping, with a NumPy array wherever torch has a tensor. It is loaded by
        `optimizer.load_state_dict(d | {"state": jax.tree.map(torch.from_numpy, d["state"])})`.
        Moments of fewer bits come in float32.

    Raises:
        TypeError: moments are codes, or complex, which torch treats as pairs.
        ValueError: a parameter in `param_groups` has no leaf or a leaf no parameter; groups do
            not fit as in `from_torch`.
    """
    parameters, states = _parameters(state_dict, names), states_in("state", state)
    check_flushed(states)
    check_maximum((found.state for found in states), maximum, "raw", "torch")
    t, fields = count_of(states), _fields(adamax)
    # torch counts in float32, which is exact up to 2²⁴.
    step = np.asarray(t, np.float32 if t <= 2**24 else np.float64)
    entries: dict[Key, dict[str, Host]] = {}
    groups: dict[str, list[_Group]] = {}
    for address in addresses(states, name):
        number, group = _fitting(parameters, address, adamax)
        groups.setdefault(address.parameter.state, []).append(group)
        entry = {"step": step.copy()}
        if group.momentum_decay is not None:
            product = momentum_product(t, group.b1, group.momentum_decay)
            entry["mu_product"] = np.asarray(product, np.float32)
        entry |= {fields[field]: departing(address, field) for field in address.parameter.moments}
        entries[number] = entry
    _check_alike(groups)
    for number, group in parameters.values():
        if number not in entries:
            raise ValueError(f"{group.where}['params']: no leaf of state is for {number!r}")
    in_order = {number: entries[number] for number, _ in parameters.values()}
    return {"state": in_order, "param_groups": state_dict["param_groups"]}
