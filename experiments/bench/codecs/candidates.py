"""The candidates: pairs of a code for m and a code for v."""

from dataclasses import dataclass

from jaxtyping import Array

from .adam import Betas, Moment
from .blocks import Stored
from .first_moment import (
    DynamicM,
    ExactM,
    FirstMoment,
    Fp8M,
    Power,
    Rational,
    Relative,
    Sinh,
    SoftsignM,
)
from .second_moment import (
    DynamicV,
    ExactV,
    FewLevels,
    FloatV,
    Fp8Root,
    LinearRoot,
    LinearV,
    LogRoot,
    OfNeighbours,
    SecondMoment,
)


@dataclass(frozen=True)
class Codec:
    """A code for both moments: v first, since the code for m may need what is stored of v.

    Attributes:
        bits: of an integer that has both codes; 0 where each has its own.
    """

    name: str
    first: FirstMoment
    second: SecondMoment
    bits: int = 0

    @property
    def bytes_per_parameter(self) -> float:
        if self.bits:
            return self.bits / 8 + 2 / getattr(self.second, "block", 128)
        return self.first.bytes + self.second.bytes

    def encode(self, m: Moment, v: Moment, g: Moment, t: Array, betas: Betas) -> Stored:
        stored = self.second.encode(v, g, t, betas)
        v_stored = self.second.decode(stored, t, betas)
        return self.first.encode(m, v, v_stored, t, betas), stored

    def decode(self, stored: Stored, t: Array, betas: Betas) -> tuple[Moment, Moment]:
        v = self.second.decode(stored[1], t, betas)
        return self.first.decode(stored[0], v, t, betas), v


NOISE = Relative(Rational(3))
ZONES = 4
# The code of jadam's 8-bit moments, as far as errors go. It is the plainest of those that pass the
# test with shrunk gradients of mixed scales, too.
WINNER = Codec(
    "jadam: log 16, Weyl, m 7 bits, v 9 bits",
    Relative(Rational(3), levels=63),
    LogRoot(half=256),
)
ZONED = Codec("zoned, blocks of 32", NOISE, LogRoot(15.6, ZONES, 32))

CANDIDATES = [
    WINNER,
    Codec("FlashOptim", SoftsignM(), LinearRoot()),
    Codec("bitsandbytes, blocks of 128", DynamicM(128), DynamicV(128)),
    Codec("fp8: e4m3, √v e4m3", Fp8M(), Fp8Root()),
    Codec("fp8: e4m3, √v e5m2", Fp8M(), Fp8Root("float8_e5m2")),
    Codec("linear √v, Weyl", NOISE, LinearRoot(128, "weyl")),
    Codec("square root of √v, Weyl", NOISE, LinearRoot(128, "weyl", 2)),
    Codec("log 16 octaves, nearest", NOISE, LogRoot(rounding="nearest")),
    Codec("log 16, hash", NOISE, LogRoot(rounding="hash")),
    Codec("log 16, Weyl", NOISE, LogRoot()),
    Codec("log 12, Weyl", NOISE, LogRoot(12)),
    Codec("log 16, Weyl, clock", NOISE, LogRoot(clock=True)),
    Codec("v's upper bits, Weyl", NOISE, FloatV()),
    Codec("log 16; m power 1", Relative(Power(1)), LogRoot()),
    Codec("log 16; m power 3", Relative(Power(3)), LogRoot()),
    Codec("zoned; m sinh", Relative(Sinh(1)), LogRoot(15.6, ZONES)),
    Codec("zoned; m nearest", Relative(Rational(3), "nearest"), LogRoot(15.6, ZONES)),
    Codec("zoned; m of exact √v", Relative(Rational(3), of_stored=False), LogRoot(15.6, ZONES)),
    Codec(
        "zoned; m subtractive hash",
        Relative(Rational(3), "hash", subtract=True),
        LogRoot(15.6, ZONES),
    ),
    Codec("zoned, blocks of 128", NOISE, LogRoot(15.6, ZONES)),
    Codec("zoned, unbiased in v", NOISE, LogRoot(15.6, ZONES, unbiased=True)),
    Codec("zoned, blocks of 64", NOISE, LogRoot(15.6, ZONES, 64)),
    ZONED,
    Codec("5 zones, blocks of 32", NOISE, LogRoot(15.3, 5, 32)),
    Codec("3 zones, blocks of 32", NOISE, LogRoot(15.6, 3, 32)),
    Codec(
        "zoned, m 7 bits, v 9 bits",
        Relative(Rational(3), levels=63),
        LogRoot(15.6, ZONES, 32, half=256),
    ),
    Codec("v float32", NOISE, ExactV()),
    Codec("m float32", ExactM(), ZONED.second),
]
FLOAT32 = Codec("float32", ExactM(), ExactV())


def few(
    bits: int,
    sizes: int,
    zones: tuple[int, ...],
    per_octave: float,
    *,
    dense: float = 2,
    power: float = 0.0,
    block: int = 128,
    rounding: str = "weyl",
) -> Codec:
    """±sizes codes of m and a lattice of √v in `bits`, for numbers, zero and NaN."""
    v = FewLevels(per_octave, zones, power, block, rounding)
    assert (2 * sizes + 1) * v.codes + 2 <= 1 << bits
    kinds = "" if len(zones) == 1 else f" in zones {zones}"
    name = f"{bits} bits: m ±{sizes}, v {v.codes}{kinds}, {per_octave:g} an octave"
    changed = {
        f"mean of v^{power:g}": power != 0,
        f"dense to {dense:g}": dense != 2,
        f"blocks of {block}": block != 128,
        rounding: rounding != "weyl",
    }
    name += "".join(f", {what}" for what, is_so in changed.items() if is_so)
    return Codec(name, Relative(Rational(dense), rounding, levels=sizes), v, bits)


# The code of jadam's 4-bit moments.
FEW_WINNER = few(8, 10, (12,), 1, power=0.25)
FEW = [
    FEW_WINNER,
    few(8, 3, (36,), 4),
    few(8, 5, (23,), 2),
    few(8, 7, (16,), 2),
    few(8, 7, (16,), 1),
    few(8, 7, (8, 8), 2),
    few(8, 7, (6, 6, 4), 2),
    few(8, 9, (13,), 1),
    few(8, 9, (7, 4, 2), 2),
    few(8, 10, (12,), 1),
    few(8, 10, (12,), 1, power=0.5),
    few(8, 10, (12,), 1, power=0.25, dense=3),
    few(8, 10, (12,), 1, power=0.25, block=64),
    few(8, 10, (12,), 1, power=0.25, rounding="hash"),
    few(8, 10, (12,), 1, power=0.25, rounding="nearest"),
    few(8, 12, (10,), 1),
    Codec(
        "8 bits: m ±15, v 62 for two neighbours, 4 an octave",
        Relative(Rational(2), levels=15),
        OfNeighbours(FewLevels(4, (62,), block=64)),
        8,
    ),
    few(10, 15, (32,), 2),
    few(10, 15, (32,), 2, power=0.25),
    few(10, 21, (23,), 2),
    few(12, 31, (64,), 4),
    few(12, 31, (64,), 4, power=0.25),
    Codec("torchao, 4 bits", DynamicM(128, exponents=3), LinearV()),
    WINNER,
]
"""Fewer bits for both moments, in blocks of 128."""
