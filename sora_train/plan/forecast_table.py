"""The part of `sora preflight --plan` about failures, checkpoints and goodput."""

from __future__ import annotations

from sora_train.plan.forecast import FAILURES_PER_NODE_DAY, GPUS_PER_NODE, Forecast, best_steps
from sora_train.plan.forecast import mean_time_between_failures as published_mtbf
from sora_train.plan.measured import NOTICE_S, Costs, Figure, costs_of
from sora_train.plan.states import checkpoint_bytes
from sora_train.recipe import Recipe
from sora_train.storage import in_bytes

FAR_OFF, FAR_OFF_S = 0.01, 300.0
"""Goodput and seconds of the run that `train.checkpoint_every` may lose before the plan warns."""
LITTLE = 0.1
"""The goodput below which no key helps."""


def forecast_of(costs: Costs, mtbf_s: float) -> Forecast:
    return Forecast(mtbf_s, costs.stall.seconds, costs.write.seconds, NOTICE_S + costs.resume.seconds)


def format_forecast(recipe: Recipe, planned_step_s: Figure, mtbf_h: float | None) -> list[str]:
    """The lines of the forecast, and a warning for each key that it shows to be wrong."""
    world, train = recipe.cluster.most, recipe.train
    costs, mtbf_s = costs_of(recipe, planned_step_s), 3600 * mtbf_h if mtbf_h else published_mtbf(world)
    forecast, step_s = forecast_of(costs, mtbf_s), costs.step.seconds
    best = min(train.steps, best_steps(forecast, step_s, recipe.validation.every))
    interval, own = best * step_s, train.checkpoint_every * step_s
    goodput, lost, size = (
        forecast.goodput(interval),
        forecast.lost(interval),
        checkpoint_bytes(recipe.model, recipe.lora),
    )
    source = "--mtbf" if mtbf_h else (
        f"{1000 * FAILURES_PER_NODE_DAY:g} per 1,000 days of a node with {GPUS_PER_NODE} GPUs, RSC-1, arXiv "
        "2410.21680; yours: --mtbf HOURS"
    )  # fmt: skip
    average = in_bytes(round(size * goodput / interval))
    rows = [
        ("MTBF", seconds(mtbf_s), source),
        ("step", seconds(step_s), costs.step.origin),
        ("stall", seconds(forecast.stall), f"of training at a checkpoint: {costs.stall.origin}"),
        ("write", seconds(forecast.write), f"in the background: {costs.write.origin}"),
        ("restart", seconds(forecast.restart), f"notice of a lost node {NOTICE_S:.0f} s; {costs.resume.origin}"),
        ("first step", seconds(costs.resume.seconds), "after the command, as in a restart"),
        ("best goodput", percent(goodput), f"with a checkpoint every {seconds(interval)} ({best:,} "
         f"step{'s' * (best != 1)}); lost to checkpoints {percent(lost.checkpoints)}, to repeated steps "
         f"{percent(lost.repeated)}, to restarts {percent(lost.restarts)}"),
        ("the recipe's", percent(forecast.goodput(own)), f"with train.checkpoint_every {train.checkpoint_every:,} "
         f"({seconds(own)})"),
        ("storage", in_bytes(size), f"per checkpoint, {average}/s on average"),
    ]  # fmt: skip
    lines = [f"{f'{world} GPUs' if world > 1 else '1 GPU':<16}{'forecast':>10}"]
    lines += [f"{what:<16}{value:>10}  {note}" for what, value, note in rows]
    return lines + [f"warning: {sentence}" for sentence in warnings(recipe, forecast, step_s, best)]


def warnings(recipe: Recipe, forecast: Forecast, step_s: float, best: int) -> list[str]:
    """What to change in the recipe, one sentence for each key."""
    train, found = recipe.train, list[str]()
    goodput, most = forecast.goodput(train.checkpoint_every * step_s), forecast.goodput(best * step_s)
    if most < LITTLE:
        return [
            f"the run makes almost no progress with a failure every {seconds(forecast.mtbf)}: a restart takes "
            f"{seconds(forecast.restart)}. --mtbf is in hours"
        ]
    run_s = train.steps * step_s
    if most - goodput > FAR_OFF and run_s / max(goodput, 1e-9) - run_s / most > FAR_OFF_S:
        found.append(
            f"train.checkpoint_every {train.checkpoint_every} ({seconds(train.checkpoint_every * step_s)}) has a "
            f"goodput of {percent(goodput)}, {best} ({seconds(best * step_s)}) {percent(most)}. Set "
            f"train.checkpoint_every to {best}"
        )
    expected = run_s / most / forecast.mtbf
    if expected > recipe.cluster.max_failures:
        found.append(
            f"{expected:.1f} failures are expected in {train.steps:,} steps, and cluster.max_failures "
            f"{recipe.cluster.max_failures} ends the command after fewer. Set cluster.max_failures to "
            f"{round(2 * expected + 3)}, or start the command again when it ends"
        )
    return found


def seconds(value: float) -> str:
    """`0.27 s`, `12 min`, `3.1 h`, `3,690 h`."""
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    number, unit = (value / 60, "min") if value < 7200 else (value / 3600, "h")
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"


def percent(share: float) -> str:
    """`97.3 %`, `99.92 %`, `0.21 %`."""
    return f"{100 * share:.2f} %" if share > 0.99 or share < 0.01 else f"{100 * share:.1f} %"
