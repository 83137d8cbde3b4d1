"""`dsv4-moe doctor`, and that the command line starts without torch."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, PackageNotFoundError
from unittest import mock

import pytest
from dsv4_kernels.compiled import key_of

from vllm_dsv4_moe.commands import doctor
from vllm_dsv4_moe.commands.cli import COMMANDS, main

OURS = EntryPoint("dsv4_moe", "vllm_dsv4_moe:register", doctor.PLUGIN_GROUP)
OTHER = EntryPoint("other", "other:register", doctor.PLUGIN_GROUP)
H200 = doctor.Gpu("NVIDIA H200", (9, 0), 150_754_820_096)


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("torch", ["tiny"]), ("nvidia-cutlass-dsl", ["compile", "--arch=sm_90a", "--model=flash"])],
)
def test_a_library_that_is_missing_is_a_sentence(missing, arguments, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "out")
    arguments = [*arguments, out] if arguments[0] == "tiny" else [*arguments, "--out", out]
    monkeypatch.setenv("CUTE_DSL_ARCH", "sm_90a")
    if missing == "torch":
        monkeypatch.setitem(sys.modules, "torch", None)
    no_version = mock.Mock(side_effect=PackageNotFoundError(missing))
    with mock.patch("dsv4_kernels.compiled.metadata.version", no_version):
        key_of.cache_clear()
        assert main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert missing in error and "`dsv4-moe doctor` says what is missing" in error


def test_a_gpu_without_a_deployment_is_refused(capsys):
    assert main(["doctor", "--gpu", "h200"]) == 2
    assert "name a deployment with --config" in capsys.readouterr().err


def only(checks):
    (check,) = checks
    return check


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        pytest.param("0.32.0+cpu", "ok", "0.32.0+cpu", id="supported"),
        pytest.param("0.33.1", "ok", "0.33.1", id="patch-release"),
        pytest.param(
            "0.31.0", "bad", "0.31.0 is not supported: this plugin is for vLLM 0.32 or", id="old"
        ),
    ],
)
def test_the_version_of_vllm(found, status, words):
    check = doctor.check_library("vllm", "vllm", found, has_gpu=False)
    assert check.status == status and words in check.text


# Library -> what its module does when it is imported, and what the row says, remedy included.
BROKEN = {
    "torch": ("raise OSError('libcudart.so.13 is cut short')", "OSError: libcudart.so.13"),
    "triton": ("import triton_of_another_name", "No module named 'triton_of_another_name'"),
    "nvidia-cutlass-dsl": ("raise SystemExit(3)", "importing it raises SystemExit: 3"),
    "vllm": ("class Panic(BaseException): ...\nraise Panic('no')", "importing it raises Panic: no"),
    "rich": ("1 / 0", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("library", BROKEN)
def test_a_library_that_cannot_be_imported_is_a_row(tmp_path, monkeypatch, library):
    code, words = BROKEN[library]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"broken_{library[:4]}.py").write_text(code)
    broken = doctor.check_library(library, f"broken_{library[:4]}", "1.0", has_gpu=True)
    missing = doctor.check_library(library, "of_no_package", None, has_gpu=True)
    assert broken.status == missing.status == "bad"
    assert words in broken.text and "into a new environment" in broken.text
    assert re.match(r"not installed: (it comes with vLLM: install|install vLLM|pip) ", missing.text)


DOCTOR = [sys.executable, "-m", "vllm_dsv4_moe.commands.cli", "doctor"]


def shadowed(folder, **modules):
    """An environment in which a folder's modules come before those that are installed."""
    for name, code in modules.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(code)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def test_a_machine_without_any_library_is_told_so(tmp_path):
    names = ("torch", "triton", "vllm", "rich")
    environment = shadowed(tmp_path, **dict.fromkeys(names, "raise ImportError('broken')"))
    done = subprocess.run(DOCTOR, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    for name in names:
        assert f"BAD  {name:<18} importing it raises ImportError: broken: install" in done.stdout
    assert done.stdout.endswith("not healthy: see what is BAD\n")


@pytest.mark.slow
def test_cutlass_is_not_needed_without_a_gpu(tmp_path):
    # It is found through the folder of another package, which Python looks up as it starts.
    environment = shadowed(tmp_path, nvidia_cutlass_dsl="")
    command = [*DOCTOR, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    gpus = [check for name, check in found.items() if name.startswith("GPU ")]
    row = found["nvidia-cutlass-dsl"]
    assert row["status"] == ("bad" if gpus else "note") and row["text"].startswith("not installed")
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == bool(gpus)


@pytest.mark.parametrize("check", ["check_entry_point", "check_registration", "check_backends"])
def test_a_check_that_raises_is_a_row(monkeypatch, check):
    monkeypatch.setattr(doctor, check, mock.Mock(return_value=(1 / 0 for _ in "x")))
    bad = only(found for found in doctor.diagnose() if found.status == "bad")
    assert "ZeroDivisionError: division by zero: install vLLM" in bad.text


def test_a_torch_that_cannot_look_for_gpus_is_a_row(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", mock.Mock(side_effect=RuntimeError("no driver")))
    bad = only(found for found in doctor.diagnose() if found.status == "bad")
    assert bad.name == "GPU" and "RuntimeError: no driver: is NVIDIA's driver" in bad.text


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
    ("gpus", "cuda", "flags", "status", "words"),
    [
        pytest.param([H200], "13.0", "", "ok", "NVIDIA H200, compute capability 9.0, 140 GiB"),
        pytest.param([], None, "avx512f avx512_bf16", "note", "small checkpoints"),
        pytest.param([], None, "avx512f", "bad", "lacks avx512_bf16"),
        pytest.param([], "13.0", "avx512_bf16", "bad", "install NVIDIA's driver for CUDA 13.0"),
    ],
    ids=["h200", "cpu", "old-cpu", "no-driver"],
)
def test_devices(tmp_path, gpus, cuda, flags, status, words):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t\t: fpu {flags} tsc\n")
    check = only(doctor.check_devices(gpus, [], cuda, cpuinfo))
    assert check.status == status and words in check.text


@pytest.mark.parametrize(
    "cuda, words", [("13.0", "CUDA 13.0: update the driver"), (None, "CPU build: install vLLM")]
)
def test_a_gpu_that_torch_does_not_see(tmp_path, cuda, words):
    check = only(doctor.check_devices([], ["GPU 0 (NVIDIA H200)"], cuda, tmp_path))
    assert check.status == "bad" and "GPU 0 (NVIDIA H200) is there" in check.text
    assert words in check.text


def test_settings_are_shown_and_refused_by_name():
    check = only(doctor.check_settings({"VLLM_DSV4_MOE_ACTIVATION_SCALE": "token"}))
    assert check == doctor.Check("settings", "ok", "VLLM_DSV4_MOE_ACTIVATION_SCALE=token")
    check = only(doctor.check_settings({"VLLM_DSV4_MOE_SPEED": "max"}))
    assert check.status == "bad" and "VLLM_DSV4_MOE_SPEED is not a setting" in check.text


def test_settings_that_name_a_path_which_is_not_there(tmp_path):
    path = tmp_path / "scales.json"
    environ = {
        "VLLM_DSV4_MOE_ACTIVATION_SCALE": "file",
        "VLLM_DSV4_MOE_ACTIVATION_SCALE_FILE": str(path),
    }
    bad, given = doctor.check_settings(environ)
    assert (bad.status, given.status) == ("bad", "ok") and "there is no such path" in bad.text
    path.touch()
    assert only(doctor.check_settings(environ)).status == "ok"


@pytest.mark.parametrize(
    ("capability", "environ", "status", "words"),
    [
        pytest.param(None, {}, "note", "auto means reference", id="no-gpu"),
        pytest.param(
            (9, 0),
            {},
            "ok",
            "auto means sm90, bf16 activations (W4A16), and for MXFP4 experts fp8 activations",
            id="h200",
        ),
        pytest.param(
            (9, 0),
            {"VLLM_DSV4_MOE_FORMATS": "nvfp4"},
            "ok",
            "auto means sm90, bf16 activations (W4A16)$",
            id="h200-nvfp4",
        ),
        pytest.param(
            (9, 0),
            {"VLLM_DSV4_MOE_FORMATS": "mxfp4"},
            "ok",
            "auto means sm90, fp8 activations (W4A8)$",
            id="h200-mxfp4",
        ),
        pytest.param(
            (9, 0),
            {"VLLM_DSV4_MOE_ACTIVATIONS": "bf16"},
            "ok",
            "auto means sm90, bf16 activations (W4A16)$",
            id="h200-bf16",
        ),
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
            "multiplies bf16 or fp8 only",
            id="w4a4-on-hopper",
        ),
        pytest.param(
            (9, 0),
            {"VLLM_DSV4_MOE_ACTIVATIONS": "fp8"},
            "ok",
            "auto means sm90, fp8 activations (W4A8)",
            id="fp8",
        ),
        pytest.param(
            (10, 0),
            {"VLLM_DSV4_MOE_ACTIVATIONS": "fp8"},
            "bad",
            "the sm100 backend multiplies nvfp4 only",
            id="fp8-on-b200",
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
    assert check.name == "backend" and check.status == status and words in f"{check.text}$"


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
        words = "runs on NVIDIA GPUs" if capability is None else f"would not run .*: the {name}"
        assert re.match(words, checks[name].text)


def test_a_machine_without_a_gpu_is_told_to_set_no_option():
    checks = list(doctor.check_backends(None, {}))
    assert {"sm90", "sm100"} <= {check.name for check in checks if "there is none" in check.text}
    assert not [check for check in checks if re.search(r"\bset\b|VLLM_DSV4_MOE|--", check.text)]


FORMATS = {
    "H200": ((9, 0), "nvfp4", "ok", "NVFP4 experts are this plugin's; MXFP4 is vLLM's, unless"),
    "H200, both": ((9, 0), "nvfp4,mxfp4", "ok", "NVFP4 and MXFP4 experts are this plugin's"),
    "B200": ((10, 0), "nvfp4", "ok", "NVFP4 experts are this plugin's"),
    "B200, both": ((10, 0), "nvfp4,mxfp4", "note", "vLLM's here: the sm100 backend runs NVFP4"),
    "A100": ((8, 0), "nvfp4,mxfp4", "note", "all experts are vLLM's here: no backend is made"),
    "CPU, MXFP4 alone": (None, "mxfp4", "ok", "MXFP4 experts are this plugin's"),
}


@pytest.mark.parametrize("capability, formats, status, says", FORMATS.values(), ids=FORMATS)
def test_formats(capability, formats, status, says):
    (check,) = doctor.check_formats(capability, {"VLLM_DSV4_MOE_FORMATS": formats})
    assert check.status == status and says in check.text


@pytest.mark.slow
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
