"""reset against new layers of the real frameworks, and lsuv."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
import torch.nn.utils.prune
from flax import nnx
from flax.training.train_state import TrainState
from marks import thorough_but
from scipy import stats

import fwt
from fwt import converters


def capture(model):
    """The weights of a live model by path, in Flax's axes."""
    found = {}

    def keep(tree):
        found.update({p: np.array(x) for p, x in fwt.select(tree, "**").items()})
        return tree

    converters.transform(model, keep)
    return found


def compare(ours, theirs, pools):
    """Constants exactly, the rest by Kolmogorov-Smirnov; ``pools`` holds other new layers."""
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        found = ours[path]
        if all(np.array_equal(expected, pool[path]) for pool in pools):  # no random numbers
            assert np.array_equal(found, expected), path
            continue
        expected = np.concatenate([expected.ravel(), *(pool[path].ravel() for pool in pools)])
        assert stats.ks_2samp(found.ravel(), expected).pvalue > 1e-4, path
        most = np.abs(expected).max()
        if found.size > 300:
            np.testing.assert_allclose(found.std(), expected.std(), rtol=0.12, err_msg=path)
        # A uniform distribution has an end, which a factor of sqrt(2) would not keep.
        if abs(expected.std() / most - 3**-0.5) < 0.03:
            assert np.abs(found).max() <= most * 1.05, path


k = keras.layers
KERAS = {
    "dense": (lambda: k.Dense(90), (None, 70)),
    "conv": (lambda: k.Conv2D(40, (3, 5)), (None, 9, 8, 7)),
    "grouped": (lambda: k.Conv1D(40, 3, groups=2), (None, 9, 20)),
    "transposed": (lambda: k.Conv2DTranspose(9, (3, 5)), (None, 9, 8, 22)),
    "depthwise": (lambda: k.DepthwiseConv2D((3, 5), depth_multiplier=4), (None, 9, 8, 30)),
    "separable": (lambda: k.SeparableConv2D(60, (3, 5), depth_multiplier=2), (None, 9, 8, 30)),
    "embedding": (lambda: k.Embedding(100, 20), (None, 5)),
    "batch_norm": (lambda: k.BatchNormalization(), (None, 5)),
    "layer_norm": (lambda: k.LayerNormalization(), (None, 5)),
    "prelu": (lambda: k.PReLU(), (None, 5)),
    "lstm": (lambda: k.LSTM(32), (None, 7, 20)),
    "gru": (lambda: k.GRU(32), (None, 7, 20)),
    "gru_v1": (lambda: k.GRU(32, reset_after=False), (None, 7, 20)),
    "rnn": (lambda: k.SimpleRNN(48), (None, 7, 20)),
    "bidirectional": (lambda: k.Bidirectional(k.LSTM(24, name="x"), name="b"), (None, 7, 20)),
    "einsum_heads": (
        lambda: k.EinsumDense("abc,cde->abde", (None, 6, 20), bias_axes="de"),
        (None, 5, 40),
    ),
    "einsum_join": (lambda: k.EinsumDense("abcd,cde->abe", (None, 20)), (None, 5, 4, 16)),
    "conv_lstm": (lambda: k.ConvLSTM2D(8, (3, 2)), (None, 3, 8, 8, 6)),
    "einsum": (lambda: k.EinsumDense("abc,cd->abd", (5, 40), bias_axes="d"), (None, 5, 30)),
}


def keras_model(name):
    make, shape = KERAS[name]
    layer = make()
    layer.build(shape)
    return layer


@pytest.mark.parametrize(
    "name",
    thorough_but(
        lambda name: name not in ("bidirectional", "gru_v1", "rnn", "lstm", "einsum"), KERAS
    ),
)
def test_keras(name):
    keras.utils.set_random_seed(1)
    theirs, *pools = (capture(keras_model(name)) for _ in range(3))
    layer = keras_model(name)
    converters.transform(layer, fwt.reset(0, like="keras"))
    compare(capture(layer), theirs, pools)


def test_keras_attention():
    def make():
        layer = k.MultiHeadAttention(6, 9, value_dim=7)
        layer.build((None, 5, 40), (None, 5, 40))
        return layer

    theirs, *pools = (capture(make()) for _ in range(3))
    layer = make()
    converters.transform(layer, fwt.reset(0, like="keras"))
    compare(capture(layer), theirs, pools)


def test_keras_orthogonal_cells():
    layer = keras_model("lstm")
    converters.transform(layer, fwt.reset(0, like="keras"))
    w = np.asarray(layer.cell.recurrent_kernel)
    np.testing.assert_allclose(w @ w.T, np.eye(32), atol=1e-5)


t = torch.nn
TORCH = {
    "linear": lambda: t.Linear(70, 90),
    "conv": lambda: t.Conv2d(7, 40, (3, 5)),
    "grouped": lambda: t.Conv1d(20, 40, 3, groups=2),
    "depthwise": lambda: t.Conv2d(20, 80, (3, 5), groups=20),
    "transposed": lambda: t.ConvTranspose2d(22, 12, (3, 5)),
    "transposed3d": lambda: t.ConvTranspose3d(12, 8, (3, 2, 1), groups=2),
    "embedding": lambda: t.Embedding(100, 20),
    "padded": lambda: t.Embedding(100, 20, padding_idx=3),
    "bag": lambda: t.EmbeddingBag(100, 20),
    "batch_norm": lambda: t.BatchNorm2d(6),
    "layer_norm": lambda: t.LayerNorm((4, 6)),
    "group_norm": lambda: t.GroupNorm(2, 6),
    "instance_norm": lambda: t.InstanceNorm2d(6, affine=True),
    "rms_norm": lambda: t.RMSNorm(6),
    "prelu": lambda: t.PReLU(5),
    "lstm": lambda: t.LSTM(20, 32, num_layers=2, bidirectional=True),
    "lstm_proj": lambda: t.LSTM(20, 32, proj_size=12),
    "gru": lambda: t.GRU(20, 32),
    "rnn": lambda: t.RNN(20, 32),
    "cell": lambda: t.LSTMCell(20, 32),
    "attention": lambda: t.MultiheadAttention(40, 4),
    "attention_apart": lambda: t.MultiheadAttention(40, 4, kdim=30, vdim=20, add_bias_kv=True),
    "encoder": lambda: t.TransformerEncoderLayer(40, 4, 60),
    "bilinear": lambda: t.Bilinear(10, 20, 30),
    "transformer": lambda: t.Transformer(20, 2, 1, 1, 31),
    # It draws the matrices of whatever is in it, and no others.
    "transformer_of_others": lambda: t.ModuleDict({
        "before": t.Linear(30, 40),
        "core": t.Transformer(20, 2, custom_encoder=t.Sequential(
            t.Embedding(50, 20, padding_idx=3), t.Conv1d(20, 24, 3), t.BatchNorm1d(24),
            t.ConvTranspose2d(24, 10, 3)), custom_decoder=t.GRU(20, 24)),
    }),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    thorough_but(
        lambda name: name not in ("encoder", "transformer", "attention_apart", "lstm_proj", "cell",
                                  "bilinear", "gru", "rnn", "transposed3d", "bag"), TORCH),
)  # fmt: skip
def test_torch(name):
    torch.manual_seed(1)
    theirs, *pools = (capture(TORCH[name]()) for _ in range(3))
    layer = TORCH[name]()
    converters.transform(layer, fwt.reset(0, like="torch"))
    compare(capture(layer), theirs, pools)


