"""Find the configs of the sm90 GEMMs that run one layer fastest, at each number of tokens.

Candidates differ from arithmetic's choice in one respect: the tile of weights, the stages' width,
the sizes of a row tile, blocks a multiprocessor or a cluster, or whether fc1 gathers. Each is
verified against the oracle before it is timed; fc1's best and fc2's best are then verified and
timed together, in turns with arithmetic's choice, and replace it only where they are faster by
`GAIN`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import sqrt
from statistics import median

from dsv4_kernels import grouped_gemm_sm90 as sm90
from dsv4_kernels.grouped_gemm_sm90_choice import by_arithmetic, rows_per_expert
from dsv4_kernels.grouped_gemm_sm90_kernel import Dsv4GroupedGemmSm90
from dsv4_kernels.grouped_gemm_sm90_spec import Gemm, LayerConfig, Sm90Config, why_unfit
from dsv4_kernels.grouped_gemm_sm90_table import Layer, Measurement, Range, Table, layer_of
from dsv4_kernels.types import MoeShape

GAIN = 1.02
TURNS = 3
# How far from the rows that were measured a choice holds, where the next measurement differs.
REACH = 1.5
# Registers of a consumer thread besides its sums: with fewer, sums go to local memory.
OTHER_REGISTERS = 56
TILES = ((1, 4), (2, 2), (2, 3), (1, 2), (1, 3))  # m_blocks, warpgroups


@dataclass(frozen=True)
class Refusal:
    num_tokens: int
    config: LayerConfig
    reason: str


@dataclass(frozen=True)
class Found:
    """At a number of tokens: arithmetic's choice and the fastest, in microseconds a layer."""

    num_tokens: int
    arithmetic: LayerConfig
    arithmetic_us: float
    config: LayerConfig
    us: float
    refused: tuple[Refusal, ...]
    tried: int


def candidates(shape: MoeShape, num_tokens: int, thorough: bool = True) -> list[LayerConfig]:
    """Arithmetic's choice first, then what differs from it in one respect of one GEMM."""
    base = by_arithmetic(shape, num_tokens)
    found = [base]
    found.append(base._replace(gather=not base.gather))
    for other in _variants(base.fc1, thorough):
        if why_unfit(other, shape.hidden) is None:
            found.append(base._replace(fc1=other))
    for other in _variants(base.fc2, thorough):
        if why_unfit(other, shape.intermediate) is None:
            found.append(base._replace(fc2=other))
    return [each for each in dict.fromkeys(found) if each == base or _may_fit(shape, each)]


