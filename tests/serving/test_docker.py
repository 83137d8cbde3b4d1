"""The image's recipe without an engine: RUN lines in a plain directory, then what they installed,
started as the users that containers have (the latter needs root, for setpriv)."""

import fnmatch
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support.plain_image import (
    DOCKERFILE,
    PYTHON,
    ROOT,
    SYSTEM_PATH,
    VLLM,
    Container,
    Image,
    User,
    instructions,
)

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DEFAULT = ROOT / "configs/flash-b200.yaml"

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)
USERS = [
    pytest.param(User(), id="caller"),
    pytest.param(User(1000, 0), id="1000:0", marks=as_root),
    pytest.param(User(1000, 1000), id="1000:1000", marks=as_root),
    pytest.param(User(54321, 0), id="54321:0", marks=as_root),
]


@pytest.fixture(scope="module")
def image():
    """The image's files in a directory that every user can enter. `dsv4-moe compile` there writes
    its arguments instead of kernels: how kernels are compiled has tests of its own."""
    root = Path(tempfile.mkdtemp(prefix="dsv4-moe-image-"))
    root.chmod(0o755)
    venv = root / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    has = sysconfig.get_path("purelib")
    (site / "image.pth").write_text(f"import site; site.addsitedir({has!r})\n")
    compiler = root / "compiler/dsv4-moe"
    compiler.parent.mkdir()
    compiler.write_text(
        f"#!{PYTHON}\nimport json, os, sys\n"
        "out = sys.argv[sys.argv.index('--out') + 1]\n"
        "os.makedirs(out, mode=0o700, exist_ok=True)\n"
        "with open(os.path.join(out, 'calls'), 'a') as file:\n"
        "    file.write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    compiler.chmod(0o755)
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environ["PATH"] = f"{compiler.parent}:{venv}/bin:{environ['PATH']}"
    built = Image(root)
    built.build(environ)
    yield built
    shutil.rmtree(root)


def test_run_lines_install_the_plugin(image):
    assert len(image.ran) == 4
    assert len(list(image.path("/wheels").glob("*.whl"))) == 1
    found = subprocess.run(
        [image.root / "venv/bin/python", "-I", "-c"]
        + ["import vllm_dsv4_moe as p, dsv4_kernels.moe as k; print(p.__file__, k.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=image.root,
    )
    assert all(str(image.root / "venv") in path for path in found.stdout.split())
    assert (image.root / "venv/bin/dsv4-moe").exists()


def test_kernels_of_every_config_are_compiled_for_its_gpu(image):
    calls = map(
        json.loads, (image.path("/opt/dsv4-moe/kernels") / "calls").read_text().split("\n")[:-1]
    )
    compiled = set()
    for call in calls:
        assert call[:2] == ["compile", "--arch"] and call[3] == "--config"
        assert call[-2:] == ["--out", str(image.path("/opt/dsv4-moe/kernels"))]
        compiled.update({(Path(config).name, call[2]) for config in call[4:-2]})
    arches = {"*h200.yaml": "sm_90a", "*b200.yaml": "sm_100a"}
    wanted = {
        (c.name, arch)
        for c in CONFIGS
        for glob, arch in arches.items()
        if fnmatch.fnmatch(c.name, glob)
    }
    assert sorted(compiled) == sorted(wanted) and len(wanted) == len(CONFIGS)


def test_image_folders_are_for_all_to_read_and_for_root_to_write(image):
    owner = os.geteuid()
    for path in image.path("/opt/dsv4-moe").rglob("*"):
        found = path.stat()
        assert found.st_uid == owner and not found.st_mode & 0o022, path
        assert found.st_mode & 0o444 == 0o444 and (path.is_file() or found.st_mode & 0o111), path
    kernels = image.path("/opt/dsv4-moe/kernels")
    assert kernels.stat().st_mode & 0o7777 == 0o755
    for volume in image.env["HF_HOME"], image.env["DSV4_MOE_CACHE"]:
        assert Path(volume).stat().st_mode & 0o7777 == 0o1777
        assert not kernels.is_relative_to(volume)


def test_runs_as_a_plain_user_and_waits_for_the_load(image):
    assert int(image.last["USER"].split(":")[0]) > 0
    assert image.command("CMD") == ["flash-b200"] and DEFAULT.exists()
    # V4-Pro's 850 GB take 1.9 h at 1 Gbit/s.
    assert "--start-period=2h" in image.last["HEALTHCHECK"]


def test_versions_are_pinned_and_agree():
    dockerfile = instructions(DOCKERFILE.read_text())
    tag = next(value for name, value in dockerfile if name == "ARG").split("=")[1]
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]["vllm"]
    assert re.fullmatch(r"v\d+\.\d+\.\d+", tag)
    assert compose["build"]["args"]["VLLM_VERSION"] == tag
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert compose["image"] == f"vllm-dsv4-moe:{version}"
    assert f"VLLM={tag[1:]} " in (ROOT / "tests/setup.sh").read_text()


@pytest.fixture
def container(image):
    """Makes a container for a user. New volumes have the modes of the image's folders."""
    made = []

    def start(user: User) -> Container:
        volumes = Path(tempfile.mkdtemp(prefix="container-", dir=image.root))
        made.append(volumes)
        volumes.chmod(0o755)
        environ = {**image.env, "PATH": f"{volumes}/bin:{SYSTEM_PATH}"}
        environ["HOME"] = str(volumes)  # root's, as / is, which an unknown uid is given
        for name in ("HF_HOME", "DSV4_MOE_CACHE", "TMPDIR"):
            (volumes / name).mkdir()
            (volumes / name).chmod(
                0o1777 if name == "TMPDIR" else Path(image.env[name]).stat().st_mode & 0o7777
            )
            environ[name] = str(volumes / name)
        (volumes / "bin").mkdir()
        for name, text in {
            "dsv4-moe": '#!/bin/sh\necho "doctor in $HOME: $*" >&2\nexit ${DOCTOR:-0}\n',
            "vllm": VLLM,
        }.items():
            (volumes / "bin" / name).write_text(text)
            (volumes / "bin" / name).chmod(0o755)
        # vLLM's image has PyYAML.
        shutil.copytree(Path(yaml.__file__).parent, volumes / "python/yaml")
        environ["PYTHONPATH"] = str(volumes / "python")
        return Container(image, user, volumes, environ)

    yield start
    for volumes in made:
        shutil.rmtree(volumes)


@pytest.mark.parametrize("user", USERS)
def test_any_user_finds_writable_caches_in_an_empty_volume(container, user):
    box = container(user)
    seen = box.vllm("flash-b200")
    if user.uid is not None:
        assert seen["uid"] == [user.uid] * 3 and seen["gid"] == [user.gid] * 3
        assert seen["groups"] == []
    assert seen["user"] == "vllm" and not seen["imports_cwd"]
    home = box.volumes / "DSV4_MOE_CACHE" / str(user.number)
    assert seen["home"] == str(home)
    assert home.stat().st_mode & 0o7777 == 0o700 and home.stat().st_uid == user.number
    assert len(seen["written"]) == 10
    assert all(Path(folder).is_relative_to(home) for folder in seen["written"].values())


def test_libraries_take_their_folders_from_there(container):
    """What vLLM, Triton and Hugging Face say in the environment that vLLM was started with."""
    box = container(User())
    seen = box.vllm("flash-b200")
    ask = (
        "import vllm.envs as v, triton, huggingface_hub.constants as h\n"
        "print(v.VLLM_CACHE_ROOT, triton.knobs.cache.dir, h.HF_HUB_CACHE, sep='\\n')"
    )
    environ = {**seen["environ"], "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", ask], env=environ, capture_output=True, text=True, check=True
    )
    vllm, triton, hub = done.stdout.splitlines()[-3:]
    assert vllm == seen["written"]["VLLM_CACHE_ROOT"]
    assert triton == seen["written"]["TRITON_CACHE_DIR"]
    assert hub == str(box.volumes / "HF_HOME/hub")


