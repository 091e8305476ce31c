"""Official names and shapes: one file a family, one table a layout, used in both directions."""

from crate_jax.interop.layouts import (
    crate,
    crate_alpha,
    crate_bert,
    crate_causal,
    crate_mae,
    hyper_set,
    tost,
    tost_lm,
    vit,
)
from crate_jax.interop.layouts.layout import Layout

# By family. PyTorch files are written in the
# first layout that PyTorch has.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "crate": crate.LAYOUTS,
    "crate_alpha": crate_alpha.LAYOUTS,
    "vit": vit.LAYOUTS,
    "crate_causal": (crate_causal.CAUSAL,),
    "crate_lm": (crate_causal.LM,),
    "crate_bert": crate_bert.LAYOUTS,
    "tost_lm": tost_lm.LAYOUTS,
    "hyper_set": hyper_set.LAYOUTS,
    "tost": tost.LAYOUTS,
    "crate_mae": crate_mae.LAYOUTS,
}
