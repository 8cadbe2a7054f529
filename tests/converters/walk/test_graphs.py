"""Models that are graphs, in every direction and by file, against the real frameworks."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import randomise_keras
from compare import close as near
from compare import in_keras, in_torch
from marks import thorough_but

import fwt
from fwt import converters
from fwt import layers as fl

L = keras.layers


def block(x, c, name):
    h = L.Conv2D(c, 3, padding="same", activation="relu", name=f"{name}_a")(x)
    h = L.BatchNormalization(name=f"{name}_norm")(h)
    gate = L.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool")(h)
    gate = L.Conv2D(c, 1, activation="sigmoid", name=f"{name}_gate")(gate)
    return L.ReLU(name=f"{name}_out")(L.Add(name=f"{name}_sum")([x, L.Multiply()([h, gate])]))


def residual():
    x = keras.Input((6, 5, 3), name="image")
    h = L.Conv2D(4, 3, name="stem")(x)
    h = block(block(h, 4, "one"), 4, "two")
    return keras.Model(x, L.Dense(3, name="head")(L.Flatten(name="flat")(h)))


def unet():
    x = keras.Input((4, 8, 2), name="image")
    one = L.Conv2D(3, 3, padding="same", activation="relu", name="one")(x)
    two = L.Conv2D(5, 3, padding="same", name="two")(L.MaxPooling2D(name="down")(one))
    up = L.Conv2DTranspose(3, 2, strides=2, name="up")(two)
    joined = L.Concatenate(name="join")([one, up, L.UpSampling2D(name="grow")(two)])
    return keras.Model(x, L.Conv2D(2, 1, name="out")(joined))


def siamese():
    start = keras.Input((5, 4, 3), name="start")
    h = L.Conv2D(4, 2, activation="tanh", name="conv")(start)
    h = L.Dense(3, name="dense")(L.Flatten(name="flat")(h))
    encode = keras.Model(start, h, name="encode")
    a, b = keras.Input((5, 4, 3), name="a"), keras.Input((5, 4, 3), name="b")
    apart = L.Subtract(name="apart")([encode(a), encode(b)])
    return keras.Model({"a": a, "b": b}, {"apart": apart, "far": L.Dense(1, name="far")(apart)})


def joined():
    """Flattened branches one after the other, and a Dense behind a Flatten and beside it."""
    x, y = keras.Input((3, 4, 2), name="x"), keras.Input((12,), name="y")
    one = L.Flatten(name="one")(L.Conv2D(3, 2, name="conv")(x))
    two = L.Flatten(name="two")(L.MaxPooling2D(2, name="pool")(x))
    both = L.Dense(12, name="both")(L.Concatenate(name="join")([one, y, two]))
    shared = L.Dense(4, name="shared")
    flat = L.Flatten(name="flat")(L.Conv2D(6, 2, 2, padding="same", name="other")(x)[:, :1])
    return keras.Model([x, y], [shared(flat), shared(both), shared(y)])


def attention():
    x, y = keras.Input((5, 6), name="x"), keras.Input((3, 6), name="y")
    h = L.LayerNormalization(name="norm")(L.Add(name="sum")([x, L.Dense(6, name="dense")(x)]))
    h = L.MultiHeadAttention(2, 3, name="attend")(h, h) + x
    h = L.MultiHeadAttention(3, 2, name="cross")(h, y, y)
    scores = keras.ops.matmul(h, L.Permute((2, 1), name="turn")(y)) / 2.0
    return keras.Model([x, y], [L.Softmax(name="soft")(scores), h[:, 0], 1.0 - keras.ops.silu(h)])


def inside():
    """Models in models: their layers' names are paths."""
    x = keras.Input((6, 4), name="x")
    start = keras.Input((6, 4), name="start")
    inner = keras.Model(
        start, [L.Conv1D(4, 3, padding="same", name="conv")(start), start], name="inner"
    )
    tail = keras.Sequential(
        [L.Dense(4, "gelu", name="dense"), L.LayerNormalization(name="norm")], name="tail"
    )
    one, two = inner(x)
    h = tail(L.Maximum(name="most")([one, two]))
    return keras.Model(x, L.Average(name="mean")([tail(h), h, one]))


