"""Scores against what defines them: jax.grad and jax.hessian, torch's unfold, worked examples."""

import copy
import functools

import equinox
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import fwt
from fwt import layers as fl

S = fwt.scores


@pytest.fixture(scope="module")
def problem():
    """A small net, its variables, a batch and a loss of the params."""
    net = fwt.Sequential([("a", nn.Dense(4)), fl.Tanh(), ("b", nn.Dense(3))], input_shape=(5,))
    x = jax.random.normal(jax.random.key(1), (7, 5))
    y = jax.random.normal(jax.random.key(2), (7, 3))
    params = net.init(jax.random.key(0), x)["params"]

    def loss(params, x=x, y=y):
        return jnp.mean((net.apply({"params": params}, x) - y) ** 2)

    return net, params, (x, y), loss


def close(found, expected):
    for path, x in fwt.select(expected).items():
        np.testing.assert_allclose(fwt.select(found)[path], x, rtol=2e-4, atol=1e-7, err_msg=path)


def both(function, *trees):
    return jax.tree.map(function, *trees)


def test_scores_of_gradients(problem):
    _, params, (x, y), loss = problem
    grads = jax.grad(loss)(params)
    close(S.magnitude(params), both(jnp.abs, params))
    close(S.gradient(params, grads=grads), both(jnp.abs, grads))
    close(S.saliency(params, grads=grads), both(lambda w, g: abs(w * g), params, grads))
    close(S.snip(params, grads=grads), S.saliency(params, grads=grads))
    close(S.taylor(params, grads=grads), both(lambda w, g: (w * g) ** 2, params, grads))
    close(S.movement(params, grads=grads), both(lambda w, g: -w * g, params, grads))
    each = jax.vmap(jax.grad(lambda p, x, y: loss(p, x[None], y[None])), (None, 0, 0))(params, x, y)
    fisher = both(lambda w, g: w**2 * (g**2).mean(0) / 2, params, each)
    close(S.fisher(params, grads=each), fisher)
    close(S.fisher(params, grads=grads), both(lambda w, g: (w * g) ** 2 / 2, params, grads))


@pytest.mark.thorough
def test_scores_of_the_hessian(problem):
    _, params, _, loss = problem
    flat, back = jax.flatten_util.ravel_pytree(params)
    hessian = jax.hessian(lambda v: loss(back(v)))(flat)
    grad = jax.grad(lambda v: loss(back(v)))(flat)
    close(S.grasp(loss)(params), back(flat * (hessian @ grad)))
    expected = (flat * grad - flat * (hessian @ flat) / 2) ** 2
    close(S.second_order_taylor(loss)(params), back(expected))
    diagonal = back(jnp.diag(hessian))
    close(S.obd(params, hessian=diagonal), both(lambda w, h: h * w * w / 2, params, diagonal))


def test_removing_a_weight_changes_the_loss_as_the_second_order_says(problem):
    """Of a quadratic loss the second-order Taylor is the change itself, for one weight."""
    x = jax.random.normal(jax.random.key(3), (20, 4))
    params = {"d": {"kernel": jax.random.normal(jax.random.key(4), (4, 1))}}

    def loss(p):
        return jnp.mean((x @ p["d"]["kernel"] - 1.0) ** 2)

    w = params["d"]["kernel"]
    h = jax.hessian(lambda v: loss({"d": {"kernel": v.reshape(4, 1)}}))(w.ravel())
    grads = jax.grad(loss)(params)["d"]["kernel"]
    exact = [loss({"d": {"kernel": w.at[i].set(0)}}) - loss(params) for i in range(4)]
    taylor = [-(w[i] * grads[i])[0] + w[i, 0] ** 2 * h[i, i] / 2 for i in range(4)]
    np.testing.assert_allclose(exact, taylor, atol=1e-5)


