"""`pixnerd new`: survey a corpus and write a recipe that runs without changes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infra.errors import SettingsError
from infra.files import appearing
from orchestration.options import JsonOption
from orchestration.patience import doing
from orchestration.terminal import print_json

if TYPE_CHECKING:
    from data_prep.survey import Survey

app = typer.Typer()


@app.command(epilog="Example: pixnerd new photos --out mine.yaml")
def new(
    path: Annotated[
        str,
        typer.Argument(help="A folder of pictures with captions, tars, a table of URLs, Parquet; or a store's URL."),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="The recipe to write. [default: NAME.yaml]")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the recipe. [default: that of the folder or file]")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Kind of corpus, if several lie there: text_folder, url_list, ...")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="The column of pictures, file names or URLs, if another one would be chosen.")
    ] = None,
    captions: Annotated[
        list[str] | None,
        typer.Option("--captions", help="A column of captions, if others would be chosen; repeatable."),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Look at your own pictures and captions, and write a recipe that trains a first small model on them."""
    from data_prep.survey import Wanted, name_of, survey
    from pipelines.recipes import own

    name = name or name_of(path)
    out = out or Path(f"{name}.yaml")
    if out.exists():
        raise SettingsError(f"{out} is there already", remedy="name another --out, or remove it")
    doing(f"looking at {path}")
    corpus = survey(path, Wanted(kind, image, tuple(captions or ())))
    text = own.written(name, path, shlex.quote(str(out)), corpus)
    _check(text)
    try:
        with appearing(out) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(
            f"{out} cannot be written ({error.strerror or error})", remedy="name another --out"
        ) from None
    next_command = f"pixnerd run {shlex.quote(str(out))}"
    if json_:
        hosts = None if corpus.hosts is None else corpus.hosts._asdict()
        facts = corpus._asdict() | {"hosts": hosts}
        print_json({"recipe": str(out), "name": name, **facts, "next": next_command})
    else:
        _say(corpus, out, next_command)


def _check(text: str) -> None:
    """Validate the prepare stage, which contains names from the corpus; the rest of the recipe is a fixed text."""
    import yaml

    from data_prep.prepare.plan import PrepareSettings
    from infra.config import parse

    stage = yaml.safe_load(text)["stages"]["prepare"]
    parse(PrepareSettings, {key: value for key, value in stage.items() if key != "kind"}, where="prepare")


def _say(corpus: Survey, out: Path, next_command: str) -> None:
    many = f"{corpus.pictures:,}" if corpus.counted else f"about {corpus.pictures:,}"
    for source in corpus.sources:
        captions = ", ".join(source.get("captions", [])) or source.get("caption_suffix", "") or "texts beside them"
        where = f", in the column {source['image']}" if "image" in source else ""
        print(f"found    {source['kind']}: pictures{where}; captions: {captions}")
    sides = f", nearly all {corpus.shorter_side} px and larger" if corpus.shorter_side else ""
    print(f"         {many} pictures{sides}; captions of about {corpus.words:g} words")
    for text in corpus.captions[:1]:
        print(f"         such as: {' '.join(text.split())[:100]!r}")
    for warning in [*corpus.warnings, *_about_hosts(corpus)]:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"wrote    {out}")
    print(f"next:    {next_command}")


def _about_hosts(corpus: Survey) -> list[str]:
    hosts, warnings = corpus.hosts, []
    if hosts is None:
        return []
    settings = " and ".join(f"fetch.{name}" for name in hosts.fetch)
    if hosts.fetch and not hosts.public:
        warnings.append(
            f"{', '.join(hosts.private[:3])} lies inside of a network: the recipe sets {settings}, so that "
            "downloads may go there; take it out if the list is a stranger's"
        )
    elif hosts.private:
        others = "the list leads to public servers, and to" if hosts.public else "the list leads to"
        unless = f" unless {settings} is set" if settings else ""
        warnings.append(f"{others} {', '.join(hosts.private[:3])} inside of a network, where nothing is asked{unless}")
    if hosts.unknown:
        warnings.append(f"{', '.join(hosts.unknown[:3])} has no address as far as this machine can tell")
    return warnings
