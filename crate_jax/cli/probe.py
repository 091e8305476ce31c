"""The commands `knn` and `probe`: what frozen features know of the classes."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from crate_jax.cli.arguments import Subparsers
from crate_jax.cli.frozen import add_frozen, measured
from crate_jax.files import Json

if TYPE_CHECKING:  # imported where it is used
    from crate_jax.evaluation.features import Features


def add_knn(subparsers: Subparsers) -> None:
    """The flags of `knn`."""
    parser = add_frozen(
        subparsers,
        "knn",
        "top-1 and top-5 of nearest neighbours on frozen features",
        "knn --workdir=runs/digits --k 10 20 --baselines pixels random",
    )
    parser.add_argument("--k", nargs="+", type=int, help="neighbours; default: 10 20 100 200")
    parser.add_argument("--temperature", type=float, help="temperature of the votes; default: 0.07")
    parser.add_argument("--form", help="form of the votes: dino (the default), or dinov2")
    parser.set_defaults(function=knn)


def knn(args: argparse.Namespace) -> Json:
    """Weighted votes of the nearest training rows, over the evaluation split."""
    from crate_jax.evaluation.knn import knn as measure

    options = _given(ks=args.k, temperature=args.temperature, form=args.form)
    return measured(args, lambda train, test, seed: measure(train, test, **options))


def add_probe(subparsers: Subparsers) -> None:
    """The flags of `probe`."""
    parser = add_frozen(
        subparsers,
        "probe",
        "top-1 of simple classifiers on frozen features",
        "probe --workdir=runs/digits --classifiers linear fewshot",
    )
    parser.add_argument(
        "--classifiers",
        nargs="+",
        default=["linear"],
        choices=CLASSIFIERS,
        metavar="NAME",
        help="linear (default), fewshot, subspace, svm",
    )
    parser.add_argument("--solver", help="solver of linear: auto (the default), lbfgs, or sgd")
    parser.add_argument("--epochs", type=int, help="epochs of --solver sgd; default: 100")
    parser.add_argument(
        "--shots", nargs="+", type=int, help="images a class for fewshot; default: 1 5 10 25"
    )
    parser.add_argument("--l2", nargs="+", type=float, help="penalty of fewshot; default: 1024")
    parser.add_argument(
        "--components",
        type=int,
        help="dimensions of subspace, a class; default: all values, shared out",
    )
    parser.add_argument("--C", type=float, help="C of svm, as scikit-learn's; default: 1")
    parser.set_defaults(function=probe)


def probe(args: argparse.Namespace) -> Json:
    """Classifiers on the features of the training split, over the evaluation split."""
    _check(args)
    classifiers = {name: CLASSIFIERS[name](args) for name in args.classifiers}

    def measure(train: "Features", test: "Features", seed: int) -> dict[str, float]:
        return {
            f"{kind}/{name}": value
            for kind, classifier in classifiers.items()
            for name, value in classifier(train, test, seed=seed).items()
        }

    return measured(args, measure)


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that nothing would read."""
    for name, flags in FLAGS.items():
        for flag in flags:
            if getattr(args, flag) is not None and name not in args.classifiers:
                raise ValueError(
                    f"--{flag} must go with --classifiers {name}; got "
                    f"{' '.join(args.classifiers)}. Leave it out, or add {name}."
                )
    if args.epochs is not None and args.solver != "sgd":
        raise ValueError(
            f"--epochs must go with --solver sgd; got {args.solver or 'auto'}. Leave it out."
        )


def _linear(args: argparse.Namespace) -> Callable[..., dict[str, float]]:
    """`linear_probe` with the flags' options."""
    from crate_jax.evaluation.linear import linear_probe

    options = _given(solver=args.solver, epochs=args.epochs)
    return lambda train, test, seed: linear_probe(train, test, seed=seed, **options)


def _fewshot(args: argparse.Namespace) -> Callable[..., dict[str, float]]:
    """`fewshot` with the flags' options."""
    from crate_jax.evaluation.fewshot import fewshot

    options = _given(shots=args.shots, l2=args.l2)
    return lambda train, test, seed: fewshot(train, test, seed=seed, **options)


def _subspace(args: argparse.Namespace) -> Callable[..., dict[str, float]]:
    """`subspace_probe` with the flags' options."""
    from crate_jax.evaluation.subspaces import subspace_probe

    options = _given(components=args.components)
    return lambda train, test, seed: subspace_probe(train, test, **options)


def _svm(args: argparse.Namespace) -> Callable[..., dict[str, float]]:
    """`svm_probe` with the flags' options."""
    from crate_jax.evaluation.subspaces import svm_probe

    options = _given(C=args.C)
    return lambda train, test, seed: svm_probe(train, test, **options)


# By name: from the flags to a function of (train, test, seed=), whose numbers have own names.
CLASSIFIERS: dict[str, Callable[[argparse.Namespace], Callable[..., dict[str, float]]]] = {
    "linear": _linear,
    "fewshot": _fewshot,
    "subspace": _subspace,
    "svm": _svm,
}


# The flags that each of them reads.
FLAGS: dict[str, tuple[str, ...]] = {
    "linear": ("solver", "epochs"),
    "fewshot": ("shots", "l2"),
    "subspace": ("components",),
    "svm": ("C",),
}


def _given(**options: Any) -> dict[str, Any]:
    """The options that a flag states."""
    return {name: value for name, value in options.items() if value is not None}
