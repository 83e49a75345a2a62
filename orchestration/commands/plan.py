"""`pixnerd plan`: what a recipe's training will need, by arithmetic, before anything is started."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestration.options import JsonOption, RecipeArgument, SetOption

if TYPE_CHECKING:
    from pipelines.planning import Shards
    from training.plan.stage import StagePlan

app = typer.Typer()

_NOTES = (
    "All of it is arithmetic: nothing was run. Time is FLOP / (ranks x peak x mfu), that of frozen encoders by the "
    "peak of their own precision, with every caption as long as it may be; evaluation, start-up, saving and Muon's "
    "own products are left out. Activations are those without `compile`. The allowance is 2 GB for CUDA and NCCL, and "
    "a tenth of the activations. GB are 10^9 bytes."
)
_WIDTH = 116  # of a line


@app.command(epilog="Example: pixnerd plan mine.yaml --gpus 16xH200 --price-per-gpu-hour 3.5 --images 45e6")
def plan(
    recipe: RecipeArgument,
    gpus: Annotated[str, typer.Option("--gpus", help="How many of which, one a rank: 16xH200, 8xA100-80, 2xcpu.")],
    set_: SetOption = None,
    mfu: Annotated[
        float,
        typer.Option("--mfu", min=0.001, max=1.0, help="The share of its peak that a GPU reaches, an assumption."),
    ] = 0.4,
    peak: Annotated[
        float | None,
        typer.Option("--peak-tflops", min=1e-6, help="TFLOP/s of a rank, measured, in place of the published peaks."),
    ] = None,
    price: Annotated[float | None, typer.Option("--price-per-gpu-hour", min=0.0, help="For the cost.")] = None,
    images: Annotated[
        float | None, typer.Option("--images", min=1.0, max=1e13, help="Images to prepare, for the disk: 45e6.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Say what training will need: memory, FLOP, time, cost, disk, network; and what to set where it does not fit."""
    from pipelines.recipes import load
    from training.plan.machines import TERA, machines

    on = machines(gpus)
    loaded = load(recipe, set_ or [])
    from orchestration.parsing import parse_stages
    from orchestration.terminal import print_json
    from pipelines.planning import plans, shards
    from training.plan.stage import Rates

    stages = {name: settings for name, (_, settings) in parse_stages(loaded).items()}
    planned = plans(stages, on, Rates(mfu, None if peak is None else peak * TERA, price))
    prepared = list(shards(stages, None if images is None else int(images)))
    if json_:
        print_json(_as_json(planned, prepared))
        return
    _show_machines(planned[0])
    for stage in planned:
        _show_stage(stage)
    _show_total(planned, prepared)
    print(f"\n{textwrap.fill(_NOTES, _WIDTH)}")


def _show_machines(plan: StagePlan) -> None:
    device, rates = plan.machines.device, plan.rates
    if rates.peak is not None:
        speed = f"{rates.peak / 1e12:g} TFLOP/s a rank, as you say"
    elif device.bf16 is None or device.fp32 is None:
        speed = "no speed is known: --peak-tflops says what you measured"
    else:
        origin = "measured" if device.bf16_measured else "published"
        speed = f"{device.bf16 / 1e12:g} TFLOP/s in bf16 ({origin}), {device.fp32 / 1e12:g} in fp32 (published)"
    memory = "memory not known" if device.memory is None else f"{_gb(device.memory)} each"
    print(f"{plan.machines}: {memory}; {speed}; mfu {rates.mfu:g} (assumed)")


def _show_stage(plan: StagePlan) -> None:
    from orchestration.terminal import table

    s, setup = plan.settings, plan.setup()
    print(
        f"\n{plan.name}: {s.preset} at {plan.config.image_size} px, {s.steps:,} steps of {s.batch:,} images, "
        f"{s.precision}, micro_batch {setup.micro_batch}"
    )
    _lines(_facts(plan))
    print()
    stages = {zero: plan.memory(zero=zero) for zero in (1, 2, 3)}
    header = [f"ZeRO {zero}{' (set)' if zero == setup.zero else ''}" for zero in stages]
    rows = [[part, *(_gb(each.device[part]) for each in stages.values())] for part in stages[1].device]
    rows += [["in all", *(_gb(each.on_device) for each in stages.values())]]
    rows += [["fits", *(_fits(plan.fits(zero=zero)) for zero in stages)]]
    table(["memory a rank", *header], rows)
    _lines(_verdict(plan))


def _facts(plan: StagePlan) -> list[tuple[str, str]]:
    work, (text, vision, *_, lpips) = plan.work, plan.encoders
    sizes = [f"network {_count(plan.network)}", f"text encoder {_count(text.parameters)}"]
    sizes += [f"vision encoder {_count(vision.parameters)}"] if vision else []
    sizes += [f"REPA head {_count(plan.head)}"] if plan.head else []
    sizes += [f"LPIPS {_count(lpips.parameters)}"] if lpips else []
    encoders = {"text": work.text, "vision": work.vision, "REPA head": work.head, "perceptual": work.perceptual}
    forward = {**work.forward, "in all": sum(work.forward.values())}
    return [
        ("parameters", f"{', '.join(sizes)}; trained {_count(plan.sizes.trained)}"),
        ("forward", f"FLOP an image: {_each(forward)}"),
        ("encoders", f"FLOP an image: {_each(encoders)}; frozen ones in {'bf16' if plan.encoders.bf16 else 'fp32'}"),
        ("training", f"{_flop(work.step)}FLOP an image, {_flop(work.frozen)}FLOP of them in frozen encoders"),
        ("time", _time(plan)),
        ("network", _network(plan)),
        ("disk", _stored(plan)),
        ("host memory", f"{_gb(plan.memory().on_host)} a rank, beside what Python and its libraries take"),
    ]