NETS = {f.__name__: f for f in (residual, unet, siamese, joined, attention, inside)}


def _difference(z, a):
    """A model of two inputs that tells them apart."""
    return L.Subtract(name="less")([L.Rescaling(3.0, name="by_3")(z), a])


def keys_out():
    """A model inside gives a dict, which Keras numbers by sorted keys, capitals first."""
    start, x = keras.Input((6,)), keras.Input((6,), name="x")
    given = {key: L.Dense(6, name=f"for_{key}")(start) for key in ("z10", "z9", "a", "B")}
    inner = keras.Model(start, given, name="inner")
    middle = keras.Input((6,))
    found = inner(middle)
    turned = {"q": found["z9"], "c": found["a"], "d": inner(found["B"])["z10"]}
    outer = keras.Model(middle, turned, name="outer")(x)
    return keras.Model(x, [outer["q"], outer["c"], outer["d"]])


def keys_in(kind, call):
    """A model inside takes a dict, or is called with one; it goes by its keys."""
    z, a = keras.Input((3,), name="z"), keras.Input((3,), name="a")
    given = {"dict": {"z": z, "a": a}, "list": [z, a], "turned": [a, z]}[kind]
    inner = keras.Model(given, _difference(z, a), name="inner")
    x, y = keras.Input((3,), name="x"), keras.Input((3,), name="y")
    sent = {"z": x, "a": y}
    if call == "turned":
        sent = {"a": y, "z": x}
    elif call == "list":
        sent = [x, y] if kind == "list" else [y, x]
    return keras.Model([x, y], inner(sent))


def keys_both():
    """Its ends have keys, and so have those of a model inside, in other orders."""
    z, a = keras.Input((3,), name="z"), keras.Input((3,), name="a")
    inner = keras.Model({"z": z, "a": a}, {"y": _difference(z, a), "q": a}, name="inner")
    p, o = keras.Input((3,), name="p"), keras.Input((3,), name="o")
    once = inner({"z": p, "a": o})
    again = inner({"a": once["y"], "z": once["q"]})
    return keras.Model({"p": p, "o": o}, {"v": once["q"], "g": again["q"], "m": again["y"]})


KEYS = {
    "out": keys_out,
    "both": keys_both,
    **{
        f"{kind}, {call}": lambda kind=kind, call=call: keys_in(kind, call)
        for kind in ("dict", "list", "turned")
        for call in ("dict", "turned", "list")
        if (kind, call) != ("dict", "list")  # Keras refuses it
    },
}


def flat(given):
    given = list(given.values()) if isinstance(given, dict) else given
    return [np.asarray(v) for v in (given if isinstance(given, list | tuple) else [given])]


def close(found, expected):
    found = flat(found)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def weights(model):
    """By layer and name: Keras puts a Sequential's name before these, a Functional's not."""
    return {
        "/".join(v.path.split("/")[-2:]): np.asarray(v)
        for v in model.variables
        if v.name != "seed_generator_state"
    }


@pytest.mark.parametrize("name", KEYS)
def test_a_dict_of_a_model_inside_goes_by_its_keys(name, tmp_path):
    net = randomise_keras(KEYS[name]())
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(3, *t.shape[1:])).astype("float32") for t in net.inputs]
    given = xs[0] if len(xs) == 1 else xs
    if isinstance(net.input, dict):
        given = {key: rng.normal(size=(3, 3)).astype("float32") for key in net.input}

    def same(found):
        wanted = net(given, training=False)
        if isinstance(wanted, dict):
            found, wanted = [found[key] for key in wanted], list(wanted.values())
        close(found, flat(wanted))

    model = converters.from_keras(net)
    same(model(given))
    same(converters.to_keras(*model)(given, training=False))
    for suffix in (".keras", ".h5"):
        net.save(tmp_path / f"net{suffix}")
        same(converters.load(tmp_path / f"net{suffix}")(given))


