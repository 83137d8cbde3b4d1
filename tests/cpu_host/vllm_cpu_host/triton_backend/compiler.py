"""The half of a Triton backend that would compile. Here it says how to do without."""

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpretedBackend(BaseBackend):
    binary_ext = "interpreted"

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreted-on-cpu"

    def parse_options(self, options: dict) -> object:
        raise RuntimeError("Triton kernels are interpreted on this host: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict, options: object, language: object = None) -> None:
        self.parse_options({})

    def load_dialects(self, context: object) -> None:
        pass

    def get_module_map(self) -> dict:
        return {}
