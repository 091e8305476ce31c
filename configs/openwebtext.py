"""Causal CRATE on OpenWebText: ``openwebtext.py:SIZE`` of base (the default), medium, large, xl.

Source (arXiv 2311.13110): batch 384 of 1,024 tokens, 600,000 steps, Adam with betas 0.9 and 0.95,
weight decay 0.1, rate 6e-4 by a cosine to 6e-5 after 2,000 steps of warm-up. As in the official
code, arrays of two axes and more decay, and dictionaries and embeddings are among them.

The data are the token files train.bin and val.bin that nanoGPT's data/openwebtext/prepare.py
writes, in data.data_dir. With ``--config.text.tokenizer=openai-community/gpt2`` there are bits per
byte too, and `generate` takes text.

Expected: base reaches a loss of 3.37 nats a token on OpenWebText. Not yet run here.
"""

from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TextConfig, TrainConfig, choose

STEPS, WARMUP, BATCH, CONTEXT = 600_000, 2_000, 384, 1_024
# Steps of an epoch; nanoGPT's prepare.py counts the tokens of train.bin.
EPOCH = 9_035_582_198 // CONTEXT // BATCH

RECIPES = {size: size for size in ("base", "medium", "large", "xl")}


def get_config(arg: str | None = None) -> TrainConfig:
    """The recipe for a size."""
    size = choose(arg, RECIPES, "base")
    return TrainConfig(
        name=f"openwebtext_{size}",
        task="next_token",
        batch_size=BATCH,
        eval_batch_size=BATCH,
        total_steps=STEPS,
        log_objective_every_steps=5_000,
        eval_every_steps=5_000,
        model=ModelConfig(name=f"crate_causal_{size}", context_length=CONTEXT, dtype="bfloat16"),
        data=DataConfig(dataset="tokens", eval_split="val", num_workers=4),
        text=TextConfig(tokenizer=None),
        optim=OptimConfig(
            lr=6e-4,
            end_lr=6e-5,
            warmup_epochs=WARMUP / EPOCH,
            weight_decay=0.1,
            decay_only=("U", "W_out", "D", "tokens", "positions"),
            b2=0.95,
        ),
    )