def test_synflow_of_a_linear_net():
    """R = sum(1 |A| |B|), so the score of A is |A| times what flows on behind it."""
    net = fwt.Sequential([("a", nn.Dense(4, use_bias=False)), ("b", nn.Dense(3, use_bias=False))],
                         input_shape=(5,))  # fmt: skip
    variables = net.init(jax.random.key(0), jnp.ones((1, 5)))
    a, b = (np.abs(np.asarray(variables["params"][n]["kernel"])) for n in "ab")
    for params in (variables, variables["params"], fwt.Model(net, variables)):
        found = fwt.select(S.synflow(net)(params))
        np.testing.assert_allclose(found["a/kernel"], a * b.sum(1), rtol=1e-5)
        np.testing.assert_allclose(found["b/kernel"], b * a.sum(0)[:, None], rtol=1e-5)
    # The paper's conservation: what flows through every layer is the same.
    assert np.isclose(found["a/kernel"].sum(), found["b/kernel"].sum(), rtol=1e-5)


@pytest.mark.thorough
def test_synflow_with_batch_norm_and_without_a_shape():
    net = fwt.Sequential([("c", nn.Conv(4, (3, 3))), ("n", nn.BatchNorm()), fl.ReLU(), fl.Flatten(),
                          ("d", nn.Dense(2))])  # fmt: skip
    variables = net.init(jax.random.key(0), jnp.ones((1, 6, 5, 3)))
    found = S.synflow(net, (6, 5, 3))(variables)
    stats = variables["batch_stats"]
    again = S.synflow(net, (6, 5, 3), batch_stats=stats)(variables["params"])
    close(again, {"params": found["params"]})
    assert all((x >= 0).all() for x in fwt.select(found, fwt.kernels).values())
    with pytest.raises(fwt.FwtError, match="input_shape"):
        S.synflow(net)
    deep = fwt.Sequential([(f"d{i}", nn.Dense(300)) for i in range(40)], input_shape=(300,))
    with pytest.raises(fwt.FwtError, match="overflows"):
        S.synflow(deep)(deep.init(jax.random.key(0), jnp.ones((1, 300))))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strides": 2},
        {"padding": "VALID"},
        {"kernel_dilation": 2, "padding": [(1, 2), (0, 3)]},
    ],
)
def test_wanda_of_convolutions_against_unfold(settings):
    kernel, channels = (3, 2), 5
    conv = nn.Conv(4, kernel, **settings)
    net = fwt.Sequential([("d", nn.Dense(channels)), ("c", conv), fl.Flatten(), ("e", nn.Dense(3))])
    x = jax.random.normal(jax.random.key(1), (6, 9, 8, 2))
    variables = net.init(jax.random.key(0), x)
    found = fwt.select(S.wanda(net, x)(variables))
    params = variables["params"]
    first = np.asarray(jnp.sqrt((x**2).sum((0, 1, 2))))[:, None] * np.abs(params["d"]["kernel"])
    np.testing.assert_allclose(found["d/kernel"], first, rtol=1e-5)
    hidden = np.asarray(x @ params["d"]["kernel"] + params["d"]["bias"])
    stride, dilation = settings.get("strides", 1), settings.get("kernel_dilation", 1)
    pads = settings.get("padding", "SAME")
    if isinstance(pads, str):
        reach = [(k - 1) * dilation + 1 for k in kernel]
        pads = jax.lax.padtype_to_pads(hidden.shape[1:3], reach, (stride, stride), pads)
    padded = np.pad(hidden, [(0, 0), *pads, (0, 0)]).transpose(0, 3, 1, 2)
    columns = torch.nn.functional.unfold(
        torch.from_numpy(padded), kernel, dilation=dilation, stride=stride
    ).numpy()
    norms = np.sqrt((columns**2).sum((0, 2))).reshape(channels, *kernel).transpose(1, 2, 0)
    expected = norms[..., None] * np.abs(params["c"]["kernel"])
    np.testing.assert_allclose(found["c/kernel"], expected, rtol=1e-4)
    np.testing.assert_allclose(found["c/bias"], np.abs(params["c"]["bias"]))


