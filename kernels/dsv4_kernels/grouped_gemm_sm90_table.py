"""The table of measured choices for the sm90 grouped GEMMs: configs/sm90.json.

    {"format": 1, "layers": [{"multiprocessors", "local_experts", "hidden", "intermediate",
                              "experts", "top_k", "gpu", "commit", "measured", "ranges"}]}

The first four fields are what a layer is looked up by. `ranges` says which kernels run where they
were faster than arithmetic's choice: {"rows": [above, up_to], "gather", "fc1", "fc2"}, rows being
those of one expert if routing is even, num_tokens * top_k / num_experts. `measured` is what that
was decided on, in microseconds a layer: {"tokens", "us", "arithmetic_us"}.
`dsv4-moe tune` writes it; tests hold every entry to what the kernels can run.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv4_kernels.grouped_gemm_sm90_spec import LayerConfig, Sm90Config, why_unfit
from dsv4_kernels.types import MoeShape

FORMAT = 1
# In a wheel the table lies beside this file, in a checkout in configs/ at the top.
_FOLDERS = (Path(__file__).parent / "configs", Path(__file__).parents[2] / "configs")
SHIPPED = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0]) / "sm90.json"


class Layer(NamedTuple):
    """What the choice depends on, besides the rows of an expert."""

    multiprocessors: int
    local_experts: int
    hidden: int
    intermediate: int  # of this rank, if tensor-parallel


class Range(NamedTuple):
    """above < rows of an expert <= up_to: the config that runs them."""

    above: float
    up_to: float
    config: LayerConfig


class Measurement(NamedTuple):
    """Microseconds of a layer at a number of tokens: as chosen, and with arithmetic's choice."""

    tokens: int
    us: float
    arithmetic_us: float


class Entry(NamedTuple):
    layer: Layer
    experts: int  # global, of the layer that was measured
    top_k: int
    gpu: str
    commit: str
    measured: tuple[Measurement, ...]
    ranges: tuple[Range, ...]


Table = Mapping[Layer, tuple[Range, ...]]


def layer_of(shape: MoeShape, multiprocessors: int) -> Layer:
    return Layer(multiprocessors, shape.num_local_experts, shape.hidden, shape.intermediate)


def table_of(entries: Iterable[Entry]) -> Table:
    return {entry.layer: entry.ranges for entry in entries}


def read_entries(path: Path) -> list[Entry]:
    """ValueError names what is wrong with a table that was not written by `dsv4-moe tune`."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, and this installation reads {FORMAT}")
        entries = [_entry(fields) for fields in content["layers"]]
        if len(table_of(entries)) < len(entries):
            raise ValueError("two entries of one layer")
        return entries
    except (ValueError, KeyError, TypeError) as error:
        words = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no table of configs: {words}; run dsv4-moe tune") from error


def _entry(fields: dict[str, Any]) -> Entry:
    layer = Layer(*(int(fields[name]) for name in Layer._fields))
    ranges = tuple(_range(layer, each) for each in fields["ranges"])
    for lower, upper in zip(ranges, ranges[1:], strict=False):
        if upper.above < lower.up_to:
            raise ValueError(f"ranges of {layer} that overlap at {upper.above} rows")
    return Entry(
        layer,
        int(fields["experts"]),
        int(fields["top_k"]),
        str(fields["gpu"]),
        str(fields["commit"]),
        tuple(Measurement(**each) for each in fields["measured"]),
        ranges,
    )


def _range(layer: Layer, fields: dict[str, Any]) -> Range:
    above, up_to = map(float, fields["rows"])
    if not 0 <= above < up_to:
        raise ValueError(f"a range of rows from {above} to {up_to}")
    fc1, fc2 = (
        Sm90Config(**fields[op] | {"tile_n": tuple(fields[op]["tile_n"])}) for op in ("fc1", "fc2")
    )
    for config, k in ((fc1, layer.hidden), (fc2, layer.intermediate)):
        reason = why_unfit(config, k)
        if reason is not None:
            raise ValueError(f"{config} for {layer}: {reason}")
    if fields["gather"] and fc1.cluster > 1:
        raise ValueError(f"a cluster that gathers rows: {fc1}")
    return Range(above, up_to, LayerConfig(bool(fields["gather"]), fc1, fc2))


def table_text(entries: Iterable[Entry]) -> str:
    """What `read_entries` reads: one line a measurement, three a range, sorted by layer."""
    layers = _lines(" ", [_entry_text(entry) for entry in sorted(entries)])
    return f'{{\n "format": {FORMAT},\n "layers": {layers}\n}}\n'


def _entry_text(entry: Entry) -> str:
    facts = {**entry.layer._asdict(), "experts": entry.experts, "top_k": entry.top_k}
    where = {"gpu": entry.gpu, "commit": entry.commit}
    measured = [f"    {json.dumps(each._asdict())}" for each in entry.measured]
    fields = (
        _inner(facts),
        _inner(where),
        f'"measured": {_lines("   ", measured)}',
        f'"ranges": {_lines("   ", [_range_text(each) for each in entry.ranges])}',
    )
    return "  {\n" + ",\n".join(f"   {field}" for field in fields) + "\n  }"


def _range_text(each: Range) -> str:
    facts = {"rows": [each.above, each.up_to], "gather": each.config.gather}
    configs = (
        f'     "{op}": {json.dumps(dataclasses.asdict(getattr(each.config, op)))}'
        for op in ("fc1", "fc2")
    )
    return ",\n".join([f"    {{{_inner(facts)}", *configs]) + "}"


def _inner(fields: dict[str, Any]) -> str:
    return json.dumps(fields)[1:-1]


def _lines(indent: str, items: list[str]) -> str:
    """A JSON list with one item a line."""
    return "[\n" + ",\n".join(items) + f"\n{indent}]" if items else "[]"
