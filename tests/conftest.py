"""Settings of the whole suite."""

import os

# Keras is imported on its JAX backend; the other backends are tested in processes of their own.
os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "fwt", deadline=None, max_examples=30, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("fwt")


# Whose time is mostly XLA's, on programs that run once, and whose results don't hang on the last
# bits or on what the optimised code does with them.
QUICK = ("test_convert", "test_formats", "test_initializers", "test_linen", "test_live", "test_nnx",
         "test_onnx", "test_optim", "test_patterns", "test_reset", "test_scores", "test_sidecar",
         "test_sparsegpt", "test_sparsify", "test_verify")  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation(request):
    name = request.module.__name__.rpartition(".")[2]
    jax.config.update("jax_disable_most_optimizations", name in QUICK)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
