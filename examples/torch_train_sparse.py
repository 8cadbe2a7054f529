"""A PyTorch net for digits that is trained to 90 % zeros with RigL, in its own loop."""

import numpy as np
import optax
import torch
from sklearn.datasets import load_digits

import fwt
from fwt import converters

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
shuffled = np.random.default_rng(0).permutation(len(labels))
images, labels = images[shuffled], labels[shuffled]
images, labels = torch.from_numpy((images / 16).astype(np.float32)), torch.from_numpy(labels)
train, test = slice(0, 1400), slice(1400, None)

net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.Adam(net.parameters(), 2e-3)
# Zeros from the first step on; each tenth step exchanges weights, which the gradients choose.
rigl = fwt.optim.sparsify(
    optax.set_to_zero(),
    0.9,
    scope="erk",
    regrow="rigl",
    regrow_fraction=fwt.schedules.cosine(0.3, 250),
    every=10,
)
with converters.hold(net, optimizer, rigl):
    for _ in range(15):
        for batch in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                net(images[train][batch]), labels[train][batch]
            )
            loss.backward()
            optimizer.step()

kernels = fwt.select(net, fwt.kernels)
zeros = {path: float((k == 0).mean()) for path, k in kernels.items()}
total = sum(k.size for k in kernels.values())
with torch.no_grad():
    accuracy = float((net(images[test]).argmax(1) == labels[test]).float().mean())
print({path: f"{share:.0%}" for path, share in zeros.items()}, f"accuracy {accuracy:.1%}")
assert sum(int((k == 0).sum()) for k in kernels.values()) == round(0.9 * total)
assert accuracy > 0.9
