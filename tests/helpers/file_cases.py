"""Models and pieces of files that several tests need."""

import io
import json
import struct
import zipfile

import flax.linen as nn
import h5py
import jax
import jax.numpy as jnp
import numpy as np

import fwt
from fwt import layers as fl


def image_net():
    return fwt.Sequential(
        [
            ("conv", nn.Conv(4, (3, 2), strides=(2, 1), feature_group_count=1)),
            ("norm", nn.BatchNorm(momentum=0.8, use_scale=False)),
            ("act", fl.LeakyReLU(0.2)),
            ("pool", fl.AvgPool((2, 2), padding="SAME")),
            ("flat", fl.Flatten()),
            ("drop", nn.Dropout(0.25)),
            ("dense_2", nn.Dense(5, use_bias=False)),
            ("dense_10", nn.Dense(3)),
            ("end", fl.Softmax()),
        ],
        input_shape=(7, 5, 3),
    )


def random_model(module, seed=0):
    shape = (1, *module.input_shape)
    variables = module.init(jax.random.key(0), jnp.ones(shape))
    rng = np.random.default_rng(seed)

    def draw(x):
        return np.abs(rng.normal(size=x.shape)).astype(np.float32) + 0.1

    return fwt.Model(module, jax.tree.map(draw, variables))


def write_keras(path, config=None, weights=None, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        if config is not None:
            archive.writestr(
                "config.json", config if isinstance(config, str) else json.dumps(config)
            )
        if weights is not None:
            archive.writestr("model.weights.h5", weights)
        for name, data in members.items():
            archive.writestr(name, data)


DENSE = {
    "class_name": "Sequential",
    "config": {
        "layers": [
            {
                "class_name": "Dense",
                "module": "keras.layers",
                "config": {"name": "d", "units": 2, "activation": "linear", "use_bias": False},
            }
        ],
        "build_input_shape": [None, 3],
    },
}


def h5(fill):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        fill(file)
    return buffer.getvalue()


def kernel(**settings):
    def fill(file):
        group = file.create_group("layers/dense/vars")
        group.create_dataset("0", **settings)

    return h5(fill)


def pt(data_pkl, storages=(), stem="a"):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{stem}/data.pkl", data_pkl)
        for i, raw in enumerate(storages):
            archive.writestr(f"{stem}/data/{i}", raw)
        archive.writestr(f"{stem}/version", "3\n")
    return buffer.getvalue()


def tensor_pickle(count, size, stride, offset=0):
    """What torch writes for one tensor, with numbers of our choice."""

    def numbers(ns):
        return b"(" + b"".join(b"J" + struct.pack("<i", n) for n in ns) + b"t"

    return (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
        b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
        + struct.pack("<i", count)
        + b"tQJ"
        + struct.pack("<i", offset)
        + numbers(size)
        + numbers(stride)
        + b"\x89}tRs."
    )
