"""``fwt demo``: the whole path on real data.

scikit-learn's digits; a small conv net trained in a jitted optax loop under a max-norm constraint
while it is pruned gradually to 90 %; written as .keras, .safetensors and .pt; opened again by real
Keras and real PyTorch.
"""

import os
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fwt
from fwt import layers as fl

SPARSITY = 0.9
EPOCHS = {"dense": 12, "gradual": 12, "fixed": 12}
BATCH = 64


def network() -> fwt.Sequential:
    """A conv net for 8 x 8 grey digits."""
    return fwt.Sequential(
        [
            ("conv_1", nn.Conv(16, (3, 3))),
            ("norm", nn.BatchNorm(momentum=0.9)),
            ("relu_1", fl.ReLU()),
            ("pool", fl.MaxPool((2, 2))),
            ("conv_2", nn.Conv(32, (3, 3))),
            ("relu_2", fl.ReLU()),
            ("flatten", fl.Flatten()),
            ("dropout", nn.Dropout(0.2)),
            ("dense_1", nn.Dense(64)),
            ("relu_3", fl.ReLU()),
            ("dense_2", nn.Dense(10)),
        ],
        input_shape=(8, 8, 1),
    )


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, test images and labels: (n, 8, 8, 1) floats in [0, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images[..., None] / 16.0).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], data.target[order].astype(np.int32)
    cut = len(images) * 4 // 5
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def steps_of(epochs: int) -> int:
    """How many updates these epochs make."""
    return epochs * (len(digits()[0]) // BATCH)


def fit(tx: Any, epochs: int, each: Any = None) -> fwt.Model:
    """The net trained by an optimizer; ``each(epoch, variables)`` is called before each epoch."""
    images, labels, _, _ = digits()
    module = network()
    batches = len(images) // BATCH

    @jax.jit
    def epoch(carry: Any, key: Any) -> tuple[Any, Any]:
        order = jax.random.permutation(key, len(images))[: batches * BATCH]
        order = order.reshape(batches, BATCH)

        def step(carry: Any, index: Any) -> tuple[Any, Any]:
            params, stats, state, count = carry

            def loss(p: Any) -> tuple[Any, Any]:
                logits, new = module.apply(
                    {"params": p, "batch_stats": stats},
                    jnp.asarray(images)[index],
                    train=True,
                    mutable=["batch_stats"],
                    rngs={"dropout": jax.random.fold_in(key, count)},
                )
                wanted = jnp.asarray(labels)[index]
                each = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
                return each.mean(), new["batch_stats"]

            (value, new_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, new_state = tx.update(grads, state, params)
            new = optax.apply_updates(params, updates)
            return (new, new_stats, new_state, count + 1), value

        return jax.lax.scan(step, carry, order)

    variables = module.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    params, stats = variables["params"], variables["batch_stats"]
    carry = (params, stats, tx.init(params), jnp.zeros((), jnp.int32))
    for index in range(epochs):
        if each is not None:
            each(index, {"params": carry[0], "batch_stats": carry[1]})
        carry, _ = epoch(carry, jax.random.key(index + 1))
        jax.block_until_ready(carry)
    return fwt.Model(module, jax.device_get({"params": carry[0], "batch_stats": carry[1]}))


def train(tick: Any) -> tuple[fwt.Model, fwt.Model]:
    """The dense and the sparse model, from one run; ``tick()`` is called for each epoch."""
    total = sum(EPOCHS.values())
    begin, end = steps_of(EPOCHS["dense"]), steps_of(EPOCHS["dense"] + EPOCHS["gradual"])
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps_of(total), 0.02))
    # The whole of fwt in a training loop: two wrappers around any optimizer.
    sparse = fwt.optim.sparsify(
        adam, fwt.schedules.cubic(SPARSITY, begin, end), scope="global", every=10
    )
    tx = fwt.optim.constrain(sparse, fwt.project(fwt.constraints.max_norm(3.0)))
    dense = {}

    def each(index: int, variables: Any) -> None:
        tick()
        if index == EPOCHS["dense"]:
            dense.update(jax.device_get(variables))

    model = fit(tx, total, each)
    return fwt.Model(model.module, dense), model


def accuracy(model: fwt.Model) -> float:
    """The share of test images that it reads rightly."""
    _, _, images, labels = digits()
    return float(np.mean(np.argmax(np.asarray(model(images)), -1) == labels))


def reopened(model: fwt.Model, folder: Path) -> dict[str, np.ndarray]:
    """The test predictions of the three files, each from its own framework."""
    from fwt import converters

    _, _, images, _ = digits()
    for suffix in ("keras", "safetensors", "pt"):
        converters.save(folder / f"digits.{suffix}", *model)
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras
    import torch

    out = {
        "Flax (digits.safetensors)": np.asarray(
            converters.load(folder / "digits.safetensors")(images)
        )
    }
    in_keras = keras.models.load_model(folder / "digits.keras")
    out["Keras (digits.keras)"] = np.asarray(in_keras.predict(images, verbose=0))
    # What a user of PyTorch does: build the net, load the state dict.
    in_torch = converters.to_torch(*model)
    in_torch.load_state_dict(torch.load(folder / "digits.pt", weights_only=True))
    with torch.no_grad():
        first = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        out["PyTorch (digits.pt)"] = in_torch(first).numpy()
    return out


