"""Files of a folder or hub repository that hold a split's rows.

Only names are looked at. Splits come from the `configs` in the head of README.md where it has
some; else from the names of files (train.csv, data/test-00000-of-00002.parquet) and folders
(validation/a.jsonl); else every file is `train`. A README cannot name files outside its folder.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from glassloop.data.names import SPLITS, listed, shorten, shown
from glassloop.data.text_files import PACKED

TEXT_KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
ARROW_KINDS = {".parquet": "arrow", ".arrow": "arrow", ".feather": "arrow"}
KINDS = TEXT_KINDS | ARROW_KINDS
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SHARD = re.compile(r"(?:.*/)?([\w.]+)-\d{5}-of-\d{5}[^/]*")
README_BYTES = 2**20


@dataclass(frozen=True)
class Chosen:
    """Names of a split's files in order, and the folder's others."""

    files: tuple[str, ...]
    splits: tuple[str, ...]  # that the folder has
    others: tuple[str, ...]  # data files of another kind, which are not read


def kind_of(name: str) -> str | None:
    """Kind of a file by its name, None without rows."""
    path = PurePosixPath(name.lower())
    if path.suffix in PACKED:
        path = path.with_suffix("")
        return TEXT_KINDS.get(path.suffix)
    return KINDS.get(path.suffix)


def data_files(names: Iterable[str]) -> list[str]:
    """Names of the files that may hold rows, in order."""
    return sorted(name for name in seen(names) if kind_of(name) is not None)


def seen(names: Iterable[str]) -> list[str]:
    """Names without hidden files and what `datasets` writes about a data set."""
    return [
        name
        for name in names
        if PurePosixPath(name).name not in NOT_ROWS
        and not any(part.startswith((".", "__")) for part in PurePosixPath(name).parts)
    ]


def refuse_outside(readme: str | None, said: str) -> None:
    """Raise ValueError for a README that names files outside its folder."""
    for one in _configs(readme, said):
        patterns = _patterns(one["data_files"], said) if "data_files" in one else []
        for pattern in [pattern for _, pattern in patterns] + [str(one.get("data_dir", "."))]:
            _refuse_outside(pattern, said)


def choose(
    names: Iterable[str], readme: str | None, config: str | None, split: str, said: str
) -> Chosen:
    """Choose the files of `split`.

    `said`: the field and value that named the folder, for messages.

    Raises ValueError for a folder without data files, an unknown split or configuration, and a
    README that names files outside.
    """
    rows = data_files(names)
    if not rows:
        raise ValueError(
            f"{said}: it holds no data file; one must end in {', '.join(KINDS)} (text also "
            f"{', '.join(PACKED)})"
        )
    asked = _from_readme(readme, config, rows, said)
    if asked is None:
        if config is not None:
            raise ValueError(
                f"data.config = {config}: {said} has no configurations; leave data.config out"
            )
        asked = _by_name(rows)
    if split not in asked:
        raise ValueError(
            f"{said} has no split {split}; it has {listed(list(asked))}: set data.split"
        )
    kinds = Counter(kind_of(name) for name in asked[split])
    kind = max(kinds, key=lambda one: kinds[one])
    files = tuple(name for name in asked[split] if kind_of(name) == kind)
    others = tuple(name for name in asked[split] if kind_of(name) != kind)
    return Chosen(files, tuple(asked), others)


def _by_name(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if (split := _split_of(name)) is not None:
            found.setdefault(split, []).append(name)
    return found or {"train": list(names)}


def _split_of(name: str) -> str | None:
    """The split in a file's name, else in its folders' names."""
    for part in reversed(PurePosixPath(name).parts):
        words = set(re.split(r"[-._ \d]+", part.lower()))
        for split, known in SPLITS.items():
            if words & set(known):
                return split
    shard = SHARD.fullmatch(name)
    return shard.group(1) if shard else None


def _from_readme(
    readme: str | None, config: str | None, names: Sequence[str], said: str
) -> dict[str, list[str]] | None:
    """Files by split, as a README's configuration names them; None without one."""
    configs = [one for one in _configs(readme, said) if {"data_files", "data_dir"} & one.keys()]
    if not configs:
        return None
    named = [str(one.get("config_name", "default")) for one in configs]
    if config is None:
        preferred = [one for one in configs if one.get("default") is True]
        if not preferred and len(configs) > 1 and "default" not in named:
            raise ValueError(
                f"{said} has configurations {listed(named)}: choose one with data.config=NAME"
            )
        chosen = (preferred or [configs[named.index("default") if "default" in named else 0]])[0]
    elif config in named:
        chosen = configs[named.index(config)]
    else:
        raise ValueError(
            f"data.config = {config}: {said} has no such configuration; it has {listed(named)}"
        )
    if "data_files" not in chosen:
        within = str(chosen["data_dir"]).strip("./") + "/"
        return _by_name([name for name in names if name.startswith(within)])
    files: dict[str, list[str]] = {}
    for split, pattern in _patterns(chosen["data_files"], said):
        _refuse_outside(pattern, said)
        found = [name for name in names if _matches(name, str(PurePosixPath(pattern)))]
        if not found:
            raise ValueError(f"{said}: README.md names data_files {shown(pattern)}, none is there")
        files.setdefault(split, []).extend(found)
    return {split: sorted(set(found)) for split, found in files.items()}


