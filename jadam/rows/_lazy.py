"""A dense transformation of the family, applied to a table by the rows that are touched."""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Integer

from jadam import _math, _validate
from jadam._kernels import choice, native
from jadam._leaf import Options, increment, leaf_step
from jadam._members import ADAM, Member, Rule
from jadam._state import RowsState
from jadam._storage import checked_storage_of, storage_of
from jadam._traced import is_tracer
from jadam._transform import FusedTransformation, recipe_of
from jadam._types import Count
from jadam.rows import _missed
from jadam.rows._divided import gathered, stepped
from jadam.rows._fading import fade, is_zero
from jadam.rows._missed import DenseStep, Rows
from jadam.rows._touched import Touched, after_writing, checked_ids, put, take

CatchUp = Literal["sum", "steps"] | bool

Table = Float[Array, "rows *row"]
Ids = Integer[Array, "*batch"]
RowsOf = Float[Array, "..."]


@dataclass(frozen=True)
class Lazy:
    """A transformation for the rows of a table: `init`, `gather`, `scatter` and `flush`.

    Made by `jadam.rows.lazy`. All four are pure functions.
    """

    tx: FusedTransformation
    plan: DenseStep
    catch_up: CatchUp
    kernel: choice.Choice = "auto"

    def init(self, table: Table, dense: Any = None) -> RowsState:
        """The state of a table before the first update, or one that goes on from the dense state.

        Args:
            table: [rows, ...], with two axes at least, of a real floating-point dtype.
            dense: the state of the dense transformation for this table, where there is one.

        Raises:
            TypeError: the table or the state is of a wrong type.
            ValueError: the table has no axis beside that of its rows, or the state is of another.
        """
        _check_table(table)
        if dense is None:
            dense = self.tx.init(table)
        count = self._moments(dense, table).count
        # A column lies where the rows of the table lie.
        column = jnp.asarray(table)[(slice(None), *(0,) * (table.ndim - 1))]
        last = jnp.zeros_like(column, jnp.int32) + count
        decayed = None
        if self.plan.decay_is_scheduled and self.catch_up:
            pair = jnp.stack([jnp.zeros_like(column, jnp.float32)] * 2, axis=-1)
            decayed = (jnp.zeros(2, jnp.float32), pair)
        return RowsState(dense, last, decayed)

    def gather(self, table: Table, state: RowsState, ids: Ids) -> RowsOf:
        """The rows as the dense transformation would have them after all updates until now.

        They may be differentiated with respect to, as constants: the gradients go to `scatter`.

        Args:
            table: as `scatter` returned it.
            state: as `scatter` returned it.
            ids: of any shape and integer dtype. Inside of `jax.jit` an id that is no row, as -1
                for padding, gives zeros.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: the state is not the table's, or an id that is known is no row.
        """
        self._check(table, state)
        ids = checked_ids(ids, len(table))
        return lax.stop_gradient(self._run(gathered, self._gather, table, state, ids))

    def _gather(self, table: Table, state: RowsState, ids: Ids) -> RowsOf:
        if self._is_in_kernel(table, table, state):
            return (
                _kernel()
                .now(*self._of_kernel(table, state, ids))
                .reshape(ids.shape + table.shape[1:])
            )
        return self._gather_in_xla(table, state, ids)

    def _gather_in_xla(self, table: Table, state: RowsState, ids: Ids) -> RowsOf:
        touched, rows = self._touched(table, state, ids)
        return rows.p[touched.place].reshape(ids.shape + table.shape[1:])

    def scatter(
        self, grads: RowsOf, ids: Ids, table: Table, state: RowsState
    ) -> tuple[Table, RowsState]:
        """One update: the table and the state after a step with these gradients of these rows.

        A row that comes several times gets the sum of its gradients, added in the order of the
        batch on a CPU; another order may round otherwise. All other rows get the gradient 0, when
        they are next touched.

        Donate table and state, in this order, to the `jax.jit` of a step that returns them so: it
        then moves bytes for the rows that are touched, and none for the others.

        Args:
            grads: the loss's gradient with respect to what `gather` gave for these ids.
            ids: as in `gather`. The gradient of an id that is no row is dropped.
            table: as it was for `gather`.
            state: as it was for `gather`.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: the state is not the table's, shapes do not match, or an id that is known is
                no row.
        """
        self._check(table, state)
        grads = _checked_grads(grads, np.shape(ids), table)
        ids = checked_ids(ids, len(table))
        return self._run(stepped, self._scatter, table, state, ids, grads)

    def _scatter(
        self, table: Table, state: RowsState, ids: Ids, grads: RowsOf
    ) -> tuple[Table, RowsState]:
        if self._is_in_kernel(grads, table, state):
            return self._scatter_in_kernel(table, state, ids, grads)
        return self._scatter_in_xla(table, state, ids, grads)

    def _scatter_in_kernel(
        self, table: Table, state: RowsState, ids: Ids, grads: RowsOf
    ) -> tuple[Table, RowsState]:
        """`_scatter` by the kernel. What `gather` needs of the batch as well, XLA computes once."""
        moments = self._moments(state.dense, table)
        count = moments.count
        of_table, batch, *_ = self._of_kernel(table, state, ids)

        def otherwise() -> Any:
            table_, state_ = self._scatter_in_xla(table, state, ids, grads)
            return table_, *self.plan.rule.member.stored(state_.dense[0]), state_.last

        table, *kept, last = _kernel().stepped(
            of_table,
            batch,
            grads.reshape((ids.size, *table.shape[1:])),
            native.numbers_of(self._rule_at(count), *self.plan.rates_at(count), count),
            increment(count),
            decays=self.plan.decays,
            otherwise=otherwise,
        )
        rows = after_writing(batch.ids, table)
        decayed = self._decayed(state, lambda x, each: x.at[rows].set(each, mode="drop"))
        return table, self._after(state, kept, last, decayed)

    def _scatter_in_xla(
        self, table: Table, state: RowsState, ids: Ids, grads: RowsOf
    ) -> tuple[Table, RowsState]:
        touched, rows = self._touched(table, state, ids)
        g = touched.sums(grads.reshape((-1, *table.shape[1:])))

        moments = self._moments(state.dense, table)
        count, member = moments.count, self.plan.rule.member
        rates = self.plan.rates_at(count)
        leaf = leaf_step(self._rule_at(count), *rates, count)
        options = Options(decays=self.plan.decays, to_params=True)
        p, stored, _ = leaf(g, rows.p, options, tuple(rows.stored))

        table = put(jnp.asarray(table), touched, p)
        touched = touched._replace(rows=after_writing(touched.rows, table))
        kept = [
            put(old, touched, new) for old, new in zip(member.stored(moments), stored, strict=True)
        ]
        last = put(state.last, touched, jnp.full(touched.rows.shape, increment(count)))
        size = touched.rows.size
        decayed = self._decayed(
            state, lambda x, each: put(x, touched, jnp.broadcast_to(each, (size, *each.shape)))
        )
        return table, self._after(state, kept, last, decayed)

    def flush(self, table: Table, state: RowsState) -> tuple[Table, RowsState]:
        """All rows brought up to date: the dense transformation's table, and its state in `.dense`.

        For evaluation, checkpoints that other programs read, and migration. It changes nothing of
        what comes after. It takes the time of a few dense steps where missed steps are
        summed, and of some hundred at most where they are made one by one.

        Raises:
            TypeError: an argument is of a wrong type.
            ValueError: the state is not the table's.
        """
        self._check(table, state)
        return self._run(stepped, self._flush, table, state) if self.catch_up else (table, state)

    def _flush(self, table: Table, state: RowsState) -> tuple[Table, RowsState]:
        moments = self._moments(state.dense, table)
        member = self.plan.rule.member
        every = Rows(
            jnp.asarray(table), member.stored(moments), state.last, self._log_decay(state, None)
        )
        rows = self._up_to_date(every, state)
        decayed = state.decayed
        if decayed is not None:
            decayed = (decayed[0], jnp.broadcast_to(decayed[0][None], decayed[1].shape))
        last = jnp.zeros_like(state.last) + moments.count
        dense = (moments._replace(**_named(member, rows.stored)), *state.dense[1:])
        return rows.p, RowsState(dense, last, decayed)

    def _run(self, over_devices: Callable[..., Any], local: Callable[..., Any], *args: Any) -> Any:
        """`over_devices(local, *args)` in one program: that which is traced, or one of its own.

        Operation by operation, each would be compiled by itself.
        """
        if any(is_tracer(x) for x in jax.tree.leaves(args)):
            return over_devices(local, *args)
        if local.__name__ not in self._programs:
            self._programs[local.__name__] = jax.jit(functools.partial(over_devices, local))
        return self._programs[local.__name__](*args)

    @functools.cached_property
    def _programs(self) -> dict[str, Callable[..., Any]]:
        """What `_run` has compiled."""
        return {}

    def _rule_at(self, count: Count) -> Rule:
        """The rule of the step after so many updates."""
        rule = self.plan.rule
        if self.catch_up:
            return rule
        # torch adds eps to √v, before the bias correction.
        numbers = dict(rule.hyperparameters)
        t = (count + 1).astype(jnp.float32)
        c2 = _math.bias_correction(_math.Decay.of(numbers["b2"], t.dtype), t)
        return Rule(rule.member, numbers | {"eps": numbers["eps"] / jnp.sqrt(c2)})

    def _moments(self, dense: Any, table: Table) -> Any:
        """The state with the moments in a dense state."""
        member = self.plan.rule.member
        moments = dense[0] if isinstance(dense, (tuple, list)) and dense else dense
        if not isinstance(moments, member.state):
            raise TypeError(
                f"state.dense: expected what tx.init makes, with {member.state.__name__} first, "
                f"got {type(moments).__name__}"
            )
        stored = member.stored(moments)
        for moment, x in zip(member.moments, stored, strict=True):
            if not hasattr(x, "dtype"):
                raise TypeError(
                    f"state.dense[0].{moment.name}: expected an array, the moments of one table, "
                    f"got {type(x).__name__}"
                )
        storage = checked_storage_of(member.moments, stored, lambda name: f"state.dense[0].{name}")
        shapes = storage.shapes(table.shape)
        for moment, x, shape in zip(member.moments, stored, shapes, strict=True):
            if x.shape != shape:
                raise ValueError(
                    f"state.dense[0].{moment.name}: expected shape {shape} for a table of shape "
                    f"{table.shape}, got {x.shape}"
                )
        return moments

    def _check(self, table: Any, state: Any) -> None:
        _check_table(table)
        if not isinstance(state, RowsState):
            raise TypeError(
                f"state: expected the RowsState that init made, got {type(state).__name__}"
            )
        self._moments(state.dense, table)
        if state.last.shape != table.shape[:1]:
            raise ValueError(
                f"state.last: expected shape {table.shape[:1]} for a table of shape "
                f"{table.shape}, got {state.last.shape}"
            )

    def _touched(self, table: Table, state: RowsState, ids: Ids) -> tuple[Touched, Rows]:
        """The distinct rows of a batch as they are now.

        `gather` and `scatter` of one step ask for the same, which XLA computes once.
        """
        touched = Touched.by(ids.reshape(-1), len(table))
        return touched, self._up_to_date(self._rows(table, state, touched.rows), state)

    def _rows(self, table: Table, state: RowsState, rows: Int[Array, "n"]) -> Rows:
        moments = self._moments(state.dense, table)
        stored = self.plan.rule.member.stored(moments)
        p, *kept = take((jnp.asarray(table), *stored), rows)
        return Rows(
            p,
            tuple(kept),
            _last_of(state, rows),
            self._log_decay(state, rows),
        )

    def _log_decay(self, state: RowsState, rows: Int[Array, "n"] | None) -> Any:
        """By what the missed updates decay each row: the sum of the logarithms of their factors."""
        if not (self.plan.decays and self.catch_up):
            return None
        if state.decayed is None:
            last = state.last if rows is None else state.last.at[rows].get(mode="clip")
            count = state.dense[0].count
            return (count - last).astype(jnp.float32) * self.plan.log_decay_at(count)
        total, then = state.decayed
        then = then if rows is None else then.at[rows].get(mode="clip")
        return (total[0] - then[:, 0]) + (total[1] - then[:, 1])

    def _up_to_date(self, rows: Rows, state: RowsState) -> Rows:
        count = state.dense[0].count
        if not self.catch_up:
            return rows
        rows = rows._replace(last=jnp.minimum(rows.last, count))
        if self._sums(rows.stored):
            return _missed.summed(self.plan, rows, count)
        return _missed.one_by_one(self.plan, rows, count)

    def _sums(self, stored: tuple[Array, ...]) -> bool:
        """Whether the missed steps are summed."""
        can = _missed.can_sum(self.plan, stored)
        if self.catch_up == "sum" and not can:
            member = self.plan.rule.member
            raise ValueError(
                "catch_up: expected 'steps' or True, since missed steps are summed for moments of "
                "32 bits or less of Adam, NAdam, AMSGrad and RAdam, with b1/√b2 up to 0.95; got "
                f"'sum' for {member.name} in {storage_of(member.moments, stored).name}"
            )
        in_float32 = all(x.dtype == jnp.float32 for x in stored)
        return can and (self.catch_up == "sum" or (in_float32 and self.catch_up != "steps"))

    def _is_in_kernel(self, g: Any, table: Table, state: RowsState) -> bool:
        """Whether the kernel takes the rows of a table. Under `jax.disable_jit` it takes none."""
        if not is_tracer(table):
            return False
        rule = self.plan.rule
        stored = rule.member.stored(self._moments(state.dense, table))
        also = set[str]()
        if self.catch_up and not self._sums(stored):
            also.add("missed steps one by one")
        if not is_zero(rule.hyperparameters.get("eps_root", 0)):
            also.add("eps_root")
        options = Options(decays=self.plan.decays, to_params=True)
        return choice.takes_rows(self.kernel, rule, g, table, options, stored, frozenset(also))

    def _of_kernel(self, table: Table, state: RowsState, ids: Ids) -> tuple[Any, ...]:
        """What the kernel takes to bring the rows of a batch up to date."""
        m, v = self.plan.rule.member.stored(self._moments(state.dense, table))
        flat, count = ids.reshape(-1), state.dense[0].count
        if self.catch_up:
            last = jnp.minimum(_last_of(state, flat), count)
            sums = _missed.Sums.of(self.plan, last, self._log_decay(state, flat), count)
        else:
            sums = _missed.Sums.none(flat.size)
        eps = jnp.asarray(self.plan.rule.hyperparameters["eps"], jnp.float32)
        return (
            _kernel().TableArrays(jnp.asarray(table), m, v, state.last),
            _kernel().Batch(flat, *sums),
            eps,
            lambda: self._gather_in_xla(table, state, flat),
        )

    def _decayed(self, state: RowsState, put: Callable[[Array, Array], Array]) -> Any:
        """`RowsState.decayed` after another update; `put` writes the new sum to touched rows."""
        if state.decayed is None:
            return None
        total, then = state.decayed
        total = _add(total, self.plan.log_decay_at(state.dense[0].count))
        return total, put(then, total)

    def _after(
        self, state: RowsState, stored: Sequence[Array], last: Array, decayed: Any
    ) -> RowsState:
        """The state after an update."""
        moments, *schedules = state.dense
        now, member = increment(moments.count), self.plan.rule.member
        moments = moments._replace(count=now, **_named(member, stored))
        return RowsState((moments, *jax.tree.map(increment, schedules)), last, decayed)


