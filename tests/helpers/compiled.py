"""Which models are compiled, for how many forward passes, and how many they then make."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest
from torch import nn

from litconvert.model.modeling_lit import LiTTransformer2DModel


@contextmanager
def counted_passes(module: str) -> Iterator[list[list[int]]]:
    """What a module gives to `compile_for`, which compiles nothing here: [passes that were said, passes that are made]
    of each model, in their order."""
    found: list[list[int]] = []

    def count(passes: int, models: Iterable[LiTTransformer2DModel], setting: str) -> None:
        assert setting == "blocks"
        for model in models:
            entry = [passes, 0]
            found.append(entry)

            def advance(module: nn.Module, arguments: object, entry: list[int] = entry) -> None:
                entry[1] += 1

            model.register_forward_pre_hook(advance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.compile_for", count)
        yield found
