"""Files whose model can't be converted: their arrays alone, and changes in a copy of them."""

import io
import json
import zipfile

import h5py
import keras
import numpy as np
import onnx
import pytest
import torch
from command import cli, fwt_command

import fwt
from fwt import converters

L = keras.layers


@keras.saving.register_keras_serializable("tests_of_files")
class Net(keras.Model):
    """A model that only its own code can say."""

    def __init__(self, **how):
        super().__init__(**how)
        self.block = [L.Dense(7, name="one"), L.Dense(5, name="two")]
        self.norm = L.BatchNormalization()
        self.head = L.Dense(3, use_bias=False)

    def call(self, x):
        for layer in self.block:
            x = layer(x)
        return self.head(self.norm(x))


def subclass():
    net = Net()
    net(np.ones((1, 6), np.float32))
    return net


def of_a_lambda():
    first = keras.Input((6,))
    scaled = L.Lambda(lambda x: 2 * x)(first)
    return keras.Model(first, L.Dense(3, name="d")(scaled))


def of_two_sequences():
    first, second = keras.Input((5, 4)), keras.Input((3, 2))
    _, *state = L.LSTM(6, return_state=True, name="before")(first)
    return keras.Model([first, second], L.LSTM(6, name="behind")(second, initial_state=state))


def masked(mask=True):
    return keras.Sequential(
        [keras.Input((4,)), L.Embedding(9, 5, mask_zero=mask, name="e"), L.LSTM(3, name="r")],
        name="masked",
    )  # fmt: skip


def arrays_of(path):
    """The file's own arrays, as h5py reads them."""
    source = path
    if zipfile.is_zipfile(path):
        source = io.BytesIO(zipfile.ZipFile(path).read("model.weights.h5"))
    found = {}
    with h5py.File(source) as file:

        def take(name, node):
            if isinstance(node, h5py.Dataset) and not name.startswith("optimizer"):
                found[name] = node[()]

        file.visititems(take)
    return found


MODELS = {
    "net": (subclass, "expected a keras Sequential or Functional, found 'Net'"),
    "lambda": (of_a_lambda, "it runs any code"),
    "states": (of_two_sequences, "behind: it takes output [1] of before"),
    "masked": (masked, "it would use the mask of e"),
}


# Keras writes no .h5 file of a subclass.
FILES = [*((name, ".keras") for name in MODELS), *((n, ".h5") for n in MODELS if n != "net")]


@pytest.mark.parametrize(("name", "suffix"), FILES)
def test_arrays_are_listed_where_the_model_is_refused(tmp_path, name, suffix):
    make, why = MODELS[name]
    path = tmp_path / f"{name}{suffix}"
    make().save(path)
    with pytest.raises(converters.FileFormatError, match=r"load\(path, module=False\) reads its"):
        converters.load(path)
    for line in (("verify", path.name, path.name), ("convert", path.name, "o.npz")):
        error = cli(*line, cwd=tmp_path, code=1).stderr
        assert "fwt inspect shows its arrays, fwt convert --weights-only takes them" in error
        assert "module=False" not in error
    cli("convert", path.name, "w.npz", "--weights-only", cwd=tmp_path)
    module, variables = converters.load(path, module=False)
    assert module is None
    own = {n.removeprefix("model_weights/"): v for n, v in arrays_of(path).items()}
    found = fwt.select(variables)
    assert {p: v.tobytes() for p, v in found.items()} == {n: v.tobytes() for n, v in own.items()}
    taken = fwt.select(converters.load(tmp_path / "w.npz"))
    assert {p: v.tobytes() for p, v in taken.items()} == {n: v.tobytes() for n, v in own.items()}
    said = cli("inspect", path.name, cwd=tmp_path).stdout
    assert why in said.splitlines()[0]
    assert "by the names in the file, since its model can't be converted" in said.splitlines()[0]
    told = json.loads(fwt_command("inspect", path, "--json")[1])
    assert {x["path"]: x["shape"] for x in told["leaves"]} == {
        p: [*v.shape] for p, v in own.items()
    }
    assert why in told["refused"]
    assert told["module"] is None
    code, said = fwt_command("diff", path, path)
    assert code == 0
    assert said.startswith(f"equal: {len(own)} arrays, bit for bit; by the names")
    assert "refused" in json.loads(fwt_command("diff", path, path, "--json")[1])