def test_wanda_in_prune_and_what_it_refuses():
    net = fwt.Sequential([("d", nn.Dense(4)), ("e", nn.Dense(8))])
    x = jax.random.normal(jax.random.key(0), (9, 8)) * jnp.array([100.0] + [1.0] * 7)
    variables = net.init(jax.random.key(1), x)
    pruned = fwt.prune(score=S.wanda(net, x), pattern=fwt.patterns.n_m(1, 4))(variables)
    first = np.asarray(pruned["params"]["d"]["kernel"])
    assert first[0].all()  # the loud input wins its group
    assert not first[1:4].any()
    assert jax.jit(lambda v: S.wanda(net, x)(v))(variables)["params"]["d"]["kernel"].shape == (8, 4)
    odd = fwt.Sequential([("r", nn.RNN(nn.SimpleCell(3)))])
    steps = jnp.ones((2, 4, 3))
    with pytest.raises(fwt.LeafError, match=r"wanda: r/.*scan"):
        S.wanda(odd, steps)(odd.init(jax.random.key(0), steps))
    with pytest.raises(fwt.FwtError, match="takes a Flax module"):
        S.wanda(None, x)(variables)
    bare = nn.Dense(2)
    values = bare.init(jax.random.key(0), x)
    assert S.wanda(bare, x)(values)["params"]["kernel"].shape == (8, 2)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_wanda_asks_only_for_the_layers_that_are_pruned(kind):
    """An RNN, a norm and a shared kernel beside them have inputs that can't be kept."""
    x = jax.random.normal(jax.random.key(0), (5, 7, 6))
    if kind == "linen":
        net = nn.Sequential([nn.Dense(8), nn.RNN(nn.GRUCell(8)), nn.WeightNorm(nn.Dense(4))])
        params = net.init(jax.random.key(1), x)
        first, others = "layers_0/kernel", "layers_[12]/**"
        alone = nn.Dense(8), {"params": params["params"]["layers_0"]}
    else:
        rngs = nnx.Rngs(0)
        net = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.RNN(nnx.GRUCell(8, 4, rngs=rngs)),
                             nnx.BatchNorm(4, rngs=rngs))  # fmt: skip
        params, first, others = net, "layers/0/kernel", "layers/1/**"
        alone = net.layers[0], net.layers[0]
    wanted = fwt.select(fwt.prune(0.5, S.wanda(alone[0], x))(alone[1]), "kernel")["kernel"]
    for where in (first, [first]):
        found = fwt.prune(0.5, S.wanda(net, x), where=where)(params)
        np.testing.assert_array_equal(fwt.select(found, first)[first], wanted)
        for path, value in fwt.select(params, others).items():
            np.testing.assert_array_equal(fwt.select(found, "**")[path], value)
    with pytest.raises(fwt.LeafError, match=r"fwt.at holds .* back: fwt.prune\(..., where=\)"):
        fwt.at(first, fwt.prune(0.5, S.wanda(net, x)))(params)
    seen = []
    twice = fwt.prune(0.5, lambda p: seen.append(S.wanda(net, x)(p)) or seen[-1], where=first)
    np.testing.assert_array_equal(fwt.select(twice(params), first)[first], wanted)
    unseen = [v for p, v in fwt.select(seen[0], others).items() if p.endswith("/kernel")]
    assert unseen
    assert all(np.isnan(v).all() for v in unseen)  # magnitudes are no scores of wanda
    with pytest.raises(fwt.LeafError, match=r"can't be kept.*: leave (it|them) out with where="):
        fwt.prune(0.5, S.wanda(net, x))(params)
    with pytest.raises(fwt.LeafError, match=r"can't be kept.*: take another score"):
        S.wanda(net, x)(params)
    if kind == "linen":  # the kernel that is chosen meets other inputs where they can't be kept
        own = params["params"]
        x = jnp.tile(x, (1, 1, 2))[..., :8]
        tied = {"kernel": own["layers_1"]["cell"]["hn"]["kernel"], "bias": own["layers_0"]["bias"]}
        with pytest.raises(fwt.LeafError, match=r"hn/kernel runs inside a lifted transformation"):
            fwt.prune(0.5, S.wanda(net, x), where=first)({"params": {**own, "layers_0": tied}})


def wanda_of_the_paper(layers, x, ratio):
    """The masks (True goes) of the algorithm of the paper: of each row of a torch weight the least
    of |w| times the norm of its inputs, which the layers pruned before give."""
    gone = []
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, torch.nn.Linear):
                norms = torch.sqrt((x**2).mean(0))
                worth = layer.weight.abs() * norms
                least = torch.sort(worth, dim=-1, stable=True)[1][:, : int(len(norms) * ratio)]
                gone.append(torch.zeros_like(worth, dtype=bool).scatter_(1, least, value=True))
                layer.weight[gone[-1]] = 0
            x = layer(x)
    return [mask.numpy() for mask in gone]


