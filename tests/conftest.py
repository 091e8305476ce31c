"""What every test runs under: eight CPU devices, strict array rules, nothing written at home."""

import contextlib
import dataclasses
import gc
import os
import shutil
import tempfile
import uuid

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before the first import of jax

import tracemalloc  # noqa: F401, pytest's hook for what a collected object raises

import emulators
import jax
import pytest
from command import OLD_EMITTERS, OPTIMISED

from crate_jax import Crate
from crate_jax.models import fields, variants
from crate_jax.options import option

# Of the process that starts pytest-xdist's workers, and of these.
OWNER = "CRATE_JAX_TESTS_SCRATCH" not in os.environ
if OWNER:
    os.environ["CRATE_JAX_TESTS_SCRATCH"] = tempfile.mkdtemp(prefix="crate_jax_tests_")
SCRATCH = os.environ["CRATE_JAX_TESTS_SCRATCH"]
# Both libraries read theirs when they are first imported, so they are set here and in no fixture.
os.environ["TFDS_DATA_DIR"] = os.path.join(SCRATCH, "tfds")
os.environ["HF_HOME"] = os.path.join(SCRATCH, "hub")
# For the programs that tests start: jax of this process has read its environment already. Each
# worker has its own: a program that is killed while it writes leaves half a file to the others.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(SCRATCH, "compiled", WORKER)

# While TFDS is imported, all imports are lazy, also those of whatever is collected meanwhile; so it
# comes first, and so does what pytest would import then.
import tensorflow_datasets  # noqa: E402, F401

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_disable_most_optimizations", not OPTIMISED)
if not OPTIMISED:  # XLA reads its flags when the first array is made
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {OLD_EMITTERS}".strip()


def pytest_collection_finish():
    """Let Python's collector of garbage look less often, and not at what the libraries made.

    Tracing makes many objects, and each of its looks went through a million of theirs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_unconfigure():
    if OWNER:
        shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def services():
    """Emulators of Google's and of S3's buckets, to which the variables of this process lead."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for kind in emulators.VARIABLES:
            for name, value in stack.enter_context(emulators.running(kind)).items():
                patch.setenv(name, value)
        yield


@pytest.fixture(params=emulators.VARIABLES)
def bucket(request, services, tmp_path, monkeypatch):
    """A new folder in a bucket, as text; what is read of it is kept in the test's own folder."""
    monkeypatch.setenv("CRATE_JAX_CACHE", str(tmp_path / "cache"))
    return f"{request.param}://{emulators.BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture
def optimised():
    """With the passes that users compile with, for as long as a test runs."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def tiny_model():
    """17 tokens of width 24, three layers, three subspaces of dimension 8."""
    return Crate(image_size=16, patch_size=4, num_classes=7, width=24, depth=3, num_heads=3)


@pytest.fixture(scope="session")
def tiny_images():
    return jax.random.normal(jax.random.key(11), (2, 16, 16, 3))


@pytest.fixture(scope="session")
def photographs():
    """The two photographs that scikit-learn ships, (427, 640, 3) uint8."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


@pytest.fixture(scope="session")
def tiny_params(tiny_model, tiny_images):
    init = jax.jit(lambda key: tiny_model.init(key, tiny_images, train=False)["params"])
    return init(jax.random.key(12))


@pytest.fixture(scope="session")
def equations():
    """A function: every equation of a jaxpr and how often one run executes it, loops unrolled.

    Of what depends on the platform those of any other platform than the named ones.
    """

    def walk(jaxpr, times=1):
        for equation in jaxpr.eqns:
            yield equation, times
            inside = times * equation.params.get("length", 1)
            values = [*equation.params.values()]
            if platforms := equation.params.get("branches_platforms"):
                values = [equation.params["branches"][platforms.index(None)]]
            for value in values:
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from walk(inner, inside)

    return walk


@pytest.fixture
def other_family(monkeypatch):
    """A second family of models, with a ratio and without eta, and one model: other_tiny."""

    @dataclasses.dataclass(eq=False, repr=False)
    class OtherFields(fields.ImageFields):
        ratio: int = option(4, "the width of something", low=1)

    row = dict(patch_size=16, width=8, depth=1, num_heads=2)
    monkeypatch.setitem(fields.FAMILIES, "other", OtherFields)
    monkeypatch.setitem(variants.VARIANTS, "other_tiny", variants.Variant("other", row))
