"""The table of configs for sm90: what it says is chosen, what it lacks is arithmetic, and every
entry that is shipped can run."""

import json
import logging
import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from bench.sass_sm100 import cuda_tool
from dsv4_kernels import grouped_gemm_sm90 as sm90
from dsv4_kernels.grouped_gemm_sm90_choice import by_arithmetic, choose_config
from dsv4_kernels.grouped_gemm_sm90_kernel import SMEM_BYTES, Dsv4GroupedGemmSm90
from dsv4_kernels.grouped_gemm_sm90_spec import MOST_PARTIALS, LayerConfig, Sm90Config, why_unfit
from dsv4_kernels.grouped_gemm_sm90_table import (
    SHIPPED,
    Entry,
    Layer,
    Measurement,
    Range,
    layer_of,
    read_entries,
    table_of,
    table_text,
)
from dsv4_kernels.types import MoeShape

from tests import sanitize
from tests.sm90_emulation import Emulation
from tests.sm90_problems import Problem

PRO_EP8 = MoeShape(384, 48, 6, 7168, 3072, 8192, False)
FLASH = MoeShape(256, 256, 6, 4096, 2048, 8192, False)
FEW = LayerConfig(True, Sm90Config(1, 4, (8, 16), 256), Sm90Config(1, 2, (8, 16), 128, 2))
MANY = LayerConfig(False, Sm90Config(2, 2, (64, 128), 64), Sm90Config(2, 2, (64, 144), 128))
ENTRY = Entry(
    Layer(132, 48, 7168, 3072),
    384,
    6,
    "NVIDIA H200",
    "0123abc",
    (Measurement(1, 20.5, 24.0), Measurement(2048, 600.0, 600.0)),
    (Range(0.0, 2.0, FEW), Range(8.0, 32.0, MANY)),
)
TABLE = table_of([ENTRY])


@pytest.fixture
def given_table(keep_sm90_table):
    sm90.use_table(TABLE)


def tokens(rows: float) -> int:
    return int(rows * 384 / 6)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1 / 64, FEW), (2, FEW), (2.25, None), (8, None), (8.25, MANY), (32, MANY), (33, None)],
)
def test_a_range_holds_above_its_first_number_up_to_its_second(rows, expected):
    chosen = choose_config(PRO_EP8, tokens(rows), 132, TABLE)
    assert chosen == (expected or by_arithmetic(PRO_EP8, tokens(rows)))


@pytest.mark.parametrize(
    ("shape", "multiprocessors"),
    [
        pytest.param(PRO_EP8, 114, id="another-gpu"),
        pytest.param(PRO_EP8._replace(num_local_experts=24), 132, id="other-experts"),
        pytest.param(PRO_EP8._replace(hidden=4096), 132, id="other-hidden"),
        pytest.param(PRO_EP8._replace(intermediate=384), 132, id="tensor-parallel"),
    ],
)
def test_what_the_table_lacks_is_arithmetic(shape, multiprocessors):
    for num_tokens in (1, 300, 8192):
        chosen = choose_config(shape, num_tokens, multiprocessors, TABLE)
        assert chosen == by_arithmetic(shape, num_tokens)


def test_the_rest_of_a_layers_shape_does_not_matter():
    """Rows of an expert count, whatever the tokens, top_k and experts that they come from."""
    half = PRO_EP8._replace(num_experts=192, top_k=3, max_num_tokens=1)
    assert choose_config(half, tokens(10), 132, TABLE) == MANY


def test_a_call_runs_what_the_table_says(given_table):
    fc1, fc2 = sm90.gemms(PRO_EP8, 1)
    assert (fc1.gather, fc1.config, fc2.gather, fc2.config) == (True, FEW.fc1, False, FEW.fc2)
    assert {gemm.config for gemm in sm90.all_gemms(PRO_EP8)} >= {*FEW[1:], *MANY[1:]}
    assert sm90.gemms(PRO_EP8, 1, multiprocessors=114)[0].config != FEW.fc1


