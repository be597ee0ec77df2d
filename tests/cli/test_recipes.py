"""`litconvert recipes`: grouped, whole in a pipe, copied with the schema that editors check them by."""

import json
from pathlib import Path

import pytest
import yaml

from litconvert.recipe.packaged import packaged_recipes
from litconvert.recipe.resolve import json_schema
from tests.helpers.command import command


def test_recipes_are_listed_by_family_and_those_that_are_taken_by_themselves_first() -> None:
    found = json.loads(command("recipes", "ls", "--json").out)
    assert {one["name"] for one in found} == set(packaged_recipes())
    assert all(one["summary"] for one in found)
    families = [one["family"] for one in found]
    assert list(dict.fromkeys(families)) == ["DiT", "SiT", "PixArt-alpha", "PixArt-Sigma", "small models, to try it"]
    assert families == sorted(families, key=list(dict.fromkeys(families)).index)
    for family in set(families):
        marks = [one["default"] for one in found if one["family"] == family]
        assert marks == sorted(marks, reverse=True)
        assert any(marks)
    assert not any(one["default"] for one in found if one["name"].endswith("-paper"))
    lines = command("recipes", "ls").out.splitlines()
    assert all(sum(one["name"] == line.split()[0] for line in lines if line.strip()) == 1 for one in found)


def test_a_pipe_gets_whole_lines_without_spaces_at_their_ends() -> None:
    lines = command("recipes", "show", "pixart-sigma-512").out.splitlines()
    assert lines[0].split() == ["key", "origin", "value"]
    (prompts,) = [line for line in lines if line.startswith("sample.prompts ")]
    assert json.loads(prompts.split(maxsplit=2)[2])[0].startswith("a red fox")
    assert all(line == line.rstrip() for line in lines)
    keys = {line.split()[0]: line.split(maxsplit=2)[2] for line in lines[1:]}
    assert (keys["source.vae.path"], keys["publish.private"], keys["scratch"]) != ("None", "False", "None")
    assert (keys["publish.private"], keys["scratch"]) == ("false", "null")


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_a_copy_names_its_own_command_and_finds_its_schema(tmp_path: Path, name: str) -> None:
    target = tmp_path / "mine.yaml"
    assert command("recipes", "copy", name, target).out == f"{target}\n"
    first, rest = target.read_text().split("\n", 1)
    original, same = packaged_recipes()[name].read_text().split("\n", 1)
    assert rest == same
    assert first.startswith("# yaml-language-server: $schema=recipe.schema.json ")
    assert name in original.split()
    assert name not in first.split()
    assert str(target) in first.split()
    assert json.loads((tmp_path / "recipe.schema.json").read_text()) == json_schema()
    assert yaml.safe_load(target.read_text()) == yaml.safe_load(packaged_recipes()[name].read_text())


def test_a_copy_goes_into_a_folder_and_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.schema.json").write_text("mine")
    assert command("recipes", "copy", "digits", tmp_path).code == 0
    assert (tmp_path / "digits.yaml").is_file()
    assert (tmp_path / "recipe.schema.json").read_text() == "mine"
    refused = command("recipes", "copy", "digits", tmp_path)
    assert refused.code == 1
    assert "digits.yaml exists; choose another name" in refused.err
    assert command("recipes", "copy", "digits", tmp_path, "--force").code == 0


def test_every_key_of_the_schema_has_a_description() -> None:
    schema = json_schema()
    sections = {"recipe": schema, **schema["$defs"]}
    missing = [
        f"{name}.{key}"
        for name, section in sections.items()
        for key, value in section.get("properties", {}).items()
        if not value.get("description", "").strip()
    ]
    assert not missing
