"""Reads a job: a TOML file, the environment over it, the command line over both; and writes a job as TOML or JSON.

The law: ``tomllib.loads(to_toml(job))`` holds the very values of ``job``.
"""

from __future__ import annotations

import datetime as dt
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource, SettingsError

from cloister.jobs import ENV_PREFIX, AdamTable, AdamWTable, Job, SgdTable
from wire.errors import ConfigError

__all__ = ["load_job", "to_json", "to_toml"]

MAX_JOB_BYTES: Final = 2**20  # a job is a page; the rest is data, and belongs elsewhere
_MAX_SHOWN: Final = 60
_OPTIMIZERS: Final[dict[str, type[BaseModel]]] = {"sgd": SgdTable, "adam": AdamTable, "adamw": AdamWTable}
#: Errors that say: this was meant as text, though it reads as a TOML number, date or list as well (a submodule "0").
_MEANT_AS_TEXT: Final = frozenset({"string_type", "path_type", "literal_error"})

_Path: TypeAlias = tuple[str, ...]


def load_job(file: Path, overrides: Sequence[tuple[str, str, str]] = (), env: Mapping[str, str] | None = None) -> Job:
    """The checked job of ``file``.

    Args:
        file: TOML; or JSON, as a run's folder keeps it (``job.json``).
        overrides: what the command line says, each as (option as typed, dotted key, text); the last one holds.
        env: the environment; this process's, unless said otherwise. ``CLOISTER_TRAIN__EPOCHS=3`` is ``train.epochs``.

    Raises:
        ConfigError: naming the file, variable or option, the key, what is wrong with it, and what to write.
    """
    given = _Given(str(file))
    given.merge(_read(file), str(file))
    for variable, path, value in _from_environment(os.environ if env is None else env):
        given.override(path, value, variable)
    for option, key, text in overrides:
        given.override(_path(option, key), text, option)
    job = given.validated()
    try:
        job.check()
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    return job


def to_json(job: Job) -> str:
    """``job`` as JSON, defaults and all; dates as ISO 8601 text."""
    return json.dumps(job.model_dump(), indent=2, default=str)


def to_toml(job: Job) -> str:
    """``job`` as a job file, defaults and all; what is not set is left out."""
    return "\n".join(_table_lines((), job.model_dump())).strip() + "\n"


@dataclass(slots=True)
class _Given:
    """Values from several sources, each with where it came from."""

    file: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[_Path, str] = field(default_factory=dict)
    texts: dict[_Path, str] = field(default_factory=dict)

    def merge(self, values: Mapping[str, Any], origin: str, at: _Path = ()) -> None:
        for key, value in values.items():
            path = (*at, key)
            if isinstance(value, dict):
                self._set(path, {}, origin, keep_table=True)
                self.merge(value, origin, path)
            else:
                self._set(path, value, origin)

    def override(self, path: _Path, value: Any, origin: str) -> None:  # noqa: ANN401 - any TOML value
        """One value of a stronger source; text is read as a TOML value where it is one."""
        if isinstance(value, str):
            self.texts[path] = value
            value = _literal(value)
        if path == ("node", "address") and isinstance(value, str) and "#" in value:
            for other in ("pin", "certificate", "ca"):  # this address says itself how the node is known
                self._set(("node", other), None, origin)
        if isinstance(value, dict):
            self.merge({path[-1]: value}, origin, path[:-1])
        else:
            self._set(path, value, origin)

    def validated(self) -> Job:
        try:
            return Job(**self.values)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        texts = [p for e in problems if e["type"] in _MEANT_AS_TEXT and (p := _shown(e["loc"])) in self.texts]
        if texts:
            for path in texts:
                self._set(path, self.texts.pop(path), self.origins[path])
            return self.validated()
        raise ConfigError(_join([self._complaint(problem) for problem in problems]))

    def _set(self, path: _Path, value: Any, origin: str, *, keep_table: bool = False) -> None:  # noqa: ANN401 - as above
        table = self.values
        for depth, key in enumerate(path[:-1], 1):
            if not isinstance(table.get(key), dict):
                table[key] = {}
                self.origins[path[:depth]] = origin
            table = table[key]
        if keep_table and isinstance(table.get(path[-1]), dict):
            return
        table[path[-1]] = value
        self.origins[path] = origin

    def _complaint(self, problem: ErrorDetails) -> str:
        path, key = _shown(problem["loc"]), str(problem["loc"][-1])
        origin = next((self.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.origins), self.file)
        if problem["type"] == "missing":
            origin = self.file  # that is where it is to be written
        table = _table_at(problem["loc"][:-1])
        dotted = ".".join(path)
        if problem["type"] == "extra_forbidden":
            return f"{origin}: {dotted}: {_no_such_key(key, table, is_table=len(path) == 1)}"
        if problem["type"].startswith("union_tag"):
            return f'{origin}: {dotted}.name: {_what(problem)}; write name = "adamw", "adam" or "sgd"'
        return f"{origin}: {dotted}: {_what(problem)}{_write(key, table, is_missing=problem['type'] == 'missing')}"


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_JOB_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the job file {file}: {error.strerror}") from error
    if len(data) > MAX_JOB_BYTES:
        raise ConfigError(f"{file} is larger than {MAX_JOB_BYTES} bytes: it is no job file")
    try:
        if file.suffix == ".json":
            read: dict[str, Any] = json.loads(data)
            return _without_none(read)
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text in UTF-8: it is no job file") from error
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConfigError(f"{file} is no job as a run keeps it: {error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not TOML: {error}; texts stand in quotes, tables in [brackets]") from error


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """What is not set is left out, as in TOML."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None
    }


def _from_environment(env: Mapping[str, str]) -> Iterator[tuple[str, _Path, Any]]:
    """What ``CLOISTER_TABLE__KEY`` variables say, read as pydantic-settings reads them."""
    names = {name.lower(): name for name in env if name.upper().startswith(ENV_PREFIX) and "__" in name}
    for name in names.values():
        table = name[len(ENV_PREFIX) :].split("__")[0].lower()
        if table not in Job.model_fields:
            raise ConfigError(f"{name}: {_no_such_key(table, Job, is_table=True)}")
    source = EnvSettingsSource(Job)
    source.env_vars = {lower: env[name] for lower, name in names.items()}
    try:
        found = source()
    except SettingsError as error:
        raise ConfigError(f"{', '.join(names.values())}: {error}; tables and lists are written as JSON") from error
    for path, value in _leaves(found):
        variable = f"{ENV_PREFIX.lower()}{'__'.join(path)}"
        yield names.get(variable.lower(), variable.upper()), path, value


def _leaves(values: Mapping[str, Any], at: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key), value


def _path(option: str, key: str) -> _Path:
    path = tuple(part.strip() for part in key.split("."))
    if len(path) < 2 or not all(path):  # noqa: PLR2004 - a table and a key
        raise ConfigError(f"{option}: write --set table.key=value, such as --set train.epochs=3")
    return path


def _literal(text: str) -> Any:  # noqa: ANN401 - any TOML value
    try:
        read = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return text
    return read["value"] if read.keys() == {"value"} else text


def _shown(loc: tuple[int | str, ...]) -> _Path:
    """A place as the user wrote it: without the optimizer's name, which pydantic adds."""
    parts = tuple(str(part) for part in loc)
    return parts[:1] + parts[2:] if parts[:1] == ("optimizer",) and parts[1:2] and parts[1] in _OPTIMIZERS else parts


