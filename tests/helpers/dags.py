"""Random Keras models that are graphs, and their way through the other frameworks.

``python tests/graphs.py --random keras COUNT`` runs many; ``run(seed)`` is one.
"""

import itertools
import tempfile
from pathlib import Path

import keras
import numpy as np
import torch

from fwt import converters

ROWS = 7  # of each Embedding
MERGES = ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum")


class Draw:
    """A model that grows by one call at a time."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.layers = []  # (layer, the shape that it takes), to be called again
        self.count = 0
        self.inputs, self.tensors = [], []
        for i in range(self.rng.integers(1, 4)):
            if self.rng.random() < 0.1:
                x = keras.Input((int(self.rng.integers(2, 6)),), name=f"in{i}", dtype="int32")
                self.tensors.append(self.layer("Embedding", ROWS, int(self.rng.integers(2, 6)))(x))
            else:
                x = keras.Input(self.size(), name=f"in{i}")
                self.tensors.append(x)
            self.inputs.append(x)

    def size(self):
        if self.rng.random() < 0.25:
            return (int(self.rng.integers(2, 6)),)
        sizes = self.rng.permutation([3, 4, 5])  # each another, so that an order can be told
        return tuple(int(n) for n in sizes[: self.rng.choice([2, 3, 3])])

    def pick(self, rank=None):
        fitting = [t for t in self.tensors if rank is None or len(t.shape) in rank]
        if not fitting:
            return None
        # The newer ones more often, so that it grows long.
        weights = np.arange(1, len(fitting) + 1) ** 1.5
        return fitting[self.rng.choice(len(fitting), p=weights / weights.sum())]

    def name(self, kind):
        self.count += 1
        return f"{kind.lower()}{self.count}"  # unlike "add_1", as operations are called

    def layer(self, kind, *given, **settings):
        made = getattr(keras.layers, kind)(*given, name=self.name(kind), **settings)
        return made

    def step(self):
        choice = self.rng.choice(
            [
                "window",
                "dense",
                "norm",
                "function",
                "merge",
                "merge",
                "joined",
                "flatten",
                "pool",
                "again",
                "shape",
                "inside",
                "slice",
                "attend",
                "recurrent",
                "each_step",
                "reduce",
                "parts",
                "moved",
                "first",
                "product",
                "crop",
            ]
        )
        found = getattr(self, choice)()
        if found is not None:
            size = np.prod(list(found.shape[1:]))
            if 0 < size <= 600:
                self.tensors.append(found)

    def window(self):
        x = self.pick((3, 4))
        if x is None:
            return None
        r = len(x.shape) - 2
        kind = self.rng.choice(
            [
                f"Conv{r}D",
                f"Conv{r}DTranspose",
                f"DepthwiseConv{r}D",
                f"SeparableConv{r}D",
                f"ZeroPadding{r}D",
                f"UpSampling{r}D",
            ]
        )
        if kind.startswith("Zero"):
            return self.layer(kind, 1)(x)
        if kind.startswith("Up"):
            return self.layer(kind, 2)(x)
        how = {
            "padding": str(self.rng.choice(["same", "valid"])),
            "kernel_size": int(self.rng.integers(1, 4)),
        }
        if self.rng.random() < 0.2 and "Transpose" not in kind:
            how["dilation_rate"] = 2
        wide = (how["kernel_size"] - 1) * how.get("dilation_rate", 1) + 1
        if any(s is not None and s < wide for s in x.shape[1:-1]):
            return None
        if not kind.startswith("Depth"):
            how["filters"] = int(self.rng.integers(1, 6))
        if kind.startswith("Conv") and "Transpose" not in kind and self.rng.random() < 0.3:
            how["groups"] = next(g for g in (2, 3, 5, 1) if x.shape[-1] % g == 0)
            how["filters"] = how["groups"] * int(self.rng.integers(1, 3))
        if self.rng.random() < 0.4:
            how["activation"] = str(self.rng.choice(["relu", "tanh", "sigmoid", "gelu"]))
        if self.rng.random() < 0.3 and "dilation_rate" not in how:
            how["strides"] = 2
        return self.kept(self.layer(kind, **how), x)

    def kept(self, layer, x):
        self.layers.append((layer, x.shape))
        return layer(x)

    def dense(self):
        x = self.pick()
        act = str(self.rng.choice(["linear", "relu", "softmax", "silu"]))
        return self.kept(self.layer("Dense", int(self.rng.integers(1, 6)), activation=act), x)

    def norm(self):
        x = self.pick()
        kind = str(self.rng.choice(["Batch", "Layer", "Batch", "Layer", "Group", "RMS", "Unit"]))
        rank = len(x.shape)
        how = {}
        if kind == "Group":
            how["groups"] = next(g for g in (2, 3, 1) if x.shape[-1] % g == 0)
        elif kind == "Layer" and self.rng.random() < 0.3:
            how["axis"] = [int(n) + 1 for n in np.sort(self.rng.permutation(rank - 1)[:2])]
        elif kind in ("Batch", "Unit") and self.rng.random() < 0.3:
            how["axis"] = int(self.rng.integers(1, rank))
        return self.kept(self.layer(f"{kind}Normalization", **how), x)

    def function(self):
        x = self.pick()
        kind = self.rng.choice(
            [
                "ReLU",
                "LeakyReLU",
                "Activation",
                "Dropout",
                "Rescaling",
                "Softmax",
                "op",
                "op",
                "PReLU",
                "ELU",
                "GaussianNoise",
                "Spatial",
            ]
        )
        if kind == "op":
            return self.rng.choice(
                [
                    keras.ops.relu,
                    keras.ops.silu,
                    keras.ops.tanh,
                    lambda x: x * 2.0 + 1.0,
                    lambda x: 1.0 - x,
                    lambda x: x / 3.0,
                    keras.ops.abs,
                    keras.ops.square,
                    keras.ops.sin,
                    keras.ops.expm1,
                    lambda x: keras.ops.log1p(keras.ops.abs(x)),
                    lambda x: keras.ops.sqrt(keras.ops.abs(x) + 0.5),
                    lambda x: keras.ops.softmax(x, axis=1),
                    lambda x: keras.ops.leaky_relu(x, 0.1),
                ]
            )(x)
        if kind == "Spatial":
            rank = len(x.shape)
            return None if rank < 3 else self.layer(f"SpatialDropout{rank - 2}D", 0.3)(x)
        if kind == "PReLU":
            axes = [a for a in range(1, len(x.shape) - 1) if self.rng.random() < 0.7]
            return self.kept(self.layer(kind, shared_axes=axes or None), x)
        given = {
            "Activation": ("tanh",),
            "Dropout": (0.5,),
            "Rescaling": (0.5, 0.25),
            "GaussianNoise": (0.5,),
        }.get(kind, ())
        return self.kept(self.layer(kind, *given), x)

    def pool(self):
        x = self.pick((3, 4))
        if x is None:
            return None
        r = len(x.shape) - 2
        kind = self.rng.choice(["Max", "Average", "GlobalMax", "GlobalAverage"])
        if kind.startswith("Global"):
            return self.layer(f"{kind}Pooling{r}D", keepdims=bool(self.rng.integers(2)))(x)
        if any(s < 2 for s in x.shape[1:-1]):
            return None
        return self.layer(
            f"{kind}Pooling{r}D",
            2,
            strides=int(self.rng.integers(1, 3)),
            padding=str(self.rng.choice(["same", "valid"])),
        )(x)

    def flatten(self):
        x = self.pick((3, 4))
        if x is None:
            return None
        flat = self.layer("Flatten")(x)
        if self.rng.random() < 0.7:
            self.tensors.append(flat)
            return self.kept(self.layer("Dense", int(self.rng.integers(1, 5))), flat)
        return flat

    def merge(self):
        x = self.pick()
        fitting = [t for t in self.tensors if self.meets(t.shape, x.shape)]
        if len(fitting) < 2:
            return None
        y = fitting[self.rng.integers(len(fitting))]
        kind = str(self.rng.choice(MERGES))
        if self.rng.random() < 0.3 and len(x.shape) == len(y.shape):
            return {
                "Add": lambda a, b: a + b,
                "Subtract": lambda a, b: a - b,
                "Multiply": lambda a, b: a * b,
                "Maximum": keras.ops.maximum,
                "Minimum": keras.ops.minimum,
                "Average": lambda a, b: a / (b * b + 1.0),
            }[kind](x, y)
        return self.layer(kind)(
            [x, y] if self.rng.random() < 0.5 or kind == "Subtract" else [x, y, x]
        )

    @staticmethod
    def meets(a, b):
        return len(a) == len(b) and all(
            m == n or 1 in (m, n) for m, n in zip(a[1:], b[1:], strict=True)
        )

    def joined(self):
        x = self.pick()
        axis = int(self.rng.integers(1, len(x.shape)))
        fitting = [
            t
            for t in self.tensors
            if len(t.shape) == len(x.shape)
            and all(
                m == n for i, (m, n) in enumerate(zip(t.shape, x.shape, strict=True)) if i != axis
            )
        ]
        several = [fitting[self.rng.integers(len(fitting))] for _ in range(self.rng.integers(1, 3))]
        return self.layer(
            "Concatenate", axis=axis if self.rng.random() < 0.5 else axis - len(x.shape)
        )([x, *several])

    def again(self):
        """A layer called once more."""
        fitting = [
            (layer, t) for layer, shape in self.layers for t in self.tensors if t.shape == shape
        ]
        if not fitting:
            return None
        layer, x = fitting[self.rng.integers(len(fitting))]
        return layer(x)

    def shape(self):
        x = self.pick((3, 4))
        if x is None:
            return None
        rest = [int(n) for n in x.shape[1:]]
        if self.rng.random() < 0.5:
            dims = [int(d) + 1 for d in self.rng.permutation(len(rest))]
            return self.layer("Permute", dims)(x)
        flat = int(np.prod(rest))
        first = next((n for n in (2, 3, 5) if flat % n == 0), 1)
        return self.layer("Reshape", (first, flat // first))(x)

    def inside(self):
        """A model of a few layers, perhaps called twice."""
        x = self.pick((3, 4))
        if x is None:
            return None
        start = keras.Input(x.shape[1:])
        c = x.shape[-1]
        h = self.layer("Dense", c, activation="relu")(start)
        if self.rng.random() < 0.5:
            model = keras.Sequential(
                [
                    keras.Input(x.shape[1:]),
                    self.layer("Dense", c),
                    self.layer("BatchNormalization"),
                ],
                name=self.name("seq"),
            )
        else:
            model = keras.Model(start, self.layer("Add")([h, start]), name=self.name("model"))
        y = model(x)
        return model(y) if self.rng.random() < 0.5 else y

    def slice(self):
        x = self.pick()
        axis = int(self.rng.integers(1, len(x.shape)))
        size = x.shape[axis]
        if size < 2:
            return None
        start = int(self.rng.integers(0, size - 1))
        stop = int(self.rng.integers(start + 1, size + 1))
        if self.rng.random() < 0.2 and len(x.shape) > 2:
            return x[(*[slice(None)] * axis, start)]
        return x[(*[slice(None)] * axis, slice(start, stop))]

    def attend(self):
        x = self.pick((3,))
        fitting = [
            t
            for t in self.tensors
            if x is not None and len(t.shape) == 3 and t.shape[-1] == x.shape[-1]
        ]
        if not fitting:
            return None
        y = fitting[self.rng.integers(len(fitting))]
        kind = self.rng.choice(["heads", "heads", "wide", "groups", "scored", "dot", "einsum"])
        causal = bool(self.rng.integers(2))
        if kind == "heads":
            heads, size = int(self.rng.integers(1, 3)), int(self.rng.integers(1, 4))
            return self.layer("MultiHeadAttention", heads, size)(x, y, use_causal_mask=causal)
        if kind == "wide" and keras.backend.backend() == "jax":  # which can't call it
            return None
        if kind == "wide":
            layer = self.layer("MultiHeadAttention", 2, 3, value_dim=2, output_shape=(4,))
            return layer(x, y, use_causal_mask=causal)
        if kind == "groups":
            return self.layer("GroupQueryAttention", 2, 4, 2)(x, y, use_causal_mask=causal)
        if kind == "scored":
            how = {"score_mode": str(self.rng.choice(["dot", "concat"])), "use_scale": True}
            layer = self.layer("AdditiveAttention") if self.rng.integers(2) else self.layer(
                "Attention", **how)  # fmt: skip
            return layer([x, y], use_causal_mask=causal)
        if kind == "dot":
            return self.layer("Dot", 2, normalize=causal)([x, y])
        return keras.ops.einsum("bti,bsi->bst", x, y)

    def recurrent(self):
        """A recurrent layer, alone or both ways, or a vector that is repeated for one."""
        x = self.pick((2, 3))
        if x is None:
            return None
        if len(x.shape) == 2:
            return self.layer("RepeatVector", int(self.rng.integers(2, 5)))(x)
        kind = str(self.rng.choice(["LSTM", "GRU", "SimpleRNN"]))
        how = {"return_sequences": bool(self.rng.integers(2))}
        if self.rng.random() < 0.4:
            made = self.layer(kind, 2, **how)
            mode = str(self.rng.choice(["concat", "sum", "ave", "mul"]))
            return self.kept(self.layer("Bidirectional", made, merge_mode=mode), x)
        if kind == "GRU":
            how["reset_after"] = bool(self.rng.integers(2))
        how["go_backwards"] = bool(self.rng.random() < 0.2)
        return self.kept(self.layer(kind, int(self.rng.integers(1, 5)), **how), x)

    def each_step(self):
        x = self.pick((3, 4))
        if x is None:
            return None
        kind = self.rng.choice(["Dense", "LayerNormalization", "ReLU"])
        given = (int(self.rng.integers(1, 5)),) if kind == "Dense" else ()
        return self.kept(self.layer("TimeDistributed", self.layer(kind, *given)), x)

    def reduce(self):
        x = self.pick((3, 4))
        if x is None:
            return None
        rank = len(x.shape)
        dims = self.rng.permutation(rank - 1)[: self.rng.integers(1, rank - 1)] + 1
        axes = [int(d) - rank * int(self.rng.integers(2)) for d in dims]
        ops = keras.ops
        f = self.rng.choice([ops.mean, ops.sum, ops.max, ops.min, ops.logsumexp])
        return f(x, axis=axes if len(axes) > 1 else axes[0], keepdims=bool(self.rng.integers(2)))

    def parts(self):
        """What split gives, put together otherwise; or two stacked."""
        x = self.pick()
        if x is None:
            return None
        axis = int(self.rng.integers(1, len(x.shape)))
        if x.shape[axis] % 2 == 0:
            one, two = keras.ops.split(x, 2, axis=axis)
            return one * keras.ops.sigmoid(two) if self.rng.random() < 0.5 else two - one
        if len(x.shape) < 4:
            return keras.ops.stack([x, keras.ops.relu(x)], axis=axis)
        at = int(self.rng.integers(1, x.shape[axis] + 1))
        first, *_ = keras.ops.split(x, [at], axis=axis) if at < x.shape[axis] else (x,)
        return first

    def moved(self):
        """Axes in another order, one more or one less."""
        x = self.pick()
        rank = len(x.shape)
        alone = [a for a in range(1, rank) if x.shape[a] == 1]
        if alone and rank > 2:
            return keras.ops.squeeze(x, axis=alone[0])
        if rank < 4 and self.rng.random() < 0.4:
            return keras.ops.expand_dims(x, int(self.rng.integers(1, rank + 1)))
        if rank == 2:
            return keras.ops.concatenate([x, x * 0.5], axis=-1)
        order = [0, *(int(d) + 1 for d in self.rng.permutation(rank - 1))]
        if self.rng.random() < 0.5:
            return keras.ops.transpose(x, order)
        return keras.ops.swapaxes(x, 1, rank - 1)

    def first(self):
        """A layer that has the channels before the other axes."""
        x = self.pick((4,))
        if x is None:
            return None
        kinds = [("ZeroPadding2D", (1,)), ("UpSampling2D", (2,)), ("Flatten", ()),
                 ("GlobalAveragePooling2D", ()), ("GlobalMaxPooling2D", ())]  # fmt: skip
        if keras.backend.backend() == "jax":  # TensorFlow has no such convolutions without a GPU
            kinds += [("Conv2D", (3, 2)), ("MaxPooling2D", (1, 2))]
        kind, given = kinds[self.rng.integers(len(kinds))]
        if kind == "Conv2D" and min(x.shape[2:]) < 2:
            return None
        return self.layer(kind, *given, data_format="channels_first")(x)

    def product(self):
        """The product of a tensor of steps with what another of as many channels has."""
        x = self.pick((3,))
        if x is None:
            return None
        near = [t for t in self.tensors if len(t.shape) == 3 and t.shape[-1] == x.shape[-1]]
        y = near[self.rng.integers(len(near))]
        return keras.ops.matmul(x, keras.ops.transpose(y, (0, 2, 1)))

    def crop(self):
        x = self.pick((3, 4))
        if x is None or min(x.shape[1:-1]) < 3:
            return None
        r = len(x.shape) - 2
        return self.layer(f"Cropping{r}D", (1, 1) if r == 1 else ((1, 0), (0, 1)))(x)

    def model(self):
        for _ in range(self.rng.integers(4, 14)):
            self.step()
        made = [t for t in self.tensors if t not in self.inputs] or [
            self.layer("Dense", 3)(self.inputs[0])
        ]
        count = int(min(self.rng.integers(1, 4), len(made)))
        outs = [made[-1], *(made[self.rng.integers(len(made))] for _ in range(count - 1))]
        used = _used(outs, self.inputs)
        form = self.rng.integers(3)
        if form == 0:
            model = keras.Model(
                {t.name: t for t in used}, {f"out{i}": t for i, t in enumerate(outs)}
            )
        else:
            model = keras.Model(used, outs if len(outs) > 1 else outs[0])
        return model, used


def _used(outs, inputs):
    """The inputs that the outputs follow from."""
    left, seen = list(outs), set()
    while left:
        tensor = left.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        layer, index, _ = tensor._keras_history
        left += layer._inbound_nodes[index].input_tensors
    return [t for t in inputs if id(t) in seen]


# What the walk may refuse, and why.
REFUSED = (
    "no layer before it proves",
    "flattened in another order",
    "has the weights of",
    "torch can't say a mean",
    "torch.nn has no such layer",  # UnitNormalization
    "numbers along one axis only",  # PReLU
    "no reset_after=False",  # GRU
)


def flat(given):
    return (
        list(given.values())
        if isinstance(given, dict)
        else (list(given) if isinstance(given, list | tuple) else [given])
    )


def orders_of(x):
    """The array with its axes but the batch in each order."""
    rest = range(1, x.ndim)
    return [x.transpose(0, *order) for order in itertools.permutations(rest)]


def run(seed):
    """What is wrong with the model of a seed: "" if nothing, or the refusals."""
    import cases

    keras.utils.clear_session(free_memory=False)  # which takes as long as all the rest
    draw = Draw(seed)
    model, used = draw.model()
    cases.randomise_keras(model, seed)
    rng = np.random.default_rng(seed)
    xs = [
        rng.integers(0, ROWS, (2, *t.shape[1:])).astype("int32") if t.dtype == "int32"
        else rng.normal(size=(2, *t.shape[1:])).astype("float32") for t in used
    ]  # fmt: skip
    by_name = {t.name: x for t, x in zip(used, xs, strict=True)}
    given = by_name if isinstance(model.input, dict) else xs if len(xs) > 1 else xs[0]
    expected = [np.asarray(v) for v in flat(model(given, training=False))]
    said = []

    def same(found, what, wanted=expected):
        found = [np.asarray(v) for v in flat(found)]
        assert len(found) == len(wanted), f"{what}: {len(found)} outputs, expected {len(wanted)}"
        for a, b in zip(found, wanted, strict=True):
            forms = orders_of(b) if "first" in what else [b]
            most = 1e-5 * max(np.abs(b).max(), 1e-6) + 1e-6
            close = any(a.shape == f.shape and np.allclose(a, f, rtol=0, atol=most) for f in forms)
            found_ = np.abs(a - b).max() if a.shape == b.shape else (a.shape, b.shape)
            assert close, f"{what}: {found_}"

    there = converters.from_keras(model, layout="source")
    same(there(given), "flax")
    again = converters.to_keras(there)
    same(again(given, training=False), "keras again")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ours.keras"
        converters.save(path, there)
        same(keras.saving.load_model(path, compile=False)(given, training=False), "our file")
        model.save(Path(folder) / "theirs.keras")
        same(converters.load(Path(folder) / "theirs.keras")(given), "their file")
    held = [v for v in model.variables if v.name != "seed_generator_state"]
    back = [v for v in again.variables if v.name != "seed_generator_state"]
    # A Flatten that puts the channels last comes back as one that has them there already, before
    # a Dense whose rows are in that order.
    turned = any(getattr(layer, "data_format", "") == "channels_first" for layer in model.layers)
    one, two = ([np.ravel(v) for v in each] for each in (held, back))
    one, two = ([np.sort(v) if turned else v for v in each] for each in (one, two))
    assert sorted(v.tobytes() for v in one) == sorted(v.tobytes() for v in two), "bits"
    for layout in ("source", "channels_first"):
        try:
            net = converters.to_torch(there, layout=layout)
        except converters.ConversionError as error:
            if not any(r in str(error) for r in REFUSED):
                raise
            said.append(f"{layout}: {error}")
            continue
        with torch.no_grad():
            taken = xs if layout == "source" else as_taken(there, xs)
            taken = [torch.from_numpy(np.ascontiguousarray(x)) for x in taken]
            found = net(*taken)
            try:
                same(found, f"torch {layout}")
            except AssertionError:  # where it cancels, Keras is as near to float64 as torch
                wide = [x.double() if x.is_floating_point() else x for x in taken]
                each = zip(flat(found), flat(net.double()(*wide)), expected, strict=True)
                for a, b, wanted in each:
                    forms = [y for y in orders_of(wanted) if y.shape == b.shape]
                    apart = min(np.abs(y - b.numpy()).max() for y in forms)
                    if apart > 4 * float((a - b).abs().max()):
                        raise
    return said


def as_taken(model, xs):
    """The inputs in the order in which the torch model takes them, told by their sizes."""
    from fwt.converters.frameworks import flax, torch_layers

    net = torch_layers.torch_net(flax.read_flax(*model), "channels_first")
    return [
        next(y for y in orders_of(x) if y.shape[1:] == shape)
        for x, shape in zip(xs, net.inputs.values(), strict=True)
    ]
