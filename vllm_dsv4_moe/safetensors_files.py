"""What a checkpoint's safetensors files hold, read from their headers alone.

A file is: header length (8 bytes, little endian), header (JSON: name -> dtype, shape, offsets into
the data), data. Only headers are read here; a file that ends before its data does is found by its
size. Format: https://github.com/huggingface/safetensors
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from vllm_dsv4_moe.checkpoint_layout import DTYPE_BYTES

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
INDEX = "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """One tensor as a file holds it."""

    dtype: str  # as the header spells it: BF16, F8_E4M3, ...
    shape: tuple[int, ...]
    file: Path
    start: int  # first byte in the file
    num_bytes: int

    def read(self) -> bytes:
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.num_bytes)


@dataclass
class StoredCheckpoint:
    """Every tensor of a checkpoint's files, and what is wrong with the files themselves."""

    folder: Path
    num_files: int = 0
    num_bytes: int = 0  # of the files
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises ValueError where the file is cut short or its header bad."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(
                f"{path.name} is cut short or no safetensors file: it has {size} bytes"
            )
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        data = 8 + length
        tensors = {name: _stored(path, data, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} has a damaged header: {error!r}") from error
    end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=data)
    if end > size:
        lost = sum(tensor.start + tensor.num_bytes > size for tensor in tensors.values())
        raise ValueError(
            f"{path.name} is cut short: it has {size} bytes and its header speaks of {end}, "
            f"so {lost} of its {len(tensors)} tensors are lost; fetch it again"
        )
    return tensors


def _stored(path: Path, data: int, entry: dict[str, Any]) -> StoredTensor:
    first, last = entry["data_offsets"]
    tensor = StoredTensor(entry["dtype"], tuple(entry["shape"]), path, data + first, last - first)
    item = DTYPE_BYTES.get(tensor.dtype)
    if item is not None and prod(tensor.shape) * item != tensor.num_bytes:
        raise ValueError(f"{tensor.dtype} {list(tensor.shape)} in {tensor.num_bytes} bytes")
    return tensor


def read_checkpoint(folder: Path) -> StoredCheckpoint:
    """All headers of a folder. Raises ValueError where it holds no safetensors file."""
    stored = StoredCheckpoint(folder)
    index = folder / INDEX
    weight_map: dict[str, str] = {}
    names: list[str] = []
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} has no weight_map that can be read: {error!r}") from error
    names = names or sorted(path.name for path in _shards(folder))
    if not names:
        raise ValueError(f"{folder} holds no .safetensors file")
    for name in names:
        _add_file(stored, folder / name)
    _compare_with_index(stored, weight_map)
    return stored


def _shards(folder: Path) -> Iterable[Path]:
    return (path for path in folder.glob("*.safetensors") if path.is_file())


def _add_file(stored: StoredCheckpoint, path: Path) -> None:
    if not path.is_file():
        stored.problems.append(f"{path.name} is missing, and {INDEX} names it")
        return
    stored.num_files += 1
    stored.num_bytes += os.path.getsize(path)
    try:
        tensors = read_header(path)
    except ValueError as error:
        stored.problems.append(str(error))
        return
    for name in tensors.keys() & stored.tensors.keys():
        other = stored.tensors[name].file.name
        stored.problems.append(f"{name} is in two files, {other} and {path.name}")
    stored.tensors |= tensors


def _compare_with_index(stored: StoredCheckpoint, weight_map: dict[str, str]) -> None:
    elsewhere = [
        name
        for name, file in weight_map.items()
        if name in stored.tensors and stored.tensors[name].file.name != file
    ]
    if elsewhere:
        stored.problems.append(
            f"{INDEX} places {len(elsewhere)} tensors in another file than holds them, "
            f"{elsewhere[0]} among them"
        )
    unlisted = [name for name in stored.tensors if name not in weight_map]
    if weight_map and unlisted:
        stored.problems.append(
            f"{len(unlisted)} tensors are in the files and not in {INDEX}, {unlisted[0]} among them"
        )
