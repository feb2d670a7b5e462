"""kd-accel VERB [CONFIG.yaml ...] [positional ...] [key=value ...]: how the words are read, and how a verb ends.

Imports no torch; the module behind a verb (verbs.py) is imported when the verb runs.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, get_origin

from kd_accel import __version__
from kd_accel.config_files import dump, load
from kd_accel.help import explain
from kd_accel.leave import leave
from kd_accel.schema import ConfigError, LocalError, LostPeerError, Schema, alternatives, did_you_mean
from kd_accel.slurm import adopt_tasks
from kd_accel.verbs import VERBS, config_class, function_of


class HelpConfig(Schema):
    """kd-accel help [VERB]: the keys of a verb, with types, limits and defaults."""

    positional: ClassVar[str] = "verb"
    verb: str | None = None
    """The verb to explain; null lists the verbs."""


FIRST_WORD_S = 10  # for the rank that knows what is wrong: a launcher ends all, and blames the first that has ended


def run() -> None:
    """The program: `main` on the command line's words, then the end of this process."""
    code = 1
    atexit.register(lambda: leave(code))  # what is registered first comes last
    try:
        code = main()
    except Exception:
        _tell_launcher(traceback.format_exc())
        raise
    if "kd_accel.processes" in sys.modules:
        sys.modules["kd_accel.processes"].end_process(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code: 0, 2 after a user's mistake (one line each on stderr), 130 after Ctrl-C, 141
    when nobody reads the output any more."""
    words = sys.argv[1:] if argv is None else argv
    if list(words) == ["--version"]:
        print(f"kd-accel {__version__}")
        return 0
    try:
        adopt_tasks(os.environ)
        verb, config = parse(words)
        function = function_of(verb)
        gc.freeze()  # no garbage in what was imported, and each look for it takes 0.3 s
        return function(config) or 0
    except ConfigError as error:
        # Every rank meets the same mistake, and one of them says so; what one rank meets alone, it says itself.
        speaks = os.environ.get("RANK", "0") == "0" or isinstance(error, LocalError)
        knows = speaks and not isinstance(error, LostPeerError)
        said = "\n".join(f"error: {line}" for line in str(error).splitlines())
        if speaks:
            print(said, file=sys.stderr)
        if knows:
            _tell_launcher(said)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(FIRST_WORD_S)
        return 2
    except BrokenPipeError:  # whoever reads the output, head for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python still flushes it at the end
        return 141
    except KeyboardInterrupt:
        return 130
    finally:
        gc.unfreeze()


def _tell_launcher(said: str) -> None:
    """Let torchrun, and Accelerate with it, end with this as the cause, in place of "To enable traceback see ..."."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": said, "extraInfo": {"py_callstack": said, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": cause}), encoding="utf-8")


def parse(words: Sequence[str]) -> tuple[str, Schema]:
    """The verb and its checked config, without running anything; raises ConfigError for whatever does not fit."""
    verb, *arguments = _joined(words) or ["help"]
    if verb in ("--help", "-h"):
        return "help", HelpConfig()
    if verb not in VERBS:
        raise ConfigError(f"unknown verb '{verb}'{did_you_mean(verb, list(VERBS))}")
    if {"--help", "-h"} & set(arguments):
        return "help", HelpConfig(verb=verb)
    if flags := [word for word in arguments if word.startswith("-") and word != "-"]:
        raise ConfigError(f"'{flags[0]}': no flags; write key=value (kd-accel help {verb} lists the keys)")
    overrides = [word for word in arguments if "=" in word]
    files = [word for word in arguments if word not in overrides and word.endswith((".yaml", ".yml"))]
    rest = [word for word in arguments if word not in overrides and word not in files]
    return verb, load(config_class(verb), files, overrides, **_positional(verb, rest, given=bool(files or overrides)))


def _joined(words: Sequence[str]) -> list[str]:
    """The words, with the two of a verb like "eval prepare" as one."""
    at = 1 if words[:1] == ["help"] else 0
    pair = " ".join(words[at : at + 2])
    return [*words[:at], pair, *words[at + 2 :]] if pair in VERBS else list(words)


def usage(verb: str) -> str:
    """The command line of a verb."""
    words = ["kd-accel", verb]
    for name, many, needed in _positional_fields(config_class(verb)):
        word = f"{name.upper()} [{name.upper()} ...]" if many else name.upper()
        words.append(word if needed else f"[{word}]")
    return " ".join([*words, "[CONFIG.yaml ...]", "[key=value ...]"])


def print_config(config: Schema) -> None:
    """kd-accel config: every key with its value, as YAML that `train` accepts."""
    print(dump(config), end="")


def print_help(config: HelpConfig) -> None:
    """kd-accel help: the verbs, or the keys of one of them."""
    if config.verb is None:
        print(f"kd-accel {__version__}: kd-accel VERB [CONFIG.yaml ...] [key=value ...]\n")
        width = max(map(len, VERBS))
        print("\n".join(f"  {verb:{width}}  {line}" for verb, (_, _, line) in VERBS.items()))
        print("\nLater files and keys win. kd-accel help VERB explains the keys of a verb.")
    elif config.verb in VERBS:
        schema, line = config_class(config.verb), VERBS[config.verb][2]
        print(f"{usage(config.verb)}\n\n{line[0].upper()}{line[1:]}.\n\n{explain(schema)}")
    else:
        raise ConfigError(f"unknown verb '{config.verb}'{did_you_mean(config.verb, list(VERBS))}")


def _positional(verb: str, words: list[str], *, given: bool) -> dict[str, Any]:
    """The words that are neither file nor key=value, as the fields that take them.

    Without any, the fields may still come from the files or keys that are `given`.
    """
    fields, values, rest = _positional_fields(config_class(verb)), {}, list(words)
    for name, many, needed in fields:
        taken, rest = (rest, []) if many else (rest[:1], rest[1:])
        if needed and not taken and not given:
            raise ConfigError(f"{name.upper()} is missing; usage: {usage(verb)}")
        if taken:
            values[name] = taken if many else taken[0]
    if rest and not fields:
        raise ConfigError(f"'{rest[0]}' is neither a .yaml file nor key=value; usage: {usage(verb)}")
    if rest:
        name = fields[-1][0].upper()
        raise ConfigError(f"expected one {name}, got {len(words)}: {' '.join(words)}; usage: {usage(verb)}")
    return values


def _positional_fields(schema: type[Schema]) -> list[tuple[str, bool, bool]]:
    """The fields that positional words go to: name, whether it takes all that are left, whether it is needed."""
    names = getattr(schema, "positional", ())
    fields = {name: schema.model_fields[name] for name in ((names,) if isinstance(names, str) else names)}
    return [
        (name, any(get_origin(a) is list for a in alternatives(field.annotation)), field.is_required())
        for name, field in fields.items()
    ]
