"""`plan --stage`: what each stage of a recipe will take, for a source of which only headers are read."""

from collections.abc import Sequence

from litconvert.conversion.plan import plan_conversion
from litconvert.distillation.pretraining import checked_config
from litconvert.errors import UsageError
from litconvert.estimates.stage import StageEstimate, Workload, estimate_stages
from litconvert.families.sources import open_named_teacher, open_source_of
from litconvert.recipe.resolve import resolve
from litconvert.training.checks import check_model, check_teacher


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
    settings = resolve(recipe, overrides, source).recipe
    if settings.scratch is not None:
        config, teacher, files = checked_config(settings), None, 0
    else:
        opened = open_source_of(settings)
        plan = plan_conversion(opened, settings)
        config = plan.config
        teaching = open_named_teacher(settings, opened)
        check_model(config, settings)
        check_teacher(config, teaching.config, settings, is_source=teaching is opened)
        teacher = teaching.config
        files = plan.totals["student_bytes"] + sum(
            one.nbytes for one in {id(one): one for one in (opened, teaching)}.values()
        )
    work = Workload(settings, config, teacher, processes=processes, micro_batch=micro_batch, mapped_bytes=files)
    return estimate_stages(work, stage)
