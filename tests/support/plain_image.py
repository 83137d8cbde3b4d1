"""docker/Dockerfile without an engine: its instructions carried out in a plain directory.

Absolute folders (ARG, ENV, WORKDIR, exec forms) become folders under the directory; COPY copies,
and RUN runs, as whoever calls this.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker/Dockerfile"
# The tests' own Python may stand in a folder of root's alone.
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"
PYTHON = shutil.which("python3", path=SYSTEM_PATH)

# A `vllm` that says how it was started, and which folders that libraries compile into it can write.
VLLM = f"""#!{PYTHON} -I
import getpass, json, os, subprocess, sys
folders = {{
    "VLLM_CACHE_ROOT": "~/.cache/vllm",
    "VLLM_CONFIG_ROOT": "~/.config/vllm",
    "XDG_CACHE_HOME": "~/.cache",
    "TRITON_CACHE_DIR": "~/.triton/cache",
    "TILELANG_CACHE_DIR": "~/.tilelang/cache",
    "HUMMING_CACHE_DIR": "~/.humming/cache",
    "DG_JIT_CACHE_DIR": "~/.deep_gemm",
    "FLASHINFER_WORKSPACE_BASE": "~/.cache/flashinfer",
    "TVM_FFI_CACHE_DIR": "~/.cache/tvm-ffi",
    "CUDA_CACHE_PATH": "~/.nv/ComputeCache",
}}
written = {{}}
for name, default in folders.items():
    folder = os.path.expanduser(os.environ.get(name, default))
    os.makedirs(folder, exist_ok=True)
    open(os.path.join(folder, "written"), "w").close()
    written[name] = folder
search = [{PYTHON!r}, "-c", "import sys; print('' in sys.path)"]
print(json.dumps({{
    "argv": sys.argv[1:], "uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(),
    "user": getpass.getuser(), "home": os.environ["HOME"], "written": written, "cwd": os.getcwd(),
    "imports_cwd": subprocess.check_output(search, text=True).strip() == "True",
    "environ": dict(os.environ),
}}))
"""


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


@dataclass
class Image:
    root: Path
    env: dict[str, str] = field(default_factory=dict)  # of ENV alone, as a container starts with
    last: dict[str, str] = field(default_factory=dict)  # instruction -> its value in the last stage
    ran: list[str] = field(default_factory=list)

    def path(self, absolute: str) -> Path:
        return self.root / absolute.removeprefix("/")

    def _mapped(self, value: str) -> str:
        return str(self.path(value)) if value.startswith("/") else value

    def command(self, instruction: str) -> list[str]:
        """The exec form of ENTRYPOINT, CMD or HEALTHCHECK, with this directory's paths."""
        form = self.last[instruction]
        return [self._mapped(word) for word in json.loads(form[form.index("[") :])]

    def build(self, environ: dict[str, str]) -> None:
        arguments: dict[str, str] = {}
        for name, value in instructions(DOCKERFILE.read_text()):
            if name == "FROM":
                arguments, self.env, self.last = {}, {}, {}
            self.last[name] = value
            variables = {**arguments, **self.env}
            if name in ("ARG", "ENV"):
                found = dict(re.findall(r'(\w+)=("[^"]*"|\S+)', value))
                target = self.env if name == "ENV" else arguments
                target.update({key: self._mapped(text.strip('"')) for key, text in found.items()})
            elif name == "WORKDIR":
                self.last[name] = re.sub(r"\$\{(\w+)\}", lambda m: variables[m[1]], value)  # noqa: B023
            elif name == "COPY":
                self._copy(value, variables)
            elif name == "RUN":
                done = subprocess.run(
                    ["/bin/sh", "-c", value],
                    env={**environ, **variables},
                    capture_output=True,
                    text=True,
                    cwd=self.root,
                )
                assert done.returncode == 0, f"RUN {value}\n{done.stdout}{done.stderr}"
                self.ran.append(value)

    def _copy(self, value: str, variables: dict[str, str]) -> None:
        *sources, target = re.sub(r"--from=\S+\s+", "", value).split()
        target = re.sub(r"\$\{(\w+)\}", lambda m: variables[m[1]], target)
        folder = Path(target if target.endswith("/") else Path(target).parent)
        folder.mkdir(parents=True, exist_ok=True)
        if "--from" in value:  # the stages share one directory
            return
        for source in sources:
            subprocess.run(["cp", "-R", ROOT / source, target], check=True)
            # A checkout under umask 077 has such files; COPY keeps their modes.
            subprocess.run(["chmod", "-R", "go=", target], check=True)


@dataclass(frozen=True)
class User:
    """uid and gid of a container; None: whoever runs the tests."""

    uid: int | None = None
    gid: int | None = None

    def command(self, *words: str | Path) -> list[str]:
        """`words` as this user; the shell gives up what capabilities setpriv still holds."""
        if self.uid is None:
            return list(map(str, words))
        switch = ["setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups"]
        return [*switch, "/bin/sh", "-c", 'exec "$@"', "sh", *map(str, words)]

    @property
    def number(self) -> int:
        return os.geteuid() if self.uid is None else self.uid


@dataclass
class Container:
    """One container of the image: its two volumes, its /tmp, and stand-ins for doctor and vLLM."""

    image: Image
    user: User
    volumes: Path
    environ: dict[str, str]

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.user.command(*words),
            env={**self.environ, **environ},
            cwd=self.environ["HF_HOME"],
            capture_output=True,
            text=True,
        )

    def serve(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
        return self.run(*self.image.command("ENTRYPOINT"), *arguments, **environ)

    def vllm(self, *arguments: str, **environ: str) -> dict:
        """What the stand-in for vLLM saw."""
        done = self.serve(*arguments, **environ)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def healthy(self) -> bool:
        return (
            self.run(*self.image.command("HEALTHCHECK"), http_proxy="http://127.0.0.1:9").returncode
            == 0
        )
