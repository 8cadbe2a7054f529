"""Dtype policies of Keras against its own predictions, in each framework that can say them."""

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import ml_dtypes
import numpy as np
import pytest
import torch
from command import cli
from compare import close, generator, in_torch
from marks import thorough_but

import fwt
from fwt import converters

k = keras.layers
POLICIES = ("mixed_float16", "mixed_bfloat16", "float16", "bfloat16", "float64")


def net(dtype):
    """Layers that Flax has, layers that only fwt has, and some without weights at the start."""
    return cases.randomise_keras(keras.Sequential([
        keras.Input((6, 3)), k.Rescaling(0.7, 0.1, dtype=dtype),
        k.Conv1D(4, 2, activation="tanh", dtype=dtype), k.BatchNormalization(dtype=dtype),
        k.PReLU(shared_axes=[1], dtype=dtype), k.LayerNormalization(dtype=dtype),
        k.GRU(3, recurrent_initializer="zeros", return_sequences=True, dtype=dtype),
        k.Dropout(0.4, dtype=dtype), k.Flatten(dtype=dtype),
        k.Dense(5, activation="softmax", dtype=dtype),
    ]))  # fmt: skip


def predicted(model, x):
    return np.asarray(keras.ops.convert_to_numpy(model(x, training=False)))


def agree(found, expected, eps, place):
    found = np.asarray(found)
    assert found.shape == expected.shape, place
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    assert np.abs(found - expected).max() <= 8 * eps * max(1, np.abs(expected).max()), place


