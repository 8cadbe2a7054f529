"""The three tasks again, each in one line: in JAX on a tree, and on the command line on a file."""

import subprocess
import sys
import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fwt
from fwt import converters

net = fwt.Sequential(
    [("first", nn.Dense(64)), nn.relu, ("second", nn.Dense(10)), nn.softmax], input_shape=(10,)
)
variables = net.init(jax.random.key(0), jnp.ones((1, 10)))

# In JAX, each of them a pure function that jit takes:
zeros = fwt.initialize(fwt.initializers.zeros, key=0, where="first/*")(variables)
uniform = fwt.initialize(fwt.initializers.uniform(1.0), key=42, where="first/kernel")(variables)
pruned = jax.jit(fwt.prune(threshold=0.1))(variables)

assert not np.any(zeros["params"]["first"]["kernel"])
assert np.all(uniform["params"]["first"]["kernel"] >= 0)
kept = np.abs(pruned["params"]["first"]["kernel"])
assert np.all((kept == 0) | (kept > np.float32(0.1)))

# On the command line, on files:
folder = Path(tempfile.mkdtemp())
converters.save(folder / "net.keras", net, variables)
for line in (
    "initialize net.keras zeros.keras --initializer zeros --where 'first/*'",
    "initialize net.keras uniform.pt --initializer uniform(1.0) --seed 42 --where first/kernel",
    "prune net.keras pruned.keras --threshold 0.1",
):
    print(f"$ fwt {line}")
    code = "import sys; from fwt.cli import main; main()"
    subprocess.run(
        [sys.executable, "-c", code, *(a.strip("'") for a in line.split())], cwd=folder, check=True
    )
