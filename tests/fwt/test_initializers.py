"""fwt.initializers.keras and .torch against the real frameworks, and the fans of every layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
import pytest
import torch
from marks import thorough_but
from scipy import stats

import fwt
from fwt import converters

K, T = fwt.initializers.keras, fwt.initializers.torch


def same_distribution(ours, theirs):
    """Kolmogorov-Smirnov and moments; the seeds are fixed, so this is no lottery."""
    ours, theirs = (np.concatenate([np.ravel(x) for x in xs]) for xs in (ours, theirs))
    assert ours.shape == theirs.shape
    assert len(ours) >= 1400
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-4
    scale = theirs.std() / len(theirs) ** 0.5
    assert abs(ours.mean() - theirs.mean()) < 6 * scale
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.08)
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=0.3)


# -- Keras ------------------------------------------------------------------------------------

KERAS_PLACES = {
    "dense": (lambda: keras.layers.Dense(50), (40,)),
    "conv1d": (lambda: keras.layers.Conv1D(31, 5), (9, 17)),
    "conv2d": (lambda: keras.layers.Conv2D(24, (3, 5)), (9, 8, 7)),
    "grouped": (lambda: keras.layers.Conv2D(24, (3, 5), groups=3), (9, 8, 21)),
    "conv3d": (lambda: keras.layers.Conv3D(12, (2, 3, 5)), (5, 6, 7, 8)),
    "conv2d_transpose": (lambda: keras.layers.Conv2DTranspose(9, (3, 5)), (4, 5, 22)),
    "conv3d_transpose": (lambda: keras.layers.Conv3DTranspose(5, 3), (4, 4, 4, 18)),
    "depthwise": (
        lambda: keras.layers.DepthwiseConv2D((3, 5), depth_multiplier=4),
        (9, 8, 40),
    ),
}
SOME = ("dense", "grouped")
KERAS = {
    "random_normal": ({"mean": 0.3, "stddev": 0.2}, "RandomNormal"),
    "random_uniform": ({"minval": -1.0, "maxval": 3.0}, "RandomUniform"),
    "truncated_normal": ({"mean": -0.3, "stddev": 0.2}, "TruncatedNormal"),
    "glorot_uniform": ({}, "GlorotUniform"),
    "glorot_normal": ({}, "GlorotNormal"),
    "he_uniform": ({}, "HeUniform"),
    "he_normal": ({}, "HeNormal"),
    "lecun_uniform": ({}, "LecunUniform"),
    "lecun_normal": ({}, "LecunNormal"),
    "orthogonal": ({"gain": 1.5}, "Orthogonal"),
    "variance_scaling": (
        {"scale": 0.7, "mode": "fan_out", "distribution": "untruncated_normal"},
        "VarianceScaling",
    ),
}


@functools.cache
def keras_layer(place):
    make, shape = KERAS_PLACES[place]
    layer = make()
    layer.build((1, *shape))
    return layer


# What counts no fans has two places; the two that are slow to compile are only about fans.
KERAS_CASES = [
    (name, place)
    for name in KERAS
    for place in KERAS_PLACES
    if ("3d" not in place or name in ("glorot_uniform", "orthogonal"))
    and (place in SOME or name not in ("random_normal", "random_uniform", "truncated_normal"))
]


@pytest.mark.parametrize(
    ("name", "place"),
    thorough_but(lambda c: c[1] in SOME or c[0] == "glorot_uniform", KERAS_CASES, most=13),
)
def test_keras_distributions(name, place):
    settings, theirs = KERAS[name]
    layer = keras_layer(place)
    shape = tuple(layer.kernel.shape)
    expected = np.asarray(getattr(keras.initializers, theirs)(**settings, seed=0)(shape))
    converters.transform(layer, fwt.initialize(getattr(K, name)(**settings), 0, "**/*kernel"))
    found = np.asarray(layer.kernel)
    same_distribution([found], [expected])
    if name == "orthogonal":
        for w in (found, expected):
            flat = w.reshape(-1, w.shape[-1])
            gram = flat @ flat.T if len(flat) < flat.shape[1] else flat.T @ flat
            np.testing.assert_allclose(gram, 2.25 * np.eye(len(gram)), atol=1e-5)


@pytest.mark.parametrize("distribution", ["uniform", "truncated_normal", "normal"])
@pytest.mark.parametrize("mode", ["fan_in", "fan_out", "fan_avg"])
def test_keras_variance_scaling(mode, distribution):
    theirs = keras.initializers.VarianceScaling(2.0, mode, distribution, seed=3)
    ours = K.variance_scaling(2.0, mode, distribution)
    for shape in ((40, 90), (3, 5, 8, 30), (4000,), (7, 11, 5, 9)):
        same_distribution([ours(jax.random.key(0), shape)], [np.asarray(theirs(shape))])
    axes = {"input_axes": (0, 2), "output_axes": (1,)}
    theirs = keras.initializers.VarianceScaling(2.0, mode, distribution, 3, **axes)
    ours = K.variance_scaling(2.0, mode, distribution, **axes)
    same_distribution([ours(jax.random.key(0), (9, 30, 11))], [np.asarray(theirs((9, 30, 11)))])


@pytest.mark.parametrize("kind", ["query", "attention_output"])
def test_keras_attention(kind):
    layer = keras.layers.MultiHeadAttention(6, 9, value_dim=7, output_shape=53)
    layer.build((1, 5, 40), (1, 5, 40))
    dense = {"query": layer._query_dense, "attention_output": layer._output_dense}[kind]
    expected = np.asarray(dense.kernel)
    path = next(p for p in _live_paths(layer) if p.endswith(f"{kind}/kernel"))
    converters.transform(layer, fwt.initialize(K.glorot_uniform, 0, path))
    same_distribution([np.asarray(dense.kernel)], [expected])


def _live_paths(model):
    seen = []
    converters.transform(model, lambda t: seen.extend(fwt.paths(t)) or t)
    return seen


@pytest.mark.parametrize("shape", [(3, 4), (5, 2), (3, 3)])
def test_keras_deterministic(shape):
    for ours, theirs in (
        (K.zeros, keras.initializers.Zeros()),
        (K.ones(), keras.initializers.Ones()),
        (K.constant(0.3), keras.initializers.Constant(0.3)),
        (K.identity, keras.initializers.Identity()),
        (K.identity(2.5), keras.initializers.Identity(2.5)),
    ):
        tree = {"d": {"kernel": np.full(shape, 9, np.float32)}}
        found = fwt.initialize(ours, 0)(tree)["d"]["kernel"]
        assert np.array_equal(found, np.asarray(theirs(shape)))


# -- torch ------------------------------------------------------------------------------------

nn_t = torch.nn
TORCH_PLACES = {
    "linear": (lambda: nn_t.Linear(40, 60), "weight"),
    "conv1d": (lambda: nn_t.Conv1d(20, 33, 5), "weight"),
    "conv2d": (lambda: nn_t.Conv2d(8, 24, (3, 5)), "weight"),
    "grouped": (lambda: nn_t.Conv2d(24, 30, (3, 5), groups=3), "weight"),
    "depthwise": (lambda: nn_t.Conv2d(40, 160, (3, 5), groups=40), "weight"),
    "conv3d": (lambda: nn_t.Conv3d(8, 12, (2, 3, 5)), "weight"),
    "transposed": (lambda: nn_t.ConvTranspose2d(30, 9, (3, 5)), "weight"),
    "transposed1d": (lambda: nn_t.ConvTranspose1d(36, 20, 4, groups=2), "weight"),
    "attention": (lambda: nn_t.MultiheadAttention(30, 3), "in_proj_weight"),
    "out_proj": (lambda: nn_t.MultiheadAttention(52, 2).out_proj, "weight"),
}
TORCH = [
    ("uniform", {"a": -0.3, "b": 2.0}),
    ("normal", {"mean": 0.5, "std": 0.2}),
    ("trunc_normal", {"mean": 0.1, "std": 2.0, "a": -1.0, "b": 1.5}),
    ("trunc_normal", {"std": 0.02}),
    ("xavier_uniform", {"gain": 1.5}),
    ("xavier_normal", {"gain": 0.5}),
    ("kaiming_uniform", {"a": 5**0.5}),
    ("kaiming_uniform", {"mode": "fan_out", "nonlinearity": "tanh"}),
    ("kaiming_normal", {"nonlinearity": "relu"}),
    ("kaiming_normal", {"a": 0.3, "mode": "fan_out"}),
    ("orthogonal", {"gain": 0.5}),
]


@pytest.mark.parametrize(("name", "settings"), TORCH, ids=[f"{n}-{len(s)}" for n, s in TORCH])
@pytest.mark.parametrize("place", thorough_but(lambda p: p == "grouped", TORCH_PLACES, 4))
def test_torch_distributions(place, name, settings):
    make, weight = TORCH_PLACES[place]
    torch.manual_seed(0)
    layer = make()
    parameter = getattr(layer, weight)
    getattr(nn_t.init, name + "_")(parameter, **settings)
    expected = parameter.detach().numpy().copy()
    paths = [p for p in _live_paths(layer) if "bias" not in p and "out_proj" not in p]
    assert len(paths) == 1
    converters.transform(layer, fwt.initialize(getattr(T, name)(**settings), 0, paths))
    found = parameter.detach().numpy()
    same_distribution([found], [expected])
    if name == "orthogonal":
        flat = found.reshape(len(found), -1)
        gram = flat @ flat.T if len(flat) < flat.shape[1] else flat.T @ flat
        np.testing.assert_allclose(gram, 0.25 * np.eye(len(gram)), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (lambda: nn_t.Conv1d(3, 5, 4), {}),
        (lambda: nn_t.Conv2d(5, 3, (2, 3)), {}),
        (lambda: nn_t.Conv2d(8, 6, (3, 4), groups=2), {"groups": 2}),
        (lambda: nn_t.Conv3d(2, 3, (1, 2, 3)), {}),
        (lambda: nn_t.ConvTranspose2d(4, 3, (3, 2)), {}),
        (lambda: nn_t.ConvTranspose2d(4, 3, (3, 2)), {"groups": 2}),
    ],
)
def test_torch_dirac(make, settings):
    layer = make()
    converters.transform(layer, fwt.initialize(T.dirac(**settings), 0, "kernel"))
    found = layer.weight.detach().clone()
    nn_t.init.dirac_(layer.weight, **settings)
    assert torch.equal(found, layer.weight)


@pytest.mark.parametrize(
    "sizes", [(3, 5), *(pytest.param(s, marks=pytest.mark.thorough) for s in ((5, 3), (4, 4)))]
)
def test_torch_eye_and_sparse(sizes):
    layer = nn_t.Linear(*sizes)
    converters.transform(layer, fwt.initialize(T.eye, 0))
    assert torch.equal(layer.weight, torch.eye(sizes[1], sizes[0]))
    for sparsity in (0.0, 0.1, 0.5, 1.0):
        converters.transform(layer, fwt.initialize(T.sparse(sparsity), 0))
        ours = (layer.weight == 0).sum(0)
        nn_t.init.sparse_(layer.weight, sparsity)
        assert torch.equal(ours, (layer.weight == 0).sum(0))
    big = nn_t.Linear(100, 80)
    nn_t.init.sparse_(big.weight, 0.3, std=0.5)
    theirs = big.weight.detach().numpy().copy()
    converters.transform(big, fwt.initialize(T.sparse(0.3, 0.5), 0))
    ours = big.weight.detach().numpy()
    same_distribution([ours[ours != 0]], [theirs[theirs != 0]])
    places = {tuple(np.flatnonzero(column == 0)) for column in ours.T}
    assert len(places) == 100


FAR = [(7.0, 9.0), (-9.5, -8.0), (2.0, 30.0), (-30.0, 0.1), (30.0, 40.0), (-25.0, -20.0),
       (13.5, 15.0), (5.1, 6.0), (-6.0, -4.9)]  # fmt: skip


@pytest.mark.parametrize("bounds", FAR)
def test_trunc_normal_far_in_the_tail(bounds):
    w = np.asarray(T.trunc_normal(0.0, 1.0, *bounds)(jax.random.key(1), (4000,)), np.float64)
    reference = stats.truncnorm(*bounds)
    assert stats.kstest(w, reference.cdf).pvalue > 1e-4
    assert (w >= bounds[0]).all()
    assert (w <= bounds[1]).all()


@pytest.mark.parametrize(
    ("nonlinearity", "param"),
    [("linear", None), ("conv_transpose2d", None), ("sigmoid", None), ("tanh", None),
     ("relu", None), ("leaky_relu", None), ("leaky_relu", 0.3), ("selu", None)],
)  # fmt: skip
def test_gains(nonlinearity, param):
    assert T.calculate_gain(nonlinearity, param) == nn_t.init.calculate_gain(nonlinearity, param)


# -- Flax -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "path"),
    [
        (nn.Dense(60), (1, 40), "layer/kernel"),
        (nn.Conv(24, (3, 5)), (1, 9, 8, 7), "layer/kernel"),
        (nn.Conv(24, (3, 5), feature_group_count=3), (1, 9, 8, 21), "layer/kernel"),
        (nn.ConvTranspose(9, (3, 5)), (1, 4, 5, 22), "layer/kernel"),
        (nn.ConvTranspose(9, (3, 5), transpose_kernel=True), (1, 4, 5, 22), "layer/kernel"),
        (nn.MultiHeadDotProductAttention(6), (1, 5, 54), "layer/query/kernel"),
        (nn.MultiHeadDotProductAttention(6), (1, 5, 54), "layer/out/kernel"),
    ],
)
def test_the_fans_of_flax(layer, shape, path):
    net = fwt.Sequential([("layer", layer)])
    variables = net.init(jax.random.key(0), jnp.ones(shape))
    expected = fwt.select(variables, path)[path]
    for model in (fwt.Model(net, variables), variables):
        new = fwt.initialize(fwt.initializers.lecun_normal, 1, path)(model)
        same_distribution([fwt.select(new, path)[path]], [expected])


def test_the_trap_of_the_fans():
    """8 to 16 channels, 3x3: the table of fan_in/fan_out in each framework."""
    keras_2d = keras.layers.Conv2DTranspose(16, 3)
    keras_2d.build((1, 5, 5, 8))
    torch_2d = nn_t.ConvTranspose2d(8, 16, 3)
    depthwise = keras.layers.DepthwiseConv2D(3, depth_multiplier=2)
    depthwise.build((1, 5, 5, 8))
    grouped = nn_t.Conv2d(8, 16, 3, groups=8)
    cases = [
        (keras_2d, K.lecun_uniform(), "kernel", 144),
        (keras_2d, K.variance_scaling(1.0, "fan_out", "uniform"), "kernel", 72),
        (keras_2d, fwt.initializers.lecun_uniform(), "kernel", 72),
        (torch_2d, T.kaiming_uniform(nonlinearity="linear"), "kernel", 144),
        (torch_2d, T.kaiming_uniform(mode="fan_out", nonlinearity="linear"), "kernel", 72),
        (depthwise, K.lecun_uniform(), "depthwise_kernel", 72),
        (depthwise, K.variance_scaling(1.0, "fan_out", "uniform"), "depthwise_kernel", 18),
        (depthwise, T.kaiming_uniform(nonlinearity="linear"), "depthwise_kernel", 9),
        (depthwise, T.kaiming_uniform(0, "fan_out", "linear"), "depthwise_kernel", 144),
        (depthwise, fwt.initializers.lecun_uniform(), "depthwise_kernel", 9),
        (grouped, T.kaiming_uniform(nonlinearity="linear"), "kernel", 9),
        (grouped, K.variance_scaling(1.0, "fan_out", "uniform"), "kernel", 18),
    ]
    for layer, initializer, path, fan in cases:
        seen = {}

        def keep(tree, initializer=initializer, path=path, seen=seen):
            seen["w"] = np.asarray(
                fwt.select(fwt.initialize(initializer, 0, path)(tree), path)[path]
            )
            return tree

        converters.transform(layer, keep)
        bound = (3 / fan) ** 0.5
        assert 0.95 * bound < np.abs(seen["w"]).max() <= bound, (initializer, fan)


def test_axes_said_by_the_user_do_not_hide_what_the_layer_is():
    net = fwt.Sequential([("up", nn.ConvTranspose(16, (3, 3)))])
    model = fwt.Model(net, net.init(jax.random.key(0), jnp.ones((1, 4, 4, 8))))
    for axes in (None, {"up/kernel": "h w in out"}):
        new = fwt.initialize(K.lecun_uniform, 0, axes=axes)(model)
        most = np.abs(new.variables["params"]["up"]["kernel"]).max()
        assert 0.95 * (3 / 144) ** 0.5 < most <= (3 / 144) ** 0.5


def test_axes_said_by_the_user_tell_a_transposed_kernel():
    w = {"up": {"weight": np.zeros((8, 16, 3, 3), np.float32)}}
    for order, fan in (("in out h w", 144), ("out in h w", 144)):
        new = fwt.initialize(T.kaiming_uniform(nonlinearity="linear"), 0, "**", axes={"**": order})(
            w
        )["up"]["weight"]
        bound = (3 / fan) ** 0.5
        assert 0.95 * bound < np.abs(new).max() <= bound
    named = {"conv2d_transpose_1": {"kernel": np.zeros((3, 3, 8, 16), np.float32)}}
    new = fwt.initialize(K.lecun_uniform, 0)(named)["conv2d_transpose_1"]["kernel"]
    assert 0.95 * (3 / 144) ** 0.5 < np.abs(new).max() <= (3 / 144) ** 0.5


# -- what they are ----------------------------------------------------------------------------

EVERY = [
    (space, name, {"constant": (0.3,), "sparse": (0.5,)}.get(name, ()))
    for space in (K, T)
    for name in space.__all__
    if name != "calculate_gain" and (space, name) != (K, "constant")
]


@pytest.mark.parametrize(
    ("space", "name", "arguments"), thorough_but(10, EVERY[::3] + EVERY[1::3] + EVERY[2::3])
)
def test_they_are_jax_initializers(space, name, arguments):
    noun = getattr(space, name)(*arguments)
    assert noun == getattr(space, name)(*arguments)
    assert hash(noun) == hash(getattr(space, name)(*arguments))
    shape = (3, 4, 5) if name == "dirac" else (6, 4)
    key = jax.random.key(0)
    half = (jnp.float16, ml_dtypes.bfloat16)[EVERY.index((space, name, arguments)) % 2]
    for dtype in (jnp.float32, half):
        w = noun(key, shape, dtype)
        assert w.shape == shape
        assert w.dtype == dtype
        compiled = jax.jit(lambda k, dtype=dtype: noun(k, shape, dtype))(key)
        np.testing.assert_allclose(
            np.asarray(w, np.float32), np.asarray(compiled, np.float32), rtol=1e-2, atol=1e-6
        )
    several = jax.vmap(lambda k: noun(k, shape, jnp.float32))(jax.random.split(key, 3))
    np.testing.assert_allclose(
        several[1], noun(jax.random.split(key, 3)[1], shape), rtol=1e-5, atol=1e-6
    )
    if name not in ("zeros", "ones", "constant", "eye", "identity", "dirac"):
        with pytest.raises((TypeError, ValueError)):
            noun(key, shape, jnp.int32)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: K.variance_scaling(mode="fan"), "mode must be one of"),
        (lambda: K.variance_scaling(0.0), "scale must be a number"),
        (lambda: K.random_uniform(1.0, 0.0), "maxval"),
        (lambda: K.truncated_normal(stddev=-1.0), "stddev"),
        (lambda: T.kaiming_uniform(nonlinearity="gelu"), "'relu'"),
        (lambda: T.sparse(1.5), "sparsity"),
        (lambda: T.trunc_normal(a=1.0, b=0.0), "b must be"),
        (lambda: T.dirac(0), "groups"),
        (lambda: T.uniform("0"), "a must be a number"),
    ],
)
def test_settings_are_checked(make, said):
    with pytest.raises(fwt.FwtError, match=said):
        make()


@pytest.mark.parametrize(
    ("initializer", "path", "shape", "said"),
    [
        (T.xavier_uniform, "d/bias", (4,), "no fans"),
        (T.eye, "c/kernel", (3, 3, 2, 4), "Linear"),
        (T.sparse(0.5), "c/kernel", (3, 3, 2, 4), "Linear"),
        (T.dirac, "d/kernel", (3, 4), "convolution"),
        (T.dirac(3), "conv/kernel", (3, 2, 4), "must divide the 4"),
        (T.orthogonal, "d/bias", (4,), "two axes"),
        (K.identity, "c/kernel", (3, 2, 4), "matrices"),
        (K.orthogonal, "d/bias", (4,), "two axes"),
        (K.glorot_uniform, "d/weight", (4, 3, 3, 3), "axes="),
        (T.xavier_normal, "d/weight", (4, 3, 3, 3), "axes="),
        (fwt.initializers.delta_orthogonal, "d/kernel", (4, 3), "dense kernel"),
        (fwt.initializers.delta_orthogonal, "d/kernel", (3, 4, 3), "d/kernel"),
        (fwt.initializers.orthogonal, "query/bias", (4, 3), "beside the output"),
    ],
)
def test_what_has_no_answer_is_refused(initializer, path, shape, said):
    layer, leaf = path.split("/")
    tree = {layer: {leaf: np.ones(shape, np.float32)}}
    with pytest.raises(fwt.FwtError, match=said):
        fwt.initialize(initializer, 0, "**")(tree)


def test_constants_and_empty_leaves():
    value = np.arange(3.0)
    for space in (fwt.initializers, K):
        tree = {"d": {"kernel": np.ones((2, 3), np.float32)}}
        w = fwt.initialize(space.constant(value), 0)(tree)
        assert np.array_equal(w["d"]["kernel"], [[0, 1, 2]] * 2)
        with pytest.raises(fwt.FwtError, match="array of them"):
            space.constant("a")
        assert space.he_normal()(jax.random.key(0), (0, 3)).shape == (0, 3)


DEPTHWISE = {
    "DepthwiseConv2D": (lambda k: k.DepthwiseConv2D((3, 2), depth_multiplier=2), (5, 4, 120)),
    "DepthwiseConv1D": (lambda k: k.DepthwiseConv1D(9), (12, 160)),
    "SeparableConv2D": (lambda k: k.SeparableConv2D(30, 3, depth_multiplier=3), (4, 5, 60)),
    "SeparableConv1D": (lambda k: k.SeparableConv1D(20, 7, strides=2), (12, 210)),
}
FANS = {
    **{name: (lambda n=name: fwt.initialize(getattr(K, n), 0), name)
       for name in ("he_normal", "glorot_uniform", "orthogonal")},
    "reset": (lambda: fwt.reset(0, like="keras"), "glorot_uniform"),
}  # fmt: skip


@pytest.mark.parametrize("name", thorough_but(lambda n: n == "reset", FANS, most=2))
@pytest.mark.parametrize("kind", DEPTHWISE)
def test_keras_depthwise_fans_by_every_way(tmp_path, kind, name):
    """In Flax it is a Conv with groups, of which Keras would count other fans."""
    make, shape = DEPTHWISE[kind]
    net = keras.Sequential([keras.Input(shape), make(keras.layers)])
    transform, theirs = FANS[name][0](), getattr(keras.initializers, FANS[name][1])
    wanted = [np.asarray(theirs(seed=1)(w.shape)) for w in net.weights if "kernel" in w.path]
    source, out = tmp_path / "a.keras", tmp_path / "b.keras"
    net.save(source)
    model = converters.from_keras(net)
    converters.save(out, *transform(converters.load(source)))
    converters.transform(net, transform)
    graph = fwt.Graph(fwt.nodes_of(model.module), input_shape=model.module.input_shape)
    graph = transform(fwt.Model(graph, model.variables))
    ways = {"live": net, "from_keras": converters.to_keras(*transform(model)),
            "a file": keras.models.load_model(out),
            "a graph": converters.to_keras(*graph)}  # fmt: skip
    for way, found in ways.items():
        assert type(found.layers[-1]).__name__ == kind, way
        kernels = [np.asarray(w) for w in found.weights if "kernel" in w.path]
        assert [w.shape for w in kernels] == [w.shape for w in wanted], way
        for ours, expected in zip(kernels, wanted, strict=True):
            same_distribution([ours], [expected])
            if name == "orthogonal":
                flat = ours.reshape(-1, ours.shape[-1])
                np.testing.assert_allclose(flat.T @ flat, np.eye(flat.shape[1]), atol=1e-5)


def test_what_keras_calls_depthwise_is_one_from_anywhere():
    """As to_keras has it: a Conv whose groups take one input each, but of three axes, of uneven
    strides or with causal padding."""
    he = fwt.initialize(K.he_normal, 0)
    window, channels = 9, 60

    def spread(model):
        return float(np.std(next(iter(fwt.select(model, "**").values()))))

    def linen(size, **settings):
        layer = nn.Conv(2 * channels, size, feature_group_count=channels, use_bias=False,
                        **settings)  # fmt: skip
        return fwt.Model(layer, layer.init(jax.random.key(0), jnp.ones((1, *[9] * len(size), 60))))

    whole = (2 / (window * channels)) ** 0.5
    for model in (
        linen((3, 3)),
        linen((9,)),
        linen((9,), strides=2),
        linen((3, 3), strides=(2, 2)),
    ):
        assert spread(he(model)) == pytest.approx(whole, rel=0.1)
    group = (2 / window) ** 0.5
    for model in (linen((9,), padding="CAUSAL"), linen((3, 3), strides=(1, 2)), linen((3, 3, 1))):
        assert spread(he(model)) == pytest.approx(group, rel=0.1)

    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(120, (3, 3), feature_group_count=60, use_bias=False)(x)

    model = fwt.Model(Own(), Own().init(jax.random.key(0), jnp.ones((1, 9, 9, 60))))
    assert spread(he(model)) == pytest.approx(whole, rel=0.1)
    few = nn.Conv(120, (3, 3), feature_group_count=30, use_bias=False)  # of two inputs each
    model = fwt.Model(few, few.init(jax.random.key(0), jnp.ones((1, 9, 9, 60))))
    assert spread(he(model)) == pytest.approx((2 / (2 * window)) ** 0.5, rel=0.1)

    from flax import nnx

    layer = nnx.Conv(60, 120, (3, 3), feature_group_count=60, use_bias=False, rngs=nnx.Rngs(0))
    assert spread(he(nnx.state(layer))) == pytest.approx(group, rel=0.1)  # of a bare state
    assert spread(he(layer)) == pytest.approx(whole, rel=0.1)
    live = torch.nn.Sequential(torch.nn.Conv2d(60, 120, 3, groups=60, bias=False))
    assert spread(he(converters.from_torch(live))) == pytest.approx(whole, rel=0.1)
    converters.transform(live, he)
    assert live[0].weight.detach().numpy().std() == pytest.approx(whole, rel=0.1)
    # Keras's own Conv2D with as many groups as inputs is none, while it lives.
    net = keras.Sequential([keras.Input((9, 9, 60)), keras.layers.Conv2D(120, 3, groups=60)])
    converters.transform(net, he)
    assert np.asarray(net.layers[0].kernel).std() == pytest.approx(group, rel=0.1)
