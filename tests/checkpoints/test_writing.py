"""Writing safetensors: what is in memory meanwhile."""

import gc
import weakref
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from litconvert.checkpoints.writing import LazyTensors, write_safetensors
from litconvert.common.tensors import TensorInfo


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def produce(name: str) -> Tensor:
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        tensor = torch.full((8,), float(name))
        made.append(weakref.ref(tensor))
        return tensor

    infos = {str(index): TensorInfo((8,), torch.float32) for index in range(4)}
    write_safetensors(tmp_path / "x.safetensors", LazyTensors(infos, produce), {})
    assert alive == [0, 0, 0, 0]
    assert {name: value[0].item() for name, value in load_file(tmp_path / "x.safetensors").items()} == {
        name: float(name) for name in infos
    }