def lazy(tx: FusedTransformation, *, catch_up: CatchUp = True) -> Lazy:
    """A transformation of the family for a table of which each batch touches some rows.

    An integer for each row says after which update it stands. When a batch touches a row again,
    the steps that it has missed are made up for, as the dense transformation would have made them
    with the gradient 0: moments fade, the parameter moves on along m, and decays. So a step reads,
    computes and writes the touched rows alone, once for the `gather` and `scatter` of a step.

    A table that is divided by its rows along explicit mesh axes stays so, and each device steps its
    own rows; ids and gradients of any sharding are gathered, and vectors lie as the ids do. Along
    automatic axes XLA exchanges the touched rows and steps them on all devices.

    Equal to dense: the same bits for a row that missed nothing. Missed steps of `adam`, `nadam`,
    `amsgrad`, `radam` and those with decay, with float32 moments and b1/√b2 up to 0.95, are summed
    from a dozen of them, for a constant learning rate or a schedule, which is evaluated at all
    missed updates: within 1e-5 learning rates of float64, where dense float32 rounds the parameter
    in each step. Else (`adamax`, 16-bit, 8-bit and float64 moments) they are made one by one, with
    the dithers of the moments' storage, until nothing moves any more, after 200 steps at the
    default b1 and b2: moments have the bits of dense steps up to there, and parameters are an ulp
    off at most for each, where XLA fuses a multiplication with an addition in one program alone.
    Moments of 16 and 8 bits that are summed, with catch_up="sum", are rounded once for all missed
    steps: nearer to exact Adam than dense is, but not its bits, and many times faster.

    Args:
        tx: one of `jadam.adam` and the others, without a mask. b1 and b2 are Python numbers with
            b1 < √b2 (AdaMax: b1 < b2), where the motion without gradients ends. Hyperparameters
            must not change between steps except by schedules; learning_rate·weight_decay is
            under 1. `ademamix` is refused: its slow average moves a row for ten thousands of steps.
            Its `kernel` is that of the rows too: float32 rows of `adam`, `nadam`, `radam` and
            those with decay, where missed steps are summed or none are made, on CPUs. Else the
            touched rows are stepped in XLA.
        catch_up: True as above. "sum" or "steps" takes one of the two ways or raises. False is
            `torch.optim.SparseAdam`, another algorithm: the moments of a row stand still while it
            is not touched, and eps is added to √v before the bias correction. For `adam` alone.

    Returns:
        `init`, `gather`, `scatter` and `flush` for one table.

    Raises:
        TypeError: tx is none of the family's transformations, or a hyperparameter other than eps
            and eps_root is no Python number.
        ValueError: tx has a mask, or is one of those that are refused; `catch_up` is none of the
            above.

    >>> import jax, jax.numpy as jnp, jadam
    >>> embeddings = jadam.rows.lazy(jadam.adamw(1e-3, weight_decay=0.01))
    >>> def train_step(table, state, ids):
    ...     rows = embeddings.gather(table, state, ids)
    ...     grads = jax.grad(lambda rows: jnp.sum(rows**2))(rows)
    ...     return embeddings.scatter(grads, ids, table, state)
    >>> train_step = jax.jit(train_step, donate_argnums=(0, 1))
    >>> table = jnp.ones((1000, 4))
    >>> table, state = train_step(table, embeddings.init(table), jnp.array([3, 500, 3]))
    >>> table, state = embeddings.flush(table, state)
    >>> [round(x, 5) for x in table[2:5, 0].tolist()]
    [0.99999, 0.99899, 0.99999]
    """
    recipe = recipe_of(tx)
    if recipe is None:
        raise TypeError(
            "tx: expected a transformation of jadam's family, as jadam.adam(1e-3), got "
            f"{type(tx).__name__}"
        )
    if recipe.mask is not None:
        raise ValueError(f"tx: expected no mask, since a table is one leaf; got {recipe.mask!r}")
    if not isinstance(catch_up, bool) and catch_up not in ("sum", "steps"):
        raise ValueError(f"catch_up: expected True, False, 'sum' or 'steps', got {catch_up!r}")
    plan = DenseStep(recipe.rule, recipe.learning_rate, recipe.weight_decay)
    if catch_up:
        fade(plan.rule)
    elif plan.rule.member is not ADAM or plan.decays or plan.rule.hyperparameters["eps_root"] != 0:
        raise ValueError(
            "tx: expected jadam.adam without eps_root for catch_up=False, which is torch's "
            f"SparseAdam; got {plan.rule.member.name}{' with decay' if plan.decays else ''}"
        )
    return Lazy(tx, plan, catch_up, recipe.kernel)


