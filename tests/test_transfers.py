"""Many small tensors in one copy. The meta device stands for one that is not the host."""

import torch

from grass_fx.state.transfers import reading, to_device


def test_what_lies_on_the_host_stays_as_it_is():
    tensors = [torch.arange(3.0), torch.arange(6.0).view(2, 3)]
    for got, given in zip(reading(tensors)(), tensors, strict=True):
        assert torch.equal(got, given.flatten()) and got.data_ptr() == given.data_ptr()
    assert reading([])() == to_device([], torch.device("meta")) == []
    assert to_device(tensors, torch.device("cpu")) == tensors


def test_what_goes_to_a_device_has_memory_of_its_own():
    tensors = [torch.arange(3), torch.arange(5)]
    moved = to_device(tensors, torch.device("meta"))
    assert [each.shape for each in moved] == [(3,), (5,)]
    for each in moved:
        assert each.device.type == "meta" and each.dtype == torch.int64
        assert each.untyped_storage().nbytes() == each.nbytes  # not all of the copy
