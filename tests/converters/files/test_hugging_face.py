"""Folders of Hugging Face: edited in place, and read again by transformers."""

import filecmp
import json
import os

import pytest
import safetensors.torch
import torch
from command import fwt_command

import fwt
from fwt import _axes, _tree, converters

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore"),  # of transformers itself
]
SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 20}  # fmt: skip


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=2, n_positions=20,
                                bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def llama(tied=False):
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def tied_llama():
    return llama(True)


def vit():
    sizes = {n: v for n, v in SIZES.items() if n not in ("vocab_size", "max_position_embeddings")}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=4)
    return transformers.ViTForImageClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def inputs(net):
    generator = torch.Generator().manual_seed(1)
    if isinstance(net, transformers.ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 4, 8, 8, generator=generator)}
    tokens = torch.randint(0, 50, (2, 7), generator=generator)
    return {"input_ids": tokens} | (
        {"decoder_input_ids": tokens} if net.config.is_encoder_decoder else {}
    )


def outputs(net):
    with torch.no_grad():
        return net.eval()(**inputs(net)).logits


MODELS = [bert, gpt2, llama, tied_llama, vit, t5]


@pytest.fixture(params=["file", "shards", "bin", "bin in shards"])
def written(request, tmp_path):
    def write(net):
        folder = tmp_path / "a-1.5"
        how = {"max_shard_size": "8KB"} if "shards" in request.param else {}
        net.save_pretrained(folder, **how)
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        if "bin" in request.param:
            _as_bin(folder, net, bool(how))
        return folder

    return write


def _as_bin(folder, net, shards):
    """As older versions of transformers wrote it: ties are one storage."""
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"] if shards else {}
    held = tensors(folder)
    if held.keys() <= net.state_dict().keys():  # which has the ties
        held = net.state_dict()
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if not shards or len(set(where.values())) == 1:
        torch.save(held, folder / "pytorch_model.bin")
        return
    where = {n: s.replace("model-", "pytorch_model-").replace("safetensors", "bin")
             for n, s in where.items()}  # fmt: skip
    for shard in set(where.values()):
        torch.save({n: held[n] for n in where if where[n] == shard}, folder / shard)
    told = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(told))


def tensors(folder):
    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        held |= safetensors.torch.load_file(path)
    for path in sorted(folder.glob("*.bin")):
        held |= torch.load(path)
    return held


def bits(tensor):
    return tensor.shape, tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def kernels_of(net, folder):
    """By the names in the files, the kernels of a model that was read from them, and their axes, as
    torch's classes have them. The files may have other names than the modules."""
    kinds = {torch.nn.Linear: ("out", "in"), transformers.pytorch_utils.Conv1D: ("in", "out"),
             torch.nn.Conv2d: ("out", "in", "spatial", "spatial")}  # fmt: skip
    found = {}
    tables = [m.weight for m in net.modules() if isinstance(m, torch.nn.Embedding)]
    for module in net.modules():
        for kind, axes in kinds.items():
            if isinstance(module, kind) and not any(module.weight is t for t in tables):
                found[bits(module.weight)] = module.weight, axes
    return {n: found[bits(x)] for n, x in tensors(folder).items() if bits(x) in found}


@pytest.mark.parametrize("make", MODELS)
def test_roles_and_axes_are_those_of_the_classes(written, make):
    torch.manual_seed(0)
    net = make()
    folder = written(net)
    expected = kernels_of(type(net).from_pretrained(folder), folder)
    assert len(expected) > 4
    model = converters.load(folder)
    tree = _tree.Tree(model)
    chosen = {p.replace("/", ".") for p in fwt.select(model, fwt.kernels)}
    tied = {n for group in tree.ties for p in group for n in [p.replace("/", ".")]}
    assert chosen - tied == set(expected)
    places = _axes.Places(tree)
    for name, (_, axes) in expected.items():
        assert places(name.replace(".", "/")).names == axes, name


WORDS = {
    "layer": ("prune", "--sparsity", "0.5"),
    "global": ("prune", "--sparsity", "0.5", "--scope", "global"),
    "n_m": ("prune", "--pattern", "n_m(2, 4)"),
    "project": ("project", "--constraint", "unit_norm"),
    "initialize": ("initialize", "--initializer", "zeros"),
}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("how", list(WORDS))
def test_a_folder_is_edited(written, tmp_path, make, how):
    torch.manual_seed(0)
    folder = written(make())
    net = type(make()).from_pretrained(folder)
    out = tmp_path / "b"
    converters.transform(folder, lambda model: model, out=out)
    for path in folder.iterdir():
        zipped = path.suffix == ".bin"  # whose members are the same
        assert zipped or filecmp.cmp(path, out / path.name, shallow=False)
    assert torch.equal(outputs(net), outputs(type(net).from_pretrained(out)))

    edited = tmp_path / "c"
    verb, *words = WORDS[how]
    assert fwt_command(verb, folder, edited, *words)[0] == 0
    assert sorted(os.listdir(folder)) == sorted(os.listdir(edited))
    kernels = kernels_of(net, folder)
    before, after = tensors(folder), tensors(edited)
    assert list(before) == list(after)
    for name, old in before.items():
        assert after[name].dtype == old.dtype
        assert torch.equal(after[name], old) == (name not in kernels), name
    order = [p.replace("/", ".") for p in _tree.Tree(converters.load(folder)).leaves]
    with torch.no_grad():
        _change(how, [kernels[n] for n in order if n in kernels])
    there = type(net).from_pretrained(edited)
    expected, found = net.state_dict(), there.state_dict()
    for name, x in expected.items():
        if how == "project":  # whose norms torch sums in another order
            rounding = 1e-2 if x.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(found[name], x, rtol=rounding, atol=0)
        else:
            assert torch.equal(found[name], x), name
    if how != "project":
        assert torch.equal(outputs(net), outputs(there))


def _change(how, kernels):
    """The same change in the torch module itself."""
    weights = [weight for weight, _ in kernels]
    if how in ("layer", "global"):
        for group in [weights] if how == "global" else [[w] for w in weights]:
            size = torch.cat([w.abs().reshape(-1) for w in group])
            kept = torch.ones_like(size, dtype=torch.bool)
            gone = round(0.5 * len(size))
            kept[size.sort(dim=0, descending=True, stable=True).indices[len(size) - gone :]] = False
            for w, part in zip(group, kept.split([w.numel() for w in group]), strict=True):
                w.copy_(torch.where(part.reshape(w.shape), w, torch.zeros_like(w)))
    for weight, axes in kernels:
        rows = weight if axes[0] == "out" else weight.T  # a view
        if how == "initialize":
            weight.zero_()
        elif how == "project":
            norms = rows.float().reshape(len(rows), -1).norm(dim=1)
            rows.div_(norms.reshape(-1, *[1] * (rows.ndim - 1)))
        elif how == "n_m":
            _keep_two_of_four(rows)


def _keep_two_of_four(weight):
    """In each four along the inputs, the two of the largest size; of equals the first."""
    inner = weight.abs().movedim(1, -1)
    groups = inner.reshape(*inner.shape[:-1], -1, 4)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True)
    kept = kept.reshape(inner.shape).movedim(-1, 1)
    weight.copy_(torch.where(kept, weight, torch.zeros_like(weight)))