def _kernel() -> Any:
    # Imported where a kernel is in use: without what it needs of JAX, the rest goes on.
    return importlib.import_module("jadam._kernels.rows")


def _last_of(state: RowsState, rows: Int[Array, "n"]) -> Int[Array, "n"]:
    """After which update rows stand. An id that is no row counts as one that missed nothing."""
    return state.last.at[rows].get(mode="fill", fill_value=np.iinfo(np.int32).max)


def _check_table(table: Any) -> None:
    _validate.inexact_leaves("table", table)
    dtype, shape = jnp.result_type(table), np.shape(table)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(f"table: expected a real dtype, got {dtype}")
    if len(shape) < 2:
        raise ValueError(f"table: expected shape [rows, ...] with two axes at least, got {shape}")


def _checked_grads(grads: Any, batch: tuple[int, ...], table: Table) -> Array:
    _validate.inexact_leaves("grads", grads)
    expected = batch + table.shape[1:]
    if np.shape(grads) != expected:
        raise ValueError(
            f"grads: expected shape {expected} for ids of shape {batch} and a table of shape "
            f"{table.shape}, got {np.shape(grads)}"
        )
    grads = jnp.asarray(grads)
    if jnp.iscomplexobj(grads):
        raise TypeError(f"grads: expected a real dtype, got {grads.dtype}")
    return grads


def _named(member: Member, stored: Sequence[Array]) -> dict[str, Array]:
    """The moments by their names in the state."""
    return {moment.name: x for moment, x in zip(member.moments, stored, strict=True)}


def _add(total: Float[Array, "2"], x: Float[Array, ""]) -> Float[Array, "2"]:
    """x added to a sum that is kept as a float32 and its rounding error (Knuth's two-sum)."""
    high, low = total
    s = high + x
    part = s - high
    low += (high - (s - part)) + (x - part)
    return jnp.stack([s, low])