def _table_at(loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    table: type[BaseModel] | None = Job
    for part in loc:
        if table is None:
            table = _OPTIMIZERS.get(str(part))
            continue
        known = table.model_fields.get(str(part))
        kind = known.annotation if known else None
        table = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return table


def _no_such_key(key: str, table: type[BaseModel] | None, *, is_table: bool) -> str:
    known = list(table.model_fields) if table else []
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "leave it out."
    kind = "tables are" if is_table else "keys here are"
    return f"no such {'table' if is_table else 'key'}; {hint} The {kind} {', '.join(known)}"


def _what(problem: ErrorDetails) -> str:
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"].startswith("union_tag"):
        given = problem["input"].get("name") if isinstance(problem["input"], dict) else None
        return "is missing" if given is None else f"no optimizer is called {_short(given)}"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"is a table, not {_short(problem['input'])}"
    said = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{_short(problem['input'])} {'is ' if said.startswith('not ') else ''}{said}"


def _write(key: str, table: type[BaseModel] | None, *, is_missing: bool) -> str:
    known = table.model_fields.get(key) if table else None
    if known is None:
        return ""
    if isinstance(known.annotation, type) and issubclass(known.annotation, BaseModel):
        keys = [name for name, f in known.annotation.model_fields.items() if f.is_required()]
        return f"; write [{key}] with {', '.join(keys)}" if keys else f"; write [{key}]"
    if key == "optimizer":
        return '; write [optimizer] with name = "adamw" and lr = 0.001'
    example = known.examples[0] if known.examples else known.default
    suffix = "" if is_missing else " or the like"
    return "" if example is None else f"; write {key} = {_value(example)}{suffix}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _join(complaints: list[str]) -> str:
    if len(complaints) == 1:
        return complaints[0]
    return f"{len(complaints)} things to mend in the job:\n" + "\n".join(f"  {c}" for c in complaints)


def _table_lines(path: _Path, table: Mapping[str, Any]) -> Iterator[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, dict) and value}
    plain = {key: value for key, value in table.items() if value is not None and key not in inner}
    if plain:
        if path:
            yield f"[{'.'.join(map(_key, path))}]"
        yield from (f"{_key(key)} = {_value(value)}" for key, value in plain.items())
        yield ""
    for key, value in inner.items():
        yield from _table_lines((*path, key), value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _value(value: Any) -> str:  # noqa: ANN401 - any TOML value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dt.datetime | dt.date | dt.time):
        return value.isoformat()
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    return _string(str(value))


def _string(text: str) -> str:
    # JSON's escapes are TOML's, but for the one control character that JSON lets through.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
