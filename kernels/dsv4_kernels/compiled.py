"""CuTe DSL kernels compiled ahead of time: written to a folder, and found there by a server.

    FOLDER/manifest.json   {"format", "arch", "versions", "objects": {specialisation: file}}
    FOLDER/*.o             one object each: the cubin and its host launcher

A specialisation's key is the repr of its op's Gemm: sizes, config, everything that the compiler
was given. Versions are CuTe DSL's and a digest of the kernels' sources: objects of another source
are refused, never run.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
_REMEDY = "run dsv4-moe compile again with this installation"
# (arch, key) -> launcher, and the folder that they came from
_loaded: dict[tuple[str, str], Any] = {}
_folders: dict[str, str] = {}


def arch_of(capability: tuple[int, int]) -> str:
    """What to compile for: instructions of the sm_90a kind exist on that very capability only."""
    return f"sm_{capability[0]}{capability[1]}a"


def versions() -> dict[str, str]:
    """What must be the same where objects are made and where they run."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return {
        "nvidia-cutlass-dsl": metadata.version("nvidia-cutlass-dsl"),
        "kernel sources": digest.hexdigest()[:16],
    }


def compiled(key: str, arch: str, compile: Callable[[], Any]) -> Any:
    """The launcher of a specialisation: a loaded object, or compiled now if none were loaded.

    ValueError if objects were loaded for the arch and this one is not among them.
    """
    if arch not in _folders:
        return compile()
    if (arch, key) not in _loaded:
        raise ValueError(
            f"{_folders[arch]} has no object for {key}: it was made for another model, parallel "
            f"size, scale policy or table of configs; {_REMEDY}, or unset the option to compile at "
            "load"
        )
    return _loaded[arch, key]


def write_objects(folder: Path, arch: str, kernels: Mapping[str, Callable[[], Any]]) -> list[Path]:
    """Compile and write every kernel, then the manifest; no GPU is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = {}
    for key, compile in kernels.items():
        name = "dsv4_" + hashlib.sha256(f"{arch} {key}".encode()).hexdigest()[:16]
        compile().export_to_c(str(folder), name, name)
        (folder / f"{name}.h").unlink()
        objects[key] = f"{name}.o"
    manifest = {"format": FORMAT, "arch": arch, "versions": versions(), "objects": objects}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return [folder / name for name in objects.values()]


def load_objects(folder: Path, arch: str) -> int:
    """Use the folder's objects for this arch from now on; returns how many there are.

    ValueError says what does not fit, and with what to compare it.
    """
    if _folders.get(arch) == str(folder):
        return sum(loaded == arch for loaded, _ in _loaded)
    manifest = _read_manifest(folder)
    if manifest["arch"] != arch:
        raise ValueError(
            f"{folder} holds kernels for {manifest['arch']}, and this GPU runs {arch}: run "
            f"dsv4-moe compile --arch {arch}"
        )
    for name, here in versions().items():
        there = manifest["versions"].get(name)
        if there != here:
            raise ValueError(
                f"{folder} was made with {name} {there}, and this installation has {here}: "
                f"{_REMEDY}"
            )
    from cutlass.cute.runtime import load_module

    for key, name in manifest["objects"].items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{folder} lacks {name}, which its manifest names: {_REMEDY}")
        _loaded[arch, key] = getattr(load_module(str(path)), path.stem)
    _folders[arch] = str(folder)
    return len(manifest["objects"])


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}: name a folder that dsv4-moe compile wrote")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): {_REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}: {_REMEDY}")
    return manifest