def test_wanda_prunes_what_the_paper_does():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(14, 9), torch.nn.Tanh(), torch.nn.Linear(9, 5))
    x = torch.randn(33, 14) * torch.arange(1.0, 15)
    model = new = fwt.converters.from_torch(net)
    for path in ("0/kernel", "2/kernel"):
        score = S.wanda(new, x.numpy())
        new = fwt.prune(1 / 3, score, scope="output", where=path)(new)
    half = fwt.prune(0.5, S.wanda(model, x.numpy()), scope="output")(model)
    found = {p: np.asarray(w).T == 0 for p, w in fwt.select(new, fwt.kernels).items()}
    first = np.asarray(fwt.select(half, fwt.kernels)["0/kernel"]).T == 0
    assert np.array_equal(first, wanda_of_the_paper([copy.deepcopy(net[0])], x, 0.5)[0])
    # Of 14 / 3 weights fwt prunes the nearest number, 5, and the paper the whole ones, 4.
    masks = wanda_of_the_paper(net, x, 5 / 14 + 1e-6)
    assert np.array_equal(found["0/kernel"], masks[0])
    assert np.array_equal(found["2/kernel"], masks[1])


def test_scores_of_a_model_are_those_of_its_module():
    layers = [("c", nn.Conv(4, (3,))), ("n", nn.BatchNorm()), fl.Flatten(), ("d", nn.Dense(3))]
    net = fwt.Sequential(layers, input_shape=(6, 2))
    x = jax.random.normal(jax.random.key(0), (7, 6, 2))
    variables = net.init(jax.random.key(1), x)
    variables["batch_stats"]["n"]["mean"] += 3.0
    model = fwt.Model(net, variables)
    for ours, theirs in (
        (S.wanda(model, x), S.wanda(net, x)),
        (S.synflow(model), S.synflow(net)),
    ):
        expected = fwt.select(theirs(variables))
        for params in (variables, model, variables["params"]):  # whose statistics the Model has
            found = fwt.select(ours(params))
            assert all(np.array_equal(found[p], x) for p, x in expected.items())
    other = jax.tree.map(lambda v: v, variables)
    other["batch_stats"]["n"]["mean"] -= 2.0  # those that are given count
    found, expected = (fwt.select(S.wanda(m, x)(other))["d/kernel"] for m in (model, net))
    assert np.array_equal(found, expected)


class Graph(nnx.Module):
    """Layers of each linear kind, one of them twice under the same kernel."""

    def __init__(self, rngs):
        self.d = nnx.Linear(4, 6, rngs=rngs)
        self.g = nnx.LinearGeneral((3, 2), (5,), axis=(-2, -1), rngs=rngs)
        self.c = nnx.Conv(5, 3, (3,), strides=2, kernel_dilation=2, padding="VALID", rngs=rngs)
        self.t = nnx.ConvTranspose(3, 2, (4,), strides=2, transpose_kernel=False, rngs=rngs)
        self.e = nnx.Einsum("bti,io->bto", (2, 4), (4,), rngs=rngs)
        self.again = nnx.Linear(4, 6, rngs=rngs)
        self.again.kernel = self.d.kernel
        self.n = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        x = self.n(jnp.tanh(self.d(x)))
        x = self.c(self.g(x.reshape(*x.shape[:2], 3, 2)))
        return self.again(jnp.tanh(self.e(self.t(x))))


