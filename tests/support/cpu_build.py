"""What is made for vLLM's CPU build with tests/cpu_host, and left out elsewhere."""

from importlib.util import find_spec

import pytest

HAS_CPU_BUILD = find_spec("vllm_cpu_host") is not None
REASON = "made for vLLM's CPU build with tests/cpu_host"
needs_cpu_build = pytest.mark.skipif(not HAS_CPU_BUILD, reason=REASON)