def test_a_file_that_is_broken_stays_an_error(tmp_path):
    path = tmp_path / "net.keras"
    subclass().save(path)
    (tmp_path / "cut.keras").write_bytes(path.read_bytes()[:-200])
    for line, said in (
        (("inspect", "cut.keras"), "cut.keras"),
        (("inspect", "none.keras"), "no such file"),
        (("inspect", "net.keras", "--key", "a"), "--key a: it holds one model"),
        (("diff", "net.keras", "cut.keras"), "cut.keras"),
        (("verify", "net.keras", "net.keras"), "expected a keras Sequential or Functional"),
    ):
        assert said in cli(*line, cwd=tmp_path, code=1).stderr


@pytest.mark.parametrize("name", ["net", "lambda", "states"])
def test_a_copy_of_a_file_with_other_arrays(tmp_path, name):
    """Which Keras reads again, with all else as it was."""
    net = MODELS[name][0]()
    net.compile("adam", "mse")
    net.save(tmp_path / "a.keras")
    before = arrays_of(tmp_path / "a.keras")
    kernel = next(n for n, v in before.items() if v.ndim == 2)
    cli("prune", "a.keras", "b.keras", "--sparsity", 0.5, "--where", kernel, cwd=tmp_path)
    after = arrays_of(tmp_path / "b.keras")
    assert (after[kernel] == 0).sum() == before[kernel].size // 2
    assert {n for n in before if before[n].tobytes() != after[n].tobytes()} == {kernel}
    one, two = (zipfile.ZipFile(tmp_path / f"{x}.keras") for x in "ab")
    for member in ("config.json", "metadata.json"):
        assert one.read(member) == two.read(member)
    again = keras.saving.load_model(tmp_path / "b.keras", safe_mode=False)
    assert again.loss == "mse"
    values = sorted(v.numpy().tobytes() for v in again.weights)
    assert values == sorted(v.tobytes() for v in after.values())


