"""Settings of the whole suite."""

import os
import shutil
import tempfile

# Keras is imported on its JAX backend; the other backends are tested in processes of their own.
os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest

# What one process has compiled, the others of this run need not compile again: in a folder of this
# run, unless the environment names one that outlives it.
_OURS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OURS = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fwt-compiled-")
    jax.config.update("jax_compilation_cache_dir", _OURS)


def pytest_unconfigure():
    if _OURS:
        shutil.rmtree(_OURS, ignore_errors=True)


hypothesis.settings.register_profile(
    "fwt", deadline=None, max_examples=30, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("fwt")


# Whose time is mostly XLA's, on programs that run once, and whose results don't hang on the last
# bits or on what the optimised code does with them. What does, or computes much, is marked
# "optimised".
QUICK = (
    "test_constraints", "test_convert", "test_formats", "test_initializers", "test_layers",
    "test_linen", "test_live", "test_nnx", "test_onnx", "test_optim", "test_patterns", "test_reset",
    "test_scores", "test_sidecar", "test_sparsegpt", "test_sparsify", "test_verify",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_compilation(request):
    name = request.module.__name__.rpartition(".")[2]
    marked = request.node.get_closest_marker("optimised")
    quick = name in QUICK and not marked
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()  # which don't know of this setting


@pytest.fixture
def params():
    """A small tree with names that sort unnaturally."""
    import numpy as np

    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "dense_10": {"kernel": draw(5, 4), "bias": draw(4)},
        "dense_2": {"kernel": draw(4, 3), "bias": draw(3)},
        "norm": {"scale": draw(4), "bias": draw(4)},
        "embed": {"embedding": draw(7, 5)},
    }
