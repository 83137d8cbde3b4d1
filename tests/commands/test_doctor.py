"""`dsv4-moe doctor`, and that the command line starts without torch."""

import json
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from vllm_dsv4_moe.commands import doctor
from vllm_dsv4_moe.commands.cli import COMMANDS, main

OURS = EntryPoint("dsv4_moe", "vllm_dsv4_moe:register", doctor.PLUGIN_GROUP)
OTHER = EntryPoint("other", "other:register", doctor.PLUGIN_GROUP)
INSTALLED = {"vllm": "0.32.0+cpu", "torch": "2.13.0", "triton": "3.9.0"}
H200 = doctor.Gpu("NVIDIA H200", (9, 0), 150_754_820_096)


def only(checks):
    (check,) = checks
    return check


@pytest.mark.parametrize(
    ("changes", "bad", "words"),
    [
        pytest.param({}, None, "", id="supported"),
        pytest.param({"vllm": "0.33.1"}, None, "", id="patch-release"),
        pytest.param({"vllm": "0.31.0"}, "vllm", "is not supported", id="old-vllm"),
        pytest.param({"triton": None}, "triton", "not installed", id="no-triton"),
    ],
)
def test_versions(changes, bad, words):
    checks = list(doctor.check_versions(INSTALLED | changes))
    assert [check.name for check in checks if check.status == "bad"] == ([bad] if bad else [])
    assert any(words in check.text for check in checks)


@pytest.mark.parametrize(
    ("found", "environ", "status", "words"),
    [
        pytest.param([OURS, OTHER], {}, "ok", "others: other", id="found"),
        pytest.param([OURS], {"VLLM_PLUGINS": "a,dsv4_moe"}, "ok", "vLLM loads", id="named"),
        pytest.param([OTHER], {}, "bad", "no entry point dsv4_moe", id="not-installed"),
        pytest.param([OURS], {"VLLM_PLUGINS": "other"}, "bad", "leaves it out", id="left-out"),
        pytest.param([OURS], {"VLLM_PLUGINS": ""}, "bad", "leaves it out", id="no-plugins"),
    ],
)
def test_entry_point(found, environ, status, words):
    check = only(doctor.check_entry_point(found, environ))
    assert check.status == status and words in check.text


@pytest.mark.parametrize(
    ("gpus", "flags", "status", "words"),
    [
        pytest.param([H200], "", "ok", "NVIDIA H200, compute capability 9.0, 140 GiB", id="h200"),
        pytest.param([], "avx512f avx512_bf16", "note", "small checkpoints", id="cpu"),
        pytest.param([], "avx512f", "bad", "lacks avx512_bf16", id="old-cpu"),
    ],
)
def test_devices(tmp_path, gpus, flags, status, words):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t\t: fpu {flags} tsc\n")
    check = only(doctor.check_devices(gpus, [], cpuinfo))
    assert check.status == status and words in check.text


@pytest.mark.parametrize("cuda, words", [("13.0", "CUDA 13.0: is the driver"), (None, "CPU build")])
def test_a_gpu_that_torch_does_not_see(tmp_path, monkeypatch, cuda, words):
    monkeypatch.setattr("torch.version.cuda", cuda)
    check = only(doctor.check_devices([], ["GPU 0 (NVIDIA H200)"], tmp_path))
    assert check.status == "bad" and "GPU 0 (NVIDIA H200) is there" in check.text
    assert words in check.text


def test_settings_are_shown_and_refused_by_name():
    check = only(doctor.check_settings({"VLLM_DSV4_MOE_ACTIVATION_SCALE": "token"}))
    assert check == doctor.Check("settings", "ok", "VLLM_DSV4_MOE_ACTIVATION_SCALE=token")
    check = only(doctor.check_settings({"VLLM_DSV4_MOE_SPEED": "max"}))
    assert check.status == "bad" and "VLLM_DSV4_MOE_SPEED is not a setting" in check.text


def test_settings_that_name_a_path_which_is_not_there(tmp_path):
    environ = {"VLLM_DSV4_MOE_KERNEL_OBJECTS": str(tmp_path / "objects")}
    bad, given = doctor.check_settings(environ)
    assert (bad.status, given.status) == ("bad", "ok") and "there is no such path" in bad.text
    (tmp_path / "objects").mkdir()
    assert only(doctor.check_settings(environ)).status == "ok"


@pytest.mark.parametrize(
    ("capability", "environ", "status", "words"),
    [
        pytest.param(None, {}, "note", "auto means reference", id="no-gpu"),
        pytest.param((9, 0), {}, "ok", "auto means sm90, bf16 activations", id="h200"),
        pytest.param((10, 0), {}, "ok", "auto means sm100, NVFP4 activations", id="b200"),
        pytest.param((8, 0), {}, "bad", "compute capability 8.0", id="a100"),
        pytest.param(
            (9, 0),
            {"VLLM_DSV4_MOE_BACKEND": "reference"},
            "note",
            "--enforce-eager only",
            id="forced",
        ),
        pytest.param(
            (9, 0),
            {"VLLM_DSV4_MOE_BACKEND": "sm90", "VLLM_DSV4_MOE_ACTIVATIONS": "nvfp4"},
            "bad",
            "multiplies bf16 only",
            id="w4a4-on-hopper",
        ),
        pytest.param(
            None,
            {"VLLM_DSV4_MOE_BACKEND": "sm100"},
            "bad",
            "vLLM sees none",
            id="sm100-without-a-gpu",
        ),
    ],
)
def test_backend(capability, environ, status, words):
    check = list(doctor.check_backends(capability, environ))[-1]
    assert check.name == "backend" and check.status == status and words in check.text


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        pytest.param(None, {"reference"}, id="no-gpu"),
        pytest.param((9, 0), {"sm90", "reference"}, id="h200"),
        pytest.param((10, 0), {"sm100", "reference"}, id="b200"),
    ],
)
def test_every_backend_says_whether_and_why_not(capability, runs):
    checks = {check.name: check for check in doctor.check_backends(capability, {})}
    assert checks.pop("backend").status != "bad"
    assert {name for name, check in checks.items() if check.status == "ok"} == runs
    for name in checks.keys() - runs:
        assert checks[name].text.startswith("would not run V4-Flash here: the " + name)


def test_this_machine_is_healthy_as_vllm_sees_it():
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dsv4_moe.commands.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["healthy"], done.stdout + done.stderr
    texts = {check["name"]: check["text"] for check in found["checks"]}
    assert texts["register"] == "deepseek_v4_fp8 is Dsv4Fp8Config"


def test_an_unfit_machine_ends_in_status_1(monkeypatch, capsys):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("VLLM_DSV4_MOE_BACKEND", "fast")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "BAD  plugin" in text and "BAD  settings" in text and "not healthy" in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom vllm_dsv4_moe.commands.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'vllm', 'triton', 'cutlass', 'numpy', 'transformers', 'rich'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *help_text, imported = done.stdout.splitlines()
    assert imported == "[]"
    for name in COMMANDS:
        assert any(line.strip().startswith(name) for line in help_text)
