"""Tables of cases: a new row is tested everywhere.

KERAS and TORCH hold models of the real frameworks as functions that build them, each with the
shape of its input without the batch axis. :func:`randomise` gives every weight and statistic a
value away from its default.
"""

import keras
import numpy as np
import torch

k = keras.layers
t = torch.nn


def keras_model(shape, *layers):
    return lambda: randomise_keras(
        keras.Sequential([keras.Input(shape), *(make() for make in layers)])
    )


def randomise_keras(model, seed=0):
    rng = np.random.default_rng(seed)
    for v in model.variables:
        if v.name == "seed_generator_state" or "normalization/count" in v.path:
            continue
        if v.path.rpartition("/")[0].rpartition("/")[2].startswith("normalization") and (
            v.name in ("mean", "variance")  # which only adapt() sets
        ):
            continue
        value = rng.normal(size=v.shape, scale=0.4).astype(np.float32)
        v.assign(np.abs(value) + 0.3 if v.name == "moving_variance" else value)
    return model


def torch_model(*layers, **named):
    def build():
        made = {name: make() for name, make in named.items()} or {
            str(i): make() for i, make in enumerate(layers)
        }
        from collections import OrderedDict

        return randomise_torch(t.Sequential(OrderedDict(made)))

    return build


def randomise_torch(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, v in [*model.named_parameters(), *model.named_buffers()]:
            if v.is_floating_point():
                v.copy_(torch.randn(v.shape, generator=generator) * 0.4)
                if name.endswith("running_var"):
                    v.abs_().add_(0.3)
    return model.eval()


KERAS = {
    "mlp": (
        (7,),
        keras_model(
            (7,),
            lambda: k.Dense(11, activation="relu", name="first_dense"),
            lambda: k.BatchNormalization(epsilon=3e-3, momentum=0.9),
            lambda: k.Dense(5, use_bias=False),
            lambda: k.Softmax(),
        ),
    ),
    "conv_flatten": (
        (9, 7, 3),
        keras_model(
            (9, 7, 3),
            lambda: k.Conv2D(4, (3, 2), strides=2, padding="same", name="first", activation="gelu"),
            lambda: k.BatchNormalization(scale=False),
            lambda: k.MaxPooling2D(2, padding="same"),
            lambda: k.Conv2D(6, (3, 2), padding="same", groups=2),
            lambda: k.LeakyReLU(),
            lambda: k.AveragePooling2D((2, 1), strides=1),
            lambda: k.Dropout(0.3),
            lambda: k.Flatten(),
            lambda: k.BatchNormalization(center=False),
            lambda: k.Dropout(0.5),
            lambda: k.Dense(5, activation="tanh"),
            lambda: k.Dense(4, activation="softmax", name="last"),
        ),
    ),
    "conv_global": (
        (8, 11, 2),
        keras_model(
            (8, 11, 2),
            lambda: k.Conv2D(5, 3, dilation_rate=2, padding="same", use_bias=False),
            lambda: k.Activation("swish"),
            lambda: k.Conv2D(3, 4, padding="same"),
            lambda: k.GlobalAveragePooling2D(),
            lambda: k.Dense(2),
        ),
    ),
    "conv_only": (
        (8, 11, 2),
        keras_model(
            (8, 11, 2),
            lambda: k.Conv2D(5, 3),
            lambda: k.Softmax(axis=1),
            lambda: k.Softmax(axis=-1),
        ),
    ),
    "dense_on_images": (
        (4, 6, 3),
        keras_model(
            (4, 6, 3),
            lambda: k.Conv2D(4, 2),
            lambda: k.Dense(5, activation="elu"),
            lambda: k.Conv2D(3, 2, strides=(1, 2)),
            lambda: k.GlobalMaxPooling2D(keepdims=True),
            lambda: k.Flatten(),
        ),
    ),
    "flatten_end": (
        (4, 6, 3),
        keras_model(
            (4, 6, 3),
            lambda: k.ZeroPadding2D(((1, 0), (2, 1))),
            lambda: k.Conv2D(4, 2),
            lambda: k.Flatten(),
            lambda: k.BatchNormalization(),
            lambda: k.ReLU(),
        ),
    ),
    "permute_reshape": (
        (4, 6, 3),
        keras_model(
            (4, 6, 3),
            lambda: k.Conv2D(4, 1),
            lambda: k.Permute((3, 1, 2)),
            lambda: k.Reshape((8, -1)),
            lambda: k.Dense(3),
            lambda: k.Flatten(),
            lambda: k.Dense(2),
        ),
    ),
}
for _name in [
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "selu",
    "gelu",
    "silu",
    "mish",
    "sigmoid",
    "log_sigmoid",
    "hard_sigmoid",
    "hard_silu",
    "tanh",
    "softplus",
    "softsign",
    "softmax",
    "log_softmax",
    "linear",
]:
    KERAS[f"activation_{_name}"] = (
        (5,),
        keras_model(
            (5,), lambda n=_name: k.Dense(6, activation=n), lambda n=_name: k.Activation(n)
        ),
    )

TORCH = {
    "mlp": (
        (7,),
        torch_model(
            hidden=lambda: t.Linear(7, 11),
            norm=lambda: t.BatchNorm1d(11, eps=3e-3, momentum=0.2),
            act=lambda: t.ReLU(inplace=True),
            out=lambda: t.Linear(11, 5, bias=False),
            probabilities=lambda: t.Softmax(dim=1),
        ),
    ),
    "conv_flatten": (
        (3, 12, 9),
        torch_model(
            lambda: t.Conv2d(3, 4, 3, stride=2, padding=1),
            lambda: t.ReLU(),
            lambda: t.MaxPool2d(3, 2, 1),
            lambda: t.Conv2d(4, 5, (2, 3), padding=(0, 1)),
            lambda: t.BatchNorm2d(5),
            lambda: t.AvgPool2d(2, 1, 1),
            lambda: t.Flatten(),
            lambda: t.Dropout(0.4),
            lambda: t.BatchNorm1d(60),
            lambda: t.LeakyReLU(0.3),
            lambda: t.Linear(60, 7),
            lambda: t.Softmax(dim=1),
        ),
    ),
    "conv_groups_same": (
        (4, 7, 10),
        torch_model(
            lambda: t.Conv2d(4, 6, (2, 3), padding="same", groups=2, dilation=(2, 1)),
            lambda: t.SiLU(),
            lambda: t.Conv2d(6, 6, 3, groups=6, bias=False),
            lambda: t.BatchNorm2d(6, affine=False),
            lambda: t.AdaptiveAvgPool2d(1),
            lambda: t.Flatten(),
            lambda: t.Linear(6, 3),
        ),
    ),
    "conv_only": (
        (3, 8, 5),
        torch_model(lambda: t.Conv2d(3, 6, 3), lambda: t.Softmax(dim=1), lambda: t.Softmax(dim=3)),
    ),
    "ceil_mode": (
        (3, 8, 16),
        torch_model(
            lambda: t.Conv2d(3, 4, 1),
            lambda: t.Sigmoid(),
            lambda: t.MaxPool2d(3, 2, ceil_mode=True),
            lambda: t.AvgPool2d(3, 2, ceil_mode=True),
            lambda: t.Flatten(),
            lambda: t.Linear(32, 2),
        ),
    ),
    "flatten_end": (
        (3, 5, 6),
        torch_model(
            lambda: t.ZeroPad2d((1, 2, 0, 1)),
            lambda: t.Conv2d(3, 4, 2),
            lambda: t.Flatten(),
            lambda: t.BatchNorm1d(160),
            lambda: t.Tanh(),
        ),
    ),
    "unflatten": (
        (3, 4, 5),
        torch_model(
            lambda: t.Conv2d(3, 2, 1),
            lambda: t.Flatten(),
            lambda: t.Unflatten(1, (2, 4, 5)),
            lambda: t.Conv2d(2, 3, 2),
            lambda: t.AdaptiveMaxPool2d((1, 1)),
            lambda: t.Flatten(),
            lambda: t.Linear(3, 2),
        ),
    ),
    "linear_on_images": (
        (3, 4, 5),
        torch_model(lambda: t.Conv2d(3, 2, 2), lambda: t.Linear(4, 6), lambda: t.Conv2d(2, 3, 2)),
    ),
}
for _name in [
    "Identity",
    "ReLU",
    "ReLU6",
    "LeakyReLU",
    "ELU",
    "SELU",
    "GELU",
    "SiLU",
    "Mish",
    "Sigmoid",
    "LogSigmoid",
    "Hardsigmoid",
    "Hardswish",
    "Tanh",
    "Softplus",
    "Softsign",
]:
    TORCH[f"activation_{_name}"] = ((5,), torch_model(lambda: t.Linear(5, 6), getattr(t, _name)))
TORCH["activation_softmaxes"] = (
    (5,),
    torch_model(lambda: t.Linear(5, 6), lambda: t.Softmax(dim=-1), lambda: t.LogSoftmax(dim=1)),
)


def shop(by_key=False, again=False):
    """Tokens and numbers in; two outputs of different ranks out."""
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    numbers = keras.Input((6,), name="numbers")
    table = keras.layers.Embedding(11, 4, name="table")(tokens)
    mean = keras.layers.GlobalAveragePooling1D(name="mean")(table)
    dense = keras.layers.Dense(4, activation="relu", name="dense")(numbers)
    score = keras.layers.Dense(3, name="score")(keras.layers.Add(name="sum")([mean, dense]))
    tags = keras.layers.Dense(2, name="tags")(table)
    if again:  # an input, and one output twice
        return keras.Model([tokens, numbers], [score, numbers, score])
    if by_key:
        return keras.Model({"tokens": tokens, "numbers": numbers}, {"tags": tags, "score": score})
    return keras.Model([tokens, numbers], [score, tags])
