"""What a transform in a training loop costs: ``python tests/benchmarks/training.py``.

A step of Adam on four layers of 1024 x 1024 and a batch of 256, in a loop of torch, and by Keras's
``fit`` on each of its backends, in a process each. Steps with and without the transform take
turns; what is shown is the median of the ratios of such pairs. ``--write`` puts the table into
the guide.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np
import pages

WIDTH, DEPTH, BATCH, ROUNDS = 1024, 4, 256, 15
BACKENDS = ("tensorflow", "jax", "torch")
X = np.random.default_rng(0).normal(size=(BATCH * 6, WIDTH)).astype(np.float32)


def ratios(plain, others):
    """By name, the median of the time of each over that of ``plain``, measured in turn."""
    for run in (plain, *others.values()):
        run()
    found = {name: [] for name in others}
    for _ in range(ROUNDS):
        for name, run in others.items():
            took = []
            for each in (plain, run):
                begun = time.perf_counter()
                each()
                took.append(time.perf_counter() - begun)
            found[name].append(took[1] / took[0])
    return {name: statistics.median(values) for name, values in found.items()}


def in_torch():
    import torch
    from torch.nn.utils import prune

    import fwt
    from fwt import converters

    x = torch.from_numpy(X[:BATCH])

    def loop(prepare=lambda net, adam: None):
        net = torch.nn.Sequential(
            *(m for _ in range(DEPTH) for m in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()))
        )
        adam = torch.optim.Adam(net.parameters(), 1e-4)
        prepare(net, adam)

        def step():
            for _ in range(3):
                adam.zero_grad()
                net(x).square().mean().backward()
                adam.step()

        return step

    def hooks(net, adam):
        for layer in net[::2]:
            prune.l1_unstructured(layer, "weight", 0.8)

    def masks(net, adam):
        converters.hold(net, adam, fwt.apply_masks(fwt.masks(0.8)(net)))

    def norms(net, adam):
        converters.hold(net, adam, fwt.project(fwt.constraints.max_norm(1.0)))

    named = {"masks": masks, "torch.nn.utils.prune": hooks, "max_norm": norms}
    return ratios(loop(), {name: loop(prepare) for name, prepare in named.items()})


def in_keras():
    import keras

    import fwt
    from fwt import converters

    def loop(make=lambda net: []):
        net = keras.Sequential([keras.Input((WIDTH,))])
        for _ in range(DEPTH):
            net.add(keras.layers.Dense(WIDTH, "relu"))
        net.compile(keras.optimizers.Adam(1e-4), "mse")
        callbacks = make(net)
        return lambda: net.fit(X, X, batch_size=BATCH, verbose=0, callbacks=callbacks)

    def masks(net):
        return [converters.Callback(fwt.apply_masks(fwt.masks(0.8)(net)))]

    def norms(net):
        return [converters.Callback(fwt.project(fwt.constraints.max_norm(1.0)))]

    return ratios(loop(), {"masks": loop(masks), "max_norm": loop(norms)})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.of:
        print(json.dumps(in_torch() if given.of == "loop" else in_keras()))
        return
    found = {}
    for of in ("loop", *BACKENDS):
        env = {
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "KERAS_BACKEND": of.replace("loop", "jax"),
        }
        out = subprocess.run(
            [sys.executable, __file__, "--of", of], env=env, check=True, stdout=subprocess.PIPE
        )
        found[of] = json.loads(out.stdout.splitlines()[-1])
    lines = ["", "| | masks | a max-norm | masks by `torch.nn.utils.prune` |", "|---|---|---|---|"]
    for of, row in found.items():
        cells = [f"{row[n]:.2f}" if n in row else "" for n in
                 ("masks", "max_norm", "torch.nn.utils.prune")]  # fmt: skip
        title = "a loop of torch, `hold`" if of == "loop" else f"`fit` on {of}, `Callback`"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if given.write:
        pages.write("speed.md", "training", "\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
