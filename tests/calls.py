"""Watches the functions of tensors that are called inside it."""

import collections

import torch
from torch.overrides import TorchFunctionMode


class Calls(TorchFunctionMode):
    """sizes: by the function's name, the number of elements of the first tensor of each call."""

    def __init__(self):
        super().__init__()
        self.sizes = collections.defaultdict(list)

    def __torch_function__(self, function, types, arguments=(), options=None):
        if arguments and isinstance(arguments[0], torch.Tensor):
            self.sizes[function.__name__].append(arguments[0].numel())
        return function(*arguments, **(options or {}))
