"""One model loaded by vLLM's own worker, in this process, with the experts' phases timed.

    python -m bench.load_model CHECKPOINT OUT.json [--load-format dummy] [--backend marlin]

It imports vLLM, makes OUT.ready, and loads when standard input has a line; without one it ends.
Nothing is profiled, captured or served. Of this plugin it counts: build (making the layers'
methods, where compiling may begin), prepare (checks and the weights' layout), compile (waiting for
processes that compile), objects (loading what they made, or compiling here), and warm_up (launching
every kernel once). Of vLLM's backends: prepare, their process_weights_after_loading.
VLLM_CACHE_ROOT is where compiled kernels are looked for and kept.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.stopwatch import Record, Stopwatch

PLUGIN = "plugin"
BACKENDS = (PLUGIN, "marlin", "humming")
METHOD = "vllm_dsv4_moe.moe_method:ModelOptNvFp4Dsv4Method"
PEERS_METHOD = "vllm.model_executor.layers.quantization.modelopt:ModelOptNvFp4FusedMoE"
MAX_NUM_TOKENS = 8192  # of a batch: what the arena is sized for


def watch_plugin(watch: Stopwatch) -> None:
    from vllm_dsv4_moe import register

    register()
    watch.time(f"{METHOD}.__init__", "build")
    watch.time(f"{METHOD}.process_weights_after_loading", "prepare", opens_layer=True)
    watch.time("vllm_dsv4_moe.kernel_cache:Compilation.wait", "compile")
    watch.time("vllm_dsv4_moe.warm_up:WarmUp.__call__", "warm_up", before=note_arena(watch))

    @functools.cache
    def watch_objects() -> None:
        watch.time("dsv4_kernels.sm90.gemm:compile_layer", "objects")

    # Not before: what it takes to import CuTe DSL is a load's own time.
    prepare_layer = "vllm_dsv4_moe.moe_method:prepare_layer"
    watch.time(prepare_layer, "prepare", before=lambda *_, **__: watch_objects())


def note_arena(watch: Stopwatch):
    """Remember the size of the arena, of which the warm-up has one for itself."""

    def before(_, layer, *rest) -> None:
        from dsv4_kernels.moe import workspace_bytes

        watch.current.extra_bytes["arena"] = workspace_bytes(layer.backend, layer.shape)

    return before


def objects_in(folder: Path) -> dict[Path, float]:
    """Every object file below, and when it was written."""
    return {path: path.stat().st_mtime for path in folder.rglob("*.o")}


def load(
    checkpoint: Path, load_format: str, backend: str, is_wanted: Callable[[], bool]
) -> dict | None:
    """Load it once it is wanted; the measurements, in seconds and bytes."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    watch = Stopwatch()
    if backend == PLUGIN:
        watch_plugin(watch)
    else:
        watch.time(f"{PEERS_METHOD}.process_weights_after_loading", "prepare", opens_layer=True)
    config = EngineArgs(
        model=str(checkpoint),
        load_format=load_format,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=MAX_NUM_TOKENS,
        enforce_eager=True,
        kernel_config={"moe_backend": "auto" if backend == PLUGIN else backend},
    ).create_engine_config()
    if not is_wanted():
        return None
    cache = Path(os.environ["VLLM_CACHE_ROOT"])
    there = objects_in(cache)
    start = time.perf_counter()
    UniProcExecutor(config)
    load_s = time.perf_counter() - start
    new = {path: at for path, at in objects_in(cache).items() if there.get(path) != at}
    return {
        "load_s": load_s,
        "layers": [as_row(layer) for layer in watch.layers],
        "build_s": watch.outside.seconds.get("build", 0.0),
        **overlap(watch.began, new),
        "new_objects": len(new),
    }


def as_row(layer: Record) -> dict:
    row = asdict(layer)
    del row["before_bytes"]
    return row


def overlap(began: dict[str, float], new_objects: dict[Path, float]) -> dict[str, float | None]:
    """reading_s: from the first method built to the first layer prepared, when vLLM makes the
    model and reads its weights. compile_s: from there to the last object written; None of none."""
    if "build" not in began:
        return {"reading_s": None, "compile_s": None}
    last = max(new_objects.values(), default=None)
    return {
        "reading_s": began["prepare"] - began["build"],
        "compile_s": None if last is None else last - began["build"],
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="JSON to write")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--backend", default=PLUGIN, choices=BACKENDS)
    return parser


def main() -> None:
    arguments = build_parser().parse_args()

    def is_wanted() -> bool:
        arguments.out.with_suffix(".ready").touch()
        return bool(sys.stdin.readline())

    row = load(arguments.checkpoint, arguments.load_format, arguments.backend, is_wanted)
    if row is not None:
        arguments.out.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
