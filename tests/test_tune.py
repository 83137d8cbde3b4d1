"""`dsv4-moe tune`: what it tries, what it refuses, what it chooses and writes; rehearsed with the
kernels in the PTX emulator and times that the test makes up."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from dsv4_kernels import compiled
from dsv4_kernels import grouped_gemm_sm90 as sm90
from dsv4_kernels.grouped_gemm_sm90_choice import by_arithmetic, rows_per_expert
from dsv4_kernels.grouped_gemm_sm90_spec import LayerConfig, Sm90Config, why_unfit
from dsv4_kernels.grouped_gemm_sm90_table import Layer, Range, read_entries, table_of
from dsv4_kernels.types import MoeShape

from tests.sm90_emulation import Emulation
from vllm_dsv4_moe import tune_command
from vllm_dsv4_moe.candidate_objects import compile_objects, load_folders, stack_bytes
from vllm_dsv4_moe.cli import main
from vllm_dsv4_moe.layer_trial import LayerTrial
from vllm_dsv4_moe.tune import (
    GAIN,
    Found,
    all_candidates,
    candidates,
    gemms_of,
    layer_gemms,
    ranges,
    tune,
)

PRO_EP8 = MoeShape(384, 48, 6, 7168, 3072, 8192, False)
FLASH = MoeShape(256, 256, 6, 4096, 2048, 8192, False)
SHAPES = {"pro-ep8": PRO_EP8, "flash": FLASH}
TINY = MoeShape(5, 3, 2, 128, 128, 8, False)


@pytest.mark.parametrize("thorough", [False, True], ids=["quick", "thorough"])
@pytest.mark.parametrize("num_tokens", [1, 512, 2048, 8192])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_candidates_differ_from_arithmetic_in_one_gemm_and_may_run(shape, num_tokens, thorough):
    base, *others = candidates(shape, num_tokens, thorough)
    assert base == by_arithmetic(shape, num_tokens) and others
    assert len(set(others)) == len(others) <= (48 if thorough else 16)
    for other in others:
        assert sum(a != b for a, b in zip(other, base, strict=True)) == 1
        assert why_unfit(other.fc1, shape.hidden) is None
        assert why_unfit(other.fc2, shape.intermediate) is None
        assert all(min(gemm.config.tile_n) >= 8 for gemm in layer_gemms(shape, other))


def test_a_quick_run_compiles_few_kernels():
    """The final run on a GPU has a minute and a half for both models."""
    for shape in SHAPES.values():
        counts = tune_command.QUICK_TOKENS
        assert len(gemms_of(shape, all_candidates(shape, counts, thorough=False))) <= 44


def chosen_now(shape: MoeShape, num_tokens: int) -> LayerConfig:
    fc1, fc2 = sm90.gemms(shape, num_tokens)
    return LayerConfig(fc1.gather, fc1.config, fc2.config)


class FakeGpu:
    """A layer whose time is the product of what its config's fields cost."""

    def __init__(self, shape: MoeShape, costs: dict, wrong: tuple = ()) -> None:
        self.shape, self.costs, self.wrong, self.ran = shape, costs, wrong, []

    def why_wrong(self, num_tokens: int) -> str | None:
        config = chosen_now(self.shape, num_tokens)
        self.ran.append(config)
        return "off by 3.0 x what rounding allows" if set(config) & set(self.wrong) else None

    def time_us(self, num_tokens: int) -> float:
        us = 100.0
        for part in chosen_now(self.shape, num_tokens):
            us *= self.costs.get(part, 1.0)
        return us


def run_tune(gpu: FakeGpu, choices, why_not=lambda gemm: None) -> list[Found]:
    return tune(gpu.shape, choices, gpu.why_wrong, gpu.time_us, why_not, sm90.H200_SMS)


def variants(base: LayerConfig) -> tuple[Sm90Config, Sm90Config, Sm90Config]:
    return (
        replace(base.fc1, tile_k=64),
        replace(base.fc1, tile_k=128),
        replace(base.fc2, m_blocks=2, warpgroups=2),
    )


