"""Text that comes with Python: a language model that needs no download.

A small causal CRATE learns the bytes of Python's own documentation, the topics of `help`
(pydoc_data.topics, 465 kB). Some of the topics are held out, none of which shares a paragraph with
those of training. On a machine with two cores it takes about two minutes:

    python train.py --config=configs/text.py --workdir=runs/text
    python -m crate_jax generate --workdir=runs/text --prompt="The for statement" --tokens=300

The first ends with the loss and the bits per byte of the held-out text, the second with a sample.
Expected: 2.55 bits per byte, where a unigram model of the same text has 4.72 and a bigram model
3.19 (benchmarks/text_baselines.py; Python 3.11).
"""

from crate_jax.config import DataConfig, ModelConfig, OptimConfig, TextConfig, TrainConfig, choose

RECIPES = {
    "crate": dict(name="crate_causal_base"),
}


def get_config(arg: str | None = None) -> TrainConfig:
    """The recipe of a form of `RECIPES`."""
    model = choose(arg, RECIPES, "crate")
    return TrainConfig(
        name="text",
        task="next_token",
        batch_size=16,
        eval_batch_size=32,
        total_steps=2000,
        log_every_steps=100,
        eval_every_steps=500,
        model=ModelConfig(
            context_length=128, vocab_size=257, width=128, depth=4, num_heads=4, **model
        ),
        data=DataConfig(dataset="pydoc"),
        text=TextConfig(tokenizer="bytes"),
        optim=OptimConfig(lr=3e-3, b2=0.95, weight_decay=0.01, warmup_epochs=0.5, clip_norm=1.0),
    )