@pytest.mark.parametrize("policy", thorough_but(lambda p: p == "float64", POLICIES))
def test_a_policy_is_dtype_and_param_dtype(policy, tmp_path):
    compute = policy.removeprefix("mixed_")
    held = compute if policy == compute else "float32"
    # Keras computes some norms of float64 with constants of float32.
    eps = 1e-9 if compute == "float64" else float(ml_dtypes.finfo(compute).eps)
    model = net(policy)
    x = generator(policy).normal(size=(3, 6, 3)).astype(np.float32)
    expected = predicted(model, x)
    made = converters.from_keras(model)
    layers = {n.name: n.layer for n in made.module.layers}
    for layer in layers.values():
        if not isinstance(layer, nn.Dropout):
            assert np.dtype(layer.dtype).name == compute
    assert np.dtype(made.module.layers[1].layer.param_dtype).name == held
    assert {str(v.dtype) for v in jax.tree.leaves(made.variables)} == {held}
    if policy != "float64":  # which JAX has only under jax_enable_x64
        found = made(x)
        assert found.dtype == compute
        agree(found, expected, eps, "Flax")
    # Back as the same policy, through files too.
    model.save(tmp_path / "net.keras")
    loaded = converters.load(tmp_path / "net.keras")
    assert loaded.module == made.module
    if held == "bfloat16":
        with pytest.raises(converters.ConversionError, match="bfloat16 weights in an"):
            converters.save(tmp_path / "again.h5", loaded)
    for suffix in (".safetensors", *([] if held == "bfloat16" else [".h5"]), ".keras"):
        converters.save(tmp_path / f"again{suffix}", loaded)
        loaded = converters.load(tmp_path / f"again{suffix}")
        assert loaded.module == made.module, suffix
    for back in (
        converters.to_keras(made), keras.saving.load_model(tmp_path / "again.keras"),
        *[keras.saving.load_model(p) for p in tmp_path.glob("*.h5")],
    ):  # fmt: skip
        assert {x.dtype_policy.name for x in back.layers} == {policy}
        assert np.array_equal(predicted(back, x), expected)
    # torch has the dtype of its weights.
    if policy != compute:
        with pytest.raises(converters.ConversionError, match=f"{compute} with weights in float32"):
            converters.to_torch(made)
        with pytest.raises(converters.ConversionError, match="dtype='float32'"):
            converters.save(tmp_path / "net.pt", made)
    else:
        there = converters.to_torch(made, layout="source")
        dtype = getattr(torch, compute)
        assert {v.dtype for v in there.parameters()} == {dtype}
        with torch.no_grad():
            agree(there(torch.from_numpy(x).to(dtype)).double(), expected, eps, "torch")
        again = converters.from_torch(there, (6, 3), "source")
        if compute == "float64":
            last = converters.to_keras(again)  # what torch says by its weights
            agree(predicted(last, x), expected, eps, "torch -> Keras")
            assert last.layers[-1].dtype_policy.name == policy
        else:  # Flax would compute float32 inputs in float32
            with pytest.raises(fwt.ConversionError, match="says no dtype="):
                converters.to_keras(again)
    # On request it is dropped.
    truth = net("float32")
    for mine, theirs in zip(truth.variables, model.variables, strict=True):
        if "seed" not in mine.path:
            mine.assign(np.asarray(keras.ops.convert_to_numpy(theirs), np.float32))
    for plain in (
        converters.from_keras(model, dtype="float32"),
        converters.load(tmp_path / "net.keras", dtype="float32"),
        converters.load(tmp_path / "again.safetensors", dtype="float32"),
    ):
        assert {v.dtype for v in jax.tree.leaves(plain.variables)} == {np.dtype(np.float32)}
        assert [n.layer for n in plain.module.layers] == [
            n.layer for n in converters.from_keras(truth).module.layers
        ]
        converters.to_torch(plain)
    agree(plain(x), predicted(truth, x), 1e-6, "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_model_is_saved_in_another_dtype(tmp_path, dtype):
    """It computes in it, as Keras's model of that policy with these weights does; torch's and bare
    arrays are as their own casts have them, and whole numbers are kept."""
    model, truth = net("float32"), net(dtype)
    for mine, theirs in zip(truth.variables, model.variables, strict=True):
        if "seed" not in mine.path:
            mine.assign(keras.ops.cast(theirs.value, dtype))
    model.save(tmp_path / "a.keras")
    made = converters.from_keras(model)
    converters.save(tmp_path / "b.keras", made, dtype=dtype)
    converters.save(tmp_path / "b.safetensors", made, dtype=dtype)
    cli("convert", "a.keras", "c.keras", "--dtype", dtype, cwd=tmp_path)
    x = generator(3).standard_normal((4, 6, 3)).astype(np.float32)
    expected = predicted(truth, x)
    for name in ("b.keras", "c.keras"):
        again = keras.saving.load_model(tmp_path / name)
        assert {v.dtype for v in again.weights if "seed" not in v.path} == {dtype}
        assert np.array_equal(predicted(again, x), expected)
    with jax.enable_x64(dtype == "float64"):
        one, other = (converters.load(tmp_path / n)(x) for n in ("b.safetensors", "b.keras"))
    assert one.dtype == dtype
    assert np.array_equal(one, other)

    there = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(there.state_dict(), tmp_path / "t.pt")
    converters.save(tmp_path / "u.pt", converters.load(tmp_path / "t.pt"), dtype=dtype)
    found = torch.load(tmp_path / "u.pt", weights_only=True)
    for name, value in there.to(getattr(torch, dtype)).state_dict().items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_numbers_beyond_a_dtype_are_refused(tmp_path):
    wide = {"params": {"d": {"kernel": np.array([1, 7e4, np.inf], np.float32)}}}
    with pytest.raises(fwt.ConversionError, match=r"params/d/kernel: 70000.0 is beyond float16.*b"):
        converters.save(tmp_path / "w.npz", None, wide, dtype="float16")
    assert not (tmp_path / "w.npz").exists()
    converters.save(tmp_path / "w.npz", None, wide, dtype="bfloat16")
    wide["params"]["d"]["kernel"] = np.array([1e300])
    converters.save(tmp_path / "d.npz", None, wide)
    with pytest.raises(fwt.ConversionError, match="beyond float32"):
        converters.load(tmp_path / "d.npz", dtype="float32")
    with pytest.raises(fwt.ConversionError, match="bfloat16"):
        converters.save(tmp_path / "w.npz", None, wide, dtype="int8")
    with pytest.raises(fwt.ConversionError, match="give input_shape="):
        converters.save(tmp_path / "w.onnx", Own(), wide, dtype="float16")


class Own(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


def test_layers_of_several_policies():
    """As Keras's own guide has it: half precision, and float32 at the end."""
    model = keras.Sequential([
        keras.Input((5,), dtype="bfloat16"), k.Dense(4, dtype="float32"),
        k.Dense(3, "relu", dtype="mixed_bfloat16"),
        k.Activation("softmax", dtype="float32"), k.Dropout(0.5, dtype="float32"),
    ])  # fmt: skip
    cases.randomise_keras(model)
    x = generator("several").normal(size=(2, 5)).astype(np.float32)
    made = converters.from_keras(model)
    expected = predicted(model, x)
    assert made(x).dtype == np.float32
    assert made.module.layers[0].layer == fwt.layers.Identity(dtype="bfloat16")  # of the input
    agree(made(x), expected, 2**-8, "Flax")
    assert np.array_equal(predicted(converters.to_keras(made), x), expected)
    with pytest.raises(converters.ConversionError, match="casts nothing between layers"):
        converters.to_torch(made)


def small(x):
    return k.Dense(4, dtype="mixed_float16", name="small")(x)


def large(x, dtype=None):
    bias = keras.initializers.Constant(1e5)
    return k.Dense(4, bias_initializer=bias, dtype=dtype, name="large")(x)


MEETING = {
    "add": lambda x: k.Add()([small(x), large(x)]),
    "add, behind": lambda x: k.Dense(3)(k.Add()([small(x), large(x)])),
    "concatenate": lambda x: k.Concatenate()([small(x), large(x)]),
    "multiply of halves": lambda x: (lambda h: k.Multiply()([h, h + 300.0]))(small(x) * 300.0),
    "dot": lambda x: (lambda h: k.Dot(1)([h, h + 300.0]))(small(x) * 300.0),
    "attention": lambda x: k.Attention()(
        [k.Reshape((2, 2))(small(x)), k.Reshape((2, 2))(large(x))]
    ),
    "half add": lambda x: k.Add(dtype="float16")([small(x), k.Dense(4, name="d")(x)]),
    "operator": lambda x: small(x) * 3.0 + large(x),
    "operation": lambda x: keras.ops.concatenate([small(x), large(x)], axis=-1),
    "operator of halves": lambda x: small(x) + k.Dense(4, dtype="mixed_bfloat16")(x),
}


@pytest.mark.parametrize("name", MEETING)
def test_tensors_of_several_dtypes_meet(name, tmp_path):
    """A layer of Keras casts what it takes to its own dtype, an operation to the widest."""
    x = keras.Input((5,))
    model = keras.Model(x, MEETING[name](x))
    given = generator("meeting").normal(size=(3, 5)).astype(np.float32)
    expected = predicted(model, given)
    assert np.isfinite(expected).all()
    model.save(tmp_path / "net.keras")
    for made in (converters.from_keras(model), converters.load(tmp_path / "net.keras")):
        found = made(given)
        assert found.dtype == expected.dtype
        agree(found, expected, 2**-7, name)  # what stands before them rounds


def test_an_operation_of_keras_casts_what_it_takes():
    """A Dot goes to Flax as a product, and comes back as an operation, which has no dtype."""
    x = [keras.Input((5, 4)), keras.Input((6, 4))]
    model = keras.Model(x, k.Dot(2, dtype="mixed_float16")(x))
    back = converters.to_keras(converters.from_keras(model))
    given = [
        generator(name).normal(size=(2, n, 4)).astype(np.float32)
        for name, n in (("ab", 5), ("cd", 6))
    ]
    expected = np.asarray(model(given))
    found = np.asarray(back(given))
    assert found.dtype == expected.dtype == np.float16
    agree(found, expected, 2**-8, "Keras again")


def test_a_model_of_float32_says_no_dtype():
    inner = k.Dense(2, "relu"), k.LSTM(2), k.LSTMCell(2), k.Softmax()
    for layer in (*(k.TimeDistributed(inner[i]) for i in (0, 3)), k.Bidirectional(inner[1]),
                  k.RNN(inner[2]), k.Dense(2, activation=k.ReLU(max_value=1.0))):  # fmt: skip
        module = converters.from_keras(keras.Sequential([keras.Input((4, 3)), layer])).module
        assert all(named.layer.dtype is None for named in module.layers)


def test_policies_that_no_other_framework_says_are_refused():
    def refused(layers, said, shape=(4, 3), **more):
        model = keras.Sequential([keras.Input(shape, **more), *layers])
        with pytest.raises(converters.ConversionError, match=said):
            converters.from_keras(model)

    refused([k.Bidirectional(k.LSTM(2, dtype="float16"))], "computes in float32, and .* in float16")
    refused([k.Dropout(0.5, dtype="float16"), k.Dense(2)], "Dropout can't say")
    refused([k.Embedding(999, 2)], "rounds whole numbers above 256", (4,), dtype="bfloat16")
    flax = fwt.Sequential([("it", nn.Dense(2, dtype="float32", param_dtype="bfloat16"))], (3,))
    variables = flax.init(jax.random.key(0), np.ones((1, 3), np.float32))
    for target in (converters.to_keras, converters.to_torch):
        with pytest.raises(converters.ConversionError, match="float32 with weights in bfloat16"):
            target(flax, variables)
    odd = fwt.Sequential([("it", nn.Dense(2, dtype="int32"))], (3,))
    with pytest.raises(converters.ConversionError, match="floating-point"):
        converters.to_torch(odd, variables)
    with pytest.raises(converters.ConversionError, match="dtype='int8': 'float32', 'float16'"):
        converters.from_keras(net("float32"), dtype="int8")


def test_a_layer_with_a_dtype_goes_to_onnx_as_flax_computes(tmp_path):
    """A layer of its own operator is traced where it casts."""
    import onnxruntime

    flax = fwt.Sequential([("a", nn.Dense(3)), ("it", fwt.layers.Sigmoid(dtype="float16"))], (4,))
    x = generator("onnx").normal(size=(2, 4)).astype(np.float32)
    variables = flax.init(jax.random.key(0), x)
    converters.to_onnx(flax, variables, tmp_path / "net.onnx")
    run = onnxruntime.InferenceSession(str(tmp_path / "net.onnx")).run
    assert run(None, {"input": x})[0].dtype == np.float16


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("alone", [True, False])
def test_half_weights_that_are_asked_for_compute_in_float32(dtype, alone):
    """Flax computes in float32 where the input is; torch could take no float32."""
    layer = nn.Dense(5, param_dtype=dtype)
    net = layer if alone else fwt.Sequential([("a", layer), ("b", nn.relu)])
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    variables = net.init(jax.random.key(0), x)
    assert net.apply(variables, x).dtype == np.float32
    with pytest.raises(fwt.ConversionError, match=f"param_dtype={dtype} and no dtype=.*cast the"):
        converters.to_torch(net, variables, (4,))
    wide = jax.tree.map(lambda v: v.astype("float32"), variables)
    back = converters.to_torch(net, wide, (4,))
    close(in_torch(back, x), net.apply(wide, x))


@pytest.mark.parametrize(
    ("layer", "shape", "value"),
    [
        (torch.nn.AvgPool1d(300), (1, 300), 1.0),
        (torch.nn.AvgPool2d(4, 2, 1, count_include_pad=False), (2, 9, 7), 30000.0),
        (torch.nn.AvgPool2d(2, divisor_override=3), (1, 4, 4), 40000.0),
        (torch.nn.Softmax(1), (5,), 30000.0),
    ],
    ids=["many", "large", "larger", "softmax"],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_at_the_end(layer, shape, value, dtype):
    net = torch.nn.Sequential(layer).to(dtype).eval()
    model = converters.from_torch(net, input_shape=shape, layout="source")
    given = torch.full((2, *shape), value, dtype=dtype)
    given[1] /= 3
    found = model(jnp.asarray(given.float().numpy(), str(dtype).removeprefix("torch.")))
    assert str(found.dtype) == str(dtype).removeprefix("torch.")
    wanted = net(given).float().numpy()
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=0.01)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.nn.functional.normalize(x, dim=-1),
        lambda x: x.norm(dim=-1),
        lambda x: x.std(-1),
        lambda x: torch.nn.functional.cosine_similarity(x, 2 * x),
        lambda x: torch.nn.functional.scaled_dot_product_attention(*[x[:, None]] * 3),
    ],
    ids=["normalize", "norm", "std", "cosine", "attention"],
)
def test_what_half_precision_would_overflow_in_is_refused(call):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.Linear(5, 5)

        def forward(self, x):
            return call(self.dense(x))

    with pytest.raises(fwt.ConversionError, match=r"in float32 within.*convert model.float\(\)"):
        converters.from_torch(Net().half(), input_shape=(5,))
    converters.from_torch(Net(), input_shape=(5,))


