"""Transforms in training loops of torch and Keras: ``hold``, ``Callback`` and what layers take."""

import copy
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch

import fwt
from fwt import converters
from fwt.converters.frameworks import keras_training

X = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)


# -- torch --------------------------------------------------------------------------------------


def torch_net(dtype=torch.float32):
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Tanh(), torch.nn.Linear(11, 3))
    net.variables = "a name of the user's own, which means something in Keras"
    return net.to(dtype)


def torch_steps(net, optimizer, n=6, after=lambda: None):
    dtype = next(net.parameters()).dtype
    x, y = (torch.from_numpy(v).to(dtype) for v in (X, Y))
    for i in range(n):
        optimizer.zero_grad()
        part = slice(5 * i, 5 * i + 5)
        (net(x[part]) - y[part]).square().mean().backward()
        optimizer.step()
        after()


def same(one, other):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.detach().view(torch.uint8).tolist() == b.detach().view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_held_masks_are_those_of_a_loop_by_hand(dtype):
    with jax.enable_x64(dtype is torch.float64):
        masked_by_hand(dtype)


def masked_by_hand(dtype):
    net = torch_net(dtype)
    other = copy.deepcopy(net)
    masks = fwt.masks(0.6, scope="global")(net)
    kept = [torch.from_numpy(np.asarray(masks["params"][n]["kernel"]).T.copy()) for n in "02"]
    adam, theirs = (torch.optim.Adam(m.parameters(), 0.01) for m in (net, other))

    def by_hand():
        with torch.no_grad():
            for layer, mask in zip((other[0], other[2]), kept, strict=True):
                layer.weight[~mask] = 0

    handle = converters.hold(net, adam, fwt.apply_masks(masks))
    torch_steps(net, adam)
    torch_steps(other, theirs, after=by_hand)
    same(net, other)
    assert sum(int((net[i].weight == 0).sum()) for i in (0, 2)) == round(0.6 * (77 + 33))
    handle.remove()
    torch_steps(net, adam, 1)
    assert int((net[0].weight == 0).sum()) == 0


def test_held_masks_leave_nothing_of_what_is_no_number():
    net = torch.nn.Linear(4, 3)
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    mask = np.zeros((4, 3), bool)
    mask[0] = True
    with torch.no_grad():
        net.weight[:, 1:] = torch.tensor([float("nan"), float("inf"), -0.0])
        net.weight[0, 0] = float("nan")
    with converters.hold(net, sgd, fwt.apply_masks({"kernel": mask})):
        net.weight.grad = torch.zeros_like(net.weight)
        sgd.step()
    assert net.weight[:, 1:].view(torch.int32).count_nonzero() == 0
    assert torch.isnan(net.weight[0, 0])


