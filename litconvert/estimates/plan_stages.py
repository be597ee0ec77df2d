"""`plan --stage`: what each stage of a recipe will take, for a source of which only headers are read."""

from collections.abc import Sequence

from litconvert.conversion.plan import plan_conversion
from litconvert.distillation.pretraining import checked_config
from litconvert.errors import UsageError
from litconvert.estimates.stage import StageEstimate, estimate_stages
from litconvert.families.sources import open_source
from litconvert.recipe.resolve import resolve, with_source
from litconvert.training.checks import check_model, check_source, check_teacher


def plan_stages(
    source: str | None,
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    stage: int | None = None,
    processes: int = 1,
    micro_batch: int | None = None,
) -> list[StageEstimate]:
    """Estimates of one stage, or with None of all, in the order of the recipe.

    Args:
        source: replaces the recipe's; unused by a recipe that trains from nothing.
        recipe, overrides: as for `distill` and `train`.
        processes: that share a batch.
        micro_batch: samples at a time; None: what batch, accumulation and processes leave.

    Raises UsageError for inputs that do not fit.
    """
    if processes < 1 or (micro_batch is not None and micro_batch < 1):
        raise UsageError("--processes and --micro-batch count from 1")
    resolved = resolve(recipe, overrides)
    settings = resolved.recipe
    if settings.scratch is not None:
        config, teacher, inherited, files = checked_config(settings), None, None, 0
    else:
        settings = with_source(resolved, source).recipe
        opened = open_source(settings.source, settings.inherit.weights)
        plan = plan_conversion(opened, settings)
        config = plan.config
        teaching = opened if settings.distill.teacher is None else open_source(settings.distill.teacher)
        check_model(config, settings)
        check_teacher(config, teaching.reading.config, settings)
        check_source(config, opened.reading.config, settings, is_teacher=teaching is opened)
        teacher, inherited = teaching.reading.config, opened.reading.config
        files = plan.totals["student_bytes"] + sum(
            one.nbytes for one in {id(one): one for one in (opened, teaching)}.values()
        )
    return estimate_stages(
        settings,
        config,
        teacher,
        inherited,
        stage=stage,
        processes=processes,
        micro_batch=micro_batch,
        mapped_bytes=files,
    )
