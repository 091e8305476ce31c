"""The string that transforms are written as: ``random_resized_crop(224)|random_flip()``."""

import ast
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from crate_jax.config import did_you_mean
from crate_jax.data.images import augment
from crate_jax.data.images.decode import MAX_PIXELS
from crate_jax.data.images.randaugment import randaugment, timm_randaugment
from crate_jax.data.images.resize import SUPPORT

Argument = Any  # of a transform, as `ast.literal_eval` reads it: nobody has checked it yet
Transform = functools.partial[np.ndarray]  # called with (image, rng)

TRANSFORMS: dict[str, Callable[..., np.ndarray]] = {
    f.__name__: f
    for f in (
        augment.resize,
        augment.resize_shorter,
        augment.center_crop,
        augment.random_resized_crop,
        augment.random_flip,
        augment.random_affine,
        randaugment,
        timm_randaugment,
        augment.color_jitter,
        augment.random_grayscale,
        augment.random_solarize,
        augment.random_blur,
        augment.random_erasing,
    )
}


def _is_size(value: Argument) -> bool:
    return type(value) is int and 0 < value <= MAX_PIXELS


def _is_between(low: float, high: float, *, above_low: bool = False) -> Callable[[Argument], bool]:
    """True for a finite number in [low, high] or (low, high]."""

    def check(value: Argument) -> bool:
        is_number = type(value) in (int, float) and math.isfinite(value)
        return is_number and (low < value if above_low else low <= value) and value <= high

    return check


def _is_level(value: Argument) -> bool:
    return type(value) is int and 0 <= value <= 255


def _is_one_or_each(check: Callable[[Argument], bool]) -> Callable[[Argument], bool]:
    """True if one value passes a check, or one value for each channel."""

    def checks(value: Argument) -> bool:
        return check(value) or (
            type(value) is tuple and len(value) in (1, 3) and all(map(check, value))
        )

    return checks


def _is_one_or_two_sizes(value: Argument) -> bool:
    if type(value) is not tuple:
        value = (value, value)
    return len(value) == 2 and all(map(_is_size, value)) and value[0] * value[1] <= MAX_PIXELS


# The rule of each argument, in every transform that takes it; some by transform.argument.
_side_or_two = (
    _is_one_or_two_sizes,
    f"a positive whole number of pixels, or (height, width), of at most {MAX_PIXELS} in all",
)
_share = (_is_between(0, 1), "in [0, 1]")
_positive_share = (_is_between(0, 1, above_low=True), "in (0, 1]")
_ratio = (_is_between(0.01, 100), "in [0.01, 100]")
_sigma = (_is_between(0, 100, above_low=True), "in (0, 100] pixels")
_strength = (_is_between(0, 100), "in [0, 100]")
RULES: dict[str, tuple[Callable[[Argument], bool], str]] = {
    "size": _side_or_two,
    "interpolation": (lambda v: type(v) is str and v in SUPPORT, f"one of {', '.join(SUPPORT)}"),
    "antialias": (lambda v: type(v) is bool, "True or False"),
    "probability": _share,
    "min_area": _positive_share,
    "max_area": _positive_share,
    "min_ratio": _ratio,
    "max_ratio": _ratio,
    "degrees": (_is_between(0, 360), "in [0, 360]"),
    "shift": _share,
    "scale": (lambda v: _is_between(0, 1)(v) and v < 1, "in [0, 1)"),
    "shear": (lambda v: _is_between(0, 90)(v) and v < 90, "in [0, 90) degrees"),
    "brightness": _strength,
    "contrast": _strength,
    "saturation": _strength,
    "hue": (_is_between(0, 0.5), "in [0, 0.5]"),
    "threshold": (_is_between(0, 256), "in [0, 256]"),
    "min_sigma": _sigma,
    "max_sigma": _sigma,
    "num_ops": (lambda v: type(v) is int and v >= 0, "a whole number >= 0"),
    "magnitude": (lambda v: type(v) is int and 0 <= v <= 30, "a whole number in 0 … 30"),
    "timm_randaugment.magnitude": (_is_between(0, 10), "in [0, 10]"),
    "magnitude_std": (_is_between(0, 10), "in [0, 10]"),
    "fill": (_is_one_or_each(_is_level), "a level in 0 … 255, or one for each channel"),
    "value": (
        lambda v: (type(v) is str and v == "noise") or _is_one_or_each(_is_level)(v),
        "a level in 0 … 255, one for each channel, or 'noise'",
    ),
    "deviation": (_is_one_or_each(_is_between(0, 255)), "in [0, 255], or one for each channel"),
    "resize_shorter.size": (_is_size, "a positive whole number of pixels"),
}  # fmt: skip


def _broken_rule(name: str, arguments: dict[str, Argument], channels: int | None) -> str | None:
    """The rule that the arguments of a transform break, or None."""
    for key, value in arguments.items():
        holds, rule = RULES.get(f"{name}.{key}") or RULES[key]
        if not holds(value):
            return f"{key} must be {rule}; got {value!r}"
    for low in (key for key in arguments if key.startswith("min_")):
        high = low.replace("min_", "max_")
        if arguments[low] > arguments[high]:
            return f"{low} must be at most {high}; got {arguments[low]} and {arguments[high]}"
    for key in ("fill", "value", "deviation"):
        levels = arguments.get(key)
        if channels and type(levels) is tuple and len(levels) not in (1, channels):
            return f"{key} must have a level for each of {channels} channels; got {levels}"
    if arguments.get("value") == "noise" and np.any(arguments["deviation"]):
        return f"deviation must be 0 if value is 'noise'; got {arguments['deviation']}"
    return None


def parse_transforms(spec: str, field: str, *, channels: int | None = None) -> list[Transform]:
    """The transforms that a pipeline string names, with their arguments bound.

    Args:
        spec: "name(arguments)|name(arguments)"; empty for none.
        field: the name of the string in errors, such as ``data.train_transforms``.
        channels: of the images, if they are known: as many levels may be given.

    Raises:
        KeyError: an unknown transform; the nearest known one is suggested.
        ValueError: a part is not a call with literal arguments, or they do not fit the transform.
    """
    transforms = []
    for part in filter(None, (p.strip() for p in spec.split("|"))):
        try:
            call = ast.parse(part, mode="eval").body
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                raise ValueError(part)
            args = [ast.literal_eval(a) for a in call.args]
            kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except (SyntaxError, ValueError, TypeError) as error:
            raise ValueError(
                f"{field} must be name(arguments)|name(arguments); got {part}. "
                "Write for example resize(224)|random_flip()."
            ) from error
        if call.func.id not in TRANSFORMS:
            raise KeyError(
                f"{field} must name known transforms; got {call.func.id}. "
                + did_you_mean(call.func.id, TRANSFORMS)
            )
        function = TRANSFORMS[call.func.id]
        signature = inspect.signature(function)
        try:
            bound = signature.bind(None, None, *args, **kwargs)
        except TypeError as error:
            options = ", ".join(list(signature.parameters)[2:])
            raise ValueError(f"{field}: {part} does not fit {call.func.id}({options}).") from error
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[2:])
        broken = _broken_rule(call.func.id, arguments, channels)
        if broken:
            raise ValueError(f"{field}: in {part}, {broken}. Correct it.")
        transforms.append(functools.partial(function, **arguments))
    return transforms