@pytest.mark.thorough
def test_wanda_of_nnx():
    graph = Graph(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (7, 9, 4)) * jnp.array([1, 5, 0.1, 2])
    before = nnx.state(graph)
    found = fwt.select(S.wanda(graph, x)(graph), fwt.kernels)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, nnx.state(graph)))

    met = {}  # by hand: the inputs of each, in eval mode
    graph.eval()

    def kept(name, y):
        met[name] = np.asarray(y, np.float64)
        return y

    y = graph.n(jnp.tanh(graph.d(kept("d", x))))
    y = graph.c(kept("c", graph.g(kept("g", y.reshape(7, 9, 3, 2)))))
    graph.again(kept("again", jnp.tanh(graph.e(kept("e", graph.t(kept("t", y)))))))
    both = np.sqrt((met["d"] ** 2).sum((0, 1)) + (met["again"] ** 2).sum((0, 1)))
    rows = {
        "again/kernel": both[:, None],
        "e/kernel": np.sqrt((met["e"] ** 2).sum((0, 1)))[:, None],
        "g/kernel": np.sqrt((met["g"] ** 2).sum((0, 1)))[..., None],
    }
    parts = [met["c"][:, t : t + 2 * y.shape[1] : 2][:, : y.shape[1]] for t in (0, 2, 4)]
    rows["c/kernel"] = np.sqrt([(p**2).sum((0, 1)) for p in parts])[..., None]
    for path, norms in rows.items():
        weights = fwt.select(graph, path)[path]
        np.testing.assert_allclose(found[path], np.abs(weights) * norms, rtol=1e-4, err_msg=path)
    assert float(jnp.abs(found["t/kernel"]).min()) > 0
    pruned = fwt.prune(0.5, S.wanda(graph, x))(graph)
    assert int((pruned.d.kernel[...] == 0).sum()) == 12
    state = nnx.state(graph, nnx.Param)
    again = fwt.select(S.wanda(graph, x)(state), fwt.kernels)
    assert all(np.array_equal(again[p], w) for p, w in found.items())
    with pytest.raises(fwt.FwtError, match="no samples"):
        S.wanda(graph, x[:0])(graph)


class Hidden(nnx.Module):
    def __init__(self, rngs):
        self.d = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return nnx.remat(lambda layer, y: layer(y))(self.d, x)


def test_layers_of_nnx_whose_inputs_are_hidden_are_refused():
    x = jax.random.normal(jax.random.key(0), (5, 6, 4))
    for graph, path in (
        (Hidden(nnx.Rngs(0)), "d/kernel"),
        (nnx.Sequential(nnx.RNN(nnx.GRUCell(4, 3, rngs=nnx.Rngs(0)))), "layers/0/cell/dense_."),
    ):
        with pytest.raises(fwt.LeafError, match=f"wanda: {path}.* meets no inputs on the batch"):
            S.wanda(graph, x)(graph)
    with pytest.raises(fwt.LeafError, match="sparsegpt: d/kernel meets no inputs"):
        fwt.sparsegpt(Hidden(nnx.Rngs(0)), Hidden(nnx.Rngs(0)), x, 0.5)


def test_random_is_by_path_and_bare_or_called(problem):
    _, params, _, loss = problem
    grads = jax.grad(loss)(params)
    one, two = (
        S.random(params, key=0),
        S.random({**params, "c": {"kernel": jnp.ones((2, 2))}}, key=0),
    )
    assert jnp.array_equal(one["a"]["kernel"], two["a"]["kernel"])
    assert not jnp.array_equal(one["a"]["kernel"], S.random(params, key=1)["a"]["kernel"])
    counts = []
    for score in (S.random, S.random(), S.random(key=3), functools.partial(S.random, key=3)):
        new = fwt.prune(0.5, score, key=7)(params)
        counts.append(int((new["a"]["kernel"] == 0).sum()))
    assert counts == [10] * 4
    bound, given = fwt.prune(0.5, S.saliency(grads=grads)), fwt.prune(0.5, S.saliency, grads=grads)
    assert jax.tree.all(both(jnp.array_equal, bound(params), given(params)))
    assert fwt.prune(0.5, S.magnitude())(params)["a"]["kernel"].tolist() == (
        fwt.prune(0.5)(params)["a"]["kernel"].tolist()
    )


def test_a_users_score_gets_what_it_names(problem):
    _, params, _, loss = problem
    grads, seen = jax.grad(loss)(params), []

    def mine(params, *, grads, key=None, other=3):
        seen.append((grads is not None, key, other))
        return params

    fwt.prune(0.5, mine, grads=grads, key=5)(params)
    ((had, key, other),) = seen
    assert (had, other) == (True, 3)
    jax.random.uniform(key)  # a JAX key, made of the seed
    with pytest.raises(fwt.FwtError, match="needs grads=: give grads="):
        fwt.prune(0.5, mine)
    with pytest.raises(fwt.LeafError, match="grads: nothing for 'a/bias'; close"):
        fwt.prune(0.5, S.saliency, grads={"b": grads["b"]})(params)
    wrong = {**grads, "a": {**grads["a"], "bias": jnp.ones(9)}}
    with pytest.raises(fwt.LeafError, match="grads: a/bias expected shape"):
        fwt.prune(0.5, S.saliency, grads=wrong)(params)