def test_a_held_projection_and_every():
    net, other = torch_net(), torch_net()
    sgd, theirs = (torch.optim.SGD(m.parameters(), 0.5, momentum=0.9) for m in (net, other))
    converters.hold(net, sgd, fwt.project(fwt.constraints.max_norm(0.3), where="0/kernel"), every=2)
    steps = []

    def by_hand():
        steps.append(None)
        if len(steps) % 2 == 0:
            with torch.no_grad():
                other[0].weight.copy_(torch.renorm(other[0].weight, 2, 0, 0.3))

    torch_steps(net, sgd)
    torch_steps(other, theirs, after=by_hand)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch_steps(net, sgd, 1)
    assert net[0].weight.norm(dim=1).max() > 0.3  # the seventh step is not due


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.8, "every": 2},
        {"sparsity": fwt.schedules.cubic(0.9, 0, 5), "every": 1, "scope": "global"},
        {"sparsity": 0.7, "every": 2, "regrow": "rigl"},
        {"sparsity": 0.7, "every": 2, "regrow": "set", "key": 0},
        {"masks": fwt.masks(0.5)},
    ],
    ids=["number", "schedule", "rigl", "set", "masks"],
)
def test_schedules_of_sparsity_are_those_of_optax(settings):
    net = torch_net()
    tree = jax.tree.map(jnp.array, converters.weights(net))
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    converters.hold(net, sgd, fwt.optim.sparsify(optax.set_to_zero(), **settings))
    torch_steps(net, sgd)
    tx = fwt.optim.sparsify(optax.sgd(0.1), **settings)
    state = tx.init(tree)

    def loss(tree, x, y):
        first, last = (tree["params"][n] for n in "02")
        return jnp.mean(
            (jnp.tanh(x @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"] - y) ** 2
        )

    for i in range(6):
        part = slice(5 * i, 5 * i + 5)
        grads = jax.grad(loss)(tree, X[part], Y[part])
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    found = fwt.select(net)
    for path, value in fwt.select(tree).items():
        np.testing.assert_array_equal(found[path] == 0, value == 0, err_msg=path)
        np.testing.assert_allclose(found[path], value, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    "t",
    [
        lambda: fwt.optim.sparsify(
            optax.set_to_zero(), fwt.schedules.cubic(0.8, 0, 8), every=2, regrow="rigl", key=4
        ),
        lambda: fwt.optim.sparsify(optax.set_to_zero(), 0.7, every=3, regrow="set", key=4),
        lambda: fwt.project(fwt.constraints.max_norm(0.5)),
    ],
)
def test_training_goes_on_after_a_checkpoint(t, tmp_path):
    """Six steps at once, and three, a file, and three more, are the same to the bit."""
    whole, half = torch_net(), torch_net()
    sgd = torch.optim.SGD(whole.parameters(), 0.1)
    converters.hold(whole, sgd, t(), every=2)
    torch_steps(whole, sgd, 3)
    torch_steps(whole, sgd, 3)
    first = torch.optim.SGD(half.parameters(), 0.1)
    handle = converters.hold(half, first, t(), every=2)
    torch_steps(half, first, 3)
    parts = {"net": half.state_dict(), "sgd": first.state_dict(), "held": handle.state_dict()}
    torch.save(parts, tmp_path / "run.pt")
    handle.remove()

    found = torch.load(tmp_path / "run.pt")  # of weights only
    again = torch_net()
    second = torch.optim.SGD(again.parameters(), 0.1)
    again.load_state_dict(found["net"])
    second.load_state_dict(found["sgd"])
    converters.hold(again, second, t(), every=2).load_state_dict(found["held"])
    torch_steps(again, second, 3)
    same(whole, again)


def test_a_state_of_something_else_is_refused():
    net = torch_net()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    sparse = converters.hold(net, sgd, fwt.optim.sparsify(optax.set_to_zero(), 0.5))
    plain = converters.hold(net, sgd, fwt.project(fwt.constraints.max_norm(0.5)))
    with pytest.raises(fwt.ConversionError, match=r"hold: .* is not in both states"):
        plain.load_state_dict(sparse.state_dict())
    other = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    adam = torch.optim.Adam(other.parameters())
    held = converters.hold(other, adam, fwt.optim.sparsify(optax.set_to_zero(), 0.5))
    with pytest.raises(fwt.ConversionError, match="of another model"):
        held.load_state_dict(sparse.state_dict())


def test_infinities_are_pruned_by_a_schedule_too():
    net = torch_net()
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    sparse = fwt.optim.sparsify(optax.set_to_zero(), masks=fwt.masks(0.5))
    converters.hold(net, sgd, sparse)
    with torch.no_grad():
        net[0].weight.fill_(float("inf"))
    sgd.step()
    assert int((net[0].weight == 0).sum()) == 38
    assert not net[0].weight.isnan().any()


def test_a_double_module_asks_for_x64_at_once():
    net = torch_net(torch.float64)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(fwt.LeafError, match="enable_x64"):
        converters.hold(net, sgd, fwt.optim.sparsify(optax.set_to_zero(), 0.5))


def test_steps_of_a_closure_and_those_that_a_scaler_skips():
    net = torch_net()
    lbfgs = torch.optim.LBFGS(net.parameters(), max_iter=3)
    runs = []
    handle = converters.hold(net, lbfgs, lambda tree: runs.append(None) or tree)
    runs.clear()

    def closure():
        lbfgs.zero_grad()
        loss = net(torch.from_numpy(X)).square().mean()
        loss.backward()
        return loss

    lbfgs.step(closure)
    assert len(runs) == 1
    handle.remove()
    scaler, sgd = (
        torch.amp.GradScaler("cpu", init_scale=8.0),
        torch.optim.SGD(net.parameters(), 0.1),
    )
    converters.hold(net, sgd, lambda tree: runs.append(None) or tree)
    runs.clear()
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(net(torch.from_numpy(X)).square().mean() * factor).backward()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
    assert len(runs) == 2


@pytest.mark.parametrize("around", [torch.compile, torch.nn.DataParallel])
def test_the_module_in_what_runs_it_is_held(around):
    net = torch_net()
    masks = fwt.masks(0.5)(net)
    sgd = torch.optim.SGD([{"params": [p], "lr": 0.1} for p in net.parameters()])
    converters.hold(around(net), sgd, fwt.apply_masks(masks))
    torch_steps(net, sgd)
    assert int((net[0].weight == 0).sum()) == 38


def test_what_is_held_may_change_its_dtype_or_its_parameters():
    net = torch_net()
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    converters.hold(net, sgd, fwt.apply_masks(fwt.masks(0.5)(net)))
    torch_steps(net.half(), sgd)
    assert int((net[0].weight == 0).sum()) == 38
    torch_steps(net.double(), sgd)
    assert int((net[0].weight == 0).sum()) == 38
    net.float()
    net[0].weight = torch.nn.Parameter(torch.ones_like(net[0].weight))
    sgd.add_param_group({"params": [net[0].weight]})
    torch_steps(net, sgd)
    assert int((net[0].weight == 0).sum()) == 38


DISTRIBUTED = """
import tempfile, torch, fwt
from fwt import converters
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(7, 11))
sgd = torch.optim.SGD(net.parameters(), 0.1)
converters.hold(net, sgd, fwt.apply_masks(fwt.masks(0.5)(net)))
for _ in range(3):
    sgd.zero_grad()
    net(torch.randn(5, 7)).square().mean().backward()
    sgd.step()
print(int((net.module.weight == 0).sum()))
torch.distributed.destroy_process_group()
"""


def test_the_module_in_a_distributed_one_is_held():
    done = subprocess.run([sys.executable, "-c", DISTRIBUTED], capture_output=True, text=True)
    assert done.stdout.split() == ["38"], done.stderr


def test_a_callback_of_two_models_counts_for_each():
    seen = []
    callback = converters.Callback(lambda tree: seen.append(None) or tree, every=6)
    for _ in range(2):  # five batches each, of which none is the sixth
        seen.clear()
        fit(keras_net(), callback)
        assert len(seen) == 2  # tried at the start, and run at the end


def test_tied_weights_are_held_once():
    table = torch.nn.Embedding(5, 4)
    head = torch.nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    net = torch.nn.Sequential(table, head)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    mask = np.arange(20).reshape(5, 4) % 3 > 0
    converters.hold(net, sgd, fwt.apply_masks({"0/embedding": mask}))
    net(torch.arange(5)).square().sum().backward()
    sgd.step()
    np.testing.assert_array_equal(table.weight.detach().numpy() != 0, mask)
    assert head.weight is table.weight


NET = torch_net()
SGD = torch.optim.SGD(NET.parameters(), 0.1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: converters.hold(NET, 3, fwt.prune(0.5)),
            "takes a torch optimizer after the model",
        ),
        (
            lambda: converters.hold(torch_net(), SGD, fwt.prune(0.5)),
            "has none of the model's parameters",
        ),
        (lambda: converters.hold(NET, SGD, fwt.prune(0.5), every=0), "every must be a whole"),
        (lambda: converters.hold(NET, SGD, fwt.constraints.max_norm(1)), "hold takes a transform"),
        (
            lambda: converters.hold(NET, SGD, fwt.prune(0.5, where="x/*")),
            r"matches none.*fwt.paths\(model\) lists",
        ),
        (
            lambda: converters.hold(NET, SGD, fwt.optim.sparsify(optax.adam(0.1), 0.5)),
            r"takes the steps: .*around optax.set_to_zero\(\)",
        ),
        (
            lambda: converters.hold(
                NET, SGD, fwt.optim.sparsify(optax.set_to_zero(), 0.5, straight_through=True)
            ),
            "straight_through= and rewind=",
        ),
        (
            lambda: converters.hold(NET, SGD, optax.sgd(optax.linear_schedule(0.0, 0.5, 9))),
            "takes the steps: ",
        ),
        (
            lambda: converters.hold(
                NET,
                SGD,
                fwt.optim.sparsify(
                    optax.chain(optax.set_to_zero(), optax.add_decayed_weights(0.1)), 0.5
                ),
            ),
            "takes the steps: ",
        ),
        (
            lambda: converters.hold(fwt.Model(None, {}), SGD, fwt.prune(0.5)),
            "a torch module, found",
        ),
        (
            lambda: converters.keras_initializer(fwt.initializers.ones, seed="a"),
            "seed must be a whole number",
        ),
        (lambda: converters.Callback(fwt.prune(0.5), every="step"), "every must be 'batch'"),
        (lambda: converters.keras_constraint(fwt.prune(0.5)), "takes one of fwt.constraints"),
        (lambda: converters.keras_initializer(3), "takes one of fwt.initializers"),
    ],
)
def test_what_can_not_be_held_says_so_at_once(call, match):
    before = {p: x.copy() for p, x in fwt.select(NET).items()}
    with pytest.raises((fwt.FwtError, TypeError), match=match):
        call()
    assert not SGD._optimizer_step_post_hooks
    jax.tree.map(np.testing.assert_array_equal, fwt.select(NET), before)


