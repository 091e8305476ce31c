"""The command `generate`: a text that a model continues."""

import argparse
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from crate_jax.cli.arguments import Subparsers, add_model_kwargs, named_model, path, saved_run
from crate_jax.config import TextConfig
from crate_jax.files import Json
from crate_jax.waiting import counting

if TYPE_CHECKING:  # imported where they are used
    from crate_jax.data.text.tokenizers import Tokenizer
    from crate_jax.models.parameters import Params

TASK = "next_token"


class _Opened(NamedTuple):
    """A model with its parameters, its tokenizer, and the step of a run."""

    model: Any
    params: "Params"
    tokenizer: "Tokenizer"
    step: int | None


def add_generate(subparsers: Subparsers) -> None:
    """The flags of `generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a text with a model of text",
        epilog="generate --workdir=runs/text --prompt='The white box'",
    )
    parser.add_argument("--workdir", type=path, help="a run, here or in a bucket")
    parser.add_argument(
        "--step", help="checkpoint of --workdir: latest (default), best or a number"
    )
    parser.add_argument("--weights", type=path, help="a weights file (with --tokenizer)")
    parser.add_argument("--model", metavar="NAME", help="a model of the zoo, unless --weights says")
    add_model_kwargs(parser)
    parser.add_argument(
        "--tokenizer",
        type=path,
        help="bytes, a tokenizer.json, or a name on huggingface.co; default: the run's",
    )
    parser.add_argument("--end-token", help="its token that ends a text; default: the run's")
    parser.add_argument("--prompt", default="", help="the text to continue; default: a new one")
    parser.add_argument(
        "--tokens", type=int, default=200, help="largest number of added tokens; default: 200"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="temperature; default: 1; 0: the most likely token each time",
    )
    parser.add_argument("--top-k", type=int, help="draw among so many of the most likely tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws; default: 0")
    parser.set_defaults(function=generate)


def generate(args: argparse.Namespace) -> Json:
    """A text and its continuation, up to the token that ends a text."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from crate_jax.models.generation import generate as continue_texts

    _check(args)
    model, params, tokenizer, step = _of_run(args) if args.workdir else _of_weights(args)
    prompt = tokenizer.encode(args.prompt)
    begin = prompt.tolist() or [tokenizer.end]
    drawn = args.temperature > 0
    with counting("generate"):
        found = continue_texts(
            model,
            params,
            jnp.asarray([begin], jnp.int32),
            args.tokens,
            key=jax.random.key(args.seed) if drawn else None,
            temperature=args.temperature if drawn else 1.0,
            top_k=args.top_k,
        )
        added = np.asarray(found)[0, len(begin) :].tolist()
    ended = tokenizer.end in added
    added = added[: added.index(tokenizer.end)] if ended else added
    text = tokenizer.decode([*prompt.tolist(), *added])
    sys.stdout.write(text + "\n")
    return {
        "prompt": args.prompt,
        "text": text,
        "tokens": len(added),
        "ended": ended,
        "step": step,
        "seed": args.seed if drawn else None,
    }


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, and numbers out of range."""
    if bool(args.workdir) == bool(args.weights):
        raise ValueError("generate must get one of --workdir and --weights. See --help.")
    if args.workdir and (args.model or args.model_kwargs):
        raise ValueError("--model must go with --weights; a run knows its own model.")
    if args.weights and (args.step or not args.tokenizer):
        raise ValueError("generate --weights must get --tokenizer, and no --step. See --help.")
    if args.tokens < 1 or not args.temperature >= 0:
        raise ValueError(
            "--tokens must be >= 1 and --temperature >= 0; got "
            f"{args.tokens} and {args.temperature}. See --help."
        )
    if not args.temperature and args.top_k is not None:
        raise ValueError(
            f"--top-k must be left out with --temperature=0; got {args.top_k}. The most likely "
            "token is taken."
        )


def _of_run(args: argparse.Namespace) -> _Opened:
    """The model of --workdir; its data are not opened."""
    import jax

    from crate_jax.checkpoint.reading import restore_trained
    from crate_jax.tasks import NextToken

    config, facts, step = saved_run(args.workdir, args.step or "latest")
    if config.task != TASK:
        raise ValueError(
            f"generate must get a run of the task {TASK}; {args.workdir} is one of {config.task}. "
            "Choose another --workdir."
        )
    config.text.tokenizer = args.tokenizer or config.text.tokenizer
    config.text.end_token = args.end_token or config.text.end_token
    task = NextToken.from_config(config)
    tokenizer = task.tokenizer(facts)
    if tokenizer is None:
        raise ValueError(
            f"--tokenizer must be given for {args.workdir}, which knows of none. Name the one that "
            "its token files were written with."
        )
    shapes, extra = jax.eval_shape(task.init, jax.random.key(0))
    params, _, _ = restore_trained(args.workdir, shapes, extra, step)
    return _Opened(task.model, params, tokenizer, step)


def _of_weights(args: argparse.Namespace) -> _Opened:
    """The model of --weights."""
    from crate_jax.data.text.tokenizers import open_tokenizer
    from crate_jax.interop import load_fitted

    loaded = load_fitted(args.weights, named_model(args, args.weights))
    tokenizer = open_tokenizer(args.tokenizer, args.end_token or TextConfig.end_token)
    return _Opened(loaded.model, loaded.params, tokenizer, None)