def test_a_copy_of_an_older_file(tmp_path):
    """Of Keras 3, whose names are Flax's and whose axes may be others, it is not made blindly."""
    masked().save(tmp_path / "a.h5")
    line = ("prune", "a.h5", "b.h5", "--sparsity", 0.5, "--where", "**/kernel")
    said = cli(*line, cwd=tmp_path, code=1).stderr
    assert "--architecture net.keras puts its weights into a model of the same layers" in said
    model = converters.load(tmp_path / "a.h5", module=False)
    new = fwt.prune(0.5, where="r/**/kernel")(model)
    converters.save(tmp_path / "b.h5", *new, source=tmp_path / "a.h5")
    before, after = masked(), keras.saving.load_model(tmp_path / "b.h5")
    before.load_weights(tmp_path / "a.h5")
    pairs = list(zip(before.weights, after.weights, strict=True))
    changed = [a.path for a, b in pairs if (a.numpy() != b.numpy()).any()]
    assert changed == ["masked/r/lstm_cell/kernel"]


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_another_architecture_takes_the_weights_of_a_refused_model(tmp_path, suffix):
    net, plain = masked(), masked(mask=False)
    net.save(tmp_path / f"net{suffix}")
    plain.save(tmp_path / "plain.keras")
    cli("convert", f"net{suffix}", "c.keras", "-a", "plain.keras", cwd=tmp_path)
    plain.set_weights(net.get_weights())
    x = np.array([[1, 2, 3, 4], [8, 7, 6, 5]])
    again = keras.saving.load_model(tmp_path / "c.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), plain.predict(x, verbose=0))
    cli("diff", f"net{suffix}", "c.keras", "-a", "plain.keras", cwd=tmp_path)


def test_ways_out_of_a_refused_model(tmp_path):
    subclass().save(tmp_path / "a.keras")
    said = cli("prune", "a.keras", "b.keras", "--sparsity", 0.5, cwd=tmp_path, code=1).stderr
    assert "--where changes arrays by the names that fwt inspect shows, such as block/" in said
    assert "converters.transform(model, t) changes a live model in Python" in said
    said = cli("convert", "a.keras", "b.pt", cwd=tmp_path, code=1).stderr
    assert "converters.from_keras(keras.Model(x, net.call(x))) of x = keras.Input(...)" in said
    net, x = subclass(), keras.Input((6,))
    made = converters.from_keras(keras.Model(x, net.call(x)))
    assert converters.verify(net, made, np.ones((2, 6), np.float32)).ok
    said = cli("initialize", "a.keras", "b.keras", "--initializer", "he_normal", "-w",
               "head/vars/0", cwd=tmp_path, code=1).stderr  # fmt: skip
    assert "--axes" in said
    assert "since its model can't be converted" in said


def test_arrays_alone_of_other_formats(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model = converters.from_torch(net, (4,))
    for name in ("a.safetensors", "a.npz", "a.orbax"):
        converters.save(tmp_path / name, *model)
        module, variables = converters.load(tmp_path / name, module=False)
        assert module is None
        assert fwt.paths(variables) == fwt.paths(model)
    converters.save(tmp_path / "a.onnx", *model)
    proto = onnx.load(tmp_path / "a.onnx")
    proto.graph.node[0].op_type = "Unheard"
    onnx.save(proto, tmp_path / "b.onnx")
    found = fwt.select(converters.load(tmp_path / "b.onnx", module=False))
    own = {t.name: onnx.numpy_helper.to_array(t).shape for t in proto.graph.initializer}
    assert {p.replace("\\", ""): v.shape for p, v in found.items()} == own
    assert "Unheard" in cli("inspect", "b.onnx", cwd=tmp_path).stdout.splitlines()[0]
    proto.graph.initializer[1].name = proto.graph.initializer[0].name
    onnx.save(proto, tmp_path / "c.onnx")
    with pytest.raises(converters.FileFormatError, match="two of its arrays have one name"):
        converters.load(tmp_path / "c.onnx", module=False)
    with pytest.raises(converters.FileFormatError, match="give one of them"):
        converters.load(tmp_path / "a.npz", module=False, architecture=model)


def test_weights_of_keras_by_themselves_name_their_model_as_a_way_out(tmp_path):
    net = masked(mask=False)
    net.save_weights(tmp_path / "w.weights.h5")
    line = ("prune", "w.weights.h5", "v.weights.h5", "--sparsity", 0.5)
    said = cli(*line, cwd=tmp_path, code=1).stderr
    assert "--architecture net.keras, the model of these weights, does" in said
    assert "--where layers/embedding/vars/0 takes" in said
    net.save(tmp_path / "net.keras")
    cli(*line, "-a", "net.keras", cwd=tmp_path)
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [b"d"]
        file.create_group("d").attrs["weight_names"] = [b"d/kernel:0"]
        file["d"]["d/kernel:0"] = np.arange(6, dtype=np.float32).reshape(3, 2)
    line = ("prune", "old.h5", "new.h5", "--sparsity", 0.5)
    said = cli(*line, cwd=tmp_path, code=1).stderr
    assert "--where '**/kernel:0' takes" in said
    cli(*line, "--where", "**/kernel:0", cwd=tmp_path)


def test_an_architecture_in_half_precision(tmp_path):
    """Which torch's layers can't compute, since the Softmax does in float32, has its names."""
    net = keras.Sequential([keras.Input((5,)), L.Dense(3, dtype="mixed_float16", name="d"),
                            L.Softmax(dtype="float32")])  # fmt: skip
    net.save(tmp_path / "a.keras")
    plain = converters.load(tmp_path / "a.keras", dtype="float32")
    converters.save(tmp_path / "a.pt", *plain)
    half = converters.load(tmp_path / "a.pt", architecture=tmp_path / "a.keras")
    np.testing.assert_array_equal(fwt.select(half)["d/kernel"], fwt.select(plain)["d/kernel"])
    held = converters.load(tmp_path / "a.keras")
    for given in (tmp_path / "a.keras", net, held):
        found = converters.load(tmp_path / "a.pt", architecture=given, dtype="float32")
        assert found.module == plain.module
        np.testing.assert_array_equal(fwt.select(found)["d/kernel"], fwt.select(plain)["d/kernel"])
    for verb in ("diff", "verify"):
        line = (verb, "a.keras", "a.pt", "-a", "a.keras")
        assert cli(*line, cwd=tmp_path).stdout.startswith("equal")
        assert cli(*line, "--dtype", "float32", cwd=tmp_path).stdout.startswith("equal")


def test_what_is_no_file_of_weights_says_what_it_is(tmp_path):
    net = keras.Sequential([keras.Input((4,)), L.Dense(3, name="d")])
    (tmp_path / "net.json").write_text(net.to_json())
    said = cli("inspect", "net.json", cwd=tmp_path, code=1).stderr
    assert "the config of a Keras model, without weights" in said
    net.save_weights(tmp_path / "w.weights.h5")
    assert "d/kernel" in cli("inspect", "w.weights.h5", "-a", "net.json", cwd=tmp_path).stdout
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"\x08\x01")
    said = cli("inspect", "saved", cwd=tmp_path, code=1).stderr
    assert "a SavedModel of TensorFlow, which only TensorFlow can run: model.save('net" in said
    (tmp_path / "saved" / "keras_metadata.pb").write_bytes(b"")
    said = cli("inspect", "saved", cwd=tmp_path, code=1).stderr
    assert "tf_keras.models.load_model('saved').save('net.keras')" in said


def test_close_names_are_first_those_of_the_same_layer():
    first = keras.Input((5, 6))
    x = L.Bidirectional(L.LSTM(3, return_sequences=True, name="lstm"), name="bi")(first)
    x = L.MultiHeadAttention(2, 3, name="mha")(x, x)
    net = keras.Model(first, L.Dense(2, name="head")(x))
    for where, close in (
        ("bi/kernel", "'bi/forward_lstm/lstm_cell/kernel', 'bi/backward_lstm/lstm_cell/kernel'"),
        ("mha/out/kernel", "'mha/attention_output/kernel'"),
        ("head/kernl", "'head/kernel'"),
    ):
        with pytest.raises(fwt.WhereError, match=f"close: {close}"):
            converters.transform(net, fwt.prune(0.5, where=where))


@pytest.mark.parametrize("look", [fwt.prune(0.5), fwt.project(fwt.constraints.non_negative)])
def test_a_path_is_no_tree(tmp_path, look):
    """It was one without leaves."""
    for path in (tmp_path / "net.keras", "net.keras"):
        with pytest.raises(
            fwt.LeafError, match=r"is the path of a file: .*load\(path, module=False"
        ):
            look(path)


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_the_order_of_a_torch_file_turns_square_kernels(tmp_path, dtype):
    """Also where torch's layers can't compute in the dtype of the architecture."""
    layers = [keras.Input((4,)), L.Dense(4, dtype=dtype), L.Dense(4, dtype=dtype)]
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    model = converters.load(
        tmp_path / "a.pt", architecture=keras.Sequential(layers), match="order", strict=True
    )
    kernels = [v for p, v in fwt.select(model).items() if p.endswith("kernel")]
    for kernel, layer in zip(kernels, net, strict=True):
        wanted = layer.weight.detach().numpy().T.astype(kernel.dtype)
        np.testing.assert_array_equal(kernel, wanted)


def test_programs_and_checkpoints_that_another_library_alone_reads(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4))
    program = torch.export.export(net, (torch.ones(2, 3),))
    torch.export.save(program, tmp_path / "net.pt2")
    way = r"torch\.save\(torch\.export\.load\(.*\)\.state_dict, 'weights\.pt'\)"
    with pytest.raises(fwt.FileFormatError, match=way):
        converters.load(tmp_path / "net.pt2")
    torch.save(torch.export.load(tmp_path / "net.pt2").state_dict, tmp_path / "weights.pt")
    weight = converters.load(tmp_path / "weights.pt").variables["params"]["0"]["weight"]
    np.testing.assert_array_equal(weight, net[0].weight.detach().numpy())
    for name in ("ck.index", "ck.data-00000-of-00001"):
        (tmp_path / name).write_bytes(b"\0")
    for name in ("ck", "ck.index", "ck.data-00000-of-00001"):
        with pytest.raises(fwt.FileFormatError, match="not a readable"):
            converters.load(tmp_path / name)


