"""Published peaks of accelerators, and the least time that a step takes on one of them."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from crate_jax.files import Json


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of an accelerator.

    Attributes:
        flops: dense bfloat16 operations a second.
        memory: bytes.
        memory_bandwidth: bytes a second.
        inside: bytes of memory inside the chip in which its compiler keeps whole arrays; 0 of GPUs.
        link: bytes a second that a chip sends to its neighbours, one way: half of what is quoted
            for both ways.
        domain: the number of chips that those links join.
        network: bytes a second a chip beyond that.
        source: where the figures are from.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    inside: float
    link: float
    domain: int
    network: float
    source: str


_GOOGLE, _NVIDIA = "docs.cloud.google.com/tpu/docs/", "NVIDIA's data sheets of "
_V4 = _GOOGLE + "v4, arXiv:2304.01433"
CHIPS = {
    # Google publishes no network of v4 beyond the links: that of v5p stands in.
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 2**27, 300e9, 4096, 50e9 / 8, _V4),
    "v5e": Chip(197e12, 16e9, 819e9, 2**27, 200e9, 256, 6.4e12 / 8 / 256, _GOOGLE + "v5e"),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 2**26, 600e9, 6144, 50e9 / 8, _GOOGLE + "v5p"),
    "v6e": Chip(918e12, 32e9, 1600e9, 2**27, 400e9, 256, 25.6e12 / 8 / 256, _GOOGLE + "v6e"),
    "h100": Chip(989e12, 80e9, 3.35e12, 0, 450e9, 8, 50e9, _NVIDIA + "H100 SXM and DGX H100"),
    "h200": Chip(989e12, 141e9, 4.8e12, 0, 450e9, 8, 50e9, _NVIDIA + "H200 SXM and DGX H200"),
}


# JAX's names. Cards of the same name for other slots have other peaks, and are not here.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def share_of_peak(flops: float, devices: Iterable[Any]) -> float:
    """The share of so many operations a second in the published peak of all devices.

    The peak is that of bfloat16.

    Args:
        flops: operations a second.
        devices: the devices, as `jax.Device`.

    Returns:
        The share; 0.0 if the peak of one of them is not known.
    """
    names = [_KINDS.get(device.device_kind) for device in devices]
    peaks = [CHIPS[name].flops for name in names if name]
    return flops / sum(peaks) if len(peaks) == len(names) > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Joined:
    """The values that groups of devices add up, gather or exchange in a step.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
        size: bytes of the result on one device; of a reduce-scatter those of a share.
        group: the number of devices that a group has.
        stride: how many of the mesh stand between one member and the next, and the one itself.
    """

    kind: str
    size: int
    group: int
    stride: int = 1

    @property
    def whole(self) -> int:
        """Bytes of all shares of a reduce-scatter; of any other its size."""
        return self.size * (self.group if self.kind == "reduce-scatter" else 1)


def traffic(memory: dict[str, int]) -> int:
    """The least that a step moves through the memory of a device, in bytes.

    Parameters, optimizer, gradients and activations are written and read once.
    """
    return 2 * sum(memory[k] for k in ("parameters", "optimizer", "gradients", "activations"))


def least_seconds(
    chip: Chip, flops: float, moved: float, joined: Iterable[Joined], memory: float
) -> Json:
    """The least that a step can take on a chip, by each of its limits.

    A collective over more chips than the links join goes by the links first; each chip then takes
    its share of the result to the network.

    Args:
        chip: whose peaks count.
        flops: operations of a device.
        moved: bytes through the memory of a device.
        joined: what the devices send each other.
        memory: bytes that a device must hold.

    Returns:
        ``compute_s``, ``memory_s``, ``links_s`` and, where it is needed, ``network_s``; ``step_s``,
        the largest of these, where everything overlaps, and their sum, where nothing does;
        ``bound_by``, which is the largest; ``fits``.
    """
    link = network = 0.0
    for part in joined:
        inside = min(part.group, max(1, chip.domain // part.stride))
        link += _sent(part.kind, part.whole, inside)
        network += _sent(part.kind, part.whole / inside, math.ceil(part.group / inside))
    seconds: Json = {
        "compute_s": flops / chip.flops,
        "memory_s": moved / chip.memory_bandwidth,
        "links_s": link / chip.link,
    }
    if network:
        seconds["network_s"] = network / chip.network
    longest = max(seconds, key=lambda name: seconds[name])
    seconds["step_s"] = [seconds[longest], sum(seconds.values())]
    seconds["bound_by"] = longest.removesuffix("_s")
    seconds["fits"] = memory <= chip.memory
    return seconds


def _sent(kind: str, whole: float, group: int) -> float:
    """Bytes that each of a group sends in a ring: the least for a whole of so many bytes."""
    times = 2 if kind == "all-reduce" else 1
    return times * whole * (group - 1) / group