def test_the_fastest_of_each_gemm_are_taken_together():
    base = by_arithmetic(PRO_EP8, 8)
    slow, fast, other = variants(base)
    parts = {"fc1": [slow, fast], "fc2": [other]}
    choices = [base] + [base._replace(**{op: c}) for op, cs in parts.items() for c in cs]
    costs = {slow: 1.2, fast: 0.8, other: 0.9}
    before = sm90.table_in_use()
    (found,) = run_tune(FakeGpu(PRO_EP8, costs), {8: choices})
    assert found.config == base._replace(fc1=fast, fc2=other)
    assert (found.us, found.arithmetic_us) == (pytest.approx(72), 100)
    assert (found.tried, found.refused) == (4, ())
    assert sm90.table_in_use() is before


def test_a_wrong_candidate_is_refused_and_named_however_fast():
    base = by_arithmetic(PRO_EP8, 8)
    _, fast, other = variants(base)
    choices = [base, base._replace(fc1=fast), base._replace(fc2=other)]
    gpu = FakeGpu(PRO_EP8, {fast: 0.1, other: 0.9}, wrong=(fast,))
    (found,) = run_tune(gpu, {8: choices})
    assert found.config == base._replace(fc2=other)
    (refusal,) = found.refused
    assert refusal.config.fc1 == fast and "what rounding allows" in refusal.reason


def test_two_that_are_right_alone_and_wrong_together_are_not_taken():
    base = by_arithmetic(PRO_EP8, 8)
    _, fast, other = variants(base)
    choices = [base, base._replace(fc1=fast), base._replace(fc2=other)]
    gpu = FakeGpu(PRO_EP8, {fast: 0.8, other: 0.9})
    gpu.why_wrong = lambda n: (
        "off" if chosen_now(PRO_EP8, n) == base._replace(fc1=fast, fc2=other) else None
    )
    (found,) = run_tune(gpu, {8: choices})
    assert found.config == base and len(found.refused) == 1


def test_a_kernel_that_spills_does_not_run():
    base = by_arithmetic(PRO_EP8, 8)
    _, fast, _ = variants(base)
    gpu = FakeGpu(PRO_EP8, {fast: 0.5})

    def why_not(gemm):
        return "32 bytes a thread in local memory" if gemm.config in (fast, base.fc2) else None

    (found,) = run_tune(gpu, {8: [base, base._replace(fc1=fast)]}, why_not)
    assert found.config == base and all(config.fc1 != fast for config in gpu.ran)
    assert "local memory" in found.refused[0].reason


@pytest.mark.parametrize(("cost", "taken"), [(0.99, False), (1 / GAIN - 0.01, True)])
def test_noise_changes_nothing(cost, taken):
    base = by_arithmetic(PRO_EP8, 8)
    _, fast, _ = variants(base)
    (found,) = run_tune(FakeGpu(PRO_EP8, {fast: cost}), {8: [base, base._replace(fc1=fast)]})
    assert (found.config != base) is taken


def test_arithmetics_own_choice_must_be_right():
    base = by_arithmetic(PRO_EP8, 8)
    with pytest.raises(ValueError, match="own choice at 8 tokens is wrong: off by"):
        run_tune(FakeGpu(PRO_EP8, {}, wrong=(base.fc1,)), {8: [base]})


def found_at(*numbers: tuple[int, Sm90Config | None]) -> list[Found]:
    made = []
    for num_tokens, fc1 in numbers:
        base = by_arithmetic(PRO_EP8, num_tokens)
        config = base if fc1 is None else LayerConfig(True, fc1, base.fc2)
        made.append(Found(num_tokens, base, 10.0, config, 9.0, (), 2))
    return made


A, B = Sm90Config(1, 2, (8, 16), 128), Sm90Config(2, 2, (8, 16), 128)


def tokens(rows: float) -> float:
    return rows * 384 / 6


def test_ranges_reach_half_way_and_not_far():
    (a,) = ranges(PRO_EP8, found_at((1, None), (64, A), (128, None)))
    assert tokens(a.above) == pytest.approx(64 / 1.5, rel=1e-3)
    assert tokens(a.up_to) == pytest.approx(64 * 2**0.5, rel=1e-3)


