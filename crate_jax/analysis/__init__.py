"""Looking inside a trained CRATE: named tensors and the objective, layer by layer."""

from crate_jax.analysis.decoder import DecoderLayers
from crate_jax.analysis.layerwise import layerwise
from crate_jax.analysis.measure import measure
from crate_jax.analysis.measured import Measured, measured_of
from crate_jax.analysis.taps import taps
from crate_jax.analysis.verdict import verdict

__all__ = ["DecoderLayers", "Measured", "layerwise", "measure", "measured_of", "taps", "verdict"]
