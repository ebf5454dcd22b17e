"""The process that tokenises a large data set once, and its workers.

`python -m glassloop.data.making` reads an Order, pickled, from its standard input, and answers
with a line of JSON. It is a process of its own so that memory for text is given back, and so that
its workers can be forked: a rank has threads and a CUDA context, this process has neither.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glassloop.config import DataConfig
from glassloop.data.dataset import DIGITS, digested, require_rows, write_rows
from glassloop.data.duplicates import HeldoutRuns, is_no_copy, key
from glassloop.data.facts import Facts, facts_of, telling, together
from glassloop.data.identity import key_of
from glassloop.data.row_file import Manifest, SideFacts, Writer, write_manifest, writer
from glassloop.data.rows import Example, RowFault
from glassloop.data.sources import Files, Loaded, load_examples
from glassloop.data.taking import Faults
from glassloop.data.templates import Template, make_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 4000  # examples that a worker encodes at a time


@dataclass(frozen=True)
class Order:
    """What to make, and where."""

    data: DataConfig
    seed: int
    files: Files
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    key: str  # as the one who asks has found it
    texts: int  # training examples kept beside their rows; held-out ones are all kept


@dataclass(frozen=True)
class Part:
    """One chunk of a side, as bytes of the files."""

    arrays: dict[str, bytes]
    digested: bytes
    kept: bytes  # int32: places of the kept examples within the chunk
    untouched: bytes  # int32
    keys: bytes  # 32 of each kept example that is no copy
    near: list[tuple[str, str]]
    dropped: list[str]
    faults: list[tuple[str, str]]  # kind and message
    facts: Facts


@dataclass(frozen=True)
class Work:
    """What forked workers share with their parent."""

    examples: Sequence[Example]
    template: Template
    data: DataConfig
    heldout: HeldoutRuns | None
    enough: Any  # a shared byte: 1 once no more texts are wanted


@dataclass
class Side:
    """What is known of a side once its arrays are written."""

    kept: list[Example]
    digested: list[bytes]
    manifest: SideFacts
    repeated: int
    near: list[tuple[str, str]]


_work: list[Work] = []  # set before workers are forked


def make(order: Order) -> None:
    """Write the rows of an order into its folder.

    Raises ValueError for data that cannot train, as `build_rows` does, and OSError for a disk that
    refuses.
    """
    loaded = load_examples(order.data, order.seed, order.files)
    if key_of(order.data, order.seed, order.files, order.tokenizer) != order.key:
        raise ValueError(
            f"{loaded.source}: the data changed while they were read; start again once they are "
            "whole"
        )
    decide = telling((*loaded.train, *loaded.heldout))
    template = make_template(order.data, order.tokenizer, decide)
    with writer(order.folder) as out:
        # Held-out rows first, since training rows are compared with them.
        heldout = _side("heldout", loaded.heldout, loaded.source, template, order, out, None)
        runs = HeldoutRuns(heldout.kept) if heldout.kept else None
        train = _side("train", loaded.train, loaded.source, template, order, out, runs)
        sums = out.sums()
    digest = hashlib.sha256()
    for data in (*train.digested, *heldout.digested):
        digest.update(data)
    told = {one.name: getattr(loaded, one.name) for one in fields(Loaded)}
    del told["train"], told["heldout"]
    write_manifest(
        order.folder,
        Manifest(
            key=order.key,
            sides={"train": train.manifest, "heldout": heldout.manifest},
            loaded=told | {"mixed": [asdict(part) for part in loaded.mixed]},
            telling=decide,
            digest=digest.hexdigest()[:DIGITS],
            repeated=train.repeated,
            heldout_repeated=heldout.repeated,
            near_across=tuple(train.near),
            sums=sums,
        ),
    )


def _side(
    name: str,
    examples: Sequence[Example],
    source: str,
    template: Template,
    order: Order,
    out: Writer,
    heldout: HeldoutRuns | None,
) -> Side:
    """Write one side's arrays.

    `heldout`: rows to compare with, if there are any."""
    forked = multiprocessing.get_context("fork")
    enough, texts, rows = forked.Value("b", 0, lock=False), 0, 0
    kept: list[Example] = []
    side = Side(kept, [], SideFacts(len(examples)), 0, [])
    keys, untouched, facts, dropped = [], [], [], []
    faults = Faults(order.data)
    _work[:] = [Work(examples, template, order.data, heldout, enough)]
    starts = range(0, len(examples), CHUNK)
    for start, part in zip(starts, _parts(starts), strict=True):
        rows += len(part.kept) // 4
        if enough.value:
            part.arrays.update(texts=b"", text_lengths=b"")
        out.add(name, part.arrays)
        texts += len(part.arrays["text_lengths"]) // 4
        enough.value = name == "train" and texts >= order.texts
        if name == "heldout":
            kept += [examples[start + place] for place in array("i", part.kept)]
        side.digested.append(part.digested)
        side.near += part.near
        keys.append(part.keys)
        untouched.append(part.untouched)
        facts.append(part.facts)
        dropped += part.dropped
        for kind, message in part.faults:
            faults.add(RowFault(kind, message))
    faults.refuse(len(examples))
    lengths = array("i", np.sort(np.frombuffer(b"".join(untouched), np.int32)).tobytes())
    out.add(name, {"untouched": lengths.tobytes()})
    require_rows(
        source,
        "training" if name == "train" else "held-out",
        order.data,
        examples=len(examples),
        kept=rows,
        untouched_tokens=lengths,
        faulty=dict(faults.kinds()),
    )
    all_keys = np.frombuffer(b"".join(keys), "S32")
    side.repeated = len(all_keys) - len(np.unique(all_keys))
    side.manifest = SideFacts(len(examples), tuple(dropped), dict(faults.kinds()), together(facts))
    return side


def _parts(starts: range) -> Iterator[Part]:
    """The chunks in order, from as many processes as there are cores."""
    workers = min(len(os.sched_getaffinity(0)), len(starts))
    if workers < 2:
        yield from map(_part, starts)
        return
    gc.freeze()  # else a collection would copy every page that the workers share
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context) as pool:
        try:
            yield from pool.map(_part, starts)
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that tokenises rows was killed, perhaps for want of memory; free some, "
                "or train on fewer rows (data.rows)"
            ) from error


def _part(start: int) -> Part:
    """Encode one chunk."""
    work = _work[0]
    chunk = work.examples[start : start + CHUNK]
    written = write_rows(chunk, work.template, work.data)
    rows, examples = written.rows, written.examples
    ids = [row.row_id.encode() for row in rows]
    texts = [] if work.enough.value else [json.dumps(asdict(one)).encode() for one in examples]
    names = {row.row_id for row in rows}
    arrays = {
        "tokens": b"".join(_ints(row.input_ids) for row in rows),
        "supervised": b"".join(bytes(row.supervised) for row in rows),
        "lengths": _ints(map(len, rows)),
        "cut": bytes(row.truncated for row in rows),
        "ids": b"".join(ids),
        "id_lengths": _ints(map(len, ids)),
        "texts": b"".join(texts),
        "text_lengths": _ints(map(len, texts)),
    }
    return Part(
        arrays=arrays,
        digested=b"".join(map(digested, rows)),
        kept=_ints(place for place, one in enumerate(chunk) if one.row_id in names),
        untouched=_ints(written.untouched_tokens),
        keys=b"".join(key(one) for one in examples if is_no_copy(one)),
        near=[] if work.heldout is None else work.heldout.near(examples),
        dropped=written.dropped,
        faults=[(fault.kind, str(fault)) for fault in written.faults],
        facts=facts_of(examples, work.template.codec, work.data.answer_tokens),
    )


def _ints(numbers: Iterable[int]) -> bytes:
    return array("i", numbers).tobytes()


def main() -> int:
    """Make what standard input orders; answer with one line of JSON.

    {"made": true}, or {"refused": message}, or {"disk": message}.
    """
    gc.disable()  # millions of objects live to the end, and there are no cycles among them
    order = pickle.load(sys.stdin.buffer)
    try:
        make(order)
    except ValueError as error:
        answer: dict[str, Any] = {"refused": str(error)}
    except OSError as error:
        answer = {"disk": error.strerror or str(error)}
    except KeyboardInterrupt:
        return 130
    else:
        answer = {"made": True}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