def test_a_layer_that_torch_pruned_is_reset_whole():
    layer = torch.nn.utils.prune.random_unstructured(t.Linear(70, 90), "weight", 0.5)
    converters.transform(layer, fwt.reset(0, like="torch"))
    assert layer.weight.all()
    new, *pools = (capture(t.Linear(70, 90)) for _ in range(3))
    compare(capture(layer), new, pools)


he, xavier = nn.initializers.he_uniform, nn.initializers.xavier_uniform
normal = nn.initializers.normal
FLAX = {
    "dense": (nn.Dense(90), (2, 70)),
    "own": (nn.Dense(90, kernel_init=he(), bias_init=normal(2.0)), (2, 70)),
    "conv": (nn.Conv(40, (3, 5)), (2, 9, 8, 7)),
    "grouped": (nn.Conv(40, (3,), feature_group_count=2), (2, 9, 20)),
    "transposed": (nn.ConvTranspose(9, (3, 5)), (2, 9, 8, 22)),
    "transpose_kernel": (nn.ConvTranspose(9, (3, 5), transpose_kernel=True), (2, 9, 8, 22)),
    "embed": (nn.Embed(100, 20), None),
    "general": (nn.DenseGeneral((6, 20)), (2, 40)),
    "general_join": (nn.DenseGeneral(20, axis=(-2, -1)), (2, 6, 10)),
    "general_batches": (nn.DenseGeneral(40, batch_dims=(0,)), (7, 2, 30)),
    "general_batches_own": (nn.DenseGeneral(40, batch_dims=(0,), kernel_init=he()), (7, 2, 30)),
    "own_local": (nn.ConvLocal(8, (3, 2), kernel_init=he()), (2, 9, 8, 5)),
    "general_local": (nn.ConvLocal(8, (3,)), (2, 9, 5)),
    "mgu": (nn.RNN(nn.MGUCell(32)), (2, 5, 20)),
    "layer_norm": (nn.LayerNorm(), (2, 9)),
    "prelu": (nn.PReLU(), (2, 9)),
    "lstm": (nn.RNN(nn.LSTMCell(32)), (2, 5, 20)),
    "optimized": (nn.RNN(nn.OptimizedLSTMCell(32)), (2, 5, 20)),
    "gru": (nn.RNN(nn.GRUCell(32)), (2, 5, 20)),
    "simple": (nn.RNN(nn.SimpleCell(32)), (2, 5, 20)),
    "attention": (nn.MultiHeadDotProductAttention(4), (2, 5, 40)),
    "attention_own": (
        nn.MultiHeadDotProductAttention(4, kernel_init=xavier(), out_kernel_init=normal(0.2)),
        (2, 5, 40),
    ),
}


@pytest.mark.parametrize(
    "name",
    thorough_but(
        lambda name: name in ("dense", "own", "grouped", "transposed", "embed", "general_join",
                              "general_batches_own", "layer_norm", "lstm", "attention"), FLAX),
)  # fmt: skip
def test_flax(name):
    layer, shape = FLAX[name]
    x = jnp.ones((2, 5), jnp.int32) if shape is None else jnp.ones(shape)
    net = fwt.Sequential([("layer", layer)])
    drawn = [net.init(jax.random.key(seed), x) for seed in range(3)]
    theirs, *pools = ({p: np.asarray(w) for p, w in fwt.select(v, "**").items()} for v in drawn)
    told = fwt.reset(5, like="flax")(fwt.Model(net, drawn[0]))
    compare({p: np.asarray(w) for p, w in fwt.select(told, "**").items()}, theirs, pools)
    also = fwt.reset(5, like="flax", module=net)(drawn[0])
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, told.variables, also)))
    if not {"own", "general", "kernel"} & set(name.split("_")):  # by names alone
        named = fwt.select(fwt.reset(5, like="flax")(drawn[0]), "**")
        compare({p: np.asarray(w) for p, w in named.items()}, theirs, pools)


