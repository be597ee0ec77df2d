"""Agreement with the teacher: its errors against a plain computation, its intervals, and what precision changes."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litconvert.errors import LitconvertError
from litconvert.evaluation.agreement import TENTHS, AgreementImages, agreement
from litconvert.model.attention_layers import attention_of
from litconvert.model.modeling_lit import LiTTransformer2DModel
from litconvert.sampling.captions import Captions
from tests.helpers.listener import Advances

IMAGES = 6


def model(seed: int = 0, **changes: Any) -> LiTTransformer2DModel:
    """A small model with no weight zero."""
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 2, "hidden_size": 16, "num_classes": 4}
    made: LiTTransformer2DModel = LiTTransformer2DModel(
        **config | changes, patch_size=2, num_layers=2, num_attention_heads=2
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    made.eval()
    return made


def images(**changes: Any) -> AgreementImages:
    clean = torch.randn((IMAGES, 1, 8, 8), generator=torch.Generator().manual_seed(5))
    given = {"clean": clean, "conditions": torch.arange(IMAGES) % 4, "num_timesteps": 1000, "seed": 3, "batch_size": 4}
    return AgreementImages(**{**given, **changes})


def moved(source: LiTTransformer2DModel, scale: float) -> LiTTransformer2DModel:
    """The same model, a little away."""
    other = model(**{key: source.config[key] for key in ("out_channels", "prediction", "data_timestep")})
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), source.parameters(), strict=True):
            mine.copy_(theirs + scale * torch.randn(theirs.shape, generator=torch.Generator().manual_seed(7)))
    return other


def schedule() -> Tensor:
    """abar_t of DDPM's linear schedule."""
    return torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def plain(
    student: LiTTransformer2DModel, teacher: LiTTransformer2DModel, asked: AgreementImages, tenth: int, index: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Student's and teacher's noise, variance, x_0 and last stream for one input, one at a time and in float64."""
    timestep = int((tenth + (index + 0.5) / IMAGES) / TENTHS * 1000)
    share = float(schedule()[timestep])
    noisy = math.sqrt(share) * asked.clean[index] + math.sqrt(1 - share) * asked.noise(tenth, range(index, index + 1))
    labels = asked.conditions[index : index + 1]
    found: list[list[Tensor]] = []
    for one in (student, teacher):
        streams: list[Tensor] = []
        handle = one.blocks[1].register_forward_hook(lambda _, __, output, streams=streams: streams.append(output))
        with torch.inference_mode():
            output = one(noisy, torch.tensor([timestep]), class_labels=labels, return_dict=False)[0].double()
        handle.remove()
        clean = (noisy.double() - math.sqrt(1 - share) * output[:, :1]) / math.sqrt(share)
        found.append([output[:, :1], output[:, 1:], clean, streams[0].double()])
    return dict(zip(("noise", "variance", "clean", "last"), zip(*found, strict=True), strict=True))


def test_errors_are_quotients_of_sums_over_the_same_inputs() -> None:
    teacher, asked = model(), images()
    student = moved(teacher, 0.02)
    task = Advances(asked.passes(), lambda done, total: None)
    found = agreement(teacher, student, asked, task)
    assert task.done == task.total
    assert (found["images"], found["inputs"]) == (IMAGES, TENTHS * IMAGES)

    names = ("noise", "variance", "clean", "last")
    wrong, whole, largest = ({name: [0.0] * TENTHS for name in names} for _ in range(3))
    for tenth, index in product(range(TENTHS), range(IMAGES)):
        for name, (mine, theirs) in plain(student, teacher, asked, tenth, index).items():
            wrong[name][tenth] += float((mine - theirs).square().sum())
            whole[name][tenth] += float(theirs.square().sum())
            largest[name][tenth] = max(largest[name][tenth], float((mine - theirs).abs().max()))
    for name in ("noise", "variance", "clean"):
        quantity = found["student"]["quantities"][name]
        assert quantity["error"] == pytest.approx(sum(wrong[name]) / sum(whole[name]), rel=1e-3)
        expected = [one / other for one, other in zip(wrong[name], whole[name], strict=True)]
        assert [part["error"] for part in quantity["by_timestep"]] == pytest.approx(expected, rel=1e-3)
        scales = [math.sqrt(one / IMAGES / 64) for one in whole[name]]
        expected = [one / scale for one, scale in zip(largest[name], scales, strict=True)]
        assert [part["largest"] for part in quantity["by_timestep"]] == pytest.approx(expected, rel=1e-3)
    assert [part["low"] for part in quantity["by_timestep"]] == [100.0 * tenth for tenth in range(TENTHS)]
    layers = found["student"]["layers"]
    assert [one["layer"] for one in layers] == [0, 1]
    assert layers[1]["error"] == pytest.approx(sum(wrong["last"]) / sum(whole["last"]), rel=1e-3)
    assert 0 < layers[0]["error"] != layers[1]["error"]


def test_a_student_without_a_variance_is_compared_in_what_both_say() -> None:
    teacher = model()
    values = {**teacher.config, "out_channels": teacher.config.in_channels}
    student = LiTTransformer2DModel(**{key: value for key, value in values.items() if not key.startswith("_")}).eval()
    found = agreement(teacher, student, images())
    assert list(found["student"]["quantities"]) == ["noise", "clean"]
    assert list(found["precision"]["quantities"]) == ["noise", "variance", "clean"]


def test_a_teacher_agrees_with_itself_and_its_lower_precision_says_what_is_nothing() -> None:
    teacher = model()
    found = agreement(teacher, model(), images())
    for one in (*found["student"]["quantities"].values(), *found["student"]["layers"]):
        assert (one["error"], one["interval"]) == (0.0, [0.0, 0.0])
    assert found["precision"]["dtype"] == "bfloat16"
    nothing = found["precision"]["quantities"]["noise"]["error"]
    # bf16 keeps eight bits: a relative error of some 2^-9 for each operation, squared here.
    assert 1e-7 < nothing < 1e-3
    near, far = (agreement(teacher, moved(teacher, scale), images())["student"] for scale in (1e-3, 0.1))
    errors = [one["quantities"]["noise"]["error"] for one in (near, far)]
    assert errors[0] < nothing * 10 < errors[1]


def test_no_batch_size_changes_the_errors_and_intervals_hold_them() -> None:
    teacher = model()
    student = moved(teacher, 0.05)
    one, all_at_once = (agreement(teacher, student, images(batch_size=size)) for size in (1, 64))
    for name, quantity in one["student"]["quantities"].items():
        other = all_at_once["student"]["quantities"][name]
        for mine, theirs in zip((quantity, *quantity["by_timestep"]), (other, *other["by_timestep"]), strict=True):
            assert mine["error"] == pytest.approx(theirs["error"], rel=1e-3)
            low, high = mine["interval"]
            assert low <= mine["error"] <= high
            assert high > low


@pytest.mark.parametrize("data_timestep", [0, 1])
def test_a_velocity_and_the_image_it_means(data_timestep: int) -> None:
    flow: dict[str, Any] = {"out_channels": 1, "prediction": "velocity", "data_timestep": data_timestep}
    teacher = model(**flow)
    found = agreement(teacher, moved(teacher, 0.02), images())["student"]["quantities"]
    assert set(found) == {"velocity", "clean"}
    assert [part["high"] for part in found["velocity"]["by_timestep"]][-1] == 1.0
    # Near the data the velocity is scarcely looked at: x_0 is x_t already.
    near = [part["error"] for part in found["clean"]["by_timestep"]][:: 1 if data_timestep == 0 else -1]
    assert near[0] < near[-1]


def test_captions_and_their_picture_sizes_are_given() -> None:
    text: dict[str, Any] = {"num_classes": None, "caption_channels": 6, "caption_tokens": 3, "null_caption": True}
    text |= {"hidden_size": 24, "micro_conditions": True}
    generator = torch.Generator().manual_seed(0)
    captions = Captions(torch.randn((IMAGES, 3, 6), generator=generator), torch.ones(IMAGES, 3, dtype=torch.int64))
    found = agreement(model(**text), model(1, **text), images(conditions=captions))
    assert found["student"]["quantities"]["noise"]["error"] > 0.1


def test_what_is_no_number_is_refused() -> None:
    broken = model()
    with torch.no_grad():
        attention_of(broken, 0).to_q.weight[0, 0] = math.nan
    with pytest.raises(LitconvertError, match="NaN, infinite or all zero"):
        agreement(model(), broken, images())
