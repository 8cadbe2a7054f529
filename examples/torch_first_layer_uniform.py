"""A live PyTorch model whose first layer gets uniform [0, 1) weights, in place."""

import torch

import fwt
from fwt import converters

model = torch.nn.Sequential(
    torch.nn.Linear(10, 64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 10),
    torch.nn.Softmax(dim=1),
)
storage, bias = model[0].weight.data_ptr(), model[0].bias.detach().clone()

converters.transform(model, fwt.initialize(fwt.initializers.uniform(1.0), key=42, where="0/kernel"))

weight = model[0].weight
assert weight.min() >= 0
assert weight.max() < 1
assert weight.data_ptr() == storage  # the same tensor: an optimizer that holds it goes on
assert torch.equal(model[0].bias, bias)
print(f"min {weight.min():.4f}  mean {weight.mean():.4f}  max {weight.max():.4f}")
