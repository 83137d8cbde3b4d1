"""The demo's path and its failures, with a stand-in for the server; test_serve has the real one."""

import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_dsv4_moe.commands import demo, gpus
from vllm_dsv4_moe.commands.cli import main
from vllm_dsv4_moe.commands.gpus import GIB, Gpu
from vllm_dsv4_moe.commands.serving import ServerError

PYTHON = sys.executable
ANNOUNCED = (
    "INFO dsv4-moe: this plugin runs NVFP4 experts, on reference: layers 0-3 (W4A4; without nvfp4 "
    "in the setting formats they are vLLM's)"
)
H200 = Gpu("0", "GPU-a", "NVIDIA H200", (9, 0), 140 * GIB, 139 * GIB)
BUSY = replace(H200, index="1", uuid="GPU-b", free=3 * GIB)
B200 = Gpu("2", "GPU-c", "NVIDIA B200", (10, 0), 179 * GIB, 178 * GIB)
L4 = Gpu("3", "GPU-d", "NVIDIA L4", (8, 9), 22 * GIB, 22 * GIB)
# Answers as vLLM does, after writing what vLLM would log.
SERVER = """
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200, b"")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = "messages" in asked
        time.sleep(60 * (asked["max_tokens"] == 99))
        text = asked["messages"][0]["content"][:5] if chat else TEXT
        choice = {"message": {"content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": 7, "completion_tokens": asked["max_tokens"]}
        self.answer(STATUS, json.dumps({"choices": [choice], "usage": usage}).encode())

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

(port,) = [int(word.split("=")[1]) for word in sys.argv if word.startswith("--port=")]
print(os.getpid(), LOG, flush=True)
HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "visible_gpus", lambda: [])
    monkeypatch.setattr("torch.version.cuda", None)

    def make(log=ANNOUNCED, status=200, text="hello", code=SERVER):
        source = tmp_path / "server.py"
        source.write_text(
            f"LOG, STATUS, TEXT = {log!r}, {status}, {text!r}\n{textwrap.dedent(code)}"
        )
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {source} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return make


@pytest.mark.slow
def test_demo_shows_text_layers_and_figures(stand_in, tmp_path, capsys):
    stand_in()
    assert main(["demo", "--work", str(tmp_path / "work"), "--max-tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert "layers 0-3 run on its reference backend" in text
    assert "completion  'hello'" in text and "chat        'Which'" in text
    assert "7 tokens in, 5 out" in text and "tokens/s" in text and "healthy after" in text
    assert text.rstrip().endswith("stopped")
    assert (tmp_path / "work/server.log").read_text() and (tmp_path / "work/model").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "words"),
    [
        pytest.param({"log": "INFO nothing"}, "said nothing of its layers", id="no-plugin"),
        pytest.param(
            {"log": ANNOUNCED.replace("0-3", "0-2")}, "layers 0-2, not 0-3", id="layer-missing"
        ),
        pytest.param({"status": 500}, "answered 500", id="request-refused"),
        pytest.param({"text": ""}, "completion request gave no text", id="empty-answer"),
        pytest.param(
            {"code": "raise ValueError('layer 1: scale is NaN')"},
            "ValueError: layer 1: scale is NaN",
            id="server-dies",
        ),
    ],
)
def test_failure_ends_in_status_1_with_the_log(stand_in, tmp_path, capsys, server, words):
    stand_in(**server)
    assert main(["demo", "--work", str(tmp_path / "work")]) == 1
    text = capsys.readouterr().out
    assert "the demo failed" in text and words in text and "--- last lines of" in text


@pytest.mark.slow
def test_a_demo_that_is_ended_ends_its_server(stand_in, tmp_path):
    stand_in()
    log = tmp_path / "work/server.log"
    code = f"import sys; sys.executable = {sys.executable!r}\n"
    code += "from vllm_dsv4_moe.commands.cli import main\n"
    code += f"main(['demo', '--work', {str(tmp_path / 'work')!r}, '--max-tokens', '99'])"
    ended = subprocess.Popen([PYTHON, "-c", code])
    deadline = time.monotonic() + 300
    while not (log.exists() and "dsv4-moe" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    ended.terminate()
    assert ended.wait(120) == 143
    assert not Path(f"/proc/{log.read_text().split()[0]}").exists()


def test_work_folder_must_be_empty(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert main(["demo", "--work", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


DEVICES = {
    "H200": ([H200], "13.0", "GPU 0 (NVIDIA H200, compute capability 9.0)"),
    "B200": ([B200], "13.0", "GPU 2 (NVIDIA B200, compute capability 10.0)"),
    "the freest": ([BUSY, H200, B200, L4], "13.0", "GPU 2 (NVIDIA B200"),
    "none": ([], None, "CPU (no CUDA GPU here)"),
    "none with kernels": ([L4], None, "CPU (GPU 3 (NVIDIA L4, compute capability 8.9): there are"),
}


@pytest.mark.parametrize("present, cuda, words", DEVICES.values(), ids=DEVICES)
def test_where_the_demo_serves(present, cuda, words):
    device = demo.choose_device(present, cuda)
    assert device.words.startswith(words)
    assert device.sizes == (demo.GPU_SIZES if cuda else demo.CPU_SIZES)
    if cuda:
        (share,) = device.arguments
        memory = next(gpu.memory for gpu in present if str(gpu) == device.words)
        assert float(share.split("=")[1]) * memory == pytest.approx(16 * GIB, rel=0.01)
        assert dict(device.environment)["CUDA_VISIBLE_DEVICES"] in words


NOT_HERE = {
    "busy": ([BUSY], "13.0", "has 3 of 140 GiB free.* needs 16: end what uses it"),
    "too small": ([replace(H200, memory=10 * GIB, free=9 * GIB)], "13.0", "9 of 10 GiB free"),
    "no kernels": ([L4], "13.0", r"L4, .* 8.9\): there are no kernels.*9.0 .*H200.* or 10 "),
    "hidden": ([], "13.0", "no CUDA GPU here, and this vLLM was built for CUDA 13.0"),
    "CPU build": ([H200], None, "H200.* is there, and this vLLM is the CPU build: run `make demo`"),
}


@pytest.mark.parametrize("present, cuda, words", NOT_HERE.values(), ids=NOT_HERE)
def test_where_it_cannot_serve_it_says_so_before_anything_is_started(
    present, cuda, words, monkeypatch, capsys
):
    with pytest.raises(ServerError, match=words):
        demo.choose_device(present, cuda)
    monkeypatch.setattr(demo, "visible_gpus", lambda: present)
    monkeypatch.setattr("torch.version.cuda", cuda)
    assert main(["demo"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("capability, backend", [((9, 0), "sm90"), ((10, 0), "sm100")])
def test_both_kinds_of_gpu_run_the_demos_layer(capability, backend):
    from dsv4_kernels.backends import AUTO, choose_backend
    from dsv4_kernels.types import MoeShape

    sizes = demo.GPU_SIZES
    shape = MoeShape(
        sizes.experts, sizes.experts, sizes.top_k, sizes.hidden, sizes.intermediate, 256,
        quantize_activations=backend == "sm100",
    )  # fmt: skip
    assert choose_backend("auto", shape, capability).name == backend
    assert set(AUTO) == set(gpus.MAJORS)