def picture(dense: fwt.Model, sparse: fwt.Model, path: Path) -> None:
    """The weights before and after, one cell a weight, black where it is exactly zero."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    shown = {"conv_1": "convolution 1", "conv_2": "convolution 2",
             "dense_1": "dense 1", "dense_2": "dense 2 (output)"}  # fmt: skip
    limits: dict[str, float] = {}
    rows = (("Before pruning", dense), (f"Pruned to {SPARSITY:.0%} zeros", sparse))
    figure, axes = plt.subplots(2, len(shown), figsize=(10.5, 6.2), layout="constrained")
    # Few colours, so that the file stays small.
    colours = plt.get_cmap("RdBu", 9).with_extremes(bad="black")
    for row, (title, model) in enumerate(rows):
        kernels = {n: np.asarray(x) for n, x in fwt.select(model, fwt.kernels).items()}
        for column, (layer, name) in enumerate(shown.items()):
            kernel, panel = kernels[f"{layer}/kernel"], axes[row, column]
            weights = kernel.reshape(-1, kernel.shape[-1])
            if row == 0:  # one scale for both rows: the same colour is the same value
                limits[layer] = float(np.quantile(np.abs(weights), 0.99))
            limit = limits[layer]
            panel.imshow(
                np.ma.masked_equal(weights, 0.0), cmap=colours, vmin=-limit, vmax=limit,
                aspect="auto", interpolation="nearest",
            )  # fmt: skip
            share = f"{np.mean(weights == 0):.0%} of {weights.size:,} are zero"
            panel.set_title(share if row else f"{name}\n{share}", fontsize=10)
            panel.set_xticks([0, weights.shape[1] - 1], ["1", str(weights.shape[1])])
            panel.set_yticks([0, len(weights) - 1], ["1", str(len(weights))])
            panel.set_xlabel("output unit", labelpad=-6)
            panel.set_ylabel("input", labelpad=-8)
        zeros = sum(int((x == 0).sum()) for x in kernels.values())
        total = sum(x.size for x in kernels.values())
        said = (
            f"{title}\naccuracy {accuracy(model):.1%} on test digits\n"
            f"{zeros:,} of {total:,} weights are zero"
        )
        axes[row, 0].annotate(said, (-0.4, 0.5), xycoords="axes fraction", rotation=90,
                              ha="center", va="center", fontsize=10)  # fmt: skip
    figure.suptitle("The weights of a digit classifier, before and after pruning", fontsize=13)
    keys = (("black", "exactly zero"), (colours(0.2), "negative"),
            (colours(0.5), "near zero"), (colours(0.8), "positive"))  # fmt: skip
    figure.legend(
        handles=[Patch(facecolor=c, edgecolor="grey", label=label) for c, label in keys],
        loc="outside lower center", ncols=len(keys), frameon=False,
        title="Each cell is one weight.",
    )  # fmt: skip
    figure.savefig(path, dpi=90)
    plt.close(figure)


def run(folder: Path) -> dict[str, float]:
    """The demo; prints its tables and returns its figures."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    start = time.perf_counter()
    console = Console()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fwt.FileFormatError(f"{folder}: can't make this folder ({error.strerror})") from error
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training and pruning", total=sum(EPOCHS.values()))
        dense, sparse = train(lambda: progress.advance(task))
    outputs = reopened(sparse, folder)
    picture(dense, sparse, folder / "weights.png")
    figures = {"dense": accuracy(dense), "sparse": accuracy(sparse)}

    console.print()
    table = Table(title="scikit-learn digits, 360 test images", title_justify="left", box=None)
    for column in ("model", "accuracy", "kernel weights", "zeros"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name, model in (("dense", dense), ("sparse", sparse)):
        kernels = [np.asarray(x) for x in fwt.select(model, fwt.kernels).values()]
        total, zeros = sum(x.size for x in kernels), sum(int((x == 0).sum()) for x in kernels)
        table.add_row(
            name, f"{figures[name]:.1%}", f"{total:,}", f"{zeros:,} ({zeros / total:.1%})"
        )
    console.print(table)
    console.print()
    console.print(fwt.summary(sparse), highlight=False)

    console.print()
    table = Table(title="The sparse model in three frameworks", title_justify="left", box=None)
    for column in ("read by", "accuracy", "largest difference from Flax"):
        table.add_column(column, justify="left" if column == "read by" else "right", no_wrap=True)
    _, _, _, labels = digits()
    truth = outputs["Flax (digits.safetensors)"]
    figures["difference"] = max(float(np.abs(o - truth).max()) for o in outputs.values())
    for name, output in outputs.items():
        right = float(np.mean(np.argmax(output, -1) == labels))
        table.add_row(name, f"{right:.1%}", f"{float(np.abs(output - truth).max()):.1e}")
    console.print(table)
    figures["seconds"] = time.perf_counter() - start
    console.print(
        f"\nModels and weights.png are in {folder}/; {figures['seconds']:.0f} s in all.",
        highlight=False,
        soft_wrap=True,
    )
    return figures
