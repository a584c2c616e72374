"""From the words of a command line to arguments, and from arguments to help.

Flags come from the signature and the docstring of what they are for; types are checked by
jsonargparse. The parts are found first: their arguments are flags of their own
(`--likelihood Normal --likelihood.scale 0.1`).
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from pyrovae import _catalogue
from pyrovae._catalogue import GIVEN, ROLES, dashed, find, nearest
from pyrovae._config import Config, class_path, parameters

WIDTH = 98

SWITCHED = ("true", "false")
"""What a switch takes, if anything."""


def parse(command: str, target: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """The arguments of `target` that the words of a command line give.

    A parameter of `target` with the name of a role becomes the configuration of a part.

    Raises:
        ValueError: With one line that says what is wrong.
    """
    known = inspect.signature(target).parameters
    roles = roles_of(target)
    chosen, rest = _part_names(_normalised(words, target), roles)
    for role in roles:
        default = known[role].default
        if role not in chosen and default is not None:
            chosen[role] = find(role, default)
    for key in chosen:
        owner = key.rpartition(".")[0]
        if owner and owner not in chosen:
            raise ValueError(f"--{key}: name the {owner} it belongs to with --{owner}")
    parser = _Parser(command, target, chosen)
    return _with_parts(parser.parse_args(rest).as_dict(), known, chosen)


def given(words: Sequence[str]) -> set[str]:
    """The arguments that the words of a command line name."""
    flags = (word[2:].partition("=")[0] for word in words if word.startswith("--"))
    return {flag.replace("-", "_") for flag in flags}


def describe(command: str, target: Callable[..., Any], sections: dict[str, str]) -> str:
    """The help of a command.

    Args:
        command: Its name.
        target: What it calls.
        sections: Titles, by the first argument below each.
    """
    text, words, _ = _catalogue.read_docstring(target)
    doc = inspect.cleandoc(target.__doc__ or "")
    examples = re.findall(r"^    (pyrovae .*)$", doc, re.M)
    arguments = parameters_of(target)
    places = [name.upper() for name, p in arguments.items() if p.default is p.empty]
    usage = " ".join(["pyrovae", command, *places, *(["[flags]"] if arguments else [])])
    lines = [f"usage: {usage}", "", _filled(text, 0)]
    lines += ["", *(f"  {example}" for example in examples)] if examples else []
    if not sections:
        lines.append("")
    for name, parameter in arguments.items():
        if name in sections:
            lines += ["", sections[name]]
        lines.append(_flag_help(name, parameter, words.get(name, "")))
    return "\n".join(lines)


def parameters_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Arguments of a function or a class by name."""
    return dict(inspect.signature(target).parameters)


def roles_of(target: Callable[..., Any]) -> list[str]:
    """The arguments that are parts, with flags of their own."""
    taken = parameters_of(target)
    return [name for name in ROLES if name in taken and "Config" in str(taken[name].annotation)]


class _Parser(ArgumentParser):
    """A parser of one command, whose errors are one line in our words."""

    def __init__(
        self,
        command: str,
        target: Callable[..., Any],
        chosen: dict[str, type[Any]],
    ):
        super().__init__(prog=f"pyrovae {command}", add_help=False, allow_abbrev=False)
        self.command, self.target, self.chosen = command, target, chosen
        roles = set(roles_of(target))
        if inspect.isclass(target):
            self.add_class_arguments(target, skip=roles, instantiate=False)
        else:
            self.add_function_arguments(target, as_positional=True, skip=roles)
        for key, part in chosen.items():
            self.add_class_arguments(
                part, key, skip=GIVEN & set(parameters(part)), instantiate=False, fail_untyped=False
            )

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ValueError(self._in_our_words(" ".join(message.split())))

    def _in_our_words(self, words: str) -> str:
        """What the parser says, with the flag's name, what was expected and what came."""
        see = f"see pyrovae {self.command} --help"
        if found := re.search(r"[Uu]nrecognized arguments: (.+)", words):
            return self._unknown(found[1].split()[0], see)
        if found := re.search(r"argument --?([\w.-]+): expected one argument", words):
            return f"--{dashed(found[1])} needs a value; {see}"
        if found := re.search(r"arguments are required: ([\w., -]+)", words):
            return f"pyrovae {self.command} needs {found[1].upper()}; {see}"
        if found := re.search(r'Parser key "([\w.]+)": (.+)', words):
            value = re.search(r".*[Gg](?:ot|iven) value: (.+)$", found[2])  # the last is the whole
            came = f", got {_typed(value[1])!r}" if value else ""
            return f"--{dashed(found[1])} must be {self._expected(found[1])}{came}"
        return f"{words}; {see}"

    def _unknown(self, word: str, see: str) -> str:
        if not word.startswith("--"):
            return f"{word!r} is not expected here: flags begin with --; {see}"
        name = word[2:].split("=")[0]
        owner, _, option = name.rpartition(".")
        if owner and owner not in self.chosen:
            return f"--{dashed(name)}: name the {owner} it belongs to with --{owner}; {see}"
        if owner:
            part = self.chosen[owner]
            known = [*_catalogue.flags(part), *(role for role in ROLES if role in parameters(part))]
            takes = ", ".join(f"--{owner}.{dashed(flag)}" for flag in known) or "no flags"
            return f"--{dashed(name)}: {part.__name__} takes {takes}; see pyrovae parts"
        names = [dashed(known) for known in parameters_of(self.target)]
        return f"there is no flag --{dashed(name)}{nearest(dashed(option), names, '--')}; {see}"

    def _expected(self, key: str) -> str:
        """The type of an argument in words."""
        owner, _, name = key.rpartition(".")
        taken = parameters(self.chosen[owner]) if owner else parameters_of(self.target)
        return _catalogue.expected(taken[name]) if name in taken else "another value"