def test_the_first_range_begins_at_nothing_and_equal_neighbours_are_one():
    a, b = ranges(PRO_EP8, found_at((1, A), (64, A), (128, B), (8192, None)))
    assert a.above == 0 and tokens(a.up_to) == pytest.approx(64 * 2**0.5, rel=1e-3)
    assert a.up_to == b.above and tokens(b.up_to) == pytest.approx(192, rel=1e-3)


def test_every_measured_number_gets_what_was_found_there(keep_sm90_table):
    found = found_at((1, A), (8, B), (16, None), (32, B), (512, A), (8192, B))
    table = {Layer(132, 48, 7168, 3072): ranges(PRO_EP8, found)}
    sm90.use_table(table)
    for each in found:
        assert chosen_now(PRO_EP8, each.num_tokens) == each.config


def test_arithmetic_alone_makes_no_range():
    assert ranges(PRO_EP8, found_at((1, None), (8, None))) == ()


def test_an_entry_replaces_the_layers_older_one(tmp_path):
    path = tmp_path / "sm90.json"
    tune_command.write_entry(path, FLASH, found_at((1, A)), "NVIDIA H200", "abc", 132)
    tune_command.write_entry(path, PRO_EP8, found_at((1, A)), "NVIDIA H200", "abc", 132)
    tune_command.write_entry(path, PRO_EP8, found_at((8, B)), "NVIDIA H100", "def", 132)
    pro, flash = read_entries(path)
    assert (flash.layer, flash.gpu) == (Layer(132, 256, 4096, 2048), "NVIDIA H200")
    assert (pro.layer, pro.gpu, pro.commit) == (Layer(132, 48, 7168, 3072), "NVIDIA H100", "def")
    assert [each.tokens for each in pro.measured] == [8]
    assert pro.ranges[0].config.fc1 == B and pro.measured[0].arithmetic_us == 10.0


@pytest.mark.parametrize("out", ["", "absent/sm90.json"], ids=["a folder", "in no folder"])
def test_a_table_that_cannot_be_written_is_refused_first(monkeypatch, tmp_path, capsys, out):
    monkeypatch.setattr(tune_command, "suitable_gpu", lambda: "NVIDIA H200")
    monkeypatch.setattr(tune_command, "_compile", lambda *_: pytest.fail("compiled"))
    path = tmp_path / out
    assert main(["tune", "--model", "pro", "--out", str(path), "--commit", "0123abc"]) == 2
    assert f"{path} cannot be written" in capsys.readouterr().err


def test_a_file_that_is_no_table_is_refused_first(tmp_path):
    path = tmp_path / "notes.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="no table of configs"):
        tune_command.check_table(path)


@pytest.fixture
def emulation(monkeypatch) -> Emulation:
    emulation = Emulation()
    monkeypatch.setattr(sm90, "launch", emulation.launch)
    return emulation


TINY_TOKENS = 5


@pytest.fixture
def tiny_choices() -> list[LayerConfig]:
    base = by_arithmetic(TINY, TINY_TOKENS)
    fc1 = replace(base.fc1, tile_k=64)
    fc2 = replace(base.fc2, m_blocks=2, warpgroups=2)
    return [base, base._replace(fc1=fc1), base._replace(fc2=fc2)]


