"""Devices that are not here, as the compilers of TPUs and of NVIDIA's GPUs describe them.

The compilers are plugins of JAX that compile on any machine: libtpu, and the CUDA plugin with the
assembler of CUDA's toolkit.
"""

import dataclasses
import importlib
import importlib.util
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from crate_jax.errors import first_line
from crate_jax.parallel import Devices
from crate_jax.planning.chips import CHIPS, Chip

# The chips that libtpu knows, and their largest slices.
SLICES = {
    **{"v2": "16x16", "v3": "32x32", "v4": "16x16x16", "v5e": "16x16", "v5p": "16x16x24"},
    **{"v6e": "16x16", "tpu7x": "16x24x24"},
}
GPUS = ("h100", "h200")

# Without them libtpu asks the metadata server of a machine that it is not on, complains of it, and
# refuses to be loaded by two processes at once. Which type it is told makes no difference here.
_TPU_ENVIRONMENT = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# The two cores of a v4 work as one device, as JAX has it on the hardware; v5p's do by themselves.
_CORES = {"v4": {"chip_config_name": "megacore_dense"}}
# XLA's GpuTargetConfigProto: an SXM card of compute capability 9.0, by NVIDIA's figures.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: 9 minor: 0 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{kind}"
"""
_KINDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
        name: as it was asked for.
        platform: "tpu" or "gpu", as JAX calls it.
        devices: the devices, as `jax.Device`, though nothing runs on them.
        chip: the peaks of a device; None where `CHIPS` has none.
        compiler: its name and version.
        options: that it needs, by XLA's names.
        spaces: the memories that a program's account counts, see
            `crate_jax.planning.program.account`.
    """

    name: str
    platform: str
    devices: Devices
    chip: Chip | None
    compiler: str
    options: dict[str, Any]
    spaces: tuple[int, ...]


def find_topology(name: str) -> Topology:
    """The devices of a name such as ``v5e:4x4``, ``h100`` or ``h100:8``.

    Sets variables of the environment that libtpu reads when it is loaded.

    Raises:
        ValueError: its compiler is not installed.
        KeyError: no compiler knows it; the known ones are listed.
    """
    family, _, layout = name.partition(":")
    if family in GPUS and re.fullmatch(r"|[1-8]", layout):
        return _gpus(name, family, int(layout or 1))
    if family in SLICES and re.fullmatch(r"\d+(x\d+){1,2}", layout):
        return _slice(name, family, layout)
    raise KeyError(_unknown(name))


def _unknown(name: str, reason: str = "") -> str:
    largest = ", ".join(f"{family}:{layout}" for family, layout in SLICES.items())
    return (
        f"--topology must be a slice of TPUs or a GPU that the compilers know; got {name}{reason}. "
        f"Known: one chip, v5e:1x1 or v5p:1x1x1; slices with even first two sides, v5e:4x4 or "
        f"v5p:2x2x1, up to {largest}; {', '.join(f'{gpu} to {gpu}:8' for gpu in GPUS)}."
    )


def _slice(name: str, family: str, layout: str) -> Topology:
    """TPUs, as libtpu describes them."""
    _require(name, "libtpu", "tpu-compiler")
    os.environ.update(_TPU_ENVIRONMENT)
    # Hosts of four chips, but for a single one.
    host = (1, 1, 1) if set(layout.split("x")) == {"1"} else (2, 2, 1)
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=host, **_CORES.get(family, {})
        ).devices
    except jax.errors.JaxRuntimeError as error:
        raise KeyError(_unknown(name, f" ({first_line(error)})")) from error
    return Topology(
        name=name,
        platform="tpu",
        devices=devices,
        chip=CHIPS.get(family),
        compiler=f"libtpu {version('libtpu')}",
        options={},
        spaces=(0,),
    )


def _gpus(name: str, family: str, count: int) -> Topology:
    """GPUs of one host, by NVIDIA's figures."""
    for module in ("jax_plugins.xla_cuda13", "nvidia.cu13"):
        _require(name, module, "cuda-compiler")
    jax.devices()  # JAX looks for its plugins
    (toolkit,) = importlib.import_module("nvidia.cu13").__path__
    if not (Path(toolkit) / "bin" / "ptxas").exists():
        raise ValueError(_missing(name, "ptxas", "cuda-compiler"))
    chip = CHIPS[family]
    target = _HOPPER.format(
        bandwidth=chip.memory_bandwidth, memory=chip.memory, kind=_KINDS[family]
    )
    devices = topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=target, topology=f"1x1x{count}"
    ).devices
    return Topology(
        name=name,
        platform="gpu",
        devices=devices,
        chip=chip,
        compiler=f"jax-cuda13-plugin {version('jax-cuda13-plugin')}",
        # It would time kernels on a device that is not here.
        options={"xla_gpu_autotune_level": 0, "xla_gpu_cuda_data_dir": toolkit},
        spaces=(0, 1),
    )


def _require(name: str, module: str, extra: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # not even the package that it is in
        found = None
    if found is None:
        raise ValueError(_missing(name, module, extra))


def _missing(name: str, module: str, extra: str) -> str:
    return (
        f"--topology={name} must have its compiler; {module} is not installed. "
        f"pip install 'crate-jax[{extra}]'."
    )