NNX = {
    "OptimizedLSTMCell": lambda r: nnx.OptimizedLSTMCell(20, 32, rngs=r),
    "LSTMCell": lambda r: nnx.LSTMCell(20, 32, rngs=r),
    "GRUCell": lambda r: nnx.GRUCell(20, 32, rngs=r),
    "SimpleCell": lambda r: nnx.SimpleCell(20, 32, rngs=r),
    "RNN": lambda r: nnx.RNN(nnx.GRUCell(20, 32, rngs=r), rngs=r),
    "Einsum": lambda r: nnx.Einsum("abc,cde->abde", (16, 15, 9), rngs=r),
    "LinearGeneral": lambda r: nnx.LinearGeneral(16, (14, 7), batch_axis={0: 5}, rngs=r),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    drawn = [NNX[name](nnx.Rngs(seed)) for seed in range(3)]

    def arrays(module):
        return {p: np.asarray(w) for p, w in fwt.select(nnx.state(module, nnx.Param), "**").items()}

    theirs, *pools = map(arrays, drawn)
    found = arrays(fwt.reset(5, like="flax")(drawn[0]))
    compare(found, theirs, pools)
    for path, w in theirs.items():
        if re.search("(dense_h|h[ifgo])/kernel", path):
            for each in (w, found[path]):
                np.testing.assert_allclose(each @ each.T, np.eye(32), atol=1e-5)


def test_nnx_cells_of_all_gates_have_no_value_like_others():
    for like in ("keras", "torch"):
        with pytest.raises(fwt.LeafError, match="dense_h/"):
            fwt.reset(0, like)(nnx.GRUCell(9, 12, rngs=nnx.Rngs(0)))


class Local(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.ConvLocal(64, (3, 2), use_bias=False, name=self.parts)(x)

    parts: str | None = None


@pytest.mark.parametrize("how", ["by linen's name", "a module", "within another"])
def test_local_convolutions_of_flax(how):
    """Flax draws one kernel for all positions, so that its fan counts them all."""
    net = Local("mine" if how == "a module" else None)
    variables = net.init(jax.random.key(0), np.ones((1, 5, 4, 3), np.float32))
    fresh = fwt.reset(1, like="flax")
    if how == "a module":
        new = fresh(fwt.Model(net, variables)).variables["params"]
    else:
        params = variables["params"]
        params = {"block": {"a": params}} if how == "within another" else params
        new = fresh(params)
        new = new["block"]["a"] if how == "within another" else new
    (old,), (found,) = jax.tree.leaves(variables), jax.tree.leaves(new)
    assert found.shape == (5, 4, 18, 64)
    assert not np.array_equal(found, old)
    old, found = np.asarray(old), np.asarray(found)
    assert found.std() == pytest.approx(old.std(), rel=0.05)
    assert old.std() == pytest.approx((5 * 4 * 18) ** -0.5, rel=0.05)


def test_a_padding_row_stays_zero():
    layer = t.Embedding(10, 4, padding_idx=-1)
    converters.transform(layer, fwt.reset(0, like="torch"))
    assert not layer.weight[-1].any()
    assert layer.weight[:-1].all()


def test_a_users_own_initializer_is_called_each_time():
    calls = []

    def own(key, shape, dtype=jnp.float32):
        calls.append(shape)
        return jnp.full(shape, len(calls), dtype)

    net = fwt.Sequential([("d", nn.Dense(3, kernel_init=own))])
    variables = net.init(jax.random.key(0), jnp.ones((1, 2)))
    values = [
        fwt.reset(0, like="flax", module=net)(variables)["params"]["d"]["kernel"][0, 0].item()
        for _ in range(3)
    ]
    assert values == sorted(set(values))


def cell_of(name):
    layer, shape = FLAX[name]
    return layer.init(jax.random.key(0), jnp.ones(shape))["params"]["cell"]


@pytest.mark.thorough
def test_cells_of_one_framework_as_another_has_them():
    cell = {"cell": cell_of("lstm")}
    new = jax.device_get(fwt.reset(0, like="keras")(cell)["cell"])
    whole = np.concatenate([new[f"h{g}"]["kernel"] for g in "ifgo"], 1)
    np.testing.assert_allclose(whole @ whole.T, np.eye(32), atol=1e-5)
    assert (new["hf"]["bias"] == 1).all()
    assert not any(new[f"h{g}"]["bias"].any() for g in "igo")
    limit = (6 / (20 + 128)) ** 0.5
    assert 0.95 * limit < np.abs(new["ig"]["kernel"]).max() <= limit
    new = jax.device_get(fwt.reset(0, like="torch")(cell)["cell"])
    limit = 32**-0.5
    assert np.abs(new["hg"]["kernel"]).max() <= limit
    biases = np.concatenate([new[f"h{g}"]["bias"] for g in "ifgo"])
    assert limit * 1.2 < np.abs(biases).max() <= 2 * limit  # the sum of two
    gru = {"cell": cell_of("gru")}
    new = jax.device_get(fwt.reset(0, like="torch")(gru)["cell"])
    assert np.abs(new["hn"]["bias"]).max() <= limit < np.abs(new["ir"]["bias"]).max()
    new = jax.device_get(fwt.reset(0, like="keras")(gru)["cell"])
    whole = np.concatenate([new[f"h{g}"]["kernel"] for g in "zrn"], 1)
    np.testing.assert_allclose(whole @ whole.T, np.eye(32), atol=1e-5)

    torch_lstm = t.LSTM(20, 32)
    converters.transform(torch_lstm, fwt.reset(0, like="keras"))
    hidden = torch_lstm.weight_hh_l0.detach().numpy()
    np.testing.assert_allclose(hidden.T @ hidden, np.eye(32), atol=1e-5)
    both = (torch_lstm.bias_ih_l0 + torch_lstm.bias_hh_l0).detach().numpy()
    assert np.array_equal(both, np.repeat([0, 1, 0, 0], 32))
    converters.transform(torch_lstm, fwt.reset(0, like="flax"))
    hidden = torch_lstm.weight_hh_l0.detach().numpy().reshape(4, 32, 32)
    for gate in hidden:
        np.testing.assert_allclose(gate @ gate.T, np.eye(32), atol=1e-5)
    keras_lstm = keras_model("lstm")
    converters.transform(keras_lstm, fwt.reset(0, like="torch"))
    assert limit < np.abs(np.asarray(keras_lstm.cell.bias)).max() <= 2 * limit
    converters.transform(keras_lstm, fwt.reset(0, like="flax"))
    for gate in np.split(np.asarray(keras_lstm.cell.recurrent_kernel), 4, 1):
        np.testing.assert_allclose(gate @ gate.T, np.eye(32), atol=1e-5)


def test_attention_of_one_framework_as_another_has_it():
    layer, shape = FLAX["attention"]
    params = layer.init(jax.random.key(0), jnp.ones(shape))["params"]
    new = jax.device_get(fwt.reset(0, like="torch")({"mha": params})["mha"])
    packed = (6 / (40 + 120)) ** 0.5
    assert 0.98 * packed < np.abs(new["key"]["kernel"]).max() <= packed
    assert np.abs(new["out"]["kernel"]).max() <= 40**-0.5
    assert not new["out"]["bias"].any()
    theirs = t.MultiheadAttention(40, 4)
    converters.transform(theirs, fwt.reset(0, like="keras"))
    limit = (6 / 80) ** 0.5
    assert 0.98 * limit < theirs.in_proj_weight.abs().max() <= limit


def test_a_file_as_new():
    model = torch.nn.Sequential(t.Conv2d(3, 8, 3), t.Flatten(), t.Linear(128, 10))
    flax = converters.from_torch(model, input_shape=(3, 6, 6))
    for like, bias in (("torch", True), ("keras", False), ("flax", False)):
        new = fwt.reset(0, like=like)(flax)
        assert np.asarray(new.variables["params"]["2"]["bias"]).any() == bias
        assert (
            fwt.reset(0, like=like, where="2/*")(flax).variables["params"]["0"]["kernel"]
            is (flax.variables["params"]["0"]["kernel"])
        )
    jitted = jax.jit(lambda key: fwt.reset(key, like="torch")(flax.variables))(jax.random.key(0))
    plain = fwt.reset(jax.random.key(0), like="torch")(flax.variables)
    np.testing.assert_allclose(
        jitted["params"]["2"]["kernel"], plain["params"]["2"]["kernel"], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("tree", "like", "said"),
    [
        ({"head": {"logit_scale": np.ones(())}}, "keras", "logit_scale.*no value like keras"),
        ({"act": {"weight": np.ones(4)}}, "torch", "act/weight"),
        ({"d": {"bias": np.ones(4)}}, "torch", "d/bias"),
        ({"c": {"weight": np.ones((4, 2, 4, 3)), "bias": np.ones(4)}}, "torch", "axes="),
        ({"r": {"weight_hr_l0": np.ones((4, 3)), "weight_hh_l0": np.ones((4, 3))}}, "keras", "r/"),
        ({"d": {"kernel": np.ones((4, 3))}}, "jax", "like must be"),
        (
            {"c": {"kernel": np.ones((3, 3, 2, 8)), "recurrent_kernel": np.ones((3, 3, 2, 8))}},
            "torch",
            "c/kernel",
        ),
        (
            {"c": {"kernel": np.ones((3, 3, 2, 8)), "recurrent_kernel": np.ones((3, 3, 2, 8))}},
            "flax",
            "c/kernel",
        ),
    ],
)
def test_what_is_not_known_is_refused(tree, like, said):
    tree = jax.tree.map(lambda x: x.astype(np.float32), tree)
    with pytest.raises(fwt.FwtError, match=said):
        fwt.reset(0, like=like)(tree)


def test_layers_that_reset_does_not_know_are_refused():
    q = keras.Input((5, 40))
    model = keras.Model(q, k.AdditiveAttention()([q, q]))
    with pytest.raises(fwt.LeafError, match="scale"):
        converters.transform(model, fwt.reset(0, like="keras"))
    with pytest.raises(fwt.FwtError, match=r"fwt\.Sequential"):
        fwt.reset(0, like="flax", module=nn.Dense(3))


def test_axes_said_by_the_user():
    tree = {"c": {"weight": np.ones((4, 3, 3, 3), np.float32), "bias": np.ones(4, np.float32)}}
    new = fwt.reset(0, like="torch", axes={"c/weight": "out in h w"})(tree)["c"]
    assert np.abs(new["weight"]).max() <= 27**-0.5
    assert np.abs(new["bias"]).max() <= 27**-0.5


# -- running statistics -----------------------------------------------------------------------

NORMS = {
    "batch_norm": lambda: t.BatchNorm2d(6),
    "no_affine": lambda: t.BatchNorm1d(6, affine=False),
    "cumulative": lambda: t.SyncBatchNorm(6, momentum=None),
    "instance_norm": lambda: t.InstanceNorm2d(6, track_running_stats=True),
    "no_statistics": lambda: t.BatchNorm2d(6, track_running_stats=False),
}


def used(layer):
    """The layer as training leaves it."""
    for name, value in layer.state_dict().items():
        value.copy_(torch.full_like(value, 7 if "tracked" in name else 2.5))
    return layer


@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_start_anew_as_in_torch(name):
    theirs, ours = used(NORMS[name]()), used(NORMS[name]())
    theirs.reset_parameters()
    net = t.Sequential(t.Conv2d(3, 6, 1), ours)
    before = {n: v.data_ptr() for n, v in net.state_dict().items()}
    converters.transform(net, fwt.reset(0, like="torch"))
    for key, value in theirs.state_dict().items():
        found = ours.state_dict()[key]
        assert found.dtype == value.dtype
        assert torch.equal(found, value), key
    assert {n: v.data_ptr() for n, v in net.state_dict().items()} == before


def pair():
    return t.Sequential(t.Conv2d(3, 6, 1), used(t.BatchNorm2d(6)), used(t.BatchNorm2d(6)))


@pytest.mark.parametrize(
    ("make", "fresh"),
    [
        (lambda: fwt.reset(0, "torch", "1/*"), {"1/scale", "1/mean", "1/var", "1/num"}),
        (lambda: fwt.reset(0, "torch", ["*/mean", "2/var"]), {"1/mean", "2/mean", "2/var"}),
        (lambda: fwt.reset(0, "torch", fwt.kernels), set()),
        (lambda: fwt.reset(0, "torch", lambda p, x: p == "2/num_batches_tracked"), {"2/num"}),
        (lambda: fwt.at("2/*", fwt.reset(0, "torch")), {"2/scale", "2/mean", "2/var", "2/num"}),
        (
            lambda: fwt.chain(fwt.prune(0.5), fwt.at("*/var", fwt.reset(0, "torch"))),
            {"1/var", "2/var"},
        ),
        (lambda: fwt.straight_through(fwt.reset(0, "torch", "1/num*")), {"1/num"}),
        (lambda: jax.jit(fwt.reset(0, "torch", ["1/var", "1/num*"])), {"1/var", "1/num"}),
        # Whoever does not reset does not see them.
        (lambda: fwt.initialize(fwt.initializers.zeros, 0, "0/*"), set()),
    ],
)
def test_where_narrows_statistics_too(make, fresh):
    net = pair()
    converters.transform(net, make())
    names = {"scale": "weight", "mean": "running_mean", "var": "running_var",
             "num": "num_batches_tracked"}  # fmt: skip
    for layer in "12":
        for short, name in names.items():
            old = 7 if short == "num" else 2.5
            new = {"scale": 1, "mean": 0, "var": 1, "num": 0}[short]
            found = float(getattr(net[int(layer)], name).detach().flatten()[0])
            assert found == (new if f"{layer}/{short}" in fresh else old), (layer, name)


def test_other_transforms_do_not_see_statistics():
    seen = []
    converters.transform(pair(), lambda tree: seen.append(tree) or tree)
    assert set(seen[0]) == {"params"}
    converters.transform(pair(), fwt.chain(lambda tree: seen.append(tree) or tree, fwt.prune(0.5)))
    assert set(seen[1]) == {"params"}
    frozen = t.Sequential(t.Linear(3, 3), t.Module())
    for name in ("weight", "bias", "running_mean", "running_var"):
        frozen[1].register_buffer(name, torch.full((3,), 2.5))
    converters.transform(frozen, fwt.reset(0, like="torch"))
    assert (frozen[1].running_mean == 2.5).all()  # the statistics of a frozen norm are settings


@pytest.mark.parametrize("scale", [True, False])
def test_running_statistics_of_keras_start_anew(scale):
    def make():
        inputs = k.Input((5,))
        y = k.BatchNormalization(scale=scale, center=scale, name="a")(k.Dense(4, name="d")(inputs))
        return keras.Model(inputs, k.TimeDistributed(k.BatchNormalization())(k.Reshape((2, 2))(y)))

    model, new = make(), make()
    for v in model.variables:
        v.assign(np.full(v.shape, 2.5, np.float32))
    converters.transform(model, fwt.reset(0, "keras", ["**/mean", "**/var"]))
    for ours, theirs in zip(model.variables, new.variables, strict=True):
        moving = ours.name.startswith("moving_")
        assert np.array_equal(ours, theirs if moving else np.full(ours.shape, 2.5, np.float32))
    converters.transform(model, fwt.reset(0, "keras"))
    for ours, theirs in zip(model.variables, new.variables, strict=True):
        if ours.name != "kernel":
            assert np.array_equal(ours, theirs), ours.path


def test_the_data_of_a_normalization_stay():
    model = keras.Sequential([keras.Input((3,)), k.Normalization(name="n"), k.Dense(2)])
    model.layers[0].adapt(np.arange(12.0).reshape(4, 3))
    mean = np.array(model.layers[0].mean)
    converters.transform(model, fwt.reset(0, "keras"))
    assert np.array_equal(model.layers[0].mean, mean)
    flax = converters.from_keras(model)
    new = fwt.reset(0, "flax")(flax)
    assert new.variables["batch_stats"]["n"]["mean"] is flax.variables["batch_stats"]["n"]["mean"]
    with pytest.raises(fwt.LeafError, match="from the data"):
        fwt.reset(0, "flax", "n/*")(flax)


def trained(variables):
    return jax.tree.map(lambda x: np.full(x.shape, 2.5, x.dtype), jax.device_get(variables))


@pytest.mark.parametrize("like", ["flax", "keras", "torch"])
def test_running_statistics_of_flax_start_anew(like):
    net = fwt.Sequential([("d", nn.Dense(4)), ("n", nn.BatchNorm(use_running_average=True))])
    new = jax.device_get(net.init(jax.random.key(0), jnp.ones((1, 3))))
    old = trained(new)
    for model in (fwt.Model(net, old), old, {"batch_stats": old["batch_stats"]}):
        reset = fwt.reset(0, like)(model)
        found = getattr(reset, "variables", reset)
        assert jax.tree.all(jax.tree.map(np.array_equal, found["batch_stats"], new["batch_stats"]))
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found["batch_stats"]))
    for where in (fwt.kernels, {"params": True}, {"d": True, "n": {"scale": True, "bias": True}}):
        found = fwt.reset(0, like, where)(old)
        assert found["batch_stats"]["n"]["mean"] is old["batch_stats"]["n"]["mean"]
    for where in ("n/mean", {"d": False, "n": {"scale": False, "bias": False, "mean": True}},
                  {"params": False, "batch_stats": {"n": {"mean": True}}}):  # fmt: skip
        found = fwt.reset(0, like, where)(old)
        assert not found["batch_stats"]["n"]["mean"].any()
        assert found["batch_stats"]["n"]["var"] is old["batch_stats"]["n"]["var"]
        assert found["params"]["n"]["scale"] is old["params"]["n"]["scale"]
    jitted = jax.jit(fwt.reset(0, like, dtype=jnp.float16))(old)
    assert jitted["params"]["n"]["scale"].dtype == jnp.float16
    assert jitted["batch_stats"]["n"]["var"].dtype == jnp.float32
    assert (jitted["batch_stats"]["n"]["var"] == 1).all()
    plain = fwt.at("d/*", fwt.reset(0, like))(old)
    assert plain["batch_stats"]["n"]["mean"] is old["batch_stats"]["n"]["mean"]