@pytest.mark.parametrize("scale", [3, 1.7])
def test_interpolation_in_float64(scale):
    net = torch.nn.Sequential(torch.nn.Upsample(scale_factor=scale, mode="bilinear")).double()
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 7))
    with jax.enable_x64(True):
        model = converters.from_torch(net, input_shape=(3, 5, 7), layout="source")
        np.testing.assert_allclose(
            model(x), net(torch.from_numpy(x)).numpy(), rtol=1e-12, atol=1e-13
        )


@pytest.mark.parametrize("what", ["sum", "max", "relu", "reshape", "product"])
def test_operations_of_keras_in_float64(what):
    """Keras on JAX says float32 of what its operations with numbers give, and computes float64."""
    ops = keras.ops
    calls = {
        "sum": lambda h: ops.sum(h * 0.01, axis=1),
        "max": lambda h: ops.max(h - 0.5, axis=1),
        "relu": lambda h: ops.relu(h * 0.1),
        "reshape": lambda h: ops.reshape(h / 3.0, (-1, 12)) + 1.0,
        "product": lambda h: ops.sum(h * h, axis=1),
    }
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    try:
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        with jax.enable_x64(True):
            inputs = keras.Input((3, 4))
            net = keras.Model(inputs, calls[what](keras.layers.Dense(4)(inputs)))
            model = converters.from_keras(net)
            for scale in (1, 1e100):
                x = np.random.default_rng(0).normal(size=(2, 3, 4)) * scale
                wanted = keras.ops.convert_to_numpy(net(x))
                assert wanted.dtype == model(x).dtype == np.float64
                np.testing.assert_allclose(model(x), wanted, rtol=1e-12)
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def test_inputs_of_half_precision_are_verified():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3)).bfloat16()
    model = converters.from_torch(net)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(jnp.bfloat16)
    assert converters.verify(net, model, inputs=x).ok
    model.variables["params"]["0"]["kernel"] = model.variables["params"]["0"]["kernel"] * 2
    assert not converters.verify(net, model, inputs=x).ok


def test_settings_beyond_a_dtype_are_refused(tmp_path):
    net = fwt.Sequential([("r", fwt.layers.Rescaling(1e6)), ("d", nn.Dense(2))], (3,))
    model = fwt.Model(net, net.init(jax.random.key(0), np.ones((1, 3), np.float32)))
    with pytest.raises(fwt.ConversionError, match=r"Rescaling.scale: 1000000.0 is beyond float16"):
        converters.save(tmp_path / "net.safetensors", model, dtype="float16")
    converters.save(tmp_path / "net.safetensors", model, dtype="bfloat16")


def test_layers_are_called_by_name_too():
    x = np.array([[0.5, 2.0]], np.float32)
    for layer in (fwt.layers.Softmax(), fwt.layers.ReLU()):
        np.testing.assert_array_equal(layer.apply({}, x=x), layer.apply({}, x))