@pytest.mark.parametrize("where", ["takes", "gives", "called"])
def test_an_order_of_keys_that_no_config_tells_is_refused(where):
    z, a = keras.Input((3,), name="z"), keras.Input((3,), name="a")
    ordered = collections.OrderedDict
    takes = (ordered if where == "takes" else dict)([("z", z), ("a", a)])
    gives = (ordered if where == "gives" else dict)([("z", z - a), ("a", a)])
    inner = keras.Model(takes, gives, name="inner")
    x, y = keras.Input((3,), name="x"), keras.Input((3,), name="y")
    sent = (ordered if where != "gives" else dict)([("z", x), ("a", y)])
    found = inner(sent)
    net = keras.Model([x, y], found["z"] * found["a"])
    with pytest.raises(converters.ConversionError, match="inner: it takes or gives an OrderedDict"):
        converters.from_keras(net)


@pytest.mark.parametrize("name", NETS)
def test_keras_graphs_go_round(name, tmp_path):
    net = randomise_keras(NETS[name]())
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(2, *t.shape[1:])).astype("float32") for t in net.inputs]
    given = dict(zip(net.input, xs, strict=True)) if isinstance(net.input, dict) else xs
    given = xs[0] if len(xs) == 1 else given
    expected = flat(net(given, training=False))
    model = converters.from_keras(net)
    assert isinstance(model.module, fwt.Graph)
    close(model(given), expected)
    there = converters.to_torch(*model, layout="source")
    assert not any(type(m).__module__.startswith("fwt") for m in there.modules())
    with torch.no_grad():
        close(there(*map(torch.from_numpy, xs)), expected)
    again = converters.to_keras(*model)
    close(again(given, training=False), expected)
    assert {x.name for x in net.layers} <= {x.name for x in again.layers}
    held, back = weights(net), weights(again)
    assert held.keys() == back.keys()
    assert all(np.array_equal(held[k], back[k]) for k in held)
    net.save(tmp_path / "theirs.keras")
    assert converters.load(tmp_path / "theirs.keras").module == model.module
    for suffix in ("keras", "safetensors"):
        converters.save(tmp_path / f"ours.{suffix}", *model)
        found = converters.load(tmp_path / f"ours.{suffix}")
        assert found.module == model.module
        assert all(
            np.array_equal(a, b)
            for a, b in zip(
                fwt.select(found, "**").values(), fwt.select(model, "**").values(), strict=True
            )
        )
    close(keras.saving.load_model(tmp_path / "ours.keras")(given, training=False), expected)
    if name in ("joined", "attention"):  # which hold operations
        with pytest.raises(converters.ConversionError, match=r"operation in an \.h5 file"):
            converters.save(tmp_path / "ours.h5", *model)
        return
    converters.save(tmp_path / "ours.h5", *model)
    close(keras.saving.load_model(tmp_path / "ours.h5")(given, training=False), expected)


def test_a_shared_dense_behind_a_flatten_and_beside_it_keeps_one_kernel():
    model = converters.from_keras(randomise_keras(joined()))
    there = converters.to_torch(*model, layout="source")
    kernel = model.variables["params"]["shared"]["kernel"]
    assert np.array_equal(there.shared.weight.detach().numpy(), kernel.T)
    assert not np.array_equal(there.both.weight.detach().numpy(),
                              model.variables["params"]["both"]["kernel"].T)  # fmt: skip


