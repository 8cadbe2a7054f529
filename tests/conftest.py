"""Settings of the whole suite."""

import gc
import itertools
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import jaxlib.version

# The thorough run has Keras on JAX, and XLA as it comes for the transforms and for each layer, as
# users have. The suite has Keras on TensorFlow, an oracle of its own whose operations are compiled
# already, and XLA's older emitters of loops without optimisation, which compile small programs in
# half the time.
if any(word.removeprefix("-m") == "thorough" for word in sys.argv):
    os.environ["FWT_THOROUGH"] = "1"  # which the workers inherit
os.environ.setdefault("KERAS_BACKEND", "jax" if "FWT_THOROUGH" in os.environ else "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # a part of each lowering
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import jax
import pytest
from marks import DRAWS

THOROUGH = "FWT_THOROUGH" in os.environ

# 0.8 rounds to 8 bits twice with the older emitters, 0.11 has them no more. Small programs need not
# be cut into parts that threads compile, but without that the older ones may compute what two
# outputs share for each of them, with other last bits.
if (0, 9) <= jaxlib.version.__version_info__ < (0, 11):
    held = os.environ.get("XLA_FLAGS", "")
    one = "parallel_codegen_split_count=1" if THOROUGH else "use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{held} --xla_cpu_{one}".strip()
    jax.devices()  # reads them. TensorFlow has an XLA of its own, which may not know these.
    os.environ["XLA_FLAGS"] = held

# Of the many objects that tracing makes, few are in circles: looking for these at each 700th costs
# a twentieth of the time.
gc.set_threshold(100_000, 20, 20)

# What one process has compiled, the others of this run need not compile again: in a folder of this
# run, unless the environment names one that outlives it.
_OURS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OURS = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fwt-compiled-")
    jax.config.update("jax_compilation_cache_dir", _OURS)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish():
    """A worker has ten seconds to end, which may be too few for what runs at its exit."""
    running = "coverage" in sys.modules and sys.modules["coverage"].Coverage.current()
    if running:
        running.stop()
        running.save()


def pytest_unconfigure():
    if _OURS:
        shutil.rmtree(_OURS, ignore_errors=True)


# How many examples a property draws: in the suite, in the thorough run of CI, and by hand.
for profile, examples, fixed in (
    ("fwt", 10, True),
    ("thorough", 10 * DRAWS, True),
    ("search", 1000, False),
):
    hypothesis.settings.register_profile(
        profile, deadline=None, max_examples=examples, derandomize=fixed, print_blob=True
    )
hypothesis.settings.load_profile("fwt")


def pytest_configure(config):
    """``pytest -m thorough`` draws more examples of each property too."""
    if THOROUGH and not config.getoption("--hypothesis-profile"):
        hypothesis.settings.load_profile("thorough")


# What may hang on how XLA optimises: both runs have it, the thorough one with the optimised code.
BOTH = ("test_select", "test_prune", "test_tree")
# What else the thorough run compiles as users do: the transforms, and each layer in each framework.
TRANSFORMS, LAYERS = Path(__file__).parent / "fwt", "test_layers"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Properties are part of both runs, and what is compiled in one way stands together."""
    if THOROUGH:
        for item in items:
            prop = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
            if prop or item.path.stem in BOTH:
                item.add_marker(pytest.mark.thorough)
            if item.path.stem == LAYERS or TRANSFORMS in item.path.parents:
                item.add_marker(pytest.mark.optimised)
    items.sort(key=lambda item: item.get_closest_marker("optimised") is not None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What draws without a seed of its own draws the same in any order of the tests."""
    import numpy as np

    random.seed(0)  # which Keras takes its seeds from
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)  # a new process draws this seed too


# Most of the suite's time is XLA's, on programs that run once, and whose results don't hang on the
# last bits or on what the optimised code does with them. What does, or computes much, is marked
# "optimised".
@pytest.fixture(autouse=True)
def _quick_compilation(request):
    quick = not request.node.get_closest_marker("optimised")
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()  # which don't know of this setting


_TESTS = itertools.count()


@pytest.fixture(autouse=True)
def _few_programs():
    """Linux gives a process 65,530 memory maps, of which each compiled program holds some; without
    one, JAX crashes."""
    if next(_TESTS) % 20 == 19 and os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            held = sum(1 for _ in maps)
        if held > 45_000:
            jax.clear_caches()
            gc.collect()


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
