"""From preset, YAML file and command line to one Config.

argparse splits the words. pydantic converts and checks every value, whichever layer it came from,
and gives each option its help. A refusal names the nearest field, or the field's name here if
another trainer calls it so.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import BaseModel, ValidationError

from glassloop.config.config import Config, as_dict
from glassloop.config.hardware import EXAMPLES, hardware_values
from glassloop.config.layers import check_said_once, merge, nested, with_mappings
from glassloop.config.names import ConfigError, check_names, field_names, is_section, unknown_name
from glassloop.config.options import OF_A_RUN, refuse_misspelt
from glassloop.config.presets import EXPECTATIONS, PRESETS
from glassloop.config.resumed import values_of_run
from glassloop.config.trust import CACHE, FIELDS, WEBHOOK, unasked
from glassloop.disk.opening import NotPlain, open_plain
from glassloop.disk.plain_yaml import MOST_CHARACTERS, plain_yaml
from glassloop.disk.secrets import secrets_in

SHORTHANDS = {
    "--resume": "--resume.run",
    "--at": "--resume.at",
    "--without-window": "--resume.without_windows",
    "--init_adapter": "--model.init_adapter",
}
HERE = "here"  # --hardware without a name
STARTED_BY = "GLASSLOOP_TRAIN"  # set for ranks that `glassloop train` starts, which has said it


def parse(
    argv: list[str], prog: str = "train_loop.py", cards_here: Callable[[], str] | None = None
) -> Config:
    """Parse a command line.

    It has PRESET, then --config, --hardware and fields in any order.

    Prints and exits with 0 on --help and --print_config. Says on stderr what --hardware changed.

    Args:
        cards_here: names this machine's cards, for --hardware without a name.

    Raises:
        ConfigError: for anything that cannot be used.
    """
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [PRESET] [--config FILE] [--hardware NAME] [--section.field VALUE] ...",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Fine-tune a 4-bit model with LoRA. Presets: {', '.join(PRESETS)}.\n"
        "Precedence: preset < --hardware < YAML file < command line.\n"
        "A field is given as --section.field VALUE or section.field=VALUE.\n"
        "null stands for no value. A list is written with commas.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with sections and fields as --print_config prints them",
    )
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        nargs="?",
        const=HERE,
        help="settings for a set of cards (" + ", ".join(EXAMPLES) + "); no name: the cards here",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the resolved config as YAML and exit"
    )
    _add_fields(parser)
    argv = with_mappings(argv)
    has_preset = bool(argv) and not argv[0].startswith("-") and "=" not in argv[0]
    given = vars(
        parser.parse_args([_normalise(argument) for argument in (argv[1:] if has_preset else argv)])
    )
    file, hardware, print_config = (
        given.pop(name) for name in ("config", "hardware", "print_config")
    )
    values: dict[str, Any] = {}
    resumes = given.get("resume.run", "null") != "null"
    if resumes:
        if has_preset:
            raise ConfigError(
                f"preset = {argv[0]} beside --resume {given['resume.run']}: a resumed run has its "
                "own config.yaml; leave the preset out"
            )
        try:
            values = with_old_engine(
                values_of_run(given, functools.partial(_read_yaml, of_a_run=True))
            )
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if has_preset:
        values = {"preset": argv[0], **_named(PRESETS, argv[0], "preset")}
    if hardware is not None:
        _merge_hardware(values, hardware, cards_here)
    if file is not None:
        merge(values, _read_yaml(Path(file)))
    check_said_once(given)
    merge(values, nested(given))
    config = from_values(values)
    _check_trust(config, given, f"{given['resume.run']}/config.yaml" if resumes else None, file)
    if print_config:
        sys.stdout.write(to_yaml(config))
        if expected := EXPECTATIONS.get(config.preset):
            sys.stdout.write(f"# {expected}\n")
        raise SystemExit(0)
    return config


def _check_trust(config: Config, given: dict[str, str], run: str | None, file: str | None) -> None:
    """Refuse what only a file asks for.

    A preset never asks for such a thing.
    """
    source = " or ".join(name for name in (run, file) if name is not None) or "the preset"
    by_name = {CACHE: "", WEBHOOK: ""}  # --config is asked for by name
    asked = given if run is not None else {**given, **by_name}
    if (why := unasked(config, asked, source, FIELDS)) is not None:
        raise ConfigError(why)


def _merge_hardware(
    values: dict[str, Any], name: str, cards_here: Callable[[], str] | None
) -> None:
    """Put the values of a set of cards over `values`.

    Say on stderr what that changed.
    """
    if name == HERE:
        if cards_here is None:
            raise ConfigError(f"--hardware needs a name here, for example {EXAMPLES[1]}")
        name = cards_here()
    before = as_dict(from_values(values))
    try:
        merge(values, hardware_values(name))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if os.environ.get("LOCAL_RANK", "0") == "0" and STARTED_BY not in os.environ:
        changed = changed_fields(before, as_dict(from_values(values)))
        said = ", ".join(f"{field} {old} -> {new}" for field, old, new in changed)
        _say_once(f"hardware  {name}: {said or 'changes nothing'}")


@functools.cache
def _say_once(text: str) -> None:
    """Print a line on stderr, once in a process."""
    columns = shutil.get_terminal_size().columns
    print(textwrap.fill(text, columns, subsequent_indent=" " * 10), file=sys.stderr)


def changed_fields(
    before: dict[str, Any], after: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Fields that differ between two configs: (dotted name, old value, new value)."""
    found: list[tuple[str, Any, Any]] = []
    for name, new in after.items():
        old = before[name]
        if isinstance(new, dict):
            found += changed_fields(old, new, f"{prefix}{name}.")
        elif new != old:
            found.append((prefix + name, old, new))
    return found


