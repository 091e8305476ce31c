"""The optional extras of the package: what each is for, and which of its packages are missing."""

from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

PACKAGE = "crate-jax"

# By extra: the commands and settings that need it. Extras for work on the code are left out.
USES = {
    "cuda": "NVIDIA GPUs",
    "tpu": "TPUs",
    "tpu-compiler": "plan --topology=v5e:4x4 and other TPUs",
    "cuda-compiler": "plan --topology of GPUs",
    "gcs": "paths that begin with gs://",
    "s3": "paths that begin with s3://",
    "text": "tokenizers other than bytes; generate",
    "torch": "PyTorch files, compare",
    "plot": "curves of layers while a run trains",
    "report": "report, figure, compare --html",
    "export": "export",
    "onnx": "crate_jax.export_onnx",
    "wandb": "--config.loggers=wandb",
    "trackio": "--config.loggers=trackio",
    "segment": "segment --annotations",
}


def missing(
    extra: str, package: str = PACKAGE, seen: frozenset[tuple[str, str]] = frozenset()
) -> list[str]:
    """The packages of an extra that are not installed, or not in a version that is wanted.

    Args:
        extra: the extra of the package.
        package: an installed one. Of another, nothing says what its extras are.
        seen: extras that are being looked at, by package: an extra may name another, and that one
            the first.

    Returns:
        One requirement each, as pip takes it; sorted.
    """
    if (package, extra) in seen:
        return []
    seen |= {(package, extra)}
    found = []
    for line in _requires(package):
        try:
            wanted = Requirement(line)
        except InvalidRequirement:  # another package's metadata may be older than the rules
            continue
        # The requirements of the extra alone; the rest is installed with the package.
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            continue
        if not wanted.marker.evaluate({"extra": extra}):
            continue
        installed = version(wanted.name)
        if installed is None or not wanted.specifier.contains(installed, prereleases=True):
            found.append(f"{wanted.name}{wanted.specifier}")
        for inner in sorted(wanted.extras):
            found += missing(inner, wanted.name, seen)
    return sorted(set(found))


def version(package: str) -> str | None:
    """The installed version of a package; None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requires(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