# -- Keras --------------------------------------------------------------------------------------


def keras_net(**settings):
    keras.utils.set_random_seed(5)
    net = keras.Sequential(
        [
            keras.Input((7,)),
            keras.layers.Dense(11, activation="tanh", name="a", **settings),
            keras.layers.Dense(3, name="b"),
        ]
    )
    net.compile(keras.optimizers.Adam(0.05), "mse")
    return net


def fit(net, *callbacks, epochs=1):
    net.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))


def kernels(net):
    return [np.asarray(keras.ops.convert_to_numpy(layer.kernel)) for layer in net.layers]


class ByHand(keras.callbacks.Callback):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def on_train_batch_end(self, batch, logs=None):
        keras_training.sync(self.model)  # which the JAX trainer needs
        for layer, new in zip(self.model.layers, self.change(*kernels(self.model)), strict=True):
            layer.kernel.assign(new)


def test_a_callback_of_masks_is_one_by_hand():
    net, other = keras_net(), keras_net()
    masks = fwt.masks(0.6)(net)
    a, b = (np.asarray(masks["params"][n]["kernel"]) for n in "ab")
    fit(net, converters.Callback(fwt.apply_masks(masks)))
    fit(other, ByHand(lambda x, y: (np.where(a, x, 0), np.where(b, y, 0))))
    jax.tree.map(np.testing.assert_array_equal, kernels(net), kernels(other))
    assert [(x == 0).sum() for x in kernels(net)] == [46, 20]