def test_arrays_alone_on_the_command_line(tmp_path):
    net = keras.Sequential([keras.Input((4,)), L.Dense(3, name="d")])
    net.save(tmp_path / "net.keras")
    net.save_weights(tmp_path / "w.weights.h5")
    said = cli("convert", "w.weights.h5", "w.npz", cwd=tmp_path, code=1).stderr
    assert "--weights-only takes them by the file's own names" in said
    cli("convert", "w.weights.h5", "w.npz", "--weights-only", cwd=tmp_path)
    assert fwt.paths(converters.load(tmp_path / "w.npz"))[0].endswith("/vars/0")
    for more, said in (
        (("--verify",), "--verify runs the model: leave --weights-only out"),
        (("-a", "net.keras"), "--weights-only reads arrays alone, and --architecture says"),
    ):
        line = ("convert", "w.weights.h5", "o.npz", "--weights-only", *more)
        assert said in cli(*line, cwd=tmp_path, code=1).stderr
    said = cli("convert", "w.weights.h5", "o.keras", "--weights-only", cwd=tmp_path, code=1).stderr
    assert "leave --weights-only out, or write .safetensors" in said
    net.quantize("int8")
    net.save(tmp_path / "q.keras")
    said = cli("convert", "q.keras", "o.npz", cwd=tmp_path, code=1).stderr
    assert "it is quantised" in said
    assert "--architecture" not in said