@pytest.mark.parametrize("user", USERS)
def test_caches_of_an_earlier_container_are_used(container, user):
    box = container(user)
    home = box.volumes / "DSV4_MOE_CACHE" / str(user.number)
    assert box.vllm("flash-b200")["home"] == str(home)
    kernel = home / ".triton/cache/written"
    kernel.write_text("compiled earlier")
    home.chmod(0o2770)  # as Kubernetes' fsGroup leaves it
    again = box.serve("flash-b200", VLLM_CACHE_ROOT=str(home / "elsewhere"))
    seen = json.loads(again.stdout)
    assert seen["home"] == str(home) and home.stat().st_mode & 0o7777 == 0o700
    assert seen["written"]["VLLM_CACHE_ROOT"] == str(home / "elsewhere")
    assert "lost with this container" not in again.stderr


@as_root
@pytest.mark.parametrize("user", [*USERS[1:], pytest.param(User(0, 0), id="root")])
@pytest.mark.parametrize("volume", ["root's", "another's folder", "a link", "group's"])
def test_volumes_of_an_older_image_or_of_another_owner(container, user, volume):
    """Where the volume has no place for this uid the server starts all the same, and says so."""
    box = container(user)
    cache = box.volumes / "DSV4_MOE_CACHE"
    mine = cache / str(user.uid)
    if volume == "root's":
        cache.chmod(0o755)
    elif volume == "another's folder":
        mine.mkdir()
        mine.chmod(0o777)
        os.chown(mine, 4242, 4242)
    elif volume == "a link":
        (box.volumes / "target").mkdir()
        os.chown(box.volumes / "target", user.uid, user.gid)
        mine.symlink_to(box.volumes / "target")
    else:
        os.chown(cache, 0, user.gid)
        cache.chmod(0o2775)
    done = box.serve("flash-b200")
    seen = json.loads(done.stdout)
    warned = f"mount a volume at {cache} that uid {user.uid} can write" in done.stderr
    usable = volume == "group's" or (volume == "root's" and user.uid == 0)
    assert Path(seen["home"]).is_relative_to(cache) == usable
    assert warned != usable
    assert Path(seen["home"]).stat().st_mode & 0o7777 == 0o700
    assert all(Path(f).is_relative_to(seen["home"]) for f in seen["written"].values())