def test_leaves_that_are_not_selected_do_not_matter():
    tree = {"d": {"kernel": np.ones((2, 3), np.float32)}, "step": np.array(2**40), "e": np.ones(3)}
    grads = {
        "d": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)},
        "step": 0,
        "e": np.ones(3),
    }
    new = fwt.prune(0.5, S.saliency, grads=grads)(tree)
    assert new["d"]["kernel"].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert new["step"] is tree["step"]
    assert new["e"] is tree["e"]


def test_wanda_of_loud_inputs_in_half_precision():
    net = fwt.Sequential([("d", nn.Dense(1, dtype=jnp.float16))])
    params = {"d": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}}
    found = S.wanda(net, jnp.array([[300.0, 500.0]]))(params)["d"]["kernel"]
    np.testing.assert_allclose(found.ravel(), [300, 500], rtol=1e-3)


def test_more_wrong_calls(problem):
    net, params, (x, _), _ = problem
    for factory in (S.wanda, S.grasp, S.synflow, S.second_order_taylor):
        with pytest.raises(fwt.FwtError, match="needs arguments: call it first"):
            fwt.prune(0.5, factory)
    with pytest.raises(fwt.FwtError) as caught:
        fwt.prune(0.5, S.grasp({"a": np.ones(1000)}))
    assert len(str(caught.value)) < 200
    with pytest.raises(fwt.LeafError, match="a/kernel on the batch are not finite"):
        fwt.prune(0.5, S.wanda(net, x * jnp.nan))(params)
    plain = fwt.prune(0.5, lambda p, grads: grads, grads=params)(params)  # not keyword-only
    assert int((plain["a"]["kernel"] == 0).sum()) == 10


def test_scores_of_a_tie_are_those_of_its_one_weight():
    k, x = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(4, 4), (9, 4)]))

    def loss(p):
        return (jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]).var()

    def of_one(p):
        return loss({"a": p["w"], "b": p["w"]})

    both, one = {"a": {"kernel": k}, "b": {"kernel": k}}, {"w": {"kernel": k}}
    grads, total = jax.grad(loss)(both), jax.grad(of_one)(one)
    net = fwt.Sequential([("a", nn.Dense(4, use_bias=False)), ("b", nn.Dense(4, use_bias=False))],
                         (4,))  # fmt: skip

    class One(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, use_bias=False, name="w")
            return layer(layer(x))

    pairs = [
        (S.grasp(loss), S.grasp(of_one)),
        (S.second_order_taylor(loss), S.second_order_taylor(of_one)),
        (S.saliency(grads=grads), S.saliency(grads=total)),
        (S.gradient(grads=grads), S.gradient(grads=total)),
        (S.fisher(grads=grads), S.fisher(grads=total)),
        (S.synflow(net), S.synflow(One(), (4,))),
        (S.wanda(net, x), S.wanda(One(), x)),
    ]
    for score, own in pairs:
        wanted = own(one)["w"]["kernel"]
        np.testing.assert_allclose(score(both)["a"]["kernel"], wanted, rtol=1e-4, atol=1e-6)
    for score in (S.saliency, S.gradient, S.taylor):
        wanted = fwt.masks(0.5, score, grads=total)(one)["w"]["kernel"]
        assert np.array_equal(fwt.masks(0.5, score, grads=grads)(both)["b"]["kernel"], wanted)