class StateWithStatistics(TrainState):
    batch_stats: dict


STATES = {
    "a train state": lambda v, tx: StateWithStatistics.create(apply_fn=None, tx=tx, **v),
    "a dict": lambda v, tx: {**v, "opt_state": tx.init(v["params"])},
    "variables in a tuple": lambda v, tx: (v, tx.init(v["params"])),
    "a state in a dict": lambda v, tx: {"s": STATES["a train state"](v, tx), "other": np.ones(2)},
}


@pytest.mark.parametrize("name", thorough_but(lambda name: name == "a train state", STATES))
def test_running_statistics_beside_an_optimizer_start_anew(name):
    net = fwt.Sequential([("d", nn.Dense(4)), ("n", nn.BatchNorm(use_running_average=True))])
    old = trained(net.init(jax.random.key(0), jnp.ones((1, 3))))
    state = STATES[name](old, optax.adam(1e-3))

    def statistics(tree):
        found = jax.tree_util.tree_leaves_with_path(tree)
        return [float(x[0]) for path, x in found if "batch_stats" in str(path)]

    where = "**" if name != "a state in a dict" else "s/**"
    for reset in (fwt.reset(0, "flax", where), jax.jit(fwt.reset(0, "flax", where))):
        assert statistics(reset(state)) == [0, 1]
    new = fwt.reset(0, "flax", "**/mean")(state)
    assert statistics(new) == [0, 2.5]
    rest = jax.tree.map(lambda x, y: x is y, state, new)
    assert sum(not same for same in jax.tree.leaves(rest)) == 1
    assert statistics(fwt.prune(0.5, where=fwt.kernels)(state)) == [2.5, 2.5]


