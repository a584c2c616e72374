"""The parts there are, read off the code: what `pyrovae parts` prints and what a flag may name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from pyrovae import evidence, guides, likelihoods, nets, objectives, priors
from pyrovae._config import class_path, parameters

ROLES: dict[str, tuple[ModuleType, type]] = {
    "prior": (priors, priors.Prior),
    "likelihood": (likelihoods, likelihoods.Likelihood),
    "guide": (guides, guides.Guide),
    "net": (nets, nets.Net),
    "objective": (objectives, objectives.Objective),
    "method": (evidence, evidence.Method),
}
"""Where the parts of each role are, and what they derive from."""

GIVEN = {"shape", "latent_dim", "max_value", "net"}
"""Arguments of parts that come from the data and from flags of their own."""


def parts(role: str) -> dict[str, type[Any]]:
    """The parts of one role, by name."""
    module, base = ROLES[role]
    named = {name: getattr(module, name) for name in module.__all__}
    return {name: part for name, part in named.items() if _plays(part, base)}


def find(role: str, name: str) -> type[Any]:
    """The part that a flag names: one of ours, in any case, or the user's own as `module.Class`.

    Raises:
        ValueError: If there is none of that name, or it is of another role.
    """
    known = parts(role)
    by_lower = {ours.lower(): part for ours, part in known.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    if "." not in name:
        raise ValueError(
            f"--{role}: there is no {role} called {name!r}{nearest(name, known)}; there are "
            f"{', '.join(known)}, and your own as module.Class (see pyrovae parts)"
        )
    part = _imported(role, name)
    base = ROLES[role][1]
    if not _plays(part, base):
        raise ValueError(f"--{role}: expected a class derived from {class_path(base)}, got {name}")
    return part


def entry(role: str, name: str, part: type[Any]) -> str:
    """What there is to say of a part: what it is, when to use it, its flags, its paper."""
    text, arguments, papers = read_docstring(part)
    first, *more = text.split("\n\n")
    lines = [f"{name}: {first}", *("    " + paragraph for paragraph in more)]
    for flag, parameter in flags(part).items():
        default = shown_default(parameter)
        head = f"    --{role}.{dashed(flag)} ({expected(parameter)})"
        words = arguments.get(flag, "")
        lines.append(f"{head}: {words} (default {default})" if default else f"{head}: {words}")
    if papers:
        lines.append("    " + papers)
    return "\n".join(_indented(line) for line in lines)


def flags(part: type[Any]) -> dict[str, inspect.Parameter]:
    """Arguments that a part takes from the command line."""
    return {name: p for name, p in parameters(part).items() if name not in GIVEN}


def expected(parameter: inspect.Parameter) -> str:
    """What an argument may be, in words."""
    if parameter.annotation is parameter.empty:
        return "a value"
    text = str(getattr(parameter.annotation, "__name__", parameter.annotation))
    text = re.sub(r"Literal\[(.*?)\]", lambda m: re.sub(r"['\" ]", "", m[1]), text)
    text = re.sub(r"(Sequence|tuple|list)\[(\w+).*?\]", r"\2,\2,...", text)
    words = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    words |= {"str": "a word", "int,int,...": "numbers like 50,20"}
    kinds = (kind for kind in text.split(" | ") if kind != "None")
    return " or ".join(words.get(kind, kind.replace(",", " or ")) for kind in kinds)


def shown_default(parameter: inspect.Parameter) -> str:
    """The default of an argument, as it would be typed; nothing where there is none."""
    value = parameter.default
    if value is parameter.empty or value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def read_docstring(documented: Any) -> tuple[str, dict[str, str], str]:
    """Text, arguments and references of a Google docstring, paragraphs and lines joined.

    What a class does not say of its arguments, the classes that it derives from do.
    """
    sections = re.split(r"^(\w+):\n", inspect.cleandoc(documented.__doc__ or ""), flags=re.M)
    named = dict(zip(sections[1::2], sections[2::2], strict=True))
    paragraphs = (p for p in sections[0].split("\n\n") if not p.lstrip().startswith(".. "))
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).strip()
    inherited: dict[str, str] = {}
    for base in reversed(getattr(documented, "__mro__", [documented])):
        inherited |= _arguments(base)
    return text, inherited, " ".join(named.get("References", "").split())


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A hint at the name that was meant; nothing if none is near."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, 1, 0.5)
    return f" (did you mean {prefix}{by_lower[found[0]]}?)" if found else ""


def dashed(name: str) -> str:
    """An argument's name as a flag has it."""
    return name.replace("_", "-")


def _plays(part: Any, base: type) -> bool:
    return inspect.isclass(part) and issubclass(part, base) and part is not base


def _imported(role: str, path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"--{role}: the module {module!r} of {path!r} cannot be imported "
            f"({type(error).__name__}: {error}); it must lie in this folder or on the Python path"
        ) from error
    if not hasattr(found, name):
        hint = nearest(name, vars(found))
        raise ValueError(f"--{role}: the module {module!r} has no class {name!r}{hint}")
    return getattr(found, name)


def _arguments(documented: Any) -> dict[str, str]:
    doc = inspect.cleandoc(documented.__doc__ or "")
    found = re.search(r"^Args:\n((?:    .*\n?|\n)*)", doc, re.M)
    pairs = re.findall(r"^    (\w+): ((?:.*\n?)(?:^     .*\n?)*)", found[1] if found else "", re.M)
    return {name: " ".join(words.split()) for name, words in pairs}


def _indented(line: str) -> str:
    left = 2 + len(line) - len(line.lstrip())
    return textwrap.fill(
        line.strip(), 98, initial_indent=" " * left, subsequent_indent=" " * (left + 4)
    )
