"""How a script begins, and what it says of a command line that it does not take."""

from __future__ import annotations

import functools
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from absl import app, flags

Main = Callable[[Sequence[str]], int | None]


def run(main: Main, *, arguments: bool = False) -> NoReturn:
    """Parses the flags, runs ``main`` and exits with what it returns; the last line of a script.

    ``main`` gets the script's name and, with ``arguments``, what else is no flag; without, there
    may be nothing else.

    What is wrong on the command line (an unknown flag, a value that a flag does not take, an
    `absl.app.UsageError` from ``main``) is told with the help of the flags that it is about. The
    help of all flags, which `absl.app.run` prints, pushes the error off the screen.
    """
    app.run(functools.partial(_run, main, arguments), flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _exit(str(error), 1)


def _run(main: Main, arguments: bool, argv: Sequence[str]) -> int | None:
    try:
        if len(argv) > 1 and not arguments:
            raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
        return main(argv)
    except app.UsageError as error:
        _exit(str(error), error.exitcode)


def _exit(message: str, code: int) -> NoReturn:
    script = pathlib.Path(sys.argv[0]).name
    lines = [f"{script}: {message}"]
    about = _flags_of(message)
    lines += [_help(flag) for flag in about]
    if not about:
        own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
        names = ", ".join(sorted(f"--{flag.name}" for flag in own))
        lines.append(flags.text_wrap(f"Flags: {names}", indent="  "))
    lines.append(f"All flags: python {sys.argv[0]} --help")
    print(*lines, sep="\n", file=sys.stderr)
    sys.exit(code)


def _flags_of(message: str) -> list[flags.Flag]:
    """The flags that a message names, "--flag" or "--noflag", or begins with, "flag must ..."."""
    found: dict[str, flags.Flag] = {}
    for name in re.findall(r"(?<!\S)--(\w+)", message) or re.findall(r"^\w+(?= must)", message):
        for known in (name, name.removeprefix("no")):
            if known in flags.FLAGS:
                found.setdefault(known, flags.FLAGS[known])
                break
    return list(found.values())


def _help(flag: flags.Flag) -> str:
    name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
    text = f"{name}: {flag.help}"
    if flag.parser.syntactic_help:
        text += f"; {flag.parser.syntactic_help}"
    if flag.default:
        text += f"; default: {flag.default_as_str}"
    return flags.text_wrap(" ".join(text.split()), indent="    ", firstline_indent="  ")


# ---- values that flags of absl do not check ----------------------------------------------------


def numbers(
    flag: flags.FlagHolder, text: str | None = None, *, count: int | None = None, split: str = ","
) -> list[int]:
    """The positive numbers of a flag, or of one ``text`` among its values.

    Args:
      flag: of strings, or a list of them.
      text: what is split; by default all values of the flag.
      count: how many numbers there have to be; by default one or more.
      split: what is between them.

    Raises:
      ValueError: anything else stands there; names the flag.
    """
    parts = flag.value if text is None else text.split(split)
    wrong = not parts or not all(part.strip().isdecimal() and int(part) for part in parts)
    if wrong or count not in (None, len(parts)):
        wanted = f"{count or 'one or more'} numbers above 0, with {split!r} between them"
        raise ValueError(f"--{flag.name}: takes {wanted}, got {split.join(parts)!r}")
    return [int(part) for part in parts]


def names(flag: flags.FlagHolder, known: Iterable[str], *, empty: bool = False) -> list[Any]:
    """The values of a flag, without repetitions, each of them one of ``known``.

    Raises:
      ValueError: another stands there, or none where ``empty`` is False; names the flag.
    """
    known = list(known)
    for value in flag.value if flag.value or empty else [""]:
        if value not in known:
            raise ValueError(f"--{flag.name}: takes some of {', '.join(known)}, got {value!r}")
    return list(dict.fromkeys(flag.value))