@pytest.mark.parametrize(
    ("every", "runs"), [("batch", 11), ("epoch", 3), (3, 4), (4, 3), (5, 3), (11, 1)]
)
def test_when_a_callback_runs(every, runs):
    net, seen = keras_net(), []
    callback = converters.Callback(lambda tree: seen.append(None) or tree, every)
    fit(net, callback, epochs=2)
    assert len(seen) - 1 == runs  # it was tried at the start, and runs at the end


def test_a_callback_bounds_norms_and_prunes_by_a_schedule():
    net = keras_net()
    fit(net, converters.Callback(fwt.project(fwt.constraints.max_norm(0.4))))
    assert max(np.linalg.norm(x, axis=0).max() for x in kernels(net)) < 0.4 + 1e-6
    net = keras_net()
    schedule = fwt.schedules.cubic(0.8, 0, 10)
    callback = converters.Callback(fwt.optim.sparsify(optax.set_to_zero(), schedule, every=1))
    fit(net, callback)
    assert [(x == 0).sum() for x in kernels(net)] < [62, 26]
    fit(net, callback)  # it goes on where it was
    assert [(x == 0).sum() for x in kernels(net)] == [62, 26]
    rigl = fwt.optim.sparsify(optax.set_to_zero(), 0.5, regrow="rigl")
    with pytest.raises(fwt.ConversionError, match="needs the gradients of each step"):
        fit(net, converters.Callback(rigl))