def _stored(plan: StagePlan) -> str:
    last = "a checkpoint" if plan.checkpoints == 1 else f"{plan.checkpoints} checkpoints"
    kept = f", averages of {_gb(plan.kept_averages)}" if plan.kept_averages else ""
    return f"{plan.states} training states of {_gb(plan.state)}, {last} of {_gb(plan.checkpoint)}{kept}"


def _each(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_flop(flop).strip()}" for name, flop in parts.items() if flop)


def _flop(flop: float) -> str:
    for unit, of in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flop >= of:
            return f"{flop / of:.4g} {unit}"
    return f"{flop:.4g} "


def _time(plan: StagePlan) -> str:
    in_all = f"{plan.flop:.3g} FLOP in all"
    if plan.step_seconds is None or plan.hours is None:
        return f"not known; {in_all}"
    speed = f"{plan.settings.batch / plan.step_seconds:,.0f} images/s"
    cost = "" if plan.cost is None else f", costs {plan.cost:,.0f}"
    return f"{plan.step_seconds:.3g} s a step, {speed}, {_number(plan.hours)} h{cost}; {in_all}"


def _network(plan: StagePlan) -> str:
    if not plan.sent:
        return "nothing between ranks"
    rate = "" if plan.step_seconds is None else f", {_gb(plan.sent / plan.step_seconds)}/s over the whole step"
    return f"a rank sends {_gb(plan.sent)} a step, and receives as much{rate}"


def _verdict(plan: StagePlan) -> list[tuple[str, str]]:
    if plan.fits() is not False:
        return []
    ways = plan.ways()
    if not ways:
        return [("does not fit", "and no setting of training changes that: take larger GPUs or more of them")]
    texts = [
        f"--set {' --set '.join(f'{plan.name}.{k}={str(v).lower()}' for k, v in way.items())} "
        f"({_gb(plan.memory(**way).on_device)})"
        for way in ways
    ]
    return [("does not fit", f"it does with {texts[0]}"), *(("", f"or with {text}") for text in texts[1:])]


def _show_total(plans: Sequence[StagePlan], prepared: Iterable[Shards]) -> None:
    from orchestration.terminal import table

    rows = [
        [p.name, f"{p.images:,}", f"{p.flop:.3g}", _number(p.hours), _number(p.cost), _gb(_disk(p)), _fits(p.fits())]
        for p in plans
    ]
    if len(plans) > 1:
        hours, cost = (_number(_sum(values)) for values in ([p.hours for p in plans], [p.cost for p in plans]))
        images, flop = f"{sum(p.images for p in plans):,}", f"{sum(p.flop for p in plans):.3g}"
        rows.append(["in all", images, flop, hours, cost, _gb(sum(map(_disk, plans))), ""])
    print()
    table(["training", "images", "FLOP", "hours", "cost", "disk", "fits"], rows)
    for each in prepared:
        sizes = ", ".join(f"{name} {_gb(size)}" for name, size in each.sizes.items())
        print(f"shards of `{each.stage}`: about {_gb(each.size)} for {each.images:,} images ({sizes})")


def _disk(plan: StagePlan) -> float:
    return plan.states * plan.state + plan.checkpoints * plan.checkpoint + plan.kept_averages


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _as_json(plans: Sequence[StagePlan], prepared: Sequence[Shards]) -> dict[str, Any]:
    first = plans[0]
    device = first.machines.device._asdict()
    return {
        "ranks": first.machines.ranks,
        "device": device,
        "mfu": first.rates.mfu,
        "stages": [_stage_json(plan) for plan in plans],
        "total": {
            "flop": sum(plan.flop for plan in plans),
            "hours": _sum([plan.hours for plan in plans]),
            "cost": _sum([plan.cost for plan in plans]),
            "disk": sum(map(_disk, plans)),
        },
        "shards": [{"stage": s.stage, "images": s.images, "bytes": s.sizes} for s in prepared],
        "note": _NOTES,
    }


def _stage_json(plan: StagePlan) -> dict[str, Any]:
    work, text, vision = plan.work, plan.encoders.text, plan.encoders.vision
    memory = {zero: plan.memory(zero=zero) for zero in (1, 2, 3)}
    return {
        "stage": plan.name,
        "parameters": {
            "network": plan.network,
            "head": plan.head,
            "text": text.parameters,
            "vision": vision.parameters if vision else 0,
            "trained": plan.sizes.trained,
        },
        "flop": {
            "forward": work.forward,
            "text": work.text,
            "vision": work.vision,
            "head": work.head,
            "perceptual": work.perceptual,
            "step": work.step,
            "frozen": work.frozen,
            "stage": plan.flop,
        },
        "settings": plan.setup()._asdict(),
        "activations": plan.activations,
        "memory": {f"zero {zero}": each.device for zero, each in memory.items()},
        "host": plan.memory().host,
        "fits": plan.fits(),
        "fits_with": plan.ways() if plan.fits() is False else [],
        "seconds_a_step": plan.step_seconds,
        "hours": plan.hours,
        "cost": plan.cost,
        "sent_a_step": plan.sent,
        "disk": {
            "states": plan.states,
            "state": plan.state,
            "checkpoints": plan.checkpoints,
            "checkpoint": plan.checkpoint,
            "averages": plan.kept_averages,
        },
    }


def _lines(facts: Iterable[tuple[str, str]]) -> None:
    for name, text in facts:
        print(textwrap.fill(text, _WIDTH, initial_indent=f"  {name:<14} ", subsequent_indent=" " * 17))


def _fits(answer: bool | None) -> str:
    return {True: "yes", False: "no", None: "not known"}[answer]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _gb(size: float) -> str:
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= of:
            return f"{size / of:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
