"""Turns pydantic's validation errors into messages for users.

Pydantic's paths contain validators and branches of unions, and it reports an error for every branch that does not fit.
Here each mistake is reported once, under the path at which it was written.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from infra.errors import Fault, SettingsError

Path = tuple[str | int, ...]

MOST = 5  # mistakes in one message
LONGEST = 40  # characters of a value in a message

# What was expected, by pydantic's type of error.
_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping of `name: value` lines"),
    "string_type": "text",
    "literal_error": "one of {expected}",
}

# What the value must be, by pydantic's type of error.
_LIMITS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "multiple_of": "a multiple of {multiple_of:g}",
    "finite_number": "a finite number",
}
_LENGTHS = {
    "too_short": "must have at least {min_length} values, not {actual_length}",
    "too_long": "must have at most {max_length} values, not {actual_length}",
    "string_too_short": "must have at least {min_length} letters",
    "string_too_long": "must have at most {max_length} letters",
    "string_unicode": "must be text that can be written as UTF-8",
}


class Misfit(ValueError):
    """A validator's error for a value that it parsed as other settings: `error` is relative to that value."""

    def __init__(self, cls: type[BaseModel], error: ValidationError) -> None:
        super().__init__(cls.__name__)
        self.cls, self.error = cls, error


class Problem(NamedTuple):
    path: Path  # in the data as written
    after: str  # the rest of the sentence, which begins with the path
    remedy: str = ""
    before: str = ""
    expected: str = ""  # the expected type, if the value has another one; a union may expect several


class Wrong(NamedTuple):
    """A setting that does not fit the settings of other stages; the message follows the setting's path."""

    field: str  # `size`, `rules.0.above`
    message: str
    remedy: str


def faults(
    cls: type[BaseModel], error: ValidationError, data: Mapping[Any, Any], prefix: Mapping[str, Any]
) -> list[Fault]:
    """Everything that is wrong. `prefix`: path at which settings were written -> what was written there.

    The first path is that of the settings themselves, the others are those of defaults that were merged into them.
    """
    paths = ((where(problem.path, data, prefix), problem) for problem in _once(_problems(cls, error, data)))
    return [Fault(path, _sentence(problem, path), problem.remedy) for path, problem in paths]


def settings_error(mistakes: Sequence[Fault]) -> SettingsError:
    """One error that tells of all mistakes."""
    if len(mistakes) == 1:
        [(_, message, remedy)] = mistakes
        return SettingsError(message, remedy=remedy or "correct the value and run again", faults=mistakes)
    messages = [f"{message} ({remedy})" if remedy else message for _, message, remedy in mistakes[:MOST]]
    more = f"; and {len(mistakes) - MOST} more" if len(mistakes) > MOST else ""
    return SettingsError("; ".join(messages) + more, remedy="correct them and run again", faults=mistakes)


def _sentence(problem: Problem, path: str) -> str:
    """The message, which begins with the path; a mistake of the settings as a whole has none."""
    return f"{problem.before}`{path}`{problem.after}" if path else problem.after.removeprefix(": ").strip()


def nearest(word: str, known: Iterable[str]) -> str | None:
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown word: the nearest known one or, if none is near, another text."""
    near = nearest(word, known)
    return f"did you mean `{near}`?" if near else otherwise


def shown(value: object) -> str:
    """A value as its writer spelt it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value if len(value) <= LONGEST else f"{value[:LONGEST]}...")
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return str(value)[:LONGEST]


def _problems(cls: type[BaseModel], error: ValidationError, data: Any) -> list[Problem]:
    problems = []
    for detail in error.errors(include_url=False):
        inner = detail.get("ctx", {}).get("error")
        path = _written(detail["loc"], data, missing=detail["type"] == "missing")
        if isinstance(inner, Misfit):
            nested = _problems(inner.cls, inner.error, value_at(data, path))
            problems += [problem._replace(path=path + problem.path) for problem in nested]
        else:
            problems.append(_problem(cls, detail, path, data))
    return problems


def _problem(cls: type[BaseModel], detail: ErrorDetails, path: Path, data: Any) -> Problem:
    kind, context = detail["type"], detail.get("ctx", {})
    value, models = value_at(data, path), classes_at(cls, path[:-1], data)
    quiet = any(model.model_config.get("hide_input_in_errors") for model in models)
    not_this = "" if quiet else f", not {shown(value)}"
    if kind == "missing":
        return _missing(path, detail["loc"])
    if kind == "invalid_key" or (kind == "string_type" and "[key]" in detail["loc"]):
        return Problem(path, " is named by what is no text", "put the name into quotes, or take it out")
    if kind == "extra_forbidden":
        known = [name for model in models for name in model.model_fields]
        remedy = did_you_mean(str(path[-1]), known, f"known here: {', '.join(sorted(set(known)))}")
        return Problem(path, "", remedy, before="unknown setting ")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _no_kind(path, value, _tags(classes_at(cls, path, data)))
    if kind in _EXPECTED:
        return _expected(kind, path, value, str(context.get("expected", "")), not_this)
    if kind in _LIMITS:
        return Problem(path, f" must be {_LIMITS[kind].format(**context)}{not_this}")
    if kind in _LENGTHS:
        empty = context.get("min_length") == 1
        return Problem(path, " must not be empty" if empty else f" {_LENGTHS[kind].format(**context)}")
    if kind in ("value_error", "assertion_error"):
        raised = context.get("error")
        return Problem(path, f": {_first_small(str(raised))}", getattr(raised, "remedy", ""))
    return Problem(path, f" cannot be {shown(value)}" if not quiet else " cannot be what it is")


