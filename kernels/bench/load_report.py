"""What bench.load measured: the README's tables, and each bar with what it is held against."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

MIB = 2**20
NAMES = {"plugin": "this plugin", "marlin": "Marlin", "humming": "Humming"}
LAYER_SECONDS = 0.03
OVER_MARLIN_SECONDS = 2.0
COLD_SECONDS = {"real": 12.0, "dummy": 20.0}
LEAST_COLD_SECONDS = 2.0  # what a cold start may cost even where reading outlasts compiling
SCRATCH_BYTES = 300 * MIB
SECOND_COMPILE_SECONDS = 10.0


class Bar(NamedTuple):
    name: str
    limit: float
    measured: float | None  # None where it was not measured
    unit: str

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured <= self.limit


def phase_seconds(row: dict, phase: str) -> float:
    return sum(layer["seconds"].get(phase, 0.0) for layer in row["layers"])


def total_seconds(row: dict) -> float:
    """All phases of all layers, and what building their methods took."""
    layers = (sum(layer["seconds"].values()) for layer in row["layers"])
    return sum(layers) + row["build_s"]


def median_prepare(row: dict) -> float:
    """Of the layers after the first, whose Triton kernel is compiled or read from its cache."""
    return median(layer["seconds"]["prepare"] for layer in row["layers"][1:])


def scratch_bytes(row: dict) -> int:
    """The most allocated in any layer beyond the weights, the arena left out where there is one."""
    most = 0
    for layer in row["layers"]:
        extra = dict(layer["extra_bytes"])
        arena = extra.pop("arena", 0)
        if "warm_up" in extra:
            extra["warm_up"] -= arena
        most = max(most, *extra.values())
    return most


def find(results: dict, **facts: str) -> dict | None:
    """The row of which these facts are true, if it was measured."""
    for row in results["rows"]:
        if "failure" not in row and all(row[key] == value for key, value in facts.items()):
            return row
    return None


def bars(results: dict) -> list[Bar]:
    found: list[Bar] = []
    for weights in ("dummy", "real"):
        found += loading_bars(results, weights)
    ours = [row for row in results["rows"] if row["backend"] == "plugin" and "failure" not in row]
    scratch = max((scratch_bytes(row) / MIB for row in ours), default=None)
    found.append(Bar("scratch while preparing", SCRATCH_BYTES / MIB, scratch, "MiB"))
    second = [row for row in results["compiles"][1:] if "failure" not in row]
    compiled = float(second[0]["new_objects"]) if second else None
    seconds = second[0]["seconds"] if second else None
    found.append(Bar("second `dsv4-moe compile`: kernels compiled", 0, compiled, ""))
    found.append(
        Bar("second `dsv4-moe compile`: whole process", SECOND_COMPILE_SECONDS, seconds, "s")
    )
    return found


def loading_bars(results: dict, weights: str) -> Iterator[Bar]:
    what = {"backend": "plugin", "triton": "warm", "weights": weights}
    warm = find(results, **what, objects="warm")
    cold = find(results, **what, objects="cold")
    marlin = find(results, backend="marlin", weights=weights)
    layer = None if warm is None else median_prepare(warm)
    yield Bar(f"{weights}: median layer prepared", LAYER_SECONDS, layer, "s")
    over = None if warm is None or marlin is None else total_seconds(warm) - total_seconds(marlin)
    yield Bar(f"{weights}: in all, warm, beyond Marlin", OVER_MARLIN_SECONDS, over, "s")
    more = None if warm is None or cold is None else total_seconds(cold) - total_seconds(warm)
    yield Bar(f"{weights}: in all, objects cold, beyond warm", COLD_SECONDS[weights], more, "s")
    not_hidden = LEAST_COLD_SECONDS
    if cold is not None and cold["compile_s"] is not None:
        not_hidden = max(not_hidden, cold["compile_s"] - cold["reading_s"])
    yield Bar(f"{weights}: the same, beyond compiling - reading", not_hidden, more, "s")


def markdown(results: dict) -> str:
    gpu, commits = results["gpu"], results["commits"]
    lines = [
        f"Seconds, {gpu}, {results['cores']} cores, vLLM {results['vllm']}, commit "
        f"{commits.get('rows', '-')}; objects are CuTe DSL's; in all: with making the layers' "
        "methods, where compiling begins.",
        "",
        "| weights | experts | first layer | median layer | compile | objects | warm-up | in all | "
        "whole load |",
        "|---|---|---|---|---|---|---|---|---|",
        *(load_line(row, results["layers"]) for row in results["rows"]),
        "",
        "| bar | limit | measured | met |",
        "|---|---|---|---|",
        *(bar_line(bar) for bar in bars(results)),
    ]
    if results["starts"]:
        whole = f"| whole server, {results['layers']['dummy']} layers, commit {commits['starts']} "
        lines += [
            "",
            f"{whole}| first start | later starts, median | starts |",
            "|---|---|---|---|",
        ]
        lines += starts_lines(results["starts"])
    return "\n".join(lines)


def load_line(row: dict, layers: dict[str, int]) -> str:
    which = NAMES[row["backend"]]
    if row["objects"]:
        which += f", objects {row['objects']}"
    if row["triton"] == "cold":
        which += ", Triton's kernels cold"
    cells = [f"{row['weights']}, {layers[row['weights']]} layers", which]
    if "failure" in row:
        return _line(*cells, *["failed"] * 7)
    cells += [f"{row['layers'][0]['seconds']['prepare']:.3f}", f"{median_prepare(row):.3f}"]
    for phase in ("compile", "objects", "warm_up"):
        cells.append(f"{phase_seconds(row, phase):.2f}" if row["objects"] else "-")
    return _line(*cells, f"{total_seconds(row):.2f}", f"{row['load_s']:.1f}")


def bar_line(bar: Bar) -> str:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g} {bar.unit}".strip()

    return _line(bar.name, f"≤ {text(bar.limit)}", text(bar.measured), "yes" if bar.met else "no")


def starts_lines(starts: Sequence[dict]) -> Iterator[str]:
    """The first start of each backend, and the median of its later ones."""
    for backend, name in NAMES.items():
        of_it = [row for row in starts if row["backend"] == backend]
        seconds = [row["seconds"] for row in of_it if "failure" not in row]
        first = f"{seconds[0]:.0f}" if seconds else "failed" if of_it else "-"
        later = f"{median(seconds[1:]):.0f}" if seconds[1:] else "-"
        yield _line(name, first, later, str(len(seconds)))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