def test_scores_of_half_precision_are_in_float32():
    net = fwt.Sequential([("d", nn.Dense(1, dtype=jnp.float16))])
    x = jnp.full((1000, 3), 1e-4, jnp.float16) * jnp.array([1, 1.3, 0.9], jnp.float16)
    params = {"d": {"kernel": jnp.ones((3, 1)), "bias": jnp.zeros(1)}}
    wide = np.linalg.norm(np.asarray(x, np.float32), axis=0)
    np.testing.assert_allclose(S.wanda(net, x)(params)["d"]["kernel"].ravel(), wide, rtol=1e-5)
    w = {"d": {"kernel": jnp.array([[1e-3], [3e-3], [2e-3], [4e-3]], jnp.float16)}}
    score = S.second_order_taylor(lambda p: p["d"]["kernel"].astype(jnp.float32).sum() * 0.01)
    kept = np.asarray(fwt.prune(0.5, score)(w)["d"]["kernel"]).ravel() != 0
    assert kept.tolist() == [False, True, False, True]


def _own_trees():
    key = jax.random.key(3)
    net = nn.Sequential([nn.Dense(5), nn.BatchNorm(use_running_average=True)])
    variables = net.init(key, jnp.ones((1, 3)))
    grads = jax.tree.map(lambda x: jax.random.normal(key, x.shape), variables["params"])
    mlp = equinox.nn.MLP(3, 2, 5, 1, key=key)
    of_mlp = equinox.filter_grad(lambda m: (m(jnp.arange(3.0)) ** 2).sum())(mlp)
    layers = nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)), nnx.relu
    other = nnx.Sequential(*layers)
    of_other = nnx.grad(lambda m: (m(jnp.ones((2, 3))) ** 2).sum())(other)
    return {
        "variables": (variables, grads),
        "a Model": (fwt.Model(net, variables), {"params": grads}),
        "Equinox": (mlp, of_mlp),
        "nnx": (other, of_other),
    }


@pytest.mark.parametrize("kind", ["variables", "a Model", "Equinox", "nnx"])
def test_a_score_of_one_s_own_may_give_its_numbers_by_path(kind):
    tree, grads = _own_trees()[kind]

    def mine(params, *, grads):
        weights, grads = fwt.select(params), fwt.select(grads)
        return {p: jnp.abs(w * grads[p]) for p, w in weights.items()}

    def raw(params, *, grads):
        return jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads)

    found = fwt.select(fwt.masks(0.5, mine, grads=grads)(tree))
    wanted = fwt.select(fwt.masks(0.5, fwt.scores.saliency, grads=grads)(tree))
    assert all(map(np.array_equal, found.values(), wanted.values()))
    with pytest.raises(fwt.LeafError, match=r"score raw failed on .*fwt.select\(params\)"):
        fwt.masks(0.5, raw, grads=grads)(tree)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="d")(nn.Embed(7, 5, name="e")(x))


@pytest.mark.parametrize("linen", [False, True])
def test_synflow_of_whole_numbers(linen):
    net = Tokens()
    if not linen:
        net = fwt.Sequential([("e", nn.Embed(7, 5)), ("d", nn.Dense(3))], input_shape=(4,))
    variables = net.init(jax.random.key(0), jnp.ones((1, 4), jnp.int32))
    score = S.synflow(net, (4,), input_dtype="int32") if linen else S.synflow(net)
    found = fwt.select(score(variables))
    w, table = (np.abs(variables["params"][a][b]) for a, b in (("d", "kernel"), ("e", "embedding")))
    # R = 4 sum_ij |E|[1, i] |W|[i, j] + a bias
    np.testing.assert_allclose(found["d/kernel"], 4 * table[1][:, None] * w, rtol=1e-5)
    np.testing.assert_allclose(found["e/embedding"][1], 4 * table[1] * w.sum(1), rtol=1e-5)
    assert not np.delete(found["e/embedding"], 1, 0).any()
    if linen:
        with pytest.raises(fwt.FwtError, match=r'ones of \[\(1, 4\)\] .*give input_dtype="int32"'):
            S.synflow(net, (4,))(variables)


@pytest.mark.parametrize("what", ["wanda", "sparsegpt", "lsuv"])
def test_a_batch_of_whole_numbers_is_asked_for(what):
    net, x = Tokens(), np.array([[1, 2], [3, 6], [0, 5]])
    variables = net.init(jax.random.key(0), x)
    run = {
        "wanda": lambda x: fwt.prune(0.5, S.wanda(net, x))(variables),
        "sparsegpt": lambda x: fwt.sparsegpt(net, variables, x, 0.5),
        "lsuv": lambda x: fwt.lsuv(net, variables, x, 0),
    }[what]
    assert jax.tree.structure(run(x)) == jax.tree.structure(variables)
    with pytest.raises(fwt.FwtError, match=f"{what}: .*give a batch of whole numbers"):
        run(x.astype(np.float32))


