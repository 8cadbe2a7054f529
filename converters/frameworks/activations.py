"""Functions of other libraries that are an activation of Keras's under another roof."""

import sys
from typing import Any

# By module, the functions that compute what keras.activations has under their names; left out are
# those with other defaults, such as keras.ops.gelu, which approximates.
_NAMES = {
    "keras.ops": (
        "relu relu6 elu celu selu leaky_relu sigmoid tanh softmax log_softmax softplus softsign "
        "silu swish hard_sigmoid hard_silu hard_swish hard_tanh hard_shrink soft_shrink "
        "tanh_shrink log_sigmoid squareplus sparse_plus"
    ),
    "tensorflow.nn": (
        "relu relu6 elu selu leaky_relu sigmoid tanh softmax log_softmax softplus softsign silu "
        "swish gelu"
    ),
    "jax.nn": (
        "relu relu6 elu celu selu sigmoid softmax log_softmax softplus silu swish hard_sigmoid "
        "hard_silu hard_swish hard_tanh log_sigmoid mish squareplus sparse_plus"
    ),
    "jax.numpy": "tanh",
    "torch.nn.functional": "relu relu6 elu celu selu sigmoid tanh softplus softsign silu mish gelu",
    "torch": "relu celu selu sigmoid tanh",
}
SAME = {module: tuple(names.split()) for module, names in _NAMES.items()}


def is_known(function: Any) -> bool:
    """Whether a function computes what ``keras.activations`` has under its name.

    Only libraries that are imported are looked at.
    """
    for module, names in SAME.items():
        root, *parts = module.split(".")
        home: Any = sys.modules.get(root)
        for part in parts:
            home = getattr(home, part, None)
        if any(getattr(home, name, None) is function for name in names):
            return True
    return False
