"""A DPG-Bench run: draw the pictures, ask a judge about them, compute scores, and write the report's record last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field

from infra import layout
from infra.actors import Needs, PoolSettings
from infra.config import digest
from infra.errors import EvaluationError
from infra.records import CheckpointRecord, EvalReport, Interval, put_data, recorded
from infra.shards import parquet_bytes
from infra.store import Store
from pipelines.evaluation import dpg as protocol
from pipelines.evaluation.answering import AnyJudge, ShapeAnswers
from pipelines.evaluation.asking import Asking, Item, Said, answers_in, nothing_said, said_of, table_of
from pipelines.evaluation.chunks import Chunk, Shelf, Show, make
from pipelines.evaluation.dpg import Mode, Question, Scores, by_item, is_official, read_prompts, read_questions
from pipelines.evaluation.dpg_shapes import shape_questions
from pipelines.evaluation.generate import Asked, DrawingSettings, Order, chunked, generate, to_look_at
from pipelines.evaluation.grids import Grids
from pipelines.evaluation.statistics import OVERALL, intervals
from pipelines.evaluation.tars import place, tars

FORMAT = 1  # raised when the same pictures, questions and judge would give another report


class DpgSettings(PoolSettings):
    questions: str = Field("shapes", description="`shapes`: the shape world's own; or a CSV file in DPG-Bench's form")
    prompts: str | None = Field(
        None, description="a folder of ITEM.txt, the prompt of each item; none: the questions' column `text`"
    )
    per_task: int = Field(12, ge=1, description="items a task of the shape world's set")
    images: int = Field(4, ge=1, le=4, description="pictures an item, from seeds 0, 1, ...")
    judge: AnyJudge = ShapeAnswers()
    mode: Mode = Field("fixed", description="compat: with the published script's faults; fixed: without them")
    sampling: DrawingSettings = DrawingSettings()
    seed: int = Field(0, description="of the bootstrap")


def questions_of(settings: DpgSettings) -> list[Question]:
    if settings.questions == "shapes":
        return shape_questions(settings.per_task)
    return read_questions(Path(settings.questions))


def questions_name(settings: DpgSettings) -> str:
    """The name of the set of questions: scores on two sets cannot be compared."""
    if settings.questions == "shapes":
        return "the shape world's"
    return "DPG-Bench's" if is_official(Path(settings.questions)) else Path(settings.questions).name


def items_of(settings: DpgSettings) -> list[Item]:
    """The items in the order of their first rows."""
    items = by_item(questions_of(settings))
    if settings.prompts is not None:
        prompts = read_prompts(Path(settings.prompts), items)
    else:
        prompts = {name: next(iter(asked.values())).prompt for name, asked in items.items()}
    if nothing := [name for name, prompt in prompts.items() if not prompt.strip()]:
        raise EvaluationError(
            f"the item {nothing[0]} has no prompt", remedy="fill the column `text`, or name a folder: --set prompts="
        )
    return [Item(name, prompts[name], asked) for name, asked in items.items()]


def questions_digest(settings: DpgSettings) -> str:
    """A digest of the prompts and questions themselves, as a file may change while its name does not."""
    prompts = [] if settings.prompts is None else [item.prompt for item in items_of(settings)]
    return digest([*(list(question) for question in questions_of(settings)), *prompts])


def outside(settings: DpgSettings) -> list[object]:
    """What a report depends on besides the settings: the questions, and the judge with its weights."""
    return [FORMAT, questions_digest(settings), settings.judge.identity()]


def counted(settings: DpgSettings) -> dict[str, object]:
    """The settings that change results, whatever the names of the files that `outside` reads."""
    return {name: value for name, value in settings.chosen().items() if name not in ("judge", "questions", "prompts")}


def dpg(
    store: Store,
    stage: str,
    checkpoint: CheckpointRecord,
    settings: DpgSettings,
    show: Show,
    needs: Needs | None = None,
) -> EvalReport:
    """Evaluate a checkpoint by DPG-Bench; what an interrupted run drew and judged is used again."""
    items = items_of(settings)
    needs = needs or settings.needs
    order = Order(store, stage, checkpoint, settings.images, settings.sampling, needs)
    drawn = generate(order, [item.prompt for item in items], show)
    return judged(store, stage, checkpoint.digest(), drawn, settings, show, needs)


def dpg_of_folder(store: Store, folder: Path, resolution: int, settings: DpgSettings, show: Show) -> EvalReport:
    """Judge a folder's pictures, cut from grids: another model's, perhaps."""
    items = items_of(settings)
    drawing = DrawingSettings(batch=settings.sampling.batch)
    grids = Grids(folder, [item.name for item in items], settings.images, resolution)
    pictures = digest([grids.digest(), resolution])
    work = settings.model_copy(update={"sampling": drawing})
    stage = digest([pictures, outside(settings), counted(work)])
    drawn = grids.taken(store, stage, _chunked(items, settings))
    return judged(store, stage, f"folder-{pictures}", drawn, settings, show, settings.needs)


def judged(
    store: Store,
    stage: str,
    checkpoint: str,
    drawn: Sequence[Chunk],
    settings: DpgSettings,
    show: Show,
    needs: Needs,
) -> EvalReport:
    """The report on pictures that are there. `checkpoint` tells whose they are."""
    questions = questions_of(settings)
    items, judge = items_of(settings), settings.judge.located()
    to_judge = to_look_at(_chunked(items, settings), settings.images, drawn)
    answered = make(Shelf(store, layout.ANSWERED, stage), Asking(store, judge, items), to_judge, needs, show)
    failed = {place(name): cause for chunk in (*drawn, *answered) for name, cause in chunk.failed.items()}
    said = [of_picture for chunk in answered for of_picture in said_of(store, chunk)]
    said += [nothing_said(items, *picture, cause) for picture, cause in failed.items()]
    said.sort(key=lambda of_picture: of_picture[:2])
    scores = protocol.score(questions, _answers(items, said), settings.mode)
    if scores.overall is None:
        raise EvaluationError(
            f"no item has a score: {next(iter(scores.failures.values()), 'nothing was answered')}",
            remedy="mend the cause, or score what was kept by another mode",
        )
    report = EvalReport(
        protocol="dpg",
        judge=settings.judge.name if settings.mode == "fixed" else f"{settings.judge.name}, {settings.mode}",
        prompts=questions_digest(settings),
        checkpoint=checkpoint,
        images=len(said),
        failed=sum(of_picture.failure is not None for of_picture in said),
        scores={f"dpg/{name}": interval for name, interval in _intervals(scores, settings.seed).items()},
        details=put_data(
            store, layout.VERDICTS.at(stage=stage), "answers.parquet", parquet_bytes(table_of(said, items))
        ),
        pictures=tars(drawn),
        devices=sorted({chunk.device for chunk in (*drawn, *answered)}),
        prompt_set=questions_name(settings),
    )
    return recorded(store, layout.REPORT.at(stage=stage), report)


def kept_scores(store: Store, report: EvalReport, questions: Sequence[Question], mode: Mode) -> Scores:
    """The scores that follow from the answers which a report keeps."""
    return protocol.score(questions, answers_in(store, report.details), mode)


def _chunked(items: Sequence[Item], settings: DpgSettings) -> dict[int, Asked]:
    return chunked([item.prompt for item in items], settings.images, settings.sampling)


def _answers(items: Sequence[Item], said: Sequence[Said]) -> protocol.Answers:
    answers: dict[str, dict[int, Mapping[int, str | None]]] = {}
    for of_picture in said:
        answers.setdefault(items[of_picture.number].name, {})[of_picture.image] = of_picture.answers
    return answers


def _intervals(scores: Scores, seed: int) -> dict[str, Interval]:
    """Each category of level 1 and 2 and the overall score in percent, from a bootstrap over items."""
    categories = {**scores.by_l1(), **scores.by_category}
    by_name = {name: [[v / 100 for v in of_item] for of_item in items.values()] for name, items in categories.items()}
    found = {name: intervals({name: by_name[name]}, seed=seed)[name] for name in sorted(by_name)}
    overall = intervals({"items": [[value / 100] for value in scores.items.values()]}, seed=seed)[OVERALL]
    return {name: _in_percent(interval) for name, interval in {**found, OVERALL: overall}.items()}


def _in_percent(score: Interval) -> Interval:
    low, high = (None if end is None else 100 * end for end in (score.low, score.high))
    return Interval(value=100 * score.value, low=low, high=high)