@pytest.mark.parametrize("make", [S.grasp, S.second_order_taylor])
def test_what_a_loss_takes_and_gives(make, problem):
    net, params, (x, _), loss = problem
    assert make(loss)(params) is not None  # what has a default may be left out
    with pytest.raises(fwt.FwtError, match=r"found \(p, x\): .*lambda params: loss\(params, batch"):
        make(lambda p, x: net.apply({"params": p}, x).sum())
    for wrong, said in (
        (lambda p: net.apply({"params": p}, x), r"found an array of the shape \(7, 3\)"),
        (lambda p: (loss(p), 1), "found tuple"),
    ):
        with pytest.raises(fwt.FwtError, match=f"gives one number for the params, {said}"):
            make(wrong)(params)


def test_a_loss_gets_the_model_that_is_pruned(problem):
    net, params, (x, y), _ = problem
    model = fwt.Model(net, {"params": params})

    def of_variables(variables):
        return jnp.mean((net.apply(variables, x) - y) ** 2)

    def of_model(model):
        return jnp.mean((model(x) - y) ** 2)

    for score in (S.grasp, S.second_order_taylor):
        close(score(of_model)(model).variables, score(of_variables)(model.variables))
        with pytest.raises(fwt.FwtError, match=r"lambda model: loss_of\(model\(x\), y\)"):
            score(of_variables)(model)
    pruned = fwt.prune(0.5, S.grasp(of_model), scope="global")(model)
    expected = fwt.prune(0.5, S.grasp(of_variables), scope="global")(model.variables)
    close(pruned.variables, expected)


class Flows(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(4, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.b = nnx.Linear(6, 3, rngs=rngs)
        self.norm.mean[...] = jnp.arange(6.0) - 3
        self.norm.var[...] = jnp.arange(6.0) + 0.5

    def __call__(self, x):
        return self.b(self.drop(nnx.relu(self.norm(self.a(x)))))


class Flow(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(6, name="a")(x))
        return nn.Dense(3, name="b")(nn.relu(x))


def test_synflow_of_nnx():
    net = Flows(nnx.Rngs(0))
    whole = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    stats = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
    variables = {"params": whole, "batch_stats": stats}
    expected = S.synflow(Flow(), (4,))(variables)["params"]
    score = S.synflow(net, (4,))
    state = nnx.state(net)
    jitted = jax.jit(score)(state)
    for name in "ab":
        for found in (getattr(score(net), name), score(state)[name], jitted[name]):
            kernel = found["kernel"] if isinstance(found, dict | nnx.State) else found.kernel
            np.testing.assert_allclose(kernel[...], expected[name]["kernel"], rtol=1e-6)
    pruned = fwt.prune(0.5, score, scope="global")(net)
    truth = fwt.prune(0.5, S.synflow(Flow(), (4,)), scope="global")(variables)
    np.testing.assert_array_equal(pruned.a.kernel[...], truth["params"]["a"]["kernel"])


def test_a_score_gets_the_whole_tree(problem):
    _, params, _, _ = problem
    for score in (jnp.abs, lambda w: w * w):
        with pytest.raises(
            fwt.LeafError, match=r"it gets all of the params.*fwt\.select\(params\)"
        ):
            fwt.prune(0.5, score)(params)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.BatchNorm(use_running_average=True)(x))


def test_what_a_module_needs_beside_params_is_named():
    x = jnp.ones((3, 4))
    variables = Normed().init(jax.random.key(0), x)
    score = S.wanda(Normed(), x)
    with pytest.raises(fwt.FwtError, match=r"give what it needs beside params: fwt.Model\("):
        fwt.prune(0.5, score)(variables["params"])
    fwt.prune(0.5, S.wanda(fwt.Model(Normed(), variables), x))(variables["params"])
    stats = {"batch_stats": variables["batch_stats"]}
    fwt.prune(0.5, S.wanda(Normed(), x, **stats))(variables["params"])