def test_a_rehearsed_run_writes_what_servers_read(
    emulation, tiny_choices, monkeypatch, tmp_path, capsys
):
    """The command, but for the GPU: kernels run in the emulator, one of them spoilt on its way
    out, and the test says how long each takes."""
    base, one, other = tiny_choices
    launch = emulation.launch

    def spoilt(gemm, tensors, limit):
        launch(gemm, tensors, limit)
        if gemm.op == "fc2" and gemm.config == other.fc2:
            tensors[4][tensors[7] == 0] *= 1.5  # the row of slot 0

    def measure(console, shape, choices, folder, failed):
        trial = LayerTrial(shape, list(choices), device="cpu")
        costs = {one.fc1: 0.7, other.fc2: 0.5}
        time_us = FakeGpu(shape, costs).time_us
        return tune(shape, choices, trial.why_wrong, time_us, lambda gemm: None, 132)

    def write(out, *rest):
        tune_command.write_entry(out, *rest, num_sms=132)
        return out

    monkeypatch.setattr(sm90, "launch", spoilt)
    monkeypatch.setattr(tune_command, "suitable_gpu", lambda: "NVIDIA H200")
    monkeypatch.setattr(tune_command, "_compile", lambda *_: {})
    monkeypatch.setattr(tune_command, "_measure", measure)
    monkeypatch.setattr(tune_command, "_write", write)
    monkeypatch.setattr(tune_command, "_shape", lambda args: TINY)
    monkeypatch.setattr(
        "vllm_dsv4_moe.tune.all_candidates", lambda *_, **__: {TINY_TOKENS: tiny_choices}
    )
    path = tmp_path / "sm90.json"
    command = ["tune", "--model", "pro", "--out", str(path), "--commit", "0123abc", "--json"]
    assert main(command) == 0
    shown = capsys.readouterr()
    (found,) = json.loads(shown.out)["found"]
    assert (found["changed"], found["us"], found["arithmetic_us"]) == ("fc1 tile_k 64", 70, 100)
    (refusal,) = found["refused"]
    assert refusal["config"] == "fc2 m_blocks 2, fc2 warpgroups 2"
    assert "what rounding allows" in refusal["reason"]
    assert "refused at 5 tokens: fc2 m_blocks 2, fc2 warpgroups 2" in shown.err
    (entry,) = read_entries(path)
    assert (entry.gpu, entry.commit, entry.measured[0].us) == ("NVIDIA H200", "0123abc", 70)
    rows = rows_per_expert(TINY, TINY_TOKENS)
    assert table_of([entry])[Layer(132, 3, 128, 128)] == (Range(0.0, rows * 1.5, one),)


def test_a_kernel_that_does_not_end_is_named():
    code = """if True:
        import time
        from vllm_dsv4_moe.tune_command import deadline
        with deadline("at 8 tokens, it did not end", 60): pass
        with deadline("at 9 tokens, it did not end", 0.1): time.sleep(60)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == 3
    assert done.stderr == "dsv4-moe: at 9 tokens, it did not end: nothing was written\n"


def test_without_a_gpu_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["tune", "--model", "pro", "--ep-size", "8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "torch sees no GPU" in error


def test_another_gpu_has_nothing_to_tune(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (10, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA B200")
    assert main(["tune", "--model", "pro"]) == 2
    assert "this is NVIDIA B200 with 10.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compile-only"], "needs a folder to write to: add --objects"),
        (["--compile-only", "--objects", "x", "--ep-size", "7"], "384 experts cannot be divided"),
    ],
    ids=["folder", "ranks"],
)
def test_a_users_mistake_is_a_sentence(arguments, words, capsys):
    assert main(["tune", "--model", "pro", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_candidates_compile_in_processes_and_say_what_they_spill(tmp_path, monkeypatch):
    gemm = sm90.gemms(TINY, 1)[0]
    # The sums of so large a tile take more registers than four warpgroups have.
    spilling = sm90.Gemm("fc1", 4, 256, 256, 2, True, Sm90Config(2, 4, (64, 80), 64))
    impossible = gemm._replace(k=100)
    failed = compile_objects([gemm, spilling, impossible], tmp_path, jobs=2)
    assert list(failed) == [impossible] and "K = 100" in failed[impossible]
    monkeypatch.setattr(compiled, "_loaded", {})
    monkeypatch.setattr(compiled, "_folders", {})
    files = load_folders(tmp_path)
    assert set(files) == {repr(gemm), repr(spilling)}
    assert stack_bytes(files[repr(gemm)].read_bytes()) == 0
    assert stack_bytes(files[repr(spilling)].read_bytes()) > 0


def test_a_folder_without_candidates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no compiled candidates: run dsv4-moe tune"):
        load_folders(tmp_path)