def test_channels_first_ends_move_where_a_branch_proves_them():
    net = randomise_keras(unet())
    model = converters.from_keras(net)
    x = np.random.default_rng(0).normal(size=(2, 4, 8, 2)).astype("float32")
    with torch.no_grad():
        found = converters.to_torch(*model)(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    close(found.numpy().transpose(0, 2, 3, 1), flat(net(x)))


def test_an_array_that_is_permuted_has_no_batch():
    net = fwt.Graph(
        [
            ("dense", nn.Dense(4), "input"),
            ("gain", fl.Parameter((4, 3, 1)), ()),
            ("turned", fl.Permute((2, 1, 0)), "gain"),
            ("sum", fl.Add(), ("dense", "turned")),
        ],
        input_shape=(3, 5),
    )
    rng = np.random.default_rng(0)
    variables = net.init(jax.random.key(0), jnp.ones((1, 3, 5)))
    variables = jax.tree.map(lambda v: rng.normal(size=v.shape).astype("float32"), variables)
    x = rng.normal(size=(2, 3, 5)).astype("float32")
    expected = net.apply(variables, x)
    torch_net, keras_net = converters.to_torch(net, variables), converters.to_keras(net, variables)
    near(in_torch(torch_net, x), expected)
    near(in_keras(keras_net, x), expected)
    near(converters.from_keras(keras_net)(x), expected)


@pytest.mark.optimised
@pytest.mark.parametrize("seed", thorough_but(2, range(40), most=12))
def test_random_graphs(seed):
    import dags

    dags.run(seed)


class Twice(torch.nn.Module):
    """Operations that Keras says by several layers, and a user's own names beside them."""

    def __init__(self):
        super().__init__()
        self.hardtanh__1 = torch.nn.Hardtanh(0.1, 0.9)
        self.conv = torch.nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")
        self.conv__pad = torch.nn.Conv2d(3, 2, 3)

    def forward(self, x):
        x = self.conv__pad(self.conv(x))
        y = F.hardtanh(x, -0.3, 0.7) + F.hardtanh(2 * x, 0.1, 0.9) * self.hardtanh__1(x)
        z = F.threshold(x, 0.1, 0.1) * F.threshold(x, -0.5, -0.5)
        return y * x.clamp(-0.3, 0.7) + z * (x.clamp(-0.2, 0.1) + 1).clamp(0.9, 1.05)


def test_parts_of_layers_have_names_of_their_own(tmp_path):
    net = Twice().eval()
    x = torch.linspace(-3, 3, 2 * 2 * 5 * 6).reshape(2, 2, 5, 6)
    expected = net(x).detach().numpy().transpose(0, 2, 3, 1)
    there = converters.from_torch(net, (2, 5, 6))
    last = x.numpy().transpose(0, 2, 3, 1)
    close(converters.to_keras(there)(last), [expected])
    converters.save(tmp_path / "net.keras", there)
    close(keras.saving.load_model(tmp_path / "net.keras", compile=False)(last), [expected])

    def clips(x):
        return jnp.clip(x, -0.2, 0.3) + jnp.maximum(x, 0.1) * jnp.maximum(-jnp.maximum(x, -0.5), 0)

    class Clips(nn.Module):
        @nn.compact
        def __call__(self, x):
            return clips(x)

    x = x.numpy().reshape(8, 15)
    close(converters.to_keras(Clips(), {}, input_shape=(15,))(x), [np.asarray(clips(x))])


def test_a_layer_may_have_the_name_of_a_part_of_another():
    start = keras.Input((6,))
    left, right = keras.ops.split(L.Dense(6, "relu", name="d")(start), 2, -1)
    end = L.Dense(3, "tanh", name="d__activation")(L.Add(name="split__0")([left, right]))
    net = keras.Model(start, end)
    line = keras.Sequential(
        [keras.Input((6,)), L.Dense(4, "gelu", name="a"), L.Dense(2, "elu", name="a__activation")]
    )
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    other = L.Dense(4, "tanh", name="a__activation")
    again = keras.Input((4,))
    twice = L.Add()([other(L.Dense(4, "relu", name="a")(again)), other(again)])
    for model in (net, line, keras.Model(again, twice)):
        given = x[:, : model.input_shape[1]]
        there = converters.from_keras(model)
        close(there(given), flat(model(given)))
        made = converters.to_keras(there)
        close(made(given), flat(model(given)))
        one, other = ([w.path.split("/")[-2:] for w in m.weights] for m in (made, model))
        assert one == other


@pytest.mark.parametrize("swapped", [False, True])
def test_branches_of_other_lengths_keep_their_weights_in_a_file(tmp_path, swapped):
    """Keras numbers the layers of a file by how far they are from the output."""
    start = keras.Input((4, 3))
    short = L.Dense(3, name="short")(start)
    long = L.Dense(3, name="long_1")(start)
    long = L.Dense(3, name="long_2")(L.Activation("tanh")(long))
    both = [long, short] if swapped else [short, long]
    net = keras.Model(start, L.Dense(2, name="head")(L.Subtract()(both)))
    for v in net.weights:
        v.assign(np.random.default_rng(len(v.path)).normal(size=v.shape))
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    for name in ("a.keras", "a.h5"):
        converters.save(tmp_path / name, converters.from_keras(net))
        close(keras.saving.load_model(tmp_path / name)(x), flat(net(x)))


def test_learned_arrays_between_layers():
    """A gain, a row for each channel and a table of positions."""
    net = fwt.Graph(
        [
            ("gain", fwt.layers.Parameter(()), ()),
            ("scale", fwt.layers.Parameter((3,)), ()),
            ("block/table", fwt.layers.Parameter((1, 4, 3)), ()),
            ("block/a", fwt.layers.Multiply(), ("input", "scale")),
            ("block/b", fwt.layers.Add(), ("block/table", "block/a")),
            ("c", fwt.layers.Multiply(), ("gain", "block/b")),
        ],
        input_shape=(4, 3),
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    variables = jax.tree.map(
        lambda v: np.random.default_rng(1).normal(size=v.shape).astype("float32"),
        net.init(jax.random.key(0), x),
    )
    expected = flat(net.apply(variables, x))
    there = converters.to_torch(net, variables)
    assert {k: tuple(v.shape) for k, v in there.state_dict().items()} == {
        "gain": (), "scale": (3,), "block.table": (1, 4, 3)
    }  # fmt: skip
    with torch.no_grad():
        close(there(torch.from_numpy(x)), expected)
    in_keras = converters.to_keras(net, variables)
    assert len(in_keras.trainable_weights) == 3
    close(in_keras(x), expected)


def test_a_line_with_an_operation_is_a_graph_where_no_layer_says_it():
    start = keras.Input((4, 3))
    net = keras.Model(start, L.Dense(2, name="dense")(start[:, 1:3]))
    model = converters.from_keras(net)
    assert isinstance(model.module, fwt.Sequential)
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    with torch.no_grad():
        close(converters.to_torch(*model)(torch.from_numpy(x)), flat(net(x)))
    close(converters.to_keras(*model)(x), flat(net(x)))


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_a_pad_of_keras_ops_is_a_layer_and_comes_back(mode):
    start = keras.Input((6, 5, 3))
    y = keras.ops.pad(start, [[0, 0], [1, 2], [0, 1], [0, 0]], mode=mode)
    net = keras.Model(start, L.Conv2D(4, 2, name="conv")(y))
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 3)).astype("float32")
    model = converters.from_keras(net)
    close(np.asarray(model(x)), flat(net(x)))
    with torch.no_grad():
        found = converters.to_torch(model)(torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
    close(np.moveaxis(found.numpy(), 1, -1), flat(net(x)))
    again = converters.to_keras(model)
    close(again(x), flat(net(x)))
    close(np.asarray(converters.from_keras(again)(x)), flat(net(x)))


def test_what_keras_ops_split_and_stack():
    start = keras.Input((6, 5), name="start")
    one, two, three = keras.ops.split(start, [1, 4], axis=1)
    halves = keras.ops.split(keras.ops.swapaxes(L.Conv1D(4, 2, name="conv")(two), 1, -1), 2, axis=1)
    ends = [
        L.Dense(3, name="dense")(one + three[:, 1:]),
        keras.ops.stack([halves[1] * 2.0, halves[0]], axis=-2),
    ]
    net = keras.Model(start, ends)
    x = np.random.default_rng(0).normal(size=(3, 6, 5)).astype("float32")
    model = converters.from_keras(net)
    close(list(model(x)), flat(net(x)))
    close(converters.to_keras(model)(x), flat(net(x)))


def test_augmentation_is_the_identity_of_predict():
    start = keras.Input((6, 5, 3))
    y = start
    for layer in (L.RandomFlip(), L.RandomRotation(0.2), L.RandomZoom(0.2), L.RandomContrast(0.2)):
        y = layer(y)
    net = keras.Model(start, L.Add(name="sum")([L.Conv2D(3, 1, name="conv")(y), y]))
    x = np.random.default_rng(0).uniform(size=(2, 6, 5, 3)).astype("float32")
    model = converters.from_keras(net)
    close(np.asarray(model(x)), flat(net.predict(x, verbose=0)))


x = keras.Input((4, 3), name="x")
whole = keras.Input((4, 3), name="whole", dtype="uint8")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: keras.ops.split(x, [0], axis=1)[1], "Split.: one of its parts is empty"),
        (lambda: keras.ops.cumsum(x, 1), "operation with.*is not known"),
        (lambda: L.Dense(2)(L.LSTM(4, return_state=True)(x)[1]), r"output \[1\].*transform\(model"),
        (
            lambda: L.GRU(3)(x, initial_state=x[:, 0]),
            r"initial_state=; converters.transform\(model",
        ),
        (lambda: keras.ops.clip(x, np.zeros(3), np.ones(3)), "Clip.: it is called with arrays"),
        (lambda: L.TimeDistributed(L.Conv1D(2, 3))(x[..., None]), "Conv3D.*for Conv2D"),
        (lambda: keras.ops.reshape(x, (3, -1)), r"newshape=.*it puts all examples into 3"),
        (lambda: keras.ops.reshape(x, (1, -1)), r"newshape=.*it puts all examples into 1"),
        (lambda: keras.ops.pad(x, 1, mode="reflect"), "pad_width=1 with mode='reflect'"),
        (lambda: keras.ops.pad(x, [[0, 0], [1, 1], [0, 0]], constant_values=2.0), "is not known"),
        (lambda: keras.ops.maximum(x, 2.0), "with the number 2.0"),
        (lambda: L.Dropout(0.5)(x, training=True), "training=True"),
        (
            lambda: L.MultiHeadAttention(1, 3)(x, x, query_mask=x[..., 0] > 0),
            r"called with \(query_mask=",
        ),
        (lambda: L.MultiHeadAttention(1, 3, use_gate=True)(x, x), "gate"),
        (lambda: L.GroupQueryAttention(3, 2, 1, sliding_window=2)(x, x), "sliding_window"),
        (lambda: L.Attention()([x, x], return_attention_scores=True)[0], "attention_scores"),
        (lambda: L.LSTM(2, return_state=True)(x), "return_state|its output"),
        (lambda: L.LSTM(2)(x, mask=keras.ops.not_equal(x[..., 0], 0)), r"called with \(mask="),
        (lambda: keras.ops.reshape(x, (-1, 3)), "does not hold|batch"),
        (lambda: L.Lambda(lambda v: v)(x), "Lambda"),
    ],
)
def test_what_can_not_be_said_is_refused_by_name(made, said):
    model = keras.Model(x, made())
    with pytest.raises(converters.ConversionError, match=said):
        converters.from_keras(model)


