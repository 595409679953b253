"""The choice of a device and of a number format."""
import torch

from core import device
from tests.core.helpers import fails


def test_devices():
    assert device.pick_device("cpu").type == "cpu"
    assert device.pick_device().type in ("cuda", "mps", "cpu")
    for name in ("tpu", "cuda:99", "cpu:1", "cpu:x"):
        with fails(name):
            device.pick_device(name)
    assert device.autocast_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_number_formats():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert device.pick_dtype("auto", cpu, 5e8) == torch.float32
    assert device.pick_dtype("auto", cpu, 2e9) is None
    assert device.pick_dtype("auto", gpu, 5e8) is None
    assert device.pick_dtype("float16", cpu, 9) == torch.float16
    with fails("int3"):
        device.pick_dtype("int3", cpu, 9)