def test_running_statistics_of_nnx_start_anew():
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    new = nnx.to_pure_dict(nnx.state(norm))
    norm.mean[...] = norm.var[...] = jnp.full(4, 2.5)
    found = nnx.to_pure_dict(fwt.reset(0, "flax")(nnx.state(norm)))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, new))
    params = {"prior": {"mean": np.ones(3, np.float32), "var": np.ones(3, np.float32)}}
    with pytest.raises(fwt.LeafError, match="prior/mean"):  # params that are named so
        fwt.reset(0, "flax")({"params": params})
    with pytest.raises(fwt.LeafError, match="ema/average"):
        fwt.reset(0, "flax")({"params": {}, "batch_stats": {"ema": {"average": np.ones(3, "f")}}})


def test_counters_in_files_and_sidecars_start_anew(tmp_path):
    net = used(t.BatchNorm1d(3))
    torch.save(t.Sequential(net).state_dict(), tmp_path / "w.pt")
    model = fwt.reset(0, "torch")(converters.load(tmp_path / "w.pt"))
    converters.save(tmp_path / "new.pt", *model)
    found = torch.load(tmp_path / "new.pt")
    theirs = t.Sequential(t.BatchNorm1d(3)).state_dict()
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[n], theirs[n]) for n in theirs)
    kept = converters.from_torch(t.Sequential(net), sidecar=True)
    assert converters.to_torch(*kept)[0].num_batches_tracked == 7
    assert converters.to_torch(*fwt.prune(0.5, where="**")(kept))[0].num_batches_tracked == 7
    assert converters.to_torch(*fwt.reset(0, "torch")(kept))[0].num_batches_tracked == 0
    untouched = t.BatchNorm1d(3)
    untouched.num_batches_tracked += 7
    kept = converters.from_torch(t.Sequential(untouched), sidecar=True)
    assert converters.to_torch(*kept)[0].num_batches_tracked == 7


