"""Whether a plan that came from elsewhere is one that a model of these units can be trained by."""

from __future__ import annotations

from fedepth.costs import ModelCosts, UnitCost
from fedepth.errors import PlanError
from fedepth.plan import MOST_MODELS, Plan, Stage


def check_plan(costs: ModelCosts, plan: Plan) -> None:
    """Raises PlanError if a block lies beyond the model, does not begin where the one before ends, or ends where no
    skip connection leads to the head; or if several models are to be trained in more than one stage."""
    several = plan.models > 1 and not (plan.may_have_peers and plan.stages[0].last == len(costs.units) - 1)
    if several or not 1 <= plan.models <= MOST_MODELS:
        raise PlanError(
            f"the plan trains {plan.models} models in the blocks {plan.blocks[:80] or 'none'}; up to {MOST_MODELS} are "
            f"trained, and only where one block holds all {len(costs.units)} units of {costs.model}; run the same "
            "version of fedepth here and on the coordinator",
            needed_bytes=0,
            budget_bytes=plan.budget_bytes,
        )
    starts = [stage.last + 1 for stage in plan.stages[:-1]]
    odd = [stage.block for stage in plan.stages if not _possible(stage, costs.units)]
    odd += [stage.block for stage, start in zip(plan.stages[1:], starts, strict=True) if stage.first != start]
    if odd or not plan.stages:
        shown = ", ".join(odd[:20]) + (f" and {len(odd) - 20} more" if len(odd) > 20 else "")
        raise PlanError(
            f"the plan has the blocks {shown or 'none'}, which {costs.model} with its {len(costs.units)} "
            "units cannot be trained in; run the same version of fedepth here and on the coordinator",
            needed_bytes=0,
            budget_bytes=plan.budget_bytes,
        )


def _possible(stage: Stage, units: tuple[UnitCost, ...]) -> bool:
    if not 0 <= stage.first <= stage.last < len(units) or min(stage.micro_batch, stage.build_batch) < 1:
        return False
    if stage.frozen_suffix:
        return all(unit.frozen is not None for unit in units[stage.last + 1 :])
    return units[stage.last].exit is not None