@pytest.mark.parametrize("behind", ["dense", "convolution"])
def test_both_axes_of_a_product_with_its_own_transposition(behind):
    x = keras.Input((5, 4))
    y = keras.layers.Conv1D(6, 1)(x)
    y = keras.ops.matmul(y, keras.ops.transpose(y, (0, 2, 1)))
    y = keras.layers.Dense(5)(y)
    model = keras.Model(x, y if behind == "dense" else keras.layers.Conv1D(3, 2)(y))
    given = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    wanted = np.asarray(keras.ops.convert_to_numpy(model(given)))
    graph = converters.from_keras(model)
    np.testing.assert_allclose(graph(given), wanted, atol=1e-5)
    with torch.no_grad():
        found = converters.to_torch(*graph)(torch.from_numpy(given.transpose(0, 2, 1)))
    # A Dense proves no channels, so only behind a convolution torch has them before the rest.
    found = found.numpy() if behind == "dense" else found.numpy().transpose(0, 2, 1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    again = converters.to_keras(*graph)(given)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(again), wanted, atol=1e-5)


class Alone(torch.nn.Module):
    """One number for each example, beside another output."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = torch.nn.Linear(4, 3), torch.nn.Linear(3, 1), how

    def forward(self, x):
        h = torch.relu(self.a(x))
        ways = {
            "squeeze": lambda: self.b(h).squeeze(-1),
            "view": lambda: self.b(h).view(-1),
            "entry": lambda: self.b(h)[:, 0],
            "norm": lambda: ((h * h).sum(-1) + self.b(h)[:, 0]).sqrt(),
        }
        return ways[self.how](), self.b(h)


@pytest.mark.parametrize("how", thorough_but(1, ["squeeze", "view", "entry", "norm"]))
def test_one_number_for_each_example_of_torch(how):
    net = Alone(how).eval()
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    model = converters.from_torch(net, (4,))
    wanted = [y.detach().numpy() for y in net(torch.from_numpy(x))]
    there = converters.to_torch(model)
    for found in (
        model(x), converters.to_keras(model)(x), [y.detach() for y in there(torch.from_numpy(x))]
    ):  # fmt: skip
        for theirs, ours in zip(wanted, found, strict=True):
            assert tuple(ours.shape) == theirs.shape
            np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)
    assert converters.from_torch(there, (4,)).module == model.module


def test_one_number_for_each_example_of_keras():
    x = keras.Input((4,), name="x")
    h = keras.layers.Dense(3, name="h")(x)
    net = keras.Model(x, [keras.ops.sum(h, -1), keras.ops.sqrt(keras.ops.sum(h * h, -1)), h])
    model = converters.from_keras(net)
    given = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    there = [y.detach() for y in converters.to_torch(model)(torch.from_numpy(given))]
    for found in (model(given), converters.to_keras(model)(given), there):
        for theirs, ours in zip(net(given), found, strict=True):
            assert tuple(ours.shape) == tuple(theirs.shape)
            np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-6)
    meets = keras.Model(x, keras.ops.sum(h, -1) + keras.ops.max(h, -1))
    with pytest.raises(converters.ConversionError, match="the batch alone, which meets another"):
        converters.from_keras(meets)


def test_a_layer_of_two_models_is_refused():
    shared = keras.layers.Dense(4, name="shared")
    x, start = keras.Input((4,)), keras.Input((4,))
    inner = keras.Model(start, shared(start), name="inner")
    with pytest.raises(
        converters.ConversionError, match=r"it is the layer .*shared too, in another model"
    ):
        converters.from_keras(keras.Model(x, shared(inner(x))))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (keras.ops.square, r"square.* \(Square\): it computes in uint8"),
        (lambda x: L.Add(name="add")([x, x]), r"add \(Add\): it computes in uint8"),
        (lambda x: L.LayerNormalization()(L.Flatten()(x)), r"\(LayerNormalization\): it takes w"),
        (lambda x: L.UpSampling1D(2)(L.ReLU(2.5)(x)), r"\(ReLU\): it takes whole numbers"),
        (L.GlobalAveragePooling1D(), r"\(GlobalAveragePooling1D\): it takes whole numbers"),
        (L.Hashing(4), "Hashing.*can't be converted"),
    ],
)
def test_whole_numbers_that_keras_rounds_or_wraps(made, said):
    with pytest.raises(converters.ConversionError, match=said):
        converters.from_keras(keras.Model(whole, made(whole)))


def test_whole_numbers_that_a_layer_makes():
    given = L.LayerNormalization()(L.Discretization([0.0, 1.0])(x))
    with pytest.raises(converters.ConversionError, match="it takes whole numbers"):
        converters.from_keras(keras.Model(x, given))


@pytest.mark.parametrize(
    "made",
    [
        lambda x: (x - 127.5) / 127.5,
        lambda x: x * 2.0,
        lambda x: keras.ops.sum(x, -1),
        lambda x: L.BatchNormalization()(L.MaxPooling1D(2)(x)),
        lambda x: L.LayerNormalization()(L.Rescaling(1.0)(x)),
        lambda x: L.Dense(3)(L.Concatenate()([L.Flatten()(x), L.ReLU(3.0)(L.Flatten()(x))])),
    ],
)
def test_whole_numbers_that_keras_makes_floats_of(made):
    x = np.random.default_rng(0).integers(0, 256, (2, 4, 3)).astype(np.uint8)
    net = randomise_keras(keras.Model(whole, made(whole)))
    np.testing.assert_allclose(
        np.asarray(converters.from_keras(net)(x), float),
        np.asarray(net.predict(x, verbose=0), float),
        rtol=1e-5,
        atol=1e-5,
    )
