"""Families of other packages: the example in docs/add-a-family.md, as it stands there, and plugins that are broken."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import litconvert
from litconvert.errors import LitconvertError, UsageError
from litconvert.families.registry import families
from tests.helpers.command import command

PAGE = Path(__file__).parents[2] / "docs" / "add-a-family.md"
RENAMED = {
    "x_embedder.proj": "patches",
    "t_embedder.mlp": "time",
    "y_embedder.embedding_table": "classes",
    "adaLN_modulation.1": "modulation",
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
    "final_layer": "last",
    "blocks": "layers",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A DiT in the original layout under the example's names."""
    result = {}
    for name, value in state.items():
        for theirs, mine in RENAMED.items():
            name = name.replace(theirs, mine)
        result[name] = value
    return result


class Site:
    """A folder of packages on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, source: str, entry_points: dict[str, str]) -> None:
        """A package of one module, with its entry points for families."""
        (self.folder / f"{name}.py").write_text(source)
        information = self.folder / f"{name}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = "\n".join(f"{key} = {value}" for key, value in entry_points.items())
        (information / "entry_points.txt").write_text(f"[litconvert.families]\n{lines}\n")
        sys.modules.pop(name, None)
        families.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield Site(folder)
    families.cache_clear()


def test_the_example_of_the_documentation_reads_converts_and_writes_its_checkpoints(
    tmp_path: Path, site: Site, pico_state: dict[str, Tensor]
) -> None:
    text = PAGE.read_text()
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (project,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    torch.save(pico_state, tmp_path / "dit.pt")
    torch.save(renamed(pico_state), tmp_path / "mine.pt")
    with pytest.raises(UsageError, match="unknown architecture"):
        litconvert.load(tmp_path / "mine.pt", num_attention_heads=2)

    site.install("my_dit", source, tomllib.loads(project)["project"]["entry-points"]["litconvert.families"])
    given = torch.randn(2, 1, 8, 8), torch.tensor([0, 500]), torch.tensor([0, 4])
    expected = litconvert.load(tmp_path / "dit.pt", num_attention_heads=2)(*given).sample
    assert torch.equal(litconvert.load(tmp_path / "mine.pt", num_attention_heads=2)(*given).sample, expected)
    forced = litconvert.load(tmp_path / "mine.pt", family="my-dit", num_attention_heads=2)
    assert torch.equal(forced(*given).sample, expected)
    shown = command("inspect", tmp_path / "mine.pt", "--num-attention-heads", 2).out
    assert "My DiT, original layout" in shown
    assert "the last class is read as the null class" in " ".join(shown.split())
    options = ["source.num_attention_heads=2", "student.num_attention_heads=2"]
    student = litconvert.load(litconvert.convert(tmp_path / "mine.pt", tmp_path / "student", overrides=options))
    assert student.config.attention == ["linear", "linear"]
    heads = ("--num-attention-heads", 2)
    assert command("convert", tmp_path / "mine.pt", tmp_path / "again.pt", "--to", "original", *heads).code == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == renamed(pico_state).keys()
    assert all(torch.equal(again[name], value) for name, value in renamed(pico_state).items())
    with pytest.raises(UsageError, match="not of family my-dit"):
        litconvert.load(tmp_path / "dit.pt", family="my-dit", num_attention_heads=2)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import no_such_module", "the family 'odd' of odd cannot be loaded (ModuleNotFoundError"),
        ("FAMILY = 3", "the family 'odd' of odd is no litconvert Family"),
        (
            "from litconvert.families.registry import Family\nFAMILY = Family('dit', 'Other', lambda *_: None)",
            "the family 'odd' of odd takes the name 'dit'",
        ),
    ],
)
def test_a_broken_plugin_is_named_with_its_package(
    site: Site, pico_checkpoint: Path, source: str, complaint: str
) -> None:
    litconvert.load(pico_checkpoint, num_attention_heads=2)
    site.install("odd", source, {"odd": "odd:FAMILY"})
    with pytest.raises(LitconvertError) as caught:
        litconvert.load(pico_checkpoint, num_attention_heads=2)
    assert complaint in str(caught.value)
    assert "upgrade or uninstall that package" in str(caught.value)
