"""The chips that are compiled for, none of which is there."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # One libtpu a process, several processes, and no cloud to ask.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    # A test's eight virtual devices are no part of this.
    "XLA_FLAGS": "",
}
"""Of a process that compiles, before it imports jax."""

TARGETS = Path(__file__).parent / "targets"


@dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        name: as the tables show it.
        platform: JAX's name of it: "tpu" or "cuda".
        described: libtpu's name of a topology, or the file of XLA's target configuration.
    """

    name: str
    platform: str
    described: str

    @property
    def packages(self) -> dict[str, str]:
        """What compiles for it: packages by the modules in them."""
        if self.platform == "tpu":
            return {"libtpu": "libtpu"}
        return {
            "jax_plugins.xla_cuda13": "jax-cuda13-pjrt",
            "jax_cuda13_plugin": "jax-cuda13-plugin",
            "nvidia.cu13": "nvidia-cuda-nvcc",
        }

    def why_not(self) -> str | None:
        """Why nothing can be compiled for it here; None if it can."""
        missing = [package for module, package in self.packages.items() if not _is_there(module)]
        return f"not installed: {' '.join(missing)}" if missing else None

    def devices(self, number: int = 1) -> list[Any]:
        """Some of them, in a process with `ENVIRONMENT`."""
        import jax
        from jax.experimental import topologies

        # JAX looks for its plugins when it is first asked for devices.
        jax.devices()
        if self.platform == "tpu":
            found = topologies.get_topology_desc(self.described, "tpu")
        else:
            found = topologies.get_topology_desc(
                "",
                "cuda",
                target_config=(TARGETS / self.described).read_text(),
                topology=f"1x1x{number}",
            )
        return list(found.devices[:number])


def _is_there(module: str) -> bool:
    package, _, inner = module.partition(".")
    if importlib.util.find_spec(package) is None:
        return False
    return not inner or importlib.util.find_spec(module) is not None


V5E = Chip("TPU v5e", "tpu", "v5e:2x4")
V6E = Chip("TPU v6e", "tpu", "v6e:2x4")
H100 = Chip("H100", "cuda", "h100.txtpb")
A100 = Chip("A100", "cuda", "a100.txtpb")
CHIPS = {"v5e": V5E, "v6e": V6E, "h100": H100, "a100": A100}
