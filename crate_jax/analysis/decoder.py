"""The decoder of CRATE-MAE as a stack that one looks into, as one looks into an encoder."""

import dataclasses
from typing import Any, ClassVar

from jax import Array

from crate_jax.models.block import Part
from crate_jax.models.crate_mae import CrateMae


@dataclasses.dataclass(frozen=True)
class DecoderLayers:
    """A decoder with the interface that measures need of a model.

    Nothing is hidden from the encoder.

    A layer is Z^{l+1/2} = D LN(Z^l), then Z^{l+1} = Z^{l+1/2} − MSSA(LN(Z^{l+1/2})): its attention
    comes last, and undoes a compression.

    Attributes:
        model: an autoencoder with a decoder.
    """

    model: CrateMae

    BLOCKS: ClassVar[tuple[str, ...]] = ("decoder", "blocks")
    SHARED: ClassVar[bool] = False

    @property
    def tap_names(self) -> tuple[str, ...]:
        """The names of the taps of the layers."""
        return self.model.decoder_tap_names

    @property
    def attention_part(self) -> Part:
        """MSSA."""
        return self.model.attention_part

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self.model.decoder_depth

    def block_fields(self) -> dict[str, Any]:
        """The order and the sign of the halves."""
        return {"attention_first": False, "sign": -1}

    def clone(self, **fields: Any) -> "DecoderLayers":
        """With other fields of the model."""
        return DecoderLayers(self.model.clone(**fields))

    def apply(self, variables: Any, images: Array, *, taps: Any, **how: Any) -> Any:
        """Pixels, and the taps; see `crate_jax.models.crate_mae.CrateMae.forward_masked`."""
        how |= dict(method="forward_masked", decoder_taps=taps)
        return self.model.apply(variables, images, None, **how)