def test_fit_goes_on_after_a_file(tmp_path):
    """Four epochs at once, and two, files, and two more, are the same to the bit."""

    def made():
        schedule = fwt.schedules.cubic(0.8, 0, 12)
        return converters.Callback(
            fwt.optim.sparsify(optax.set_to_zero(), schedule, every=1, regrow="set", key=4), every=3
        )

    def fit(model, callback, epochs):
        model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=[callback])

    whole, half = keras_net(), keras_net()
    for model in (whole, half):
        model.compile(keras.optimizers.SGD(0.1), keras.losses.MeanSquaredError())
    half.set_weights(whole.get_weights())
    callback = made()
    fit(whole, callback, 2)
    fit(whole, callback, 2)
    first = made()
    fit(half, first, 2)
    half.save(tmp_path / "half.keras")
    np.savez(tmp_path / "held.npz", **first.state_dict())
    again = keras.saving.load_model(tmp_path / "half.keras")
    second = made()
    second.load_state_dict(np.load(tmp_path / "held.npz"))
    fit(again, second, 2)
    for a, b in zip(whole.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    third = converters.Callback(fwt.project(fwt.constraints.max_norm(0.5)))
    third.load_state_dict(first.state_dict())
    with pytest.raises(fwt.ConversionError, match=r"Callback: .* is not in both states"):
        fit(again, third, 1)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_averages_are_masked_when_training_ends(policy):
    net = keras_net(dtype=policy)
    net.compile(keras.optimizers.Adam(0.05, use_ema=True), "mse")
    fit(net, converters.Callback(fwt.apply_masks(fwt.masks(0.6)(net))))
    assert [(x == 0).sum() for x in kernels(net)] == [46, 20]


def test_weights_that_another_callback_restores_are_masked():
    net = keras_net()
    stop = keras.callbacks.EarlyStopping("loss", restore_best_weights=True, start_from_epoch=0)
    masks = converters.Callback(fwt.apply_masks(fwt.masks(0.6)(net)), every="epoch")
    fit(net, stop, masks, epochs=2)
    assert [(x == 0).sum() for x in kernels(net)] == [46, 20]


def test_batches_are_counted_in_executions_of_several():
    net, seen = keras_net(), []
    net.compile("sgd", "mse", steps_per_execution=2)
    callback = converters.Callback(lambda tree: seen.append(None) or tree, every=2)
    fit(net, callback, epochs=2)
    assert len(seen) - 1 == 5 + 1  # of ten batches in six executions


def test_each_part_of_a_layer_draws_its_own_kernel():
    drawn = converters.keras_initializer(fwt.initializers.glorot_normal)
    layer = keras.layers.MultiHeadAttention(2, 4, kernel_initializer=drawn)
    layer.build((None, 5, 8), (None, 5, 8))
    query, key = (np.asarray(x.kernel) for x in (layer.query_dense, layer.key_dense))
    assert not (query == key).any()


AXES = [
    (keras.layers.Conv2D(3, 2), (5, 5, 4), "h w in out"),
    (keras.layers.Conv2DTranspose(3, 2), (5, 5, 4), "h w out in"),
    (keras.layers.Embedding(7, 3), (4,), "in out"),
]


@pytest.mark.parametrize(("layer", "shape", "axes"), AXES, ids=["conv", "transposed", "table"])
def test_axes_that_a_constraint_can_not_know_are_asked_for(layer, shape, axes):
    layer.build((None, *shape))
    (weight, *_) = layer.weights
    with pytest.raises(fwt.AxesError, match=r"give keras_constraint.*axes="):
        converters.keras_constraint(fwt.constraints.unit_norm)(weight)
    converters.keras_constraint(fwt.constraints.non_negative)(weight)  # which asks for none
    bound = converters.keras_constraint(fwt.constraints.unit_norm, axes=axes)
    found = np.asarray(bound(weight))
    names = axes.split()
    over = tuple(i for i, name in enumerate(names) if name != "out")
    np.testing.assert_allclose(np.sqrt((found**2).sum(over)), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["orthogonal", "spectral_ball"])
def test_constraints_of_matrices_in_fit(name):
    make = getattr(fwt.constraints, name)
    bound = converters.keras_constraint(make if name == "orthogonal" else make(0.5))
    net = keras_net(kernel_constraint=bound)
    fit(net)
    singular = np.linalg.svd(kernels(net)[0], compute_uv=False)
    np.testing.assert_allclose(singular, 1, rtol=1e-4) if name == "orthogonal" else None
    assert singular.max() < (1.001 if name == "orthogonal" else 0.501)


def test_a_constraint_and_an_initializer_in_a_layer(tmp_path):
    drawn = converters.keras_initializer(fwt.initializers.torch.kaiming_uniform, seed=4)
    bound = converters.keras_constraint(fwt.constraints.max_norm(0.5))
    net = keras_net(kernel_constraint=bound, kernel_initializer=drawn)
    wanted = fwt.initializers.torch.kaiming_uniform()(jax.random.key(4), (7, 11), jnp.float32)
    np.testing.assert_array_equal(kernels(net)[0], wanted)
    theirs = keras_net(kernel_constraint=keras.constraints.MaxNorm(0.5), kernel_initializer=drawn)
    for model in (net, theirs):
        model.layers[1].kernel.assign(kernels(theirs)[1])
        fit(model)
    np.testing.assert_allclose(kernels(net)[0], kernels(theirs)[0], atol=2e-6)
    assert np.linalg.norm(kernels(net)[0], axis=0).max() < 0.5 + 1e-6
    net.save(tmp_path / "net.keras")
    again = keras.models.load_model(tmp_path / "net.keras")
    assert again.layers[0].kernel_constraint.get_config() == bound.get_config()
    fit(again)
    assert np.linalg.norm(kernels(again)[0], axis=0).max() < 0.5 + 1e-6


NOUNS = {
    **{n: (fwt.constraints, n) for n in fwt.constraints.__all__ if n != "Bound"},
    **{n: (fwt.initializers, n) for n in fwt.initializers.__all__ if n != "Bound"},
    **{f"keras.{n}": (fwt.initializers.keras, n) for n in fwt.initializers.keras.__all__},
    **{f"torch.{n}": (fwt.initializers.torch, n) for n in fwt.initializers.torch.__all__},
}
ARGUMENTS = {
    "box": (0.0, np.array([1.0, 2.0], np.float32)), "k_sparse": (3,), "low_rank": (2,),
    "constant": (0.5,),
    "variance_scaling": (2.0, "fan_in", "normal"),
}  # fmt: skip


SHAPES = {
    **dict.fromkeys(("positive_semidefinite", "symmetric", "doubly_stochastic"), (3, 3)),
    **dict.fromkeys(("radial", "delta_orthogonal", "dirac"), (3, 2, 4)),
}


@pytest.mark.parametrize("name", [n for n in NOUNS if n != "torch.calculate_gain"])
def test_nouns_go_through_the_text_of_a_file(name):
    home, last = NOUNS[name]
    noun = keras_training.resolve(getattr(home, last))
    if not hasattr(noun, "settings"):
        noun = noun(*ARGUMENTS.get(last, (1.0,)))
    if home is fwt.constraints:
        made, back = converters.keras_constraint(noun), keras.constraints
    else:
        made, back = converters.keras_initializer(noun, seed=1), keras.initializers
    again = back.deserialize(json.loads(json.dumps(back.serialize(made))))
    assert again.get_config() == made.get_config()
    shape = SHAPES.get(last, (4, 2))
    if home is fwt.constraints:
        axes = "in out" if len(shape) == 2 else "h in out"
        again = keras_training.FwtConstraint(**{**again.get_config(), "axes": axes})
        w = keras.ops.convert_to_tensor(np.random.default_rng(0).normal(size=shape), "float32")
        found, wanted = again(w), noun(jnp.asarray(np.asarray(w)), axes)
        np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-5, atol=1e-6)
    elif last != "identity":
        found, wanted = again(shape), noun(jax.random.key(1), shape, jnp.float32)
        np.testing.assert_array_equal(np.asarray(found), wanted)