def _normalised(argv: Sequence[str], target: Callable[..., Any]) -> list[str]:
    """Flags with underscores, switches (`--missing`) with their value, lists in brackets.

    Words that belong to no flag are one list where the command takes several of a kind.
    """
    switches = {n for n, p in parameters_of(target).items() if "bool" in str(p.annotation)}
    lists = {n for n, p in parameters_of(target).items() if "Sequence" in str(p.annotation)}
    has_places = any(p.default is p.empty for p in parameters_of(target).values())
    several = any(parameters_of(target)[n].default is inspect.Parameter.empty for n in lists)
    words: list[str] = []
    places: list[str] = []
    for i, word in enumerate(argv):
        if not word.startswith("--"):
            of_flag = words[-1][2:] if words and words[-1].startswith("--") else ""
            if several and not of_flag:
                places.append(word)
                continue
            words.append(_bracketed(word) if of_flag in lists or "." in of_flag else word)
            continue
        flag, equals, value = word[2:].partition("=")
        flag = flag.replace("-", "_")
        following = argv[i + 1] if i + 1 < len(argv) else "--"
        words.append(f"--{flag}")
        switched_by = following.lower() if flag in switches and not equals else ""
        if switched_by[:2] not in ("", "--") and switched_by not in SWITCHED and not has_places:
            raise ValueError(f"--{dashed(flag)} takes true or false, got {following!r}")
        if equals:
            words.append(_bracketed(value) if flag in lists or "." in flag else value)
        elif (flag in switches and following.lower() not in SWITCHED) or (
            "." in flag and flag.rpartition(".")[2] not in ROLES and following.startswith("--")
        ):
            words.append("true")
    return [json.dumps(places), *words] if places else words


def _bracketed(word: str) -> str:
    """`50,20` as `[50,20]`; any other word as it is."""
    return f"[{word}]" if re.fullmatch(r"[^\[{]+(,[^\[{]*)+", word) else word


def _typed(value: str) -> str:
    """A value as it was typed: `a,b` where the parser was given `['a', 'b']`."""
    return re.sub(r"[' ]", "", value[1:-1]) if value.startswith("[") else value


def _part_names(words: list[str], roles: list[str]) -> tuple[dict[str, type[Any]], list[str]]:
    """The parts that are named, by role (`guide`) or place (`guide.net`), and all other words."""
    chosen: dict[str, type[Any]] = {}
    rest: list[str] = []
    i = 0
    while i < len(words):
        key = words[i][2:] if words[i].startswith("--") else ""
        role = key.rpartition(".")[2]
        if role in ROLES and key.split(".")[0] in roles:
            if i + 1 == len(words) or words[i + 1].startswith("--"):
                raise ValueError(f"--{key} needs a name; see pyrovae parts")
            chosen[key] = find(role, words[i + 1])
            i += 2
        else:
            rest.append(words[i])
            i += 1
    return chosen, rest


def _with_parts(values: dict[str, Any], known: Any, chosen: dict[str, type[Any]]) -> dict[str, Any]:
    """The arguments of the command, with a configuration for each part."""
    arguments = {name: values.get(name) for name in known}
    configs: dict[str, Config] = {}
    for key in sorted(chosen, key=lambda key: key.count(".")):
        part, (owner, _, role) = chosen[key], key.rpartition(".")
        own = values
        for name in key.split("."):
            own = own.get(name) or {}
        init_args = {name: own[name] for name in own if f"{key}.{name}" not in chosen}
        configs[key] = {"class_path": class_path(part), "init_args": init_args}
        if owner:
            configs[owner]["init_args"][role] = configs[key]
        else:
            arguments[role] = configs[key]
    return arguments


def _flag_help(name: str, parameter: inspect.Parameter, words: str) -> str:
    annotation = str(parameter.annotation)
    metavars = {"int": "N", "float": "X", "bool": ""}
    metavar = metavars.get(annotation.split(" ")[0], dashed(name).upper())
    if name in ROLES:
        metavar = "NAME"
    if annotation == "bool | None":
        metavar = "true|false"
    default = _catalogue.shown_default(parameter)
    if default and default != "false" and "efault" not in words:
        words = f"{words.rstrip('.')}; default: {default}."
    if parameter.default is parameter.empty:
        head = name.upper()
    else:
        head = f"--{dashed(name)} {metavar}".rstrip()
    filled = _filled(words, 26)
    return f"  {head:<24}{filled[26:]}" if len(head) < 24 else f"  {head}\n{filled}"


def _filled(text: str, left: int) -> str:
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    indent = " " * left
    return "\n\n".join(
        textwrap.fill(p, WIDTH, initial_indent=indent, subsequent_indent=indent) for p in paragraphs
    )
