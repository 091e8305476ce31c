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
        link: bytes a second that a chip sends to its neighbours, one way: half of what is quoted
            for both ways.
        domain: how many chips those links join.
        network: bytes a second a chip beyond that.
        source: where the figures are from.
    """

    flops: float
    memory: float
    memory_bandwidth: float
    link: float
    domain: int
    network: float
    source: str


_GOOGLE, _NVIDIA = "docs.cloud.google.com/tpu/docs/", "NVIDIA's data sheets of "
CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, 256, 6.4e12 / 8 / 256, _GOOGLE + "v5e"),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9, 6144, 50e9 / 8, _GOOGLE + "v5p"),
    "v6e": Chip(918e12, 32e9, 1600e9, 400e9, 256, 25.6e12 / 8 / 256, _GOOGLE + "v6e"),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9, 8, 50e9, _NVIDIA + "H100 SXM and DGX H100"),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9, 8, 50e9, _NVIDIA + "H200 SXM and DGX H200"),
}


# What JAX calls them. Cards of the same name for other slots have other peaks, and are not here.
_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


def share_of_peak(flops: float, devices: Iterable[Any]) -> float:
    """What share of the published peak of all devices so many operations a second are.

    The peak is that of bfloat16.

    Args:
        flops: operations a second.
        devices: of `jax.Device`.

    Returns:
        The share; 0.0 if the peak of one of them is not known.
    """
    names = [_KINDS.get(device.device_kind) for device in devices]
    peaks = [CHIPS[name].flops for name in names if name]
    return flops / sum(peaks) if len(peaks) == len(names) > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Joined:
    """What groups of devices add up or gather together in a step.

    Attributes:
        kind: "all-reduce" or "all-gather".
        size: bytes of the result on one device.
        group: how many devices a group has.
        stride: how many of the mesh stand between one member and the next, and the one itself.
    """

    kind: str
    size: int
    group: int
    stride: int = 1


def least_seconds(chip: Chip, flops: float, memory: dict[str, int], joined: list[Joined]) -> Json:
    """The least that a step can take on a chip, by each of its limits.

    Parameters, optimizer, gradients and activations are written and read once. A collective over
    more chips than the links join goes by the links first; each chip then takes its share of the
    result to the network.
    """
    traffic = 2 * sum(memory[k] for k in ("parameters", "optimizer", "gradients", "activations"))
    link = network = 0.0
    for part in joined:
        inside = min(part.group, max(1, chip.domain // part.stride))
        link += _sent(part.kind, part.size, inside)
        network += _sent(part.kind, part.size / inside, math.ceil(part.group / inside))
    seconds: Json = {
        "compute_s": flops / chip.flops,
        "memory_s": traffic / chip.memory_bandwidth,
        "links_s": link / chip.link,
    }
    if network:
        seconds["network_s"] = network / chip.network
    # At best everything overlaps, at worst nothing does.
    seconds["step_s"] = [max(seconds.values()), sum(seconds.values())]
    seconds["fits"] = sum(memory.values()) <= chip.memory
    return seconds


def _sent(kind: str, size: float, group: int) -> float:
    """Bytes that each of a group sends in a ring: the least for a result of so many bytes."""
    return {"all-reduce": 2, "all-gather": 1}[kind] * size * (group - 1) / group
