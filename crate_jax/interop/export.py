"""A model, its weights and the scaling of its pixels as one program: StableHLO, by `jax.export`."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from crate_jax.models.classifier import ImageClassifier
from crate_jax.models.language import LanguageModel
from crate_jax.models.parameters import Params, variables_of
from crate_jax.models.stacked import BlockModel
from crate_jax.tasks.pixels import normalize

if TYPE_CHECKING:  # JAX imports it where it is used
    from jax.export import Exported

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
USUAL = ("cpu", "cuda", "tpu")
PIXELS = ("uint8", "float32")  # what a program of images may take
LARGEST = 2**31 - 2**24  # bytes of weights; a file of jax.export or ONNX is smaller than 2 GiB


def export_model(
    model: BlockModel,
    params: Params,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pixels: str = "uint8",
    platforms: Sequence[str] = USUAL,
) -> bytes:
    """A model with its weights as bytes that `jax.export.deserialize` reads, without this package.

    The number of examples is open, and so is the length of a text. XLA computes the attention.
    Dropout is off. The program takes

    - of a model of images, with `mean` and `std`: pixels (B, H, W, c), which it scales;
    - without them: images that are normalised already, float32;
    - of a model of text: token ids (B, N), int32, of which N is at most ``context_length``.

    It returns what a call of the model does, float32: logits, or the features of a model without a
    head. No folder of this machine is named in it.

    Args:
        model: a model of `crate_jax.create_model`.
        params: its parameters; of a model with running statistics its variables.
        mean: of pixels in [0, 1], one value, or one a channel.
        std: likewise.
        pixels: "uint8", in 0 … 255; or "float32", in [0, 1].
        platforms: where it may run, out of `PLATFORMS`.

    Raises:
        ValueError: an argument breaks a rule, the weights take 2 GiB, or flatbuffers is missing.
    """
    how: Any = dict(mean=mean, std=std, pixels=pixels, platforms=platforms)
    return bytes(make_program(model, params, **how).serialize())


def make_program(
    model: BlockModel,
    params: Params,
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    pixels: str,
    platforms: Sequence[str],
) -> "Exported":
    """`export_model` before it becomes bytes."""
    require_flatbuffers()
    unknown = sorted({*platforms} - {*PLATFORMS})
    if unknown or not platforms:
        raise ValueError(
            f"platforms must be out of {', '.join(PLATFORMS)}; got {', '.join(unknown) or 'none'}. "
            "Choose some."
        )
    check_export(model, params, mean, std, pixels)
    compute = jax.jit(applied(model, params, mean, std))
    inputs = _inputs(model, "float32" if mean is None else pixels)
    with _without_places():
        return jax.export.export(compute, platforms=tuple(platforms))(inputs)


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Keep the folders of this machine, and the calls that led here, out of the programs made."""
    wanted = {
        "jax_hlo_source_file_canonicalization_regex": ".*/",  # what is cut off
        "jax_include_full_tracebacks_in_locations": False,
    }
    before = {name: jax.config.values[name] for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def applied(
    model: BlockModel, params: Params, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Callable[[Array], Array]:
    """From what a program takes to what it returns, by no kernel and no machine's own choice."""
    variables = variables_of(params)
    fields: dict[str, Any] = {"scan_unroll": model.scan_unroll or 1}
    if hasattr(model, "attention_kernel"):
        fields["attention_kernel"] = "xla"
    portable = model.clone(**fields)

    def compute(inputs: Array) -> Array:
        if mean is not None and std is not None:
            inputs = scaled(inputs, tuple(mean), tuple(std))
        return portable.apply(variables, inputs, train=False)  # type: ignore[return-value]

    return compute


def scaled(images_BxHxWxc: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """(x − mean) / std of pixels x in [0, 1]; those of uint8 are divided by 255 before."""
    if images_BxHxWxc.dtype == jnp.uint8:
        return normalize(images_BxHxWxc, mean=mean, std=std)
    c = images_BxHxWxc.shape[-1]
    mean_c, std_c = (jnp.broadcast_to(jnp.float32(v), (c,))[None, None, None] for v in (mean, std))
    return (images_BxHxWxc - mean_c) / std_c


def require_flatbuffers() -> None:
    """Refuse to go on without the package that JAX writes programs with.

    Raises:
        ValueError: it is missing.
    """
    import jax.export  # noqa: F401, which `import jax` does not do

    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "export must have flatbuffers, with which JAX writes programs; it is missing. "
            "Install it: pip install 'crate-jax[export]'"
        ) from error


def check_export(
    model: BlockModel,
    params: Params,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    pixels: str,
) -> None:
    """Refuse what no file can be made of.

    Raises:
        ValueError: an argument breaks a rule.
    """
    if not isinstance(model, ImageClassifier | LanguageModel):
        raise ValueError(
            f"model must take images or text to be exported; got a {type(model).__name__}. Export "
            "a function of yours that calls it, by jax.export."
        )
    if pixels not in PIXELS:
        raise ValueError(f"pixels must be {' or '.join(PIXELS)}; got {pixels}. Choose one.")
    if (mean is None) != (std is None):
        raise ValueError("mean must go with std; got one of them alone. Give both, or neither.")
    if std is not None and not min(std, default=0) > 0:
        raise ValueError(f"std must be > 0; got {std}. Give that of pixels in [0, 1].")
    if mean is not None and not isinstance(model, ImageClassifier):
        raise ValueError(
            f"mean and std must go with a model of images; got a {type(model).__name__}. "
            "Leave them out."
        )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if size > LARGEST:
        raise ValueError(
            f"the weights must take at most {LARGEST} bytes, for the file must be smaller than "
            f"2 GiB; got {size}. Export a smaller model."
        )


def _inputs(model: BlockModel, pixels: str) -> jax.ShapeDtypeStruct:
    """The inputs of the program; B and N are symbols."""
    if isinstance(model, ImageClassifier):
        (B,) = jax.export.symbolic_shape("B")
        return jax.ShapeDtypeStruct((B, *model.input_shape), jnp.dtype(pixels))
    limits = [f"N <= {model.context_length}"]  # type: ignore[attr-defined]
    return jax.ShapeDtypeStruct(jax.export.symbolic_shape("B, N", constraints=limits), jnp.int32)
