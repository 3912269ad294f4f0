"""A benchmark owns its process: it takes gradients and threads of PyTorch's as it needs them. Tests share theirs."""

import pytest


@pytest.fixture(autouse=True)
def pytorch_as_before():
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_grad_enabled(True)
    torch.set_num_threads(before)
