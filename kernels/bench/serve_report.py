"""What bench.serve measured: the README's tables and plot, each bar, and a step's kernels."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from bench.released import MODELS, num_layers

GIB = 2**30
NAMES = {
    "plugin": "this plugin",
    "plugin_fp8": "this plugin, W4A8",
    "marlin": "Marlin",
    "humming": "Humming",
    "default": "vLLM's default",
}
OURS = ("plugin", "plugin_fp8")
STUDENT_95 = {19: 2.093, 9: 2.262, 4: 2.776, 1: 12.706}  # two-sided, by degrees of freedom
KERNELS_SHOWN = 12
# load -> how many times the better peer, by the engine's step and by the client's TPOT
DECODE_BARS = {"64 × 32 + 512": (1.3, 1.25), "256 × 32 + 512": (1.3, 1.25)}
TPOT_BARS = {"8 × 32 + 512": 1.15}
PROMPT_BARS = ("64 × 2048 + 256", "64 × 8000 + 256")
PREFILL_BARS = ("4 × 2048 + 1", "16 × 2048 + 1", "4 × 8000 + 1")
ITL_BAR, THROUGHPUT_BAR, PREFILL_BAR = 1.1, 1.12, 1.12
GRAPH_US_A_LAYER = 6.0
MXFP4_BAR = 0.95  # of vLLM's default, whose experts multiply in FP8
READY_RESOLUTION = 0.5  # seconds between two questions whether a server is ready
FP8_PREFILL_BAR, FP8_TPOT_BAR = 1.2, 1.0  # of the same, where this plugin's do, too


class Bar(NamedTuple):
    name: str
    limit: str
    measured: str
    met: bool


def columns_of(run: dict) -> list[str]:
    """In the order of NAMES, then others as they were given."""
    names = [row["contender"] for row in run.get("servers", ())]
    return [name for name in dict.fromkeys((*NAMES, *names)) if name in names]


def name_of(run: dict, contender: str) -> str:
    if contender == "plugin" and run["format"] == "mxfp4":
        return f"{NAMES[contender]}, W4A16"
    return NAMES.get(contender, contender)


def peers(run: dict) -> list[str]:
    return [name for name in columns_of(run) if name not in OURS]


def is_throughput(metric: str) -> bool:
    return metric.endswith("throughput")


def best(metric: str) -> Callable[[Iterable[float]], float]:
    return max if is_throughput(metric) else min


def value(run: dict, contender: str, load: str, metric: str) -> float | None:
    """The best of the times that a load was measured, since what disturbs one, another process or a
    compiler, only adds time; of those in which no kernel was compiled, if there are any."""
    rows = [
        row
        for row in run.get("loads", ())
        if row["contender"] == contender and row["load"] == load and row.get(metric) is not None
    ]
    rows = [row for row in rows if not row.get("compiled")] or rows
    return best(metric)(row[metric] for row in rows) if rows else None


def speedup(run: dict, load: str, metric: str, contender: str = "plugin") -> float | None:
    """How many times the better peer it is."""
    ours = value(run, contender, load, metric)
    theirs = [v for name in peers(run) if (v := value(run, name, load, metric)) is not None]
    if ours is None or not theirs:
        return None
    peer = best(metric)(theirs)
    return ours / peer if is_throughput(metric) else peer / ours


def paired(run: dict, metric: str) -> dict[str, tuple[float, float]]:
    """Peer -> mean of its milliseconds less this plugin's, over repeats, and its 95 % interval's
    half."""
    steps = run.get("steps", {})
    found = {}
    for name in peers(run):
        ours, theirs = (steps.get(n, {}).get(metric, ()) for n in ("plugin", name))
        differences = [b - a for a, b in zip(ours, theirs, strict=False)]
        if len(differences) > 1:
            freedom = len(differences) - 1
            student = next(t for degrees, t in STUDENT_95.items() if degrees <= freedom)
            half = student * stdev(differences) / len(differences) ** 0.5
            found[name] = (mean(differences), half)
    return found


def bars(run: dict) -> Iterator[Bar]:
    def at_least(load: str, what: str, metric: str, limit: float) -> Bar:
        limit = MXFP4_BAR if run["format"] == "mxfp4" else limit
        return speedup_bar(f"{load}: {what}", speedup(run, load, metric), limit)

    for load, (step, tpot) in DECODE_BARS.items():
        yield at_least(load, "engine's step", "step_ms", step)
        yield at_least(load, "TPOT", "median_tpot_ms", tpot)
    for load, tpot in TPOT_BARS.items():
        yield at_least(load, "TPOT", "median_tpot_ms", tpot)
    if not run.get("topology"):
        yield from step_bars(run)
    for load in PROMPT_BARS:
        yield at_least(load, "median inter-token latency", "median_itl_ms", ITL_BAR)
        yield at_least(load, "throughput", "total_token_throughput", THROUGHPUT_BAR)
    for load in PREFILL_BARS:
        yield at_least(load, "prefill", "total_token_throughput", PREFILL_BAR)
    yield from server_bars(run)
    if "plugin_fp8" in columns_of(run):
        yield from fp8_bars(run)


def speedup_bar(name: str, found: float | None, limit: float) -> Bar:
    return Bar(name, f"≥ {limit}×", times(found), found is not None and found >= limit)


def fp8_bars(run: dict) -> Iterator[Bar]:
    for load in dict.fromkeys(row["load"] for row in run.get("loads", ())):
        what, metric, limit = "TPOT", "median_tpot_ms", FP8_TPOT_BAR
        if load in PREFILL_BARS:
            what, metric, limit = "prefill", "total_token_throughput", FP8_PREFILL_BAR
        found = speedup(run, load, metric, "plugin_fp8")
        yield speedup_bar(f"W4A8, {load}: {what}", found, limit)


def step_bars(run: dict) -> Iterator[Bar]:
    """One sequence, against the peer with the least difference."""
    graph = paired(run, "graph_ms")
    least = min(graph.values(), default=None)
    shown, met = "-", False
    if least is not None:
        us, half = (1e3 * ms / run["layers"] for ms in least)
        shown, met = f"{us:.1f} ± {half:.1f} µs", us >= GRAPH_US_A_LAYER
    yield Bar("1 sequence: graph, a layer less", f"≥ {GRAPH_US_A_LAYER:.0f} µs", shown, met)
    least = min(paired(run, "step_ms").values(), default=None)
    shown, met = "-", False
    if least is not None:
        us, half = (1e3 * ms for ms in least)
        shown, met = f"{us:.0f} ± {half:.0f} µs", us + half >= 0
    yield Bar("1 sequence: step, less", "≥ 0 µs", shown, met)


def server_bars(run: dict) -> Iterator[Bar]:
    """Of servers that started alone where there are such, otherwise of those at once."""
    rows = {r["contender"]: r for r in run.get("starts") or run["servers"] if "failure" not in r}
    ours = rows.get("plugin", {})
    theirs = [rows[name] for name in peers(run) if name in rows]
    complete = bool(ours and theirs)
    ready = ours["ready_s"] - min(r["ready_s"] for r in theirs) if complete else None
    shown = "-" if ready is None else f"{ready:+.1f} s"
    met = ready is not None and ready <= READY_RESOLUTION
    yield Bar("ready, beyond the sooner peer", f"≤ {READY_RESOLUTION} s", shown, met)
    if run.get("starts") or run.get("in_turn"):
        less = max(r["kv_tokens"] for r in theirs) - ours["kv_tokens"] if complete else None
        shown = "-" if less is None else f"{less:,}"
        yield Bar("KV tokens, fewer", "≤ 0", shown, less is not None and less <= 0)


def markdown(results: dict) -> str:
    return "\n\n".join("\n".join(run_lines(run)) for run in results["runs"].values())


def title(run: dict) -> str:
    draft = f", {run['mtp']} drafted tokens" if run["mtp"] else ""
    topology = run.get("topology")
    where = "each server alone on" if run.get("in_turn") else "all servers on"
    where = f"each server alone, {topology}, each rank on" if topology else where
    return (
        f"{run['format'].upper()}, vLLM {run['vllm']}, {MODELS[run['model']]}'s layer sizes, "
        f"{run['layers']} of {num_layers(run['model'])} layers{draft}, random weights; {where} "
        f"one {run['gpu']} ({run['cores']} cores, driver {run['driver']}), commit "
        f"{run['commit']}."
    )


def run_lines(run: dict) -> Iterator[str]:
    yield title(run)
    yield ""
    columns = columns_of(run)
    names = (name_of(run, c) for c in columns)
    yield line("requests × prompt + new tokens", *names, "over the better")
    yield "|---" * (2 + len(columns)) + "|"
    loads = list(dict.fromkeys(row["load"] for row in run.get("loads", ())))
    for load in sorted(loads, key=lambda name: [int(n) for n in name.split() if n.isdigit()][::-1]):
        for metric, what in metrics_of(load):
            cells = [number(value(run, c, load, metric)) for c in columns]
            over = [times(speedup(run, load, metric, c)) for c in columns if c in OURS]
            yield line(f"{load}: {what}", *cells, " / ".join(over))
    yield from server_lines(run, columns)


def metrics_of(load: str) -> Sequence[tuple[str, str]]:
    prompt, new = int(load.split()[2]), int(load.split()[4])
    if new == 1:
        return (("total_token_throughput", "prefill, tokens/s"),)
    if prompt < 1000:
        return ("step_ms", "engine's step, ms"), ("median_tpot_ms", "TPOT, ms")
    return ("median_itl_ms", "inter-token latency, ms"), ("total_token_throughput", "tokens/s")


def server_lines(run: dict, columns: Sequence[str]) -> Iterator[str]:
    """Time to ready and memory; of a failure, that it was one."""
    rows = {row["contender"]: row for row in run["servers"]}
    alone = {row["contender"]: row for row in run.get("starts", ())}

    def gib(key: str, name: str) -> str:
        size = rows.get(name, {}).get(key)
        return "-" if size is None else f"{size / GIB:.1f}"

    in_turn, topology = run.get("in_turn"), run.get("topology")
    what = "ready, s" if in_turn else "ready, all at once, s"
    yield line(what, *(ready(rows.get(c)) for c in columns), "")
    yield line("weights, GiB", *(gib("weights_bytes", c) for c in columns), "")
    what = "most memory, GiB" if in_turn else "most memory with a KV cache of 4, GiB"
    yield line(what, *(gib("peak_bytes", c) for c in columns), "")
    if in_turn:
        what = "KV tokens of a rank" if topology else "KV tokens"
        yield line(what, *(kv_tokens(rows.get(c)) for c in columns), "")
    if alone:
        layers = next(iter(alone.values()))["layers"]
        what = f"alone, {layers} layers"
        yield line(f"{what}: ready, s", *(ready(alone.get(c)) for c in columns), "")
        yield line(f"{what}: KV tokens", *(kv_tokens(alone.get(c)) for c in columns), "")


def ready(row: dict | None) -> str:
    return "-" if row is None else "failed" if "failure" in row else f"{row['ready_s']:.0f}"


def kv_tokens(row: dict | None) -> str:
    tokens = (row or {}).get("kv_tokens")
    return f"{tokens:,}" if tokens else "-"


def details(results: dict) -> str:
    """Of every run: its bars, and of every step the kernels that take most."""
    return "\n\n".join(
        "\n".join((title(run), "", *bar_lines(run), *compiled_lines(run), *profile_lines(run)))
        for run in results["runs"].values()
    )


def bar_lines(run: dict) -> Iterator[str]:
    yield from ("| bar | limit | measured | met |", "|---|---|---|---|")
    for bar in bars(run):
        yield line(bar.name, bar.limit, bar.measured, "yes" if bar.met else "no")


def compiled_lines(run: dict) -> Iterator[str]:
    """Loads without a time in which no kernel was compiled, and the kernels."""
    rows = [row for row in run.get("loads", ()) if "failure" not in row]
    of = {(row["load"], row["contender"]): row["compiled"] for row in rows if row.get("compiled")}
    for row in rows:
        if not row.get("compiled"):
            of.pop((row["load"], row["contender"]), None)
    for (load, name), kernels in of.items():
        what = f"{load}, {name_of(run, name)}"
        yield f"\n{what}: kernels were compiled each time: {', '.join(kernels)}"


def profile_lines(run: dict) -> Iterator[str]:
    """Microseconds a step, and launches."""
    columns = columns_of(run)
    if run.get("profile"):
        yield from ("", "Microseconds a step, all streams' summed (launches):")
    for step in dict.fromkeys(row["step"] for row in run.get("profile", ())):
        rows = {r["contender"]: r for r in run["profile"] if r["step"] == step}
        tables = {
            name: {kernel["name"]: kernel for kernel in rows[name]["kernels"]}
            for name in columns
            if name in rows
        }
        yield from (
            "",
            line(step, *(name_of(run, c) for c in columns)),
            "|---" * (1 + len(columns)) + "|",
        )
        most: dict[str, float] = {}
        for kernels in tables.values():
            for name, kernel in kernels.items():
                most[name] = max(most.get(name, 0), kernel["us"])
        shown = sorted(most, key=lambda name: -most[name])[:KERNELS_SHOWN]
        for name in shown:
            yield line(f"`{name}`", *(kernel_cell(tables.get(c, {}).get(name)) for c in columns))
        yield line("all others", *(sum_cell(tables.get(c), shown) for c in columns))
        yield line("in all", *(sum_cell(tables.get(c)) for c in columns))
        moe = [rows.get(c, {}).get("moe_us") for c in columns]
        if any(moe):
            yield line("a MoE layer, shared expert beside", *(number(us) for us in moe))


def sum_cell(kernels: dict | None, without: Sequence[str] = ()) -> str:
    if kernels is None:
        return "-"
    return f"{sum(k['us'] for name, k in kernels.items() if name not in without):.0f}"


def kernel_cell(kernel: dict | None) -> str:
    return "-" if kernel is None else f"{kernel['us']:.0f} ({kernel['launches']:.0f})"


def number(found: float | None) -> str:
    return "-" if found is None else f"{found:.2f}" if found < 1000 else f"{found:,.0f}"


def times(found: float | None) -> str:
    return "-" if found is None else f"{found:.2f}×"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def plot(results: dict, path: Path) -> None:
    """TPOT against requests at once, one panel a run, and prefill below it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = list(results["runs"].values())
    figure, panels = pyplot.subplots(2, len(runs), figsize=(5 * len(runs), 7), squeeze=False)
    for (above, below), run in zip(panels.T, runs, strict=True):
        names = columns_of(run)
        decodes = {n: f"{n} × 32 + 512" for n in (1, 8, 64, 256)}
        for name in names:
            points = [
                (n, tpot)
                for n, load in decodes.items()
                if (tpot := value(run, name, load, "median_tpot_ms")) is not None
            ]
            if points:
                above.plot(*zip(*points, strict=True), marker="o", label=name_of(run, name))
        above.set(xscale="log", title=f"{run['format'].upper()}, vLLM {run['vllm']}")
        above.set_xticks(list(decodes), [str(n) for n in decodes])
        above.minorticks_off()
        above.set(xlabel="requests at once", ylabel="TPOT, ms", ylim=(0, None))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            rates = [value(run, name, x, "total_token_throughput") or 0 for x in PREFILL_BARS]
            places = [place + (i - (len(names) - 1) / 2) * width for place in range(len(rates))]
            below.bar(places, rates, width, label=name_of(run, name))
        below.set_xticks(range(len(PREFILL_BARS)), [x.removesuffix(" + 1") for x in PREFILL_BARS])
        below.set(xlabel="requests × prompt", ylabel="prefill, tokens/s")
        for axes in (above, below):
            axes.grid(alpha=0.3)
            axes.legend()
    first = runs[0]
    figure.suptitle(f"{first['gpu']}, {first['layers']} layers, {first['commit']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