# -- lsuv -------------------------------------------------------------------------------------


def outputs(net, variables, x):
    """The output of each layer that has a kernel."""
    _, state = net.apply(variables, x, capture_intermediates=True)
    params = variables["params"]
    return {
        name: value["__call__"][0]
        for name, value in state["intermediates"].items()
        if name in params and "kernel" in params[name]
    }


@pytest.mark.parametrize("bias", thorough_but(lambda bias: bias, [0.0, 0.5]))
def test_lsuv(bias):
    net = fwt.Sequential(
        [
            ("conv", nn.Conv(8, (3, 3), bias_init=nn.initializers.normal(bias))),
            fwt.layers.ReLU(),
            ("up", nn.ConvTranspose(6, (2, 3))),
            ("norm", nn.BatchNorm(use_running_average=True)),
            fwt.layers.Flatten(),
            ("a", nn.Dense(40, bias_init=nn.initializers.normal(bias))),
            fwt.layers.Tanh(),
            ("b", nn.Dense(7)),
        ]
    )
    x = 30 * jax.random.normal(jax.random.key(0), (64, 6, 5, 3)) + 2
    variables = net.init(jax.random.key(1), x)
    new = fwt.lsuv(net, variables, x, key=0)
    for name, out in outputs(net, new, x).items():
        np.testing.assert_allclose(out.var(), 1, rtol=1e-4, err_msg=name)
    for path, leaf in fwt.select(new, "**").items():
        if path.endswith("bias"):
            assert leaf is fwt.select(variables, path)[path]
    kernel = np.asarray(new["params"]["a"]["kernel"])
    gram = kernel.T @ kernel
    np.testing.assert_allclose(gram / gram[0, 0], np.eye(40), atol=1e-4)
    some = fwt.lsuv(net, variables, x, 0, where="a/*kernel")
    assert some["params"]["b"]["kernel"] is variables["params"]["b"]["kernel"]
    jitted = jax.jit(lambda v, x: fwt.lsuv(net, v, x, key=0))(variables, x)
    np.testing.assert_allclose(
        jitted["params"]["b"]["kernel"], new["params"]["b"]["kernel"], rtol=1e-3, atol=1e-5
    )


class Block(nn.Module):
    """A module of a user's own, with nested layers and one that runs twice."""

    @nn.compact
    def __call__(self, x, train=True):
        shared = nn.Dense(12, name="shared")
        x = nn.relu(shared(nn.relu(shared(x))))
        x = nn.MultiHeadDotProductAttention(3, name="mha")(x)
        return nn.Dense(5, name="head")(x) if not train else x


@pytest.mark.thorough
def test_lsuv_on_any_linen_module():
    x = jax.random.normal(jax.random.key(0), (32, 4, 12))
    net = Block()
    variables = net.init(jax.random.key(1), x, train=False)
    new = fwt.lsuv(net, variables, x, 0, train=False)
    np.testing.assert_allclose(net.apply(new, x, train=False).var(), 1, rtol=1e-4)
    with pytest.raises(fwt.LeafError, match=r"head/kernel.*ran"):
        fwt.lsuv(net, variables, x, 0)


@pytest.mark.thorough
def test_lsuv_refuses_what_it_can_not_measure():
    x = jax.random.normal(jax.random.key(0), (8, 5, 6))
    net = fwt.Sequential([("rnn", nn.RNN(nn.LSTMCell(4)))])
    variables = net.init(jax.random.key(0), x)
    with pytest.raises(fwt.LeafError, match="lifted"):
        fwt.lsuv(net, variables, x, 0)
    net = fwt.Sequential([("d", nn.Dense(4))])
    variables = net.init(jax.random.key(0), x)
    with pytest.raises(fwt.LeafError, match="does not vary"):
        fwt.lsuv(net, variables, x * 0, 0)
    variables["params"]["d"]["bias"] = np.array([0, 9, -9, 0], np.float32)
    with pytest.raises(fwt.LeafError, match="bias alone"):
        fwt.lsuv(net, variables, x, 0)
    with pytest.raises(fwt.LeafError, match="'params'"):
        fwt.lsuv(net, variables["params"], x, 0)
    with pytest.raises(fwt.LeafError, match="not finite"):
        fwt.lsuv(net, variables, x * np.nan, 0)
    wrapped = nn.WeightNorm(nn.Dense(3))
    variables = wrapped.init(jax.random.key(0), x)
    with pytest.raises(fwt.FwtError, match="not affine"):
        fwt.lsuv(wrapped, variables, x, 0)


def test_lsuv_under_remat_is_that_without_it():
    x = jax.random.normal(jax.random.key(0), (8, 5, 6))
    plain, wrapped = nn.Dense(3), nn.remat(nn.Dense)(3)
    variables = plain.init(jax.random.key(0), x)
    jax.tree.map(
        np.testing.assert_array_equal,
        fwt.lsuv(wrapped, variables, x, 0),
        fwt.lsuv(plain, variables, x, 0),
    )


