"""`dsv4-moe compile`: objects made without a GPU, found again, refused where they do not fit."""

import json
import os
import subprocess
import sys

import pytest
from dsv4_kernels import compiled
from dsv4_kernels.sm100 import gemm as sm100
from dsv4_kernels.sm100.spec import all_gemms
from dsv4_kernels.types import MoeShape

from vllm_dsv4_moe.commands.cli import main

SIZES = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 256,
    "moe_intermediate_size": 128,
}
SHAPE = MoeShape(8, 4, 2, 256, 128, 8, True)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What the command writes for a tiny model, of which a rank owns half the experts."""
    folder = tmp_path_factory.mktemp("objects")
    config = folder / "config.json"
    config.write_text(json.dumps(SIZES))
    command = ["compile", "--arch", "sm_100a", "--model", str(config), "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUTE_DSL_ARCH", "sm_100a")  # the command sets it for its process
        assert main([*command, "--ep-size", "2", "--max-num-tokens", "8"]) == 0
    return folder / "out"


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_100a")
    monkeypatch.setattr(compiled, "_loaded", {})
    monkeypatch.setattr(compiled, "_folders", {})
    sm100.compile_gemm.cache_clear()
    yield
    sm100.compile_gemm.cache_clear()


def test_a_loaded_object_is_used_instead_of_the_compiler(objects, monkeypatch):
    assert compiled.load_objects(objects, "sm_100a") == 2
    monkeypatch.setattr(sm100.cute, "compile", lambda *a, **k: pytest.fail("it compiled"))
    for gemm in all_gemms(SHAPE):
        assert callable(sm100.compile_gemm(gemm))


def test_what_was_not_compiled_is_named(objects):
    compiled.load_objects(objects, "sm_100a")
    (gemm, _) = all_gemms(SHAPE._replace(num_local_experts=8))
    with pytest.raises(ValueError, match=r"no object for Gemm\(op='fc1', num_experts=8.*unset"):
        sm100.compile_gemm(gemm)


def test_another_arch_is_refused(objects):
    with pytest.raises(ValueError, match="holds kernels for sm_100a, and this GPU runs sm_90a"):
        compiled.load_objects(objects, "sm_90a")


def test_a_folder_without_objects_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no manifest.json: name a folder that dsv4-moe"):
        compiled.load_objects(tmp_path, "sm_100a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "is not of format 1"),
        ({"versions": {"nvidia-cutlass-dsl": "1.0"}}, "made with nvidia-cutlass-dsl 1.0, and this"),
        ({"objects": {"x": "missing.o"}}, "lacks missing.o, which its manifest names"),
    ],
    ids=["format", "version", "file"],
)
def test_a_manifest_that_does_not_fit_is_refused(objects, tmp_path, change, message):
    manifest = json.loads((objects / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ValueError, match=message):
        compiled.load_objects(tmp_path, "sm_100a")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nano"], "nano is not pro, flash, a config.json or a folder with one"),
        (["--model", "pro", "--ep-size", "7"], "384 experts cannot be divided among 7 ranks"),
        (["--model", "pro", "--tp-size", "64"], "intermediate size 48 of this rank is not a"),
    ],
    ids=["model", "experts", "intermediate"],
)
def test_a_users_mistake_is_a_sentence(arguments, message, tmp_path, capsys):
    assert main(["compile", "--arch", "sm_100a", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pro_on_eight_ranks_is_what_a_rank_serves():
    shape = MoeShape(384, 48, 6, 7168, 3072, 8192, True)
    chosen = {(gemm.op, gemm.config.tile) for gemm in all_gemms(shape)}
    assert chosen == {("fc1", 64), ("fc2", 64), ("fc1", 128), ("fc2", 128)}
    more = all_gemms(shape._replace(max_num_tokens=65536))
    assert {gemm.config.tile for gemm in more} == {64, 128, 256}


def test_hoppers_kernels_are_written_too(tmp_path):
    """In a process of its own: CuTe DSL settles on one arch when it is imported."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    command = ["compile", "--arch", "sm_90a", "--model", str(tmp_path), "--max-num-tokens", "1"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "vllm_dsv4_moe.commands.cli",
            *command,
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert "2 kernels for sm_90a" in done.stdout
    assert compiled.load_objects(tmp_path / "out", "sm_90a") == 2