@pytest.mark.parametrize(
    "function",
    ["os.system", "converters.io.given_path", "constraints._vectors.jnp", "optim.sparsify"],
)
def test_a_file_names_none_but_fwts_own(function):
    config = converters.keras_constraint(fwt.constraints.non_negative).get_config()
    config["constraint"] = {**config["constraint"], "function": function}
    with pytest.raises(TypeError, match="no function"):
        keras_training.FwtConstraint(**config)


OTHER_BACKEND = """
import keras, numpy as np, optax, fwt
from fwt import converters
x, y = np.ones((12, 5), "float32"), np.arange(36.0).reshape(12, 3)
def net(**settings):
    new = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, name="a", **settings)])
    new.compile(keras.optimizers.Adam(0.1), "mse")
    return new
def fit(model, *callbacks):
    model.fit(x, y, batch_size=4, verbose=0, callbacks=list(callbacks))
    return keras.ops.convert_to_numpy(model.layers[0].kernel)
one = net()
print((fit(one, converters.Callback(fwt.apply_masks(fwt.masks(0.6)(one)))) == 0).sum())
bound = fwt.constraints.max_norm(0.25)
print(np.linalg.norm(fit(net(), converters.Callback(fwt.project(bound))), axis=0).max() < 0.2501)
gradual = fwt.optim.sparsify(optax.set_to_zero(), fwt.schedules.cubic(0.8, 0, 2), every=1)
print((fit(net(), converters.Callback(gradual)) == 0).sum())
held = net(kernel_constraint=converters.keras_constraint(bound),
           kernel_initializer=converters.keras_initializer(fwt.initializers.he_normal, seed=1))
print(np.linalg.norm(fit(held), axis=0).max() < 0.2501)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["jax", "torch", "tensorflow"])
def test_each_backend(backend):
    done = subprocess.run(
        [sys.executable, "-c", OTHER_BACKEND],
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["9", "True", "12", "True"], done.stderr