def test_lsuv_leaves_recurrent_layers_to_the_user():
    x = jax.random.normal(jax.random.key(0), (32, 3, 6))
    net = fwt.Sequential([("l", fwt.layers.LSTM(5)), ("d", nn.Dense(4))])
    variables = net.init(jax.random.key(0), x)
    with pytest.raises(fwt.LeafError, match=r"l/kernel is of a LSTM, .*leave it out with where="):
        fwt.lsuv(net, variables, x, 0)
    new = fwt.lsuv(net, variables, x, 0, where="d/kernel")
    np.testing.assert_allclose(net.apply(new, x).var(), 1, rtol=1e-4)


def test_lsuv_under_jit_and_vmap():
    x = jax.random.normal(jax.random.key(0), (64, 6))
    net = fwt.Sequential([("d", nn.Dense(4))])
    variables = net.init(jax.random.key(0), x)
    closed = jax.jit(lambda v: fwt.lsuv(net, v, x, 0))(variables)
    np.testing.assert_allclose(net.apply(closed, x).var(), 1, rtol=1e-4)
    several = jax.vmap(lambda key: fwt.lsuv(net, variables, x, key))(
        jax.random.split(jax.random.key(1), 3)
    )
    for v in range(3):
        one = jax.tree.map(lambda leaf, v=v: leaf[v], several)
        np.testing.assert_allclose(net.apply(one, x).var(), 1, rtol=1e-4)


@pytest.mark.parametrize("name", ["general_join", "general", "depthwise"])
def test_one_layer_of_linen_tells_its_axes(name):
    """No run finds which inputs it takes, and none is needed."""
    layer, shape = {
        "general": (nn.DenseGeneral((10, 30), axis=(-2, -1)), (2, 7, 30)),
        "general_join": (nn.DenseGeneral(90, axis=(-2, -1), kernel_init=he()), (2, 7, 30)),
        "depthwise": (nn.Conv(120, (3, 3), feature_group_count=60), (1, 9, 9, 60)),
    }[name]

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layer.copy()(x)

    for net in (layer, Own()):
        fresh, *pools = (capture_flax(net, shape, seed) for seed in range(3))
        changed = jax.tree.map(lambda v: v * 0 + 7, net.init(jax.random.key(0), jnp.ones(shape)))
        if net is not layer and name == "general_join":
            continue  # whose own initializers only a Sequential tells
        new = fwt.reset(7, like="flax")(fwt.Model(net, changed))
        found = {p: np.array(v) for p, v in fwt.select(new, "**").items()}
        compare(found, fresh, pools)


def capture_flax(net, shape, seed):
    variables = net.init(jax.random.key(seed), jnp.ones(shape))
    return {p: np.array(v) for p, v in fwt.select(variables, "**").items()}


EINSUMS = {  # of an axis that is of the inputs and of the outputs Keras counts the outputs
    "abc,bcd->abd": ((9, 40), (9, 20), "bd"),
    "abcd,bde->abce": ((5, 7, 12), (5, 7, 20), None),
    "abc,bde->acde": ((9, 40), (40, 30, 4), None),
    "abc,dec->abde": ((3, 40), (3, 6, 20), "e"),
    "abc,dbc->abd": ((9, 40), (9, 20), "bd"),
    "abcd,cbe->ade": ((6, 30, 4), (4, 20), None),
    "abc,bc->abc": ((90, 40), (90, 40), "bc"),
    "ab,bc->ac": ((40,), (90,), "c"),
    "...b,bcd->...cd": ((3, 40), (20, 3), None),
}
SCALED = ("glorot_uniform", "glorot_normal", "he_uniform", "he_normal", "lecun_uniform",
          "lecun_normal")  # fmt: skip


def by_equation(equation, initializer="glorot_uniform"):
    size, out, bias = EINSUMS[equation]
    layer = k.EinsumDense(
        equation, out, bias_axes=bias, kernel_initializer=initializer, name="given"
    )
    return keras.Sequential([keras.Input(size, batch_size=2), layer])


@pytest.mark.parametrize("equation", thorough_but(1, EINSUMS))
def test_fans_of_keras_einsums(equation):
    keras.utils.set_random_seed(1)
    theirs, *pools = (capture(by_equation(equation)) for _ in range(3))
    model, fresh = by_equation(equation), fwt.reset(0, like="keras")
    there = fwt.select(fresh(converters.from_keras(model)), "**")
    compare({p: np.asarray(w) for p, w in there.items()}, theirs, pools)
    converters.transform(model, fresh)
    compare(capture(model), theirs, pools)
    for name in SCALED:
        theirs, *pools = (
            {"given/kernel": by_equation(equation, name).weights[0].numpy()} for _ in range(3)
        )
        draw = fwt.initialize(getattr(fwt.initializers.keras, name), 0)
        there = fwt.select(draw(converters.from_keras(model)), fwt.kernels)
        converters.transform(model, draw)
        for found in (next(iter(there.values())), model.weights[0].numpy()):
            compare({"given/kernel": np.asarray(found)}, theirs, pools)


@pytest.mark.parametrize("equation", ["abc,dec->abde", "abc,bcd->abd", "abcd,cbe->ade"])
def test_orthogonal_einsums_of_keras(equation):
    """Keras makes one matrix of the kernel as it is stored, its last axis the columns."""
    new = by_equation(equation, "orthogonal")
    draw = fwt.initialize(fwt.initializers.keras.orthogonal, 0)
    (there,) = fwt.select(draw(converters.from_keras(new)), fwt.kernels).values()
    live = by_equation(equation)
    converters.transform(live, draw)
    for kernel in (new.weights[0].numpy(), np.asarray(there), live.weights[0].numpy()):
        w = kernel.reshape(-1, kernel.shape[-1])
        w = w if len(w) > w.shape[1] else w.T
        np.testing.assert_allclose(w.T @ w, np.eye(w.shape[1]), atol=1e-5)


