"""Random stacks of layers against the real frameworks.

``python tests/helpers/stacks.py --count 2000`` tries that many.

It goes on where it stopped (``--state``, a JSON file) and prints what it found. Each stack is 2 to
8 layers drawn from the generators of ``layer_cases``, built in the real framework with random
weights; it goes to Flax, back, and to the other framework and back, in every layout where the
order is proved. A refusal counts as such only if a layer's case declares it, or if it is one of
the walk's own (``WALK``).
"""

import argparse
import json
import re
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

# What the walk itself may refuse in a stack.
WALK = (
    "depends on the input's size|is too small for it|does not fit|proves which of the|"
    "the input is smaller"
)


def build(source, seed):
    """A stack: its input shape, the model and the patterns of refusals that are right."""
    import cases
    import keras
    import layer_cases
    import torch

    rng = np.random.default_rng(zlib.crc32(f"{source} {seed}".encode()))
    table = layer_cases.TORCH if source == "torch" else layer_cases.KERAS
    names = [n for n, c in table.items() if not c.integers]
    wanted = int(rng.integers(2, 9))
    rank = int(rng.integers(1, 4))
    size = tuple(int(n) for n in rng.integers(4, 9, size=rank - 1))
    shape = (*size, int(rng.integers(2, 5))) if source == "keras" else (3, *size)
    if source == "torch" and rank == 1:
        shape = (int(rng.integers(4, 9)),)
    layers, refused = [], []
    x = np.zeros((2, *shape), np.float32)
    tries = 0
    while len(layers) < wanted and tries < 400:
        tries += 1
        name = names[rng.integers(len(names))]
        case = table[name]
        given, layer = case.make(rng)
        if len(given) != x.ndim - 1:
            continue
        parts = layer if isinstance(layer, list) else [layer]
        parts = [refit(source, part, x.shape) for part in parts]
        try:
            if source == "torch":
                with torch.no_grad():
                    y = torch.nn.Sequential(*parts).eval()(torch.from_numpy(x)).numpy()
            else:
                y = np.asarray(layer(x))
        except Exception:  # noqa: BLE001 - it does not take this input: draw another
            continue
        if y.size == 0 or y.size > 40_000 or y.ndim > 5 or y.dtype != np.float32:
            continue
        layers += parts
        refused += [case.refused] if case.refused else []
        x = np.ascontiguousarray(y)
    if source == "torch":
        model = cases.randomise_torch(torch.nn.Sequential(*layers), seed)
    else:
        fresh = [type(layer).from_config(layer.get_config()) for layer in layers]
        try:
            model = keras.Sequential([keras.Input(shape), *fresh])
        except ValueError:  # a layer that runs, but that Keras can't build on a symbolic input
            return shape, None, ""
        cases.randomise_keras(model, seed)
    return shape, model, "|".join([WALK, *refused])


def refit(source, layer, shape):
    """A torch layer that says its number of inputs, with that of the tensor before it."""
    import torch

    if source != "torch":
        return layer
    t, channels = torch.nn, shape[1]
    if isinstance(layer, t.Linear):
        return t.Linear(shape[-1], layer.out_features, layer.bias is not None)
    if isinstance(layer, t.modules.conv._ConvTransposeNd):
        return type(layer)(channels, layer.out_channels // layer.groups, layer.kernel_size,
                           layer.stride, layer.padding, layer.output_padding, 1,
                           layer.bias is not None, layer.dilation)  # fmt: skip
    if isinstance(layer, t.modules.conv._ConvNd):
        groups = layer.groups if channels % layer.groups == 0 else 1
        return type(layer)(channels, layer.out_channels, layer.kernel_size, layer.stride,
                           layer.padding, layer.dilation, groups, layer.bias is not None,
                           layer.padding_mode)  # fmt: skip
    if isinstance(layer, t.modules.batchnorm._BatchNorm):
        return type(layer)(channels, layer.eps, layer.momentum, layer.affine)
    if isinstance(layer, t.modules.instancenorm._InstanceNorm):
        return type(layer)(channels, layer.eps, affine=layer.affine)
    if isinstance(layer, t.GroupNorm):
        groups = layer.num_groups if channels % layer.num_groups == 0 else 1
        return t.GroupNorm(groups, channels, layer.eps, layer.affine)
    if isinstance(layer, t.PReLU):
        return t.PReLU(1 if layer.num_parameters == 1 else channels)
    if isinstance(layer, t.RNNBase):
        own = {"proj_size": layer.proj_size} if isinstance(layer, t.LSTM) else {}
        own |= {"nonlinearity": layer.nonlinearity} if isinstance(layer, t.RNN) else {}
        return type(layer)(
            shape[-1], layer.hidden_size, layer.num_layers, bias=layer.bias,
            batch_first=layer.batch_first, bidirectional=layer.bidirectional, **own,
        )  # fmt: skip
    if isinstance(layer, t.LayerNorm | t.RMSNorm):
        own = {"bias": layer.bias is not None} if isinstance(layer, t.LayerNorm) else {}
        count = min(len(layer.normalized_shape), len(shape) - 1)
        return type(layer)(shape[-count:], layer.eps, layer.elementwise_affine, **own)
    return layer


