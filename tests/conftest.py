"""Every test starts without compiled code and without another test's random state."""

import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["aot_eager", "inductor"])
def compiler(request):
    return request.param
