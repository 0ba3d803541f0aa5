"""Hydra's and OmegaConf's errors as one line: what is wrong; what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from omegaconf.nodes import BooleanNode, FloatNode, IntegerNode, StringNode
from yaml import YAMLError

from dqbench.config import Config
from dqbench.errors import UserError, one_line

EXPECTED = {BooleanNode: "true or false", IntegerNode: "an integer", FloatNode: "a number", StringNode: "text"}
ITEMS = {"Integer": "integers", "Float": "numbers", "bool": "true or false"}  # OmegaConf's names for what a list holds
NOT_OFFERED = ("hydra", "table")


def explain(error: BaseException, prefix: str = "") -> str:
    """One line for an error of composing a config; `prefix` is where the node that failed hangs in it."""
    if isinstance(error, UserError):
        return first_part(error)
    if isinstance(error, YAMLError):
        return f"a config file cannot be read: {one_line(error)}"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        return unknown_choice(error.missing_cfg_file, error.options)
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read; write key=value, quoting special characters as in key='\"a,b\"'"
    if sweep := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'", str(error)):
        return f"{sweep[1]} names several values; add -m to run each, or write a list as key=[a,b]"
    if composing := re.match(r"In '(.+?)': \w+ raised while composing config:\s*(.+)", str(error)):
        lost = re.match(r"Interpolation key '(table\.\w+)' not found", composing[2])
        return f"{composing[1]}: {f'{lost[1]} is missing; needed: the axes to sweep' if lost else composing[2]}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        return unknown_key(cause, prefix)
    if isinstance(cause, ValidationError) and cause.full_key:
        return wrong_type(cause, prefix, re.match(r"Error merging override (\S+?)=(.*)", str(error), re.DOTALL))
    return first_part(cause)


def unknown_choice(path: str, options: Sequence[str]) -> str:
    """A group option that does not exist."""
    group, _, name = path.partition("/") if path.startswith("sweeps/") else path.rpartition("/")
    return f"{group}={name} is unknown; {suggestion(name, options)}allowed: {', '.join(options) or 'none exist yet'}"


def unknown_key(error: OmegaConfBaseException, prefix: str = "") -> str:
    """A misspelt key, with the keys beside it."""
    full_key = joined(prefix, str(error.full_key))
    parent, _, key = full_key.rpartition(".")
    siblings = [str(name) for name in error.parent_node if name not in NOT_OFFERED]
    if not siblings and (group := parent.rpartition(".")[2]) != parent and group in Config.__annotations__:
        return f"{full_key} cannot be set: {parent} follows {group}; set {group}.{key}"
    if not siblings:
        return f"{full_key}: {parent} is empty; add a key to it with +{full_key}=VALUE"
    where = f" in {parent}" if parent else ""
    return f"{full_key} is unknown; {suggestion(key, siblings)}allowed{where}: {', '.join(siblings)}"


def wrong_type(error: OmegaConfBaseException, prefix: str, override: re.Match[str] | None) -> str:
    """A value that is not of its key's type."""
    key = joined(prefix, str(error.full_key))
    quoted = re.match(r"Value '(.*?)'", str(error.msg))
    value = f"={override[2]}" if override else f"={quoted[1]}" if quoted else ""
    return f"{key}{value} has the wrong type; allowed: {expected(error)}"


def expected(error: OmegaConfBaseException) -> str:
    """The type a value should have, in words."""
    if isinstance(error.parent_node, ListConfig):
        found = re.search(r"converted to (\w+)|valid (bool)", str(error.msg))
        return f"a list of {ITEMS[found[1] or found[2]] if found else 'values'}"
    if isinstance(error.child_node, ListConfig):
        return "a list, as in [a,b]"
    if isinstance(error.child_node, DictConfig):
        return f"its keys one by one: {', '.join(map(str, error.child_node)) or '{key: value, ...}'}"
    return EXPECTED.get(type(error.child_node), "what conf/ shows for it")


def suggestion(name: str, options: Sequence[str]) -> str:
    """'did you mean X? ' where one of the options is close."""
    close = difflib.get_close_matches(name, options, n=1)
    return f"did you mean {close[0]}? " if close else ""


def joined(prefix: str, key: str) -> str:
    """prefix.key"""
    return f"{prefix}.{key}" if prefix else key


def first_part(error: BaseException) -> str:
    """The message up to OmegaConf's list of facts, on one line."""
    text = re.split(r"\n\s*(?:full_key|See https?:|Config search path)", str(error))[0]
    where = getattr(error, "full_key", None)
    line = " ".join(text.split()) or type(error).__name__
    return f"{where}: {line}" if where and where not in line else line