def run(source, seed):
    """None if all is equal, else what was refused; anything wrong raises."""
    import compare

    shape, model, refused = build(source, seed)
    if model is None:
        return "not run"
    x = np.random.default_rng(seed).normal(size=(1 + 2 * (seed % 2), *shape)).astype(np.float32)
    expected = compare.run(source, model, x)
    if not np.isfinite(expected).all() or np.abs(expected).max(initial=0) > 1e4:
        return "not run"
    said = compare.check(source, model, shape, x, refused, canonical=True,
                             own_refusals="the input is smaller")  # fmt: skip
    return said or layouts(source, model, x, expected, refused)


def layouts(source, model, x, expected, refused):
    """The default layout, which moves an end where a layer proves which axis is the channels."""
    import compare

    from fwt import converters

    if source != "torch":
        return None
    try:
        flax = converters.from_torch(model, input_shape=x.shape[1:])
    except converters.ConversionError as error:
        if not re.search(refused, str(error)):
            raise
        return str(error)
    start, end = x, expected
    proven = flax.module.input_shape != x.shape[1:]
    if proven:
        start = np.moveaxis(x, 1, -1)
    found = compare.in_flax(flax, start)
    if found.shape != end.shape:
        end = np.moveaxis(end, 1, -1)
    ours = [found, end] if np.allclose(found, end, atol=1e-3) else [found, np.moveaxis(end, 1, -1)]
    compare.close(ours[0], ours[1], "default layout")
    return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0, help="the first, to share the work")
    parser.add_argument("--state", type=Path, default=Path("stacks.json"))
    parser.add_argument("--minutes", type=float, default=1e9)
    options = parser.parse_args()
    state = {"next": options.start, "equal": 0, "refused": 0, "skipped": 0, "wrong": [], "said": {}}
    if options.state.exists():
        state = json.loads(options.state.read_text())
    stop = time.monotonic() + 60 * options.minutes
    while state["next"] < options.start + options.count and time.monotonic() < stop:
        seed = state["next"]
        source = ("torch", "keras")[seed % 2]
        try:
            said = run(source, seed)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            state["wrong"].append([source, seed, f"{type(error).__name__}: {error}"[:600]])
        else:
            if said == "not run":
                state["skipped"] += 1
            elif said:
                state["refused"] += 1
                reason = re.sub(r"^[^:]*: ", "", said)[:60]
                state["said"] = dict(Counter(state["said"]) + Counter([reason]))
            else:
                state["equal"] += 1
        state["next"] += 1
        if seed % 20 == 19:
            options.state.write_text(json.dumps(state))
    options.state.write_text(json.dumps(state))
    for line in state["wrong"]:
        print(*line)
    for reason, times in sorted(state["said"].items(), key=lambda kv: -kv[1]):
        print(f"{times:5} {reason}")
    done = state["next"] - options.start
    print(
        f"{done} stacks: {state['equal']} equal, {state['refused']} refused by name, "
        f"{state['skipped']} not run or overflowing, {len(state['wrong'])} wrong"
    )
    raise SystemExit(bool(state["wrong"]))


if __name__ == "__main__":
    main()
