"""The image's entry point and its health check.

    container.py serve [DEPLOYMENT] [option of `vllm serve` ...]
    container.py health

DEPLOYMENT is the stem of a file in the folder configs beside this script; without one the options
are all that vLLM gets. `dsv4-moe doctor` runs first: it says in words what is wrong before minutes
go into loading. Works for any uid, one that /etc/passwd does not know included.
"""

import argparse
import os
import ssl
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import NoReturn

CONFIGS = Path(__file__).resolve().parent / "configs"
# Written by `serve`, read by `health`, which Docker starts without the server's options.
HEALTH_URL = Path(tempfile.gettempdir(), "dsv4-moe-health-url")


def say(text: str) -> None:
    print(f"serve: {text}", file=sys.stderr, flush=True)


def vllm_arguments(arguments: list[str]) -> list[str]:
    """What `vllm serve` is called with; SystemExit where there is no such deployment."""
    if not arguments or arguments[0].startswith("-"):
        return arguments
    deployment, *options = arguments
    config = CONFIGS / f"{deployment}.yaml"
    if not config.is_file():
        there = " ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
        sys.exit(
            f"serve: there is no deployment {deployment}: name one of {there}, or give a model "
            "with --model"
        )
    return ["--config", str(config), *options]


def health_url(arguments: list[str]) -> str:
    """Where a server with these arguments answers: options win over the file of --config.

    ValueError for a file that holds no options.
    """
    import yaml

    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in ("--config", "--host", "--port", "--ssl-certfile", "--ssl_certfile"):
        parser.add_argument(name)
    options, _ = parser.parse_known_args(arguments)
    try:
        config = yaml.safe_load(Path(options.config).read_text()) if options.config else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{options.config} is not YAML: {error}") from error
    if not isinstance(config or {}, dict):
        raise ValueError(f"{options.config} holds no options: write NAME: VALUE in each line")
    values = {str(name).replace("-", "_"): value for name, value in (config or {}).items()}
    values.update({name: value for name, value in vars(options).items() if value is not None})
    host = values.get("host") or "0.0.0.0"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    scheme = "https" if values.get("ssl_certfile") else "http"
    return f"{scheme}://{host}:{values.get('port', 8000)}/health"


def own_folder(volume: Path) -> Path:
    """This uid's folder of mode 0700 in the volume, or a new one that ends with the container.

    What compilers cache is native code: nobody else may have put it there.
    """
    uid = os.geteuid()
    folder = volume / str(uid)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != uid:
            raise PermissionError(f"{folder} is not this uid's own")
        folder.chmod(0o700)  # Kubernetes' fsGroup opens it to the group
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        folder = Path(tempfile.mkdtemp(prefix="dsv4-moe-"))
        say(
            f"{error}: what is compiled now is lost with this container; "
            f"mount a volume at {volume} that uid {uid} can write"
        )
    return folder


def environment() -> dict[str, str]:
    """The server's: every library keeps its caches under HOME unless a variable says otherwise."""
    environ = dict(os.environ)
    environ["HOME"] = str(own_folder(Path(environ.get("DSV4_MOE_CACHE", "/cache"))))
    # getpass.getuser(), which torch calls, fails for a uid that has no name otherwise.
    environ["USER"] = environ["LOGNAME"] = environ.get("USER") or "vllm"
    models = Path(environ["HF_HOME"])
    for folder in (models, models / "hub"):
        if folder.exists() and not os.access(folder, os.W_OK):
            say(
                f"uid {os.geteuid()} cannot write {folder}: "
                "models that are there are served, none is downloaded"
            )
            break
    return environ


def serve(arguments: list[str]) -> NoReturn:
    arguments = vllm_arguments(arguments)
    environ = environment()
    preflight = subprocess.run(["dsv4-moe", "doctor"], env=environ)
    if preflight.returncode:
        sys.exit(preflight.returncode)
    try:
        HEALTH_URL.write_text(health_url(arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"serve: {error}")
    os.execvpe("vllm", ["vllm", "serve", *arguments], environ)


def health() -> None:
    # No proxy on the way, and a certificate that names the host that clients use.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl._create_unverified_context()),
    )
    try:
        opener.open(HEALTH_URL.read_text(), timeout=4).close()
    except OSError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    serve(rest) if command == "serve" else health()