def _variants(config: Sm90Config, thorough: bool) -> Iterator[Sm90Config]:
    for tile_k in (64, 128, 256):
        yield replace(config, tile_k=tile_k)
    for m_blocks, warpgroups in TILES[: None if thorough else 2]:
        for tile_k in (64, 128, 256) if thorough else (128,):
            other = replace(config, m_blocks=m_blocks, warpgroups=warpgroups, tile_k=tile_k)
            yield other
            if thorough and other.tile_m == 128:
                yield replace(other, blocks_per_sm=2)
    most = config.tile_n[-1]
    if most > 64:  # smaller tiles wait for weights, not for rows
        yield replace(config, cluster=3 - config.cluster)
    for shift in (-16, 16):
        yield replace(config, tile_n=tuple(n + shift for n in config.tile_n))
    yield replace(config, tile_n=(most - 32, most - 16, most))
    if thorough:
        yield replace(config, tile_n=(most - 16, most))
        yield replace(config, tile_n=(most // 32 * 16 or 8, most))


def _may_fit(shape: MoeShape, config: LayerConfig) -> bool:
    """Whether shared memory holds two stages, and registers the sums."""
    for gemm in layer_gemms(shape, config):
        try:
            kernel = Dsv4GroupedGemmSm90(gemm)
        except AssertionError:
            return False
        sums = gemm.config.m_blocks * gemm.config.tile_n[-1] // 2
        if sums + OTHER_REGISTERS > kernel._registers()[1]:
            return False
    return True


def layer_gemms(shape: MoeShape, config: LayerConfig) -> tuple[Gemm, Gemm]:
    experts, hidden, inter = shape.num_local_experts, shape.hidden, shape.intermediate
    return (
        Gemm("fc1", experts, 2 * inter, hidden, shape.top_k, config.gather, config.fc1),
        Gemm("fc2", experts, hidden, inter, shape.top_k, False, config.fc2),
    )


def all_candidates(
    shape: MoeShape, token_counts: Sequence[int], thorough: bool = True
) -> dict[int, list[LayerConfig]]:
    return {count: candidates(shape, count, thorough) for count in token_counts}


def gemms_of(shape: MoeShape, choices: Mapping[int, Sequence[LayerConfig]]) -> list[Gemm]:
    """Every kernel that tuning launches, once."""
    configs = [config for each in choices.values() for config in each]
    return list(dict.fromkeys(gemm for c in configs for gemm in layer_gemms(shape, c)))


def tune(
    shape: MoeShape,
    choices: Mapping[int, Sequence[LayerConfig]],
    why_wrong: Callable[[int], str | None],
    time_us: Callable[[int], float],
    why_not: Callable[[Gemm], str | None],
    multiprocessors: int,
    progress: Callable[[Found], None] = lambda found: None,
    watch: Callable[[int, LayerConfig], AbstractContextManager] = lambda *_: nullcontext(),
) -> list[Found]:
    """The fastest of the choices at each number of tokens, by ascending numbers.

    why_wrong and time_us run the layer at a number of tokens with whatever table sm90 uses, inside
    `watch`; why_not refuses a kernel before it runs. sm90's table is as it was on return.
    """
    before = sm90.table_in_use()
    search = _Search(shape, layer_of(shape, multiprocessors), why_wrong, time_us, why_not, watch)
    results = []
    try:
        for num_tokens in sorted(choices):
            results.append(search.fastest(num_tokens, choices[num_tokens]))
            progress(results[-1])
    finally:
        sm90.use_table(before)
    return results


@dataclass(frozen=True)
class _Search:
    shape: MoeShape
    layer: Layer
    why_wrong: Callable[[int], str | None]
    time_us: Callable[[int], float]
    why_not: Callable[[Gemm], str | None]
    watch: Callable[[int, LayerConfig], AbstractContextManager]

    def fastest(self, num_tokens: int, configs: Sequence[LayerConfig]) -> Found:
        base, *others = configs
        refused: list[Refusal] = []
        base_us = self._measure(num_tokens, base, refused)
        if base_us is None:
            reason = refused[0].reason
            raise ValueError(f"arithmetic's own choice at {num_tokens} tokens is wrong: {reason}")
        times = {base: base_us}
        for config in others:
            us = self._measure(num_tokens, config, refused)
            if us is not None:
                times[config] = us
        best, us = base, base_us
        combined = _combine(base, times)
        if combined != base and (
            combined in times or self._measure(num_tokens, combined, refused) is not None
        ):
            base_us, combined_us = self._in_turns(num_tokens, base, combined)
            best, us = (combined, combined_us)
            if combined_us * GAIN > base_us:
                best, us = base, base_us
        return Found(num_tokens, base, base_us, best, us, tuple(refused), len(configs))

    def _measure(
        self, num_tokens: int, config: LayerConfig, refused: list[Refusal]
    ) -> float | None:
        """Microseconds, or None with a refusal: of a kernel that is not, or is wrong."""
        # A layer that is chosen already is not refused for its registers, but for its output.
        is_base = config == by_arithmetic(self.shape, num_tokens)
        reason = None
        if not is_base:
            reasons = map(self.why_not, layer_gemms(self.shape, config))
            reason = next((each for each in reasons if each is not None), None)
        if reason is None:
            self._use(config)
            with self.watch(num_tokens, config):
                reason = self.why_wrong(num_tokens)
        if reason is not None:
            refused.append(Refusal(num_tokens, config, reason))
            return None
        return self.time_us(num_tokens)

    def _use(self, config: LayerConfig) -> None:
        table: Table = {self.layer: (Range(0.0, float("inf"), config),)}
        sm90.use_table(table)

    def _in_turns(
        self, num_tokens: int, base: LayerConfig, other: LayerConfig
    ) -> tuple[float, float]:
        """Medians, so that a clock that falls meanwhile falls for both."""
        times: dict[LayerConfig, list[float]] = {base: [], other: []}
        for _ in range(TURNS):
            for config, seen in times.items():
                self._use(config)
                seen.append(self.time_us(num_tokens))
        return median(times[base]), median(times[other])


def _combine(base: LayerConfig, times: Mapping[LayerConfig, float]) -> LayerConfig:
    """The fastest gather, fc1 and fc2, each of those that differ in it alone."""
    best = base
    for field in LayerConfig._fields:
        alone = [c for c in times if c == base._replace(**{field: getattr(c, field)})]
        best = best._replace(**{field: getattr(min(alone, key=times.__getitem__), field)})
    return best


def measurements(found: Sequence[Found]) -> tuple[Measurement, ...]:
    return tuple(
        Measurement(f.num_tokens, round(f.us, 2), round(f.arithmetic_us, 2)) for f in found
    )


def ranges(shape: MoeShape, found: Sequence[Found]) -> tuple[Range, ...]:
    """Where the found configs hold: half way, by ratio, to the next measurement, but no further
    than `REACH` unless that has the same config. Arithmetic keeps the rest."""
    rows = [rows_per_expert(shape, f.num_tokens) for f in found]
    made: list[Range] = []
    for i, each in enumerate(found):
        if each.config == each.arithmetic:
            continue
        above, up_to = rows[i] / REACH, rows[i] * REACH
        if i == 0:
            above = 0.0
        elif found[i - 1].config == each.config:
            above = sqrt(rows[i - 1] * rows[i])
        else:
            above = max(above, sqrt(rows[i - 1] * rows[i]))
        if i + 1 < len(found):
            middle = sqrt(rows[i] * rows[i + 1])
            up_to = middle if found[i + 1].config == each.config else min(up_to, middle)
        above, up_to = round(above, 4), round(up_to, 4)
        if made and made[-1].config == each.config and made[-1].up_to == above:
            made[-1] = made[-1]._replace(up_to=up_to)
        else:
            made.append(Range(above, up_to, each.config))
    return tuple(made)