def with_old_engine(values: dict[str, Any]) -> dict[str, Any]:
    """Name the engine of a recorded config.

    A config without the name is older than the choice.
    """
    execution = values.get("execution") or {}
    if not isinstance(execution, dict):
        return values
    return values | {"execution": {"engine": "peft", **execution}}


def to_yaml(config: Config) -> str:
    """The whole config as YAML that --config reads back."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def from_values(values: dict[str, Any]) -> Config:
    """Config from nested plain values, such as a run's config.yaml; raises ConfigError."""
    check_names(values)
    for name, what in secrets_in(values):
        raise ConfigError(
            f"{name} holds what looks like {what}. A config is written into the run's folder, "
            "checkpoints and reports: remove it, and log in (hf auth login, wandb login) or set "
            "it in the environment (HF_TOKEN, WANDB_API_KEY)"
        )
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def _add_fields(
    parser: argparse.ArgumentParser, model: type[BaseModel] = Config, prefix: str = ""
) -> None:
    """Add one option a field, with its docstring as help.

    Values stay text: pydantic converts them.
    """
    group = parser.add_argument_group(prefix.rstrip(".")) if prefix else parser
    for name, info in model.model_fields.items():
        if is_section(info.annotation):
            _add_fields(parser, info.annotation, f"{prefix}{name}.")
        elif prefix + name != "preset":
            choices = re.findall(r"Literal\[(.*?)\]", str(info.annotation))
            metavar = "|".join(choices[0].replace("'", "").split(", ")) if choices else name.upper()
            default = (
                ",".join(map(str, info.default))
                if isinstance(info.default, tuple)
                else info.default
            )
            shown = "null" if default is None else default
            text = f"{info.description} (default: {shown})".replace("%", "%%")
            flag = info.annotation is bool  # --resume.reshape alone is true
            group.add_argument(
                f"--{prefix}{name}",
                metavar=metavar,
                help=text,
                default=argparse.SUPPRESS,
                nargs="?" if flag else None,
                const="true" if flag else None,
            )


class _Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError and suggests the nearest name."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        if unknown:
            names = [word for word in unknown.group(1).split() if word.startswith("--")]
            refuse_misspelt(names, OF_A_RUN, self.prog)
            message = (
                "\n".join(unknown_name(name.lstrip("-").split("=")[0]) for name in names) or message
            )
        raise ConfigError(message)


def _normalise(argument: str) -> str:
    """Write an argument in full: dashes for section.field=value, --resume as --resume.run."""
    if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", argument):
        argument = "--" + argument
    name, equals, value = argument.partition("=")
    return SHORTHANDS.get(name, name) + equals + value


def _read_yaml(path: Path, *, of_a_run: bool = False) -> dict[str, Any]:
    """Read the fields of a YAML file.

    A run's own file is never read through a link.
    """
    try:
        with open(open_plain(path) if of_a_run else path, "rb") as file:
            values = plain_yaml(file.read(4 * MOST_CHARACTERS).decode("utf-8"))
    except NotPlain as error:
        raise ConfigError(f"--resume {path.parent}: {error}") from None
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # broken UTF-8, an odd date
        raise ConfigError(f"--config {path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {path}: expected sections such as `batch:`, found {type(values).__name__}"
        )
    check_names(values)
    return values


def _named(table: dict[str, Any], name: str, what: str) -> dict[str, Any]:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{what} = {name} is not known.{hint} There are: {', '.join(table)}")
    return table[name]()


def _explain(error: ValidationError) -> str:
    """Explain each complaint in one line: field, value, what is wrong."""
    lines = []
    kinds: dict[str, list[str]] = {}  # what a field of several kinds takes, by field
    fields = set(field_names())
    for item in error.errors():
        parts = [str(part) for part in item["loc"] if not str(part)[:1].isupper()]
        name, field = ".".join(parts), ".".join(parts[:2])
        if item["type"] == "extra_forbidden":
            lines.append(unknown_name(name))
        elif item["type"] == "value_error" and isinstance(item["input"], dict | BaseModel):
            lines.append(str(item.get("ctx", {})["error"]))  # our own checks name their fields
        elif field in fields and len(parts) == 3 and not parts[2].isdigit():
            kinds.setdefault(f"{field} = {item['input']!r}", []).append(_should_be(item))
        else:
            lines.append(f"{name} = {item['input']!r}: {item['msg'][0].lower() + item['msg'][1:]}")
    lines += [f"{said}: input should be {', or '.join(each)}" for said, each in kinds.items()]
    return "\n".join(dict.fromkeys(lines))


def _should_be(item: Any) -> str:
    """What one kind of a field's value should be, in words."""
    limits = item.get("ctx", {})
    other = str(item["msg"])
    plain: dict[str, str] = {
        "literal_error": f"{limits.get('expected')}",
        "int_parsing": "a whole number",
        "float_parsing": "a number",
        "greater_than_equal": f"a number of at least {limits.get('ge', 0):g}",
        "greater_than": f"a number above {limits.get('gt', 0):g}",
        "string_pattern_mismatch": "a size such as 12GiB",
    }
    return plain.get(item["type"]) or other[0].lower() + other[1:]