def test_a_layer_that_nobody_measured_is_logged_once(given_table, caplog):
    from vllm_dsv4_moe.moe_method import log_untuned

    device = torch.device("cpu")
    backend = SimpleNamespace(untuned=lambda shape, _: sm90.untuned(shape, device))
    other = PRO_EP8._replace(hidden=4096)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("vllm.dsv4_moe")
    caplog.set_level(logging.INFO, logger=logger.name)
    logger.addHandler(handler)
    try:
        for shape in (PRO_EP8, other, other):
            log_untuned(backend, shape, device)
    finally:
        logger.removeHandler(handler)
    (line,) = lines
    assert "by arithmetic" in line and "hidden 4096" in line and "dsv4-moe tune" in line


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "sm90.json"
    flash = ENTRY._replace(layer=Layer(132, 256, 4096, 2048), measured=(), ranges=())
    for entries in ([], [ENTRY], [flash, ENTRY]):
        path.write_text(table_text(entries))
        assert read_entries(path) == sorted(entries)
        assert table_text(read_entries(path)) == path.read_text()
    assert max(map(len, path.read_text().splitlines())) < 150


def changed(change) -> str:
    content = json.loads(table_text([ENTRY]))
    change(content["layers"][0])
    return json.dumps(content)


WRONG = {
    "no-json": ("{", "Expecting property name"),
    "another-format": ('{"format": 7}', "format 7, and this installation reads 1"),
    "no-layers": ('{"format": 1}', "no 'layers'"),
    "twice": (table_text([ENTRY, ENTRY]), "two entries of one layer"),
    "no-gpu": (changed(lambda e: e.pop("gpu")), "no 'gpu'"),
    "overlap": (changed(lambda e: e["ranges"][1].update(rows=[1, 9])), "overlap at 1.0 rows"),
    "backwards": (changed(lambda e: e["ranges"][0].update(rows=[3, 2])), "from 3.0 to 2.0"),
    "unknown-option": (changed(lambda e: e["ranges"][0]["fc1"].update(speed=2)), "speed"),
    "tile-k": (changed(lambda e: e["ranges"][0]["fc1"].update(tile_k=96)), "tile_k 96 is not"),
    "divides": (changed(lambda e: e.update(intermediate=2112)), "does not divide K = 2112"),
    "tma-box": (changed(lambda e: e["ranges"][0]["fc2"].update(tile_n=[8, 24])), "multiple of 16"),
    "tile-n": (changed(lambda e: e["ranges"][0]["fc2"].update(tile_n=[12, 16])), "multiples of 8"),
    "cluster": (changed(lambda e: e["ranges"][0]["fc1"].update(cluster=4)), "a cluster of 4"),
    "gathers": (changed(lambda e: e["ranges"][0]["fc1"].update(cluster=2)), "that gathers rows"),
    "sums": (changed(lambda e: e["ranges"][1]["fc1"].update(tile_n=[256])), "more sums than"),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
def test_a_table_that_cannot_be_is_refused(tmp_path, text, words):
    path = tmp_path / "sm90.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="sm90.json is no table of configs") as error:
        read_entries(path)
    assert words in str(error.value) and "run dsv4-moe tune" in str(error.value)


def shipped_gemms() -> dict[str, sm90.Gemm]:
    """Every kernel that the shipped table names, once for each op and config."""
    found = {}
    for entry in read_entries(SHIPPED):
        multiprocessors, experts, hidden, inter = entry.layer
        for _, _, (gather, fc1, fc2) in entry.ranges:
            for gemm in (
                sm90.Gemm("fc1", experts, 2 * inter, hidden, entry.top_k, gather, fc1),
                sm90.Gemm("fc2", experts, hidden, inter, entry.top_k, False, fc2),
            ):
                sizes = "-".join(map(str, gemm.config.tile_n))
                found[f"{gemm.op}-{gemm.m}x{gemm.k}-{sizes}-{gemm.config.tile_k}"] = gemm
    return found


def test_the_shipped_table_is_as_tune_writes_it():
    assert table_text(read_entries(SHIPPED)) == SHIPPED.read_text()


def test_a_shipped_entry_says_where_it_was_faster_than_arithmetic():
    for entry in read_entries(SHIPPED):
        assert entry.gpu.startswith("NVIDIA") and "dirty" not in entry.commit, entry.layer
        measured = [each.tokens for each in entry.measured]
        assert measured and measured == sorted(measured), entry.layer
        assert all(each.us <= each.arithmetic_us for each in entry.measured), entry.layer


# The shipped kernels, and two of arithmetic's.
KERNELS = shipped_gemms() | {f"flash-{n}": sm90.gemms(FLASH, n)[0] for n in (8, 8192)}


@pytest.mark.parametrize("gemm", KERNELS.values(), ids=KERNELS)
def test_a_kernel_fits_and_spills_nothing(gemm, tmp_path):
    assert why_unfit(gemm.config, gemm.k) is None
    kernel = Dsv4GroupedGemmSm90(gemm)
    stage = (
        kernel.tile_n_max * 128 * kernel.k_blocks + kernel.m_blocks_tile * kernel.k_blocks * 2304
    )
    per_block = SMEM_BYTES // gemm.config.blocks_per_sm
    assert kernel.stages >= 2 and kernel.stages * stage + kernel._fixed_smem() <= per_block
    assert kernel.partial_floats <= MOST_PARTIALS
    assert resources(gemm, tmp_path) == {"stack": 0, "spilled": 0}


@pytest.mark.parametrize("gemm", KERNELS.values(), ids=KERNELS)
def test_a_kernel_is_right_in_the_emulator(gemm, monkeypatch, keep_sm90_table):
    """For an expert of no row, of one, and of one more than its largest tile."""
    monkeypatch.setattr(sm90, "launch", Emulation().launch)
    monkeypatch.setattr(sm90, "num_sms", sm90.num_sms)
    counts = (0, 1, gemm.config.tile_n[-1] + 1)
    sizes = sanitize.SIZES[gemm.op]
    problem = Problem("shipped", sum(counts), len(counts), 1, *sizes, limit=10.0, counts=counts)
    config = LayerConfig(gemm.gather, gemm.config, gemm.config)
    sanitize.run_gemms([sanitize.Case("shipped", gemm.op, config, problem)], "cpu", (3,))


# Of arithmetic's kernels for Pro (EP8, TP8), Flash and Flash 4.1, those that spill.
SPILLING = {"fc2-48": (2048, 1), "fc1-64": (3072, 0)}


@pytest.mark.parametrize(("num_tokens", "op"), SPILLING.values(), ids=SPILLING)
def test_what_arithmetic_s_kernels_spill_is_not_touched_by_a_stage(num_tokens, op, tmp_path):
    """A few bytes in code that runs once a tile; the loops over K have no local memory."""
    gather, *configs = by_arithmetic(PRO_EP8, num_tokens)
    gemm = sm90.gemms(PRO_EP8, num_tokens)[op]
    gemm = gemm._replace(gather=gather and op == 0, config=configs[op])
    assert resources(gemm, tmp_path)["spilled"] <= 32
    command = [cuda_tool("nvdisasm"), "-c", tmp_path / "kernel.cubin"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loops = wgmma_loops(listing)
    assert len(loops) == len(gemm.config.tile_n)
    assert not [line for loop in loops for line in loop if re.search(r"\b(LDL|STL)\b", line)]


def wgmma_loops(listing: str) -> list[list[str]]:
    """Of nvdisasm's text, the innermost loops around WGMMA."""
    lines = [
        line for line in listing.splitlines() if re.match(r"\.L\S+:|\s+/\*[0-9a-f]{4,}\*/", line)
    ]
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if line.startswith(".L")}
    branches = [(at, re.search(r"BRA.*`\((\.L\S+?)\)", line)) for at, line in enumerate(lines)]
    loops = [(labels[to[1]], at + 1) for at, to in branches if to and labels[to[1]] <= at]
    wgmmas = [at for at, line in enumerate(lines) if "HGMMA" in line]
    around = [[loop for loop in loops if loop[0] <= at < loop[1]] for at in wgmmas]
    innermost = {min(each, key=lambda loop: loop[1] - loop[0]) for each in around}
    return [lines[start:end] for start, end in sorted(innermost)]


def resources(gemm: sm90.Gemm, folder) -> dict[str, int]:
    """ptxas's account of local memory, in bytes a thread."""
    import cutlass.cute as cute

    options = f"--gpu-arch=sm_90a --keep-ptx --dump-dir={folder}"
    arguments = sm90.example_arguments(gemm)
    compiled = cute.compile(Dsv4GroupedGemmSm90(gemm), *arguments, options=options)
    (folder / "kernel.ptx").write_text(compiled.__ptx__)
    command = [cuda_tool("ptxas"), "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert not re.search("C751[23]", done.stderr), "WGMMA waits: " + done.stderr
    numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    return {"stack": int(numbers[1]), "spilled": int(numbers[2])}


def test_the_layer_is_looked_up_by_what_its_kernels_depend_on():
    assert layer_of(PRO_EP8, 132) == ENTRY.layer
