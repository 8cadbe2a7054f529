"""A model of one framework in every other: the outputs compared with the real ones."""

import functools
import re
import tempfile
import zlib
from pathlib import Path

import jax
import keras
import numpy as np
import tensorflow as tf
import torch

from fwt import converters

TOLERANCE = 1e-5


def generator(*words):
    return np.random.default_rng(zlib.crc32(repr(words).encode()))


def close(found, expected, place=""):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, (place, found.shape, expected.shape)
    finite = np.isfinite(expected)
    scale = max(1.0, float(np.max(np.abs(expected), where=finite, initial=0)))
    np.testing.assert_allclose(
        found, expected, atol=TOLERANCE * scale, rtol=TOLERANCE, err_msg=place
    )


def inputs(rng, shape, integers, n):
    if integers:
        return rng.integers(integers, size=(n, *shape)).astype(np.int32)
    return rng.normal(size=(n, *shape)).astype(np.float32)


def in_torch(model, x):
    with torch.no_grad():
        return model(torch.from_numpy(np.ascontiguousarray(x))).numpy()


def in_keras(model, x):
    try:
        return np.asarray(model(x, training=False))
    except tf.errors.InvalidArgumentError as error:  # of dilated transposed convolutions
        if "CPU implementations do not yet support" not in str(error):
            raise
        compiled = tf.function(lambda x: model(x, training=False), jit_compile=True)
        return np.asarray(compiled(x))


@functools.cache
def applied(module):
    """One compiled program for all models of a module."""
    return jax.jit(module.apply)


def in_flax(model, x):
    return np.asarray(applied(model.module)(model.variables, x))


def run(kind, model, x):
    return {"torch": in_torch, "keras": in_keras, "flax": in_flax}[kind](model, x)


def states(model):
    """Names and arrays, whatever the framework."""
    if isinstance(model, torch.nn.Module):
        state = model.state_dict().items()
        return {n: v.numpy() for n, v in state if not n.endswith("num_batches_tracked")}
    out = {}
    for layer in model.layers:
        for index, v in enumerate(layer.variables):
            if v.name != "seed_generator_state":
                out[f"{layer.name}/{index}/{v.name}"] = np.asarray(v)
    return out


def check(source, model, shape, x, refused, canonical=(), own_refusals=None):
    """Source -> Flax -> source, and -> the other framework -> Flax. Returns what was refused."""
    expected = run(source, model, x)
    try:
        if source == "torch":
            flax = converters.from_torch(model, input_shape=shape, layout="source")
        else:
            flax = converters.from_keras(model)
    except converters.ConversionError as error:
        if not own_refusals or not re.search(own_refusals, str(error)):
            raise
        return str(error)
    close(in_flax(flax, x), expected, f"{source} -> flax\n{flax.module}")
    back = converters.to_torch(*flax, layout="source") if source == "torch" else (
        converters.to_keras(*flax)
    )  # fmt: skip
    close(run(source, back, x), expected, f"{source} -> flax -> {source}")
    mine, theirs = states(back), states(model)
    grouped = any(getattr(x, "groups", 1) > 1 for x in getattr(model, "layers", []))
    if not canonical and not grouped:
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert np.array_equal(mine[name], value), name
    try:
        if source == "torch":
            other, kind = converters.to_keras(*flax), "keras"
        else:
            other, kind = converters.to_torch(*flax, layout="source"), "torch"
    except converters.ConversionError as error:
        if refused is None or not re.search(refused, str(error)):
            raise
        return str(error)
    close(run(kind, other, x), expected, f"{source} -> flax -> {kind}")
    if kind == "torch":
        again = converters.from_torch(other, input_shape=x.shape[1:], layout="source")
    else:
        again = converters.from_keras(other)
    close(in_flax(again, x), expected, f"{source} -> flax -> {kind} -> flax")
    return None


def without_shape(model, x):
    """Without input_shape a model is as exact, or refused."""
    try:
        flax = converters.from_torch(model, layout="source")
    except converters.ConversionError as error:
        if not re.search("input_shape|known", str(error)):
            raise
        return
    close(in_flax(flax, x), in_torch(model, x), "without input_shape")
    try:
        back = converters.to_torch(*flax, layout="source")
    except converters.ConversionError as error:
        if not re.search("input_shape|known", str(error)):
            raise
        return
    close(in_torch(back, x), in_torch(model, x), "back without input_shape")


def files(source, model, shape, x):
    """The model through the files of each framework."""
    expected = run(source, model, x)
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        if source == "keras":
            model.save(there / "net.keras")
            flax = converters.load(there / "net.keras")
        else:
            flax = converters.from_torch(model, input_shape=shape, layout="source")
        converters.save(there / "net.safetensors", *flax)
        close(in_flax(converters.load(there / "net.safetensors"), x), expected, "safetensors")
        assert converters.load(there / "net.safetensors").module == flax.module
        try:
            converters.to_keras(*flax)
        except converters.ConversionError:
            pass
        else:
            try:
                converters.save(there / "again.keras", *flax)
            except converters.ConversionError as error:
                if "only Keras itself can write" not in str(error):
                    raise
            else:
                real = keras.saving.load_model(there / "again.keras")
                close(in_keras(real, x), expected, "saved .keras")
        try:
            torch_model = converters.to_torch(*flax, layout="source")
        except converters.ConversionError:
            return
        converters.save(there / "net.pt", *flax, layout="source")
        torch_model.load_state_dict(torch.load(there / "net.pt", weights_only=True))
        close(in_torch(torch_model, x), expected, "saved .pt")