class Within(nn.Module):
    """A layer that a user's module makes, so that only a run tells of it."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make()(x)


def stacked(cls):
    return nn.scan(cls, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)


class Carried(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(20, batch_dims=(0,))(x), None


WITHIN = {
    "batch": (lambda: nn.DenseGeneral(10, batch_dims=(0,)), (6, 8, 30)),
    "two batches": (lambda: nn.DenseGeneral((4, 10), axis=(-2, -1), batch_dims=(0, 1)),
                    (3, 2, 8, 5, 9)),
    "einsum": (lambda: nn.Einsum((8, 20, 10), "bsi,sio->bso"), (1, 8, 20)),
    "einsum turned": (lambda: nn.Einsum((10, 8, 30), "bsi,osi->bso", use_bias=False), (1, 8, 30)),
    "local": (lambda: nn.ConvLocal(8, (3, 2)), (1, 9, 8, 5)),
    "scan": (lambda: stacked(Carried)(), (6, 8, 20)),
}  # fmt: skip


@pytest.mark.parametrize("name", thorough_but(2, WITHIN))
def test_what_flax_draws_in_one(name):
    make, shape = WITHIN[name]
    net, x = Within(make), jnp.ones(shape)
    drawn = [net.init(jax.random.key(seed), x) for seed in range(3)]
    theirs, *pools = ({p: np.asarray(w) for p, w in fwt.select(v, "**").items()} for v in drawn)
    for each in (
        fwt.reset(1, like="flax"),
        fwt.initialize(fwt.initializers.lecun_normal, 1),
    ):
        found = fwt.select(each(fwt.Model(net, drawn[0])), "**")
        compare({p: np.asarray(w) for p, w in found.items()}, theirs, pools)


def test_a_foreign_initializer_of_what_flax_draws_in_one():
    net = Within(WITHIN["batch"][0])
    model = fwt.Model(net, net.init(jax.random.key(0), jnp.ones((6, 8, 30))))
    with pytest.raises(fwt.AxesError, match="the one of the same name from"):
        fwt.initialize(jax.nn.initializers.lecun_normal(), 0)(model)


def test_a_stack_that_may_be_one_layer_has_no_fans():
    """A DenseGeneral with a batch, which Flax draws in one, or an ensemble of such layers."""
    net = Within(WITHIN["batch"][0])
    variables = net.init(jax.random.key(0), jnp.ones((6, 8, 30)))
    for like in ("flax", "keras"):
        with pytest.raises(fwt.AxesError, match="DenseGeneral_0/kernel"):
            fwt.reset(0, like)(variables)
    with pytest.raises(fwt.AxesError, match="DenseGeneral_0/kernel"):
        fwt.initialize(fwt.initializers.keras.orthogonal, 0)(variables)
    fwt.initialize(fwt.initializers.normal, 0)(variables)
    axes = {"**/kernel": "stack in out"}
    each = fwt.initialize(fwt.initializers.lecun_normal, 0, axes=axes)(variables)
    (kernel,) = fwt.select(each, fwt.kernels).values()
    assert kernel.std() == pytest.approx(30**-0.5, rel=0.1)
    ensemble = {"params": {"Dense_0": {"kernel": np.ones((6, 4, 5)), "bias": np.ones((6, 5))},
                           **variables["params"]}}  # fmt: skip
    new = fwt.initialize(fwt.initializers.lecun_normal, 0, dtype="float32")(ensemble)
    kernel = new["params"]["DenseGeneral_0"]["kernel"]
    assert kernel.std() == pytest.approx(30**-0.5, rel=0.1)


def without_forget(kind):
    keras.utils.set_random_seed(2)
    own = {"unit_forget_bias": False, "name": "given"}
    if kind == "conv":
        return keras.Sequential([keras.Input((3, 8, 5)), k.ConvLSTM1D(6, 3, **own)])
    layer = {
        "lstm": lambda: k.LSTM(6, **own),
        "both ways": lambda: k.Bidirectional(k.LSTM(6, **own | {"name": "x"}), name="given"),
        "cell": lambda: k.RNN(k.LSTMCell(6, unit_forget_bias=False), name="given"),
    }[kind]()
    return keras.Sequential([keras.Input((4, 5)), layer])


@pytest.mark.parametrize("kind", thorough_but(1, ["lstm", "both ways", "cell", "conv"]))
def test_biases_that_start_at_zero_do_so_after_a_conversion(kind, tmp_path):
    model, fresh = without_forget(kind), fwt.reset(0, like="keras")
    made = converters.from_keras(model)
    converters.transform(model, fwt.initialize(fwt.initializers.ones, 0, where=fwt.biases))
    given = [made]
    if kind != "lstm":
        model.save(tmp_path / "a.keras")
        converters.save(tmp_path / "a.safetensors", *made)
        given += [converters.load(tmp_path / f"a.{end}") for end in ("keras", "safetensors")]
    converters.transform(model, fresh)
    assert not any(w.any() for w in model.get_weights() if w.ndim == 1)
    for each in given:
        found = fwt.select(fresh(each), fwt.biases)
        assert found
        assert not any(w.any() for w in found.values())
    back = converters.to_keras(*made)
    converters.transform(back, fresh)
    assert not any(w.any() for w in back.get_weights() if w.ndim == 1)


def test_the_tables_of_an_untied_embedding_of_keras():
    def make():
        layer = k.ReversibleEmbedding(50, 30, tie_weights=False, name="e")
        ids = keras.Input((9,), dtype="int32")
        return keras.Model(ids, layer(layer(ids), reverse=True))

    keras.utils.set_random_seed(1)
    theirs, *pools = (capture(make()) for _ in range(3))
    model = make()
    converters.transform(model, fwt.reset(0, like="keras"))
    compare(capture(model), theirs, pools)
    with pytest.raises(fwt.LeafError, match="reverse_embeddings"):
        converters.transform(model, fwt.reset(0, like="torch"))


def test_two_weights_of_one_name():
    """Keras lets a layer of one's own call both its weights `kernel`: none is passed over."""

    class Twice(k.Layer):
        def build(self, shape):
            self.a = self.add_weight(name="kernel", shape=(shape[-1], 7))
            self.b = self.add_weight(name="kernel", shape=(7, 6))
            self.c = self.add_weight(name="bias", shape=(7,))
            self.d = self.add_weight(name="bias", shape=(6,))

        def call(self, x):
            return (x @ self.a + self.c) @ self.b + self.d

    model = keras.Sequential([keras.Input((5,)), Twice(name="t")])
    converters.transform(model, fwt.initialize(fwt.initializers.ones, 0, where=fwt.biases))
    assert [w.sum() for w in model.get_weights()[2:]] == [7, 6]
    converters.transform(model, fwt.prune(0.5))
    assert [int((w == 0).sum()) for w in model.get_weights()] == [18, 21, 0, 0]
    with pytest.raises(fwt.AxesError, match="t/kernel_1"):
        converters.transform(model, fwt.initialize(fwt.initializers.keras.he_normal, 0))
    bare = fwt.prune(0.9)({"t": {"kernel": jnp.ones((5, 7)), "kernel_1": jnp.ones((7, 6))}})
    assert [int((w == 0).sum()) for w in bare["t"].values()] == [32, 38]