def _refuse_outside(pattern: str, said: str) -> None:
    path = PurePosixPath(pattern)
    if path.is_absolute() or ".." in path.parts or re.match(r"\w+:", pattern):
        raise ValueError(
            f"{said}: README.md names data_files {shown(pattern)}, which lies outside the "
            "folder; only files inside it are read. Name that file itself as data.source"
        )


def _matches(name: str, pattern: str) -> bool:
    """Match a shell pattern.

    * stays within a folder, ** does not, and a folder matches its files.
    """
    parts = re.split(r"(\*\*/?|\*|\?|\[[^\]/]+\])", pattern)
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(
        signs.get(part) or (part.replace("[!", "[^") if part[:1] == "[" else re.escape(part))
        for part in parts
    )
    try:
        whole = re.fullmatch(regex, name, re.DOTALL) is not None
    except re.error:
        whole = False
    return whole or name == pattern or name.startswith(pattern.rstrip("/") + "/")


def _patterns(found: Any, said: str) -> list[tuple[str, str]]:
    """(split, pattern) of a README's data_files, in any of its forms."""
    if isinstance(found, str):
        return [("train", found)]
    pairs: list[tuple[str, str]] = []
    for one in found if isinstance(found, list) else [found]:
        if isinstance(one, str):
            pairs.append(("train", one))
        elif isinstance(one, dict) and {"split", "path"} <= one.keys():
            paths = one["path"] if isinstance(one["path"], list) else [one["path"]]
            pairs += [(str(one["split"]), str(path)) for path in paths]
        elif isinstance(one, dict) and "split" not in one:
            for split, paths in one.items():
                each = paths if isinstance(paths, list) else [paths]
                pairs += [(str(split), str(path)) for path in each]
        else:
            raise ValueError(f"{said}: README.md has data_files = {shorten(found)}; correct it")
    return pairs


def _configs(readme: str | None, said: str) -> list[dict[str, Any]]:
    """The `configs` of a README's YAML head."""
    if readme is None or not readme.startswith("---"):
        return []
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases could make it grow without end")
            return super().compose_node(parent, index)

    head = readme[3:README_BYTES].partition("\n---")[0]
    try:
        values = yaml.load(head, Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return _complain(said, f"a head that is not read ({shown(str(error).splitlines()[0])})")
    configs = values.get("configs", []) if isinstance(values, dict) else []
    if not isinstance(configs, list) or not all(isinstance(one, dict) for one in configs):
        return _complain(said, f"configs = {shorten(configs)}")
    return configs


def _complain(said: str, what: str) -> list[dict[str, Any]]:
    raise ValueError(f"{said}: README.md has {what}; correct it, or name the files themselves")