@pytest.mark.parametrize("layout", ["folder", "hub"])
@pytest.mark.parametrize("user", [USERS[0], USERS[3]])
def test_models_are_where_the_config_looks(container, user, layout):
    """In a volume that uid 1000 of an older image filled, which others may only read."""
    box = container(user)
    models = box.volumes / "HF_HOME"
    model = yaml.safe_load(DEFAULT.read_text())["model"]
    if layout == "folder":
        wanted = models / model
    else:
        repository = models / "hub" / f"models--{model.replace('/', '--')}"
        wanted = repository / "snapshots/0123"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("0123")
    wanted.mkdir(parents=True)
    (wanted / "config.json").write_text("{}")
    if user.uid is not None:
        models.chmod(0o755)
        subprocess.run(["chown", "-R", "1000:1000", models], check=True)
    done = box.serve("flash-b200")
    seen = json.loads(done.stdout)
    assert ("none is downloaded" in done.stderr) == (user.uid is not None)
    ask = (
        "import os, sys; from huggingface_hub import snapshot_download as get\n"
        "model = sys.argv[1]\n"
        "print(os.path.abspath(model) if os.path.exists(model) else "
        "get(model, local_files_only=True))"
    )
    found = subprocess.run(
        [sys.executable, "-c", ask, model],
        env={**seen["environ"], "PYTHONPATH": ""},
        cwd=seen["cwd"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(wanted)
    assert box.run("cat", str(wanted / "config.json")).stdout == "{}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_options_are_passed_on_as_they_are(container, path):
    box = container(User())
    config = str(box.image.path(f"/opt/dsv4-moe/configs/{path.name}"))
    options = ["--max-num-seqs", "64", "--additional-config", '{"dsv4_moe": {"backend": "sm90"}}']
    assert box.vllm(path.stem, *options)["argv"] == ["serve", "--config", config, *options]
    options += ["--config", config]
    assert box.vllm(*options)["argv"] == ["serve", *options]


def test_serves_only_after_a_clean_preflight(container):
    box = container(User())
    assert f"doctor in {box.volumes}/DSV4_MOE_CACHE/" in box.serve("flash-b200").stderr
    refused = box.serve("flash-b200", DOCTOR="3")
    assert (refused.returncode, refused.stdout) == (3, "")


def test_refusals_are_sentences(container):
    box = container(User())
    unknown = box.serve("flash-b100")
    assert unknown.returncode == 1 and "flash-b200 pro-2x8xh200 pro-8xb200" in unknown.stderr
    absent = box.serve("--config", "/absent.yaml")
    assert absent.returncode == 1 and "No such file or directory: '/absent.yaml'" in absent.stderr
    assert "Traceback" not in unknown.stderr + absent.stderr
    config = box.volumes / "bad.yaml"
    for text, says in (("model: [", "is not YAML: while"), ("- model", "holds no options: write")):
        config.write_text(text)
        refused = box.serve("--config", str(config))
        assert refused.returncode == 1 and f"serve: {config} {says}" in refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.fixture
def server():
    """Starts servers of GET /health on any port of a loopback address; gives the port."""
    started = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *words) -> None:
            pass

    def start(address: str = "127.0.0.1") -> int:
        made = http.server.ThreadingHTTPServer((address, 0), Answer)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        started.append(made)
        return made.server_port

    yield start
    for made in started:
        made.shutdown()
        made.server_close()


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(
    "options",
    [
        "--port {port}",
        "--port=1 --port={port}",
        "--config {file}",
        "--config {other} --port={port}",
    ],
)
def test_health_check_follows_the_port(container, server, user, options):
    box = container(user)
    port = server()
    for name, value in {"file": port, "other": 1}.items():
        (box.volumes / f"{name}.yaml").write_text(f"model: m\nport: {value}\n")
    assert not box.healthy()  # before the server is started there is nothing to ask
    files = {name: box.volumes / f"{name}.yaml" for name in ("file", "other")}
    box.vllm(*options.format(port=port, **files).split())
    assert box.healthy()


def test_health_check_fails_where_nothing_answers(container, server):
    box = container(User())
    server()
    box.vllm("flash-b200", "--port=1")
    assert not box.healthy()


@pytest.mark.parametrize(
    "options, url",
    [
        ("", "http://127.0.0.1:8000/health"),
        ("--host 0.0.0.0", "http://127.0.0.1:8000/health"),
        ("--host=:: --port 9000", "http://[::1]:9000/health"),
        ("--host fd00::1", "http://[fd00::1]:8000/health"),
        ("--ssl-certfile c --ssl-keyfile k", "https://127.0.0.1:8000/health"),
        ("--ssl_certfile=c --host 10.0.0.2", "https://10.0.0.2:8000/health"),
    ],
)
def test_health_check_asks_where_the_server_listens(container, options, url):
    box = container(User())
    box.vllm("flash-b200", *options.split())
    (written,) = Path(box.environ["TMPDIR"]).iterdir()
    assert written.read_text() == url


def test_compose_gives_the_container_what_it_needs():
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    service = compose["services"]["vllm"]
    named = [volume.split(":/")[1] for volume in service["volumes"]]
    assert named == ["models", "cache"] and set(compose["volumes"]) == {"models", "cache"}
    words = re.sub(
        r"\$\{(\w+):-([^}]*)\}",
        lambda m: {"OPTIONS": "--a 'b c'"}.get(m[1], m[2]),
        service["command"],
    )
    assert shlex.split(words) == ["flash-b200", "--host=0.0.0.0", "--port=8000", "--a", "b c"]
    # What has no value is passed on where it is set, and only there.
    assert service["environment"] == {
        "HF_TOKEN": "${HF_TOKEN:-}",
        "VLLM_DSV4_MOE_ACTIVATIONS": None,
    }