def _missing(path: Path, loc: Path) -> Problem:
    if isinstance(path[-1], int):
        return Problem(path[:-1], f" must have at least {path[-1] + 1} values")
    return Problem(path, " is not set", f"add a line `{path[-1]}: ...`")


def _no_kind(path: Path, value: Any, tags: list[str]) -> Problem:
    known = f"known: {', '.join(tags)}"
    tag = value.get("kind") if isinstance(value, Mapping) else None
    if tag is None:
        return Problem((*path, "kind"), " is not set", known)
    return Problem((*path, "kind"), f" is {shown(tag)}, which is not known", did_you_mean(str(tag), tags, known))


def _expected(kind: str, path: Path, value: Any, literals: str, not_this: str) -> Problem:
    remedy = ""
    if isinstance(value, int | float) and (kind == "string_type" or f"'{value}'" in literals):
        remedy = f"put it into quotes: '{value}'"  # YAML reads a number where text was meant
        not_this = not_this.replace(", not", ", not the number")
    elif kind == "literal_error" and isinstance(value, str):
        remedy = did_you_mean(value, [word.strip(" '") for word in literals.replace(" or ", ",").split(",")], "")
    return Problem(path, not_this, remedy, expected=_EXPECTED[kind].format(expected=literals.replace("'", "")))


def _first_small(text: str) -> str:
    """The sentence in lower case, to follow a colon; a name in capitals stays."""
    return text if text[1:2].isupper() else f"{text[:1].lower()}{text[1:]}"


def _once(problems: list[Problem]) -> list[Problem]:
    """One problem a path: of a union, that of the branch whose type was meant; if there is none, one that names all."""
    by_path: dict[Path, Problem] = {}
    for problem in problems:
        deeper = any(len(p.path) > len(problem.path) and p.path[: len(problem.path)] == problem.path for p in problems)
        exact = any(p.path == problem.path and not p.expected for p in problems)
        if problem.expected and (deeper or exact):
            continue
        earlier = by_path.get(problem.path)
        if earlier is None:
            by_path[problem.path] = problem
        elif earlier.expected and problem.expected and problem.expected not in earlier.expected.split(" or "):
            by_path[problem.path] = earlier._replace(
                expected=f"{earlier.expected} or {problem.expected}", remedy=earlier.remedy or problem.remedy
            )
    return [p._replace(after=f" must be {p.expected}{p.after}") if p.expected else p for p in by_path.values()]


def _written(loc: Path, data: Any, *, missing: bool) -> Path:
    """Pydantic's path without the parts that are not in the data; a missing setting's name, its last part, stays."""
    path: Path = ()
    for part in loc[:-1] if missing else loc:
        if _has(data, part):
            data, path = data[part], (*path, part)
    return (*path, loc[-1]) if missing else path


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)


def value_at(data: Any, path: Path) -> Any:
    for part in path:
        if not _has(data, part):
            return None
        data = data[part]
    return data


def where(path: Path, data: Any, prefix: Mapping[str, Any]) -> str:
    """The whole path of a setting; it begins with that of the defaults, if the value was written there."""
    own, *others = prefix or [""]
    value = value_at(data, path)
    for other in others if path else ():
        if _has(value_at(prefix[other], path[:-1]), path[-1]) and value_at(prefix[other], path) == value:
            own = other
    return ".".join([*([own] if own else []), *map(str, path)])


def classes_at(cls: type[BaseModel], path: Path, data: Any) -> list[type[BaseModel]]:
    """The settings classes that the value at the path may have."""
    classes, value = [cls], data
    for part in path:
        fields = [model.model_fields[part] for model in classes if isinstance(part, str) and part in model.model_fields]
        value = value[part] if _has(value, part) else None
        if fields:
            classes = [model for field in fields for model in _classes_in(field.annotation)]
        fitting = [model for model in classes if isinstance(value, Mapping) and value.get("kind") in _tags([model])]
        classes = fitting or classes
    return classes


def _classes_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _classes_in(argument)]


def _tags(models: Iterable[type[BaseModel]]) -> list[str]:
    fields = [model.model_fields["kind"] for model in models if "kind" in model.model_fields]
    return [str(tag) for field in fields for tag in get_args(field.annotation)]
