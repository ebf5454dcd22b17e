"""Merge the adapter into 16-bit weights, and show on held-out rows what that costs."""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassloop.cli.evaluate import columns_of
from glassloop.cli.generate import add_run_options, overrides_of

if TYPE_CHECKING:
    from glassloop.use.merge.table import Line, Seen
    from glassloop.use.trained import Trained

GIB = 2**30
OTHER = {"original": "dequantised", "dequantised": "original"}


def main(argv: list[str]) -> int:
    """`glassloop merge RUN OUT --base original|dequantised`. Exit code 0; 2 for what is refused."""
    own = argparse.ArgumentParser(
        prog="glassloop merge",
        allow_abbrev=False,
        description="W + (alpha/r) B A in fp32, rounded once to 16 bits, shard by shard; no GPU needed. original: into the base's own "
        "weights. dequantised: into the NF4 weights that training computed with.",
        epilog="OUT loads in transformers and vLLM. SERVE.txt in it has the commands, Modelfile is for Ollama, glassloop_merge.json has the table.",
    )
    add_run_options(own)
    own.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    own.add_argument(
        "--base", choices=OTHER, default="original", help="what to merge into (default: original)"
    )
    own.add_argument(
        "--shard-gib",
        type=float,
        default=4.0,
        metavar="GIB",
        help="largest file, and about what is held in memory",
    )
    own.add_argument(
        "--data", metavar="SOURCE", help="rows for the table instead of the run's held-out ones"
    )
    own.add_argument(
        "--columns",
        metavar="ROLE=NAME,...",
        help="columns of --data where they differ: dialogue=text,label=is_scam",
    )
    own.add_argument(
        "--rows",
        type=int,
        default=32,
        metavar="N",
        help="at most N rows for the table (default: 32)",
    )
    own.add_argument("--no-table", action="store_true", help="merge alone; compare nothing")
    own.add_argument(
        "--bits",
        type=int,
        choices=(16, 4),
        default=16,
        help="4 rounds the merged weights to NF4 once more",
    )
    own.add_argument(
        "--accept-rounding",
        action="store_true",
        help="say so for --bits 4, which is refused without",
    )
    given = own.parse_args(argv)
    if given.bits == 4 and not given.accept_rounding:
        raise ValueError(
            "--bits 4: rounding merged weights to 4 bits changes most of them by more than a light "
            "fine-tune does, and can undo it. Serve the adapter beside the 4-bit base, or merge "
            "into 16 bits; to do it all the same and see the cost in the table: --accept-rounding"
        )
    for name in ("rows", "shard_gib"):
        if not 0 < getattr(given, name) < math.inf:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(given, name)}: it must be a number above 0"
            )
    columns_of(given.columns)  # refused before anything is opened
    return run(given)


def unwritable(out: Path, error: OSError) -> ValueError:
    return ValueError(f"OUT = {out} cannot be written ({error.strerror}): name another place")


def run(given: argparse.Namespace) -> int:
    from glassloop.loop.launch import hush
    from glassloop.use.merge.folder import check_out
    from glassloop.use.merge.table import text
    from glassloop.use.trained import load_tokenizer_of, open_trained, template_of

    check_out(given.out)
    hush(1)
    trained = open_trained(given.run, given.at, overrides_of(given))
    print(f"adapter   {trained.checkpoint}, {trained.why}; scale alpha/r = {trained.scale:g}")
    tokenizer = load_tokenizer_of(trained)
    template = template_of(trained, tokenizer)
    job = Job(given, trained, tokenizer, template)
    from glassloop.base.cache import published

    lines: list[Line] = []
    beside = given.out.absolute().parent
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=beside) as spare:
        with published(given.out, lambda _, error: unwritable(given.out, error)) as folder:
            job.write(folder, given.base)
            if given.bits == 4:
                lines = [] if given.no_table else job.table(folder, Path(spare))
                job.to_4_bits(folder)
                if not given.no_table:
                    lines.append(job.line("that, rounded to NF4 once more", job.seen(folder)))
            job.finish(folder, lines)
        print(f"wrote     {given.out}", flush=True)
        if (
            given.bits == 16 and not given.no_table
        ):  # after OUT is there, so that whatever befalls the comparison takes no merge away
            lines = job.table_of_written(Path(spare))
    for line in text(lines, "the adapter on " + job.trained_on):
        print(line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        GIB if sys.platform == "darwin" else 2**20
    )
    print(f"peak      {job.peak_gib:.1f} GiB of host memory while merging, {peak:.1f} GiB in all")
    job.say_how_to_serve()
    return 0


class Job:
    """One merge: what is read, where from, and what was seen."""

    def __init__(
        self, given: argparse.Namespace, trained: Trained, tokenizer: Any, template: Any
    ) -> None:
        from glassloop.base.source import resolve_source
        from glassloop.use.loaded import device_here

        self.given, self.trained, self.tokenizer, self.template = (
            given,
            trained,
            tokenizer,
            template,
        )
        self.source = resolve_source(trained.config.model)
        self.quantised = trained.config.model.quantization == "nf4"
        self.trained_on = "NF4" if self.quantised else "its base"
        self.device = device_here()
        self.peak_gib = 0.0
        self.rows: Any = None
        self.reference: Seen | None = None
        if given.base == "dequantised" and not self.quantised:
            raise ValueError(
                "--base dequantised: the run's base was not quantised (model.quantization = none): "
                "merge into original"
            )
        if not given.no_table:
            from glassloop.use.heldout import rows_of

            cure = "name rows with --data FILE, or merge without the table: --no-table"
            self.rows = rows_of(
                trained,
                template,
                source=given.data,
                rows=given.rows,
                columns=columns_of(given.columns),
                cure=cure,
            )
            for note in self.rows.notes:
                print(f"          {note}")

    def dtypes(self) -> tuple[Any, str]:
        """What 32-bit tensors are rounded to, and its name in config.json: the run's own 16 bits, bf16 for an fp32 run."""
        import torch

        return (
            (torch.float16, "float16")
            if self.trained.config.execution.precision == "fp16"
            else (torch.bfloat16, "bfloat16")
        )

    def weights(self, kind: str) -> tuple[Any, Path]:
        """The base's weights of that kind, and the folder with its config.

        Raises ValueError for another base than the run's.
        """
        import torch

        from glassloop.base.cache import cache_root
        from glassloop.base.quantised import find_base
        from glassloop.base.reading import DTYPES
        from glassloop.base.source import base_hash
        from glassloop.use.loaded import check_base
        from glassloop.use.merge.folder import original_folder, read_json
        from glassloop.use.merge.weights import Weights

        model, precision = self.trained.config.model, self.trained.config.execution.precision
        check_base(
            self.trained, base_hash(self.source, cache_root(model.cache_dir) / "file_hashes.json")
        )
        if kind == "original":
            folder = original_folder(self.source)
            if "quantization_config" in read_json(folder / "config.json"):
                raise ValueError(
                    f"model.id = {model.id} comes quantised, so there are no original weights: "
                    "--base dequantised"
                )
            return Weights(folder), folder
        device = (
            torch.device("cuda") if self.device.type == "cuda" else torch.device("cpu")
        )  # the copy that training here would read
        found = find_base(model, precision=precision, device=device, first=nullcontext)
        assert found.folder is not None
        return Weights(Path(found.folder), DTYPES[precision]), Path(found.folder)

    def write(self, folder: Path, kind: str) -> None:
        """Merged weights of that kind and all that stands beside them."""
        from glassloop.use.merge.folder import check_room, write_rest
        from glassloop.use.merge.merge import pairs_of, shards_of, write_merged
        from glassloop.use.trained import adapter_weights

        weights, base = self.weights(kind)
        dtype, name = self.dtypes()
        most = int(self.given.shard_gib * GIB)
        needed = sum(shard.bytes for shard in shards_of(weights, most))
        if kind == self.given.base:  # the other one comes later, beside it
            check_room(
                self.given.out, needed, with_table=self.quantised and not self.given.no_table
            )
        started, peak, changed = time.perf_counter(), PeakMemory(), 0
        pairs = pairs_of(adapter_weights(self.trained))
        for shard, merged in write_merged(
            weights, pairs, self.trained.scale, folder, dtype=dtype, most_bytes=most
        ):
            changed += merged
            print(
                f"          {shard.file}: {len(shard.names)} tensors, {merged} merged, "
                f"{shard.bytes / GIB:.2f} GiB",
                flush=True,
            )
        seconds, self.peak_gib = time.perf_counter() - started, max(self.peak_gib, peak.gib())
        print(
            f"merged    {changed} weights into {kind}, {needed / GIB:.2f} GiB in {seconds:.1f} s",
            flush=True,
        )
        write_rest(folder, self.trained, base, self.template, self.tokenizer, name)

    def table(self, folder: Path, spare: Path) -> list[Line]:
        """The adapter as trained, then both merges: one written for good, the other for the comparison only."""
        from glassloop.use.loaded import load
        from glassloop.use.merge.table import line, look

        loaded = load(self.trained, self.device)
        rows = self.rows.rows
        self.reference = look(loaded.hf.get_base_model(), rows, loaded.device, loaded.autocast)
        with loaded.hf.disable_adapter():
            base = look(loaded.hf.get_base_model(), rows, loaded.device, loaded.autocast)
        del loaded
        told = [
            line(f"{self.trained_on} without the adapter", base, self.reference, len(rows)),
            line(f"adapter on {self.trained_on}", self.reference, self.reference, len(rows)),
        ]
        merges = {self.given.base: self.line(f"merged into {self.given.base}", self.seen(folder))}
        if self.quantised:
            other = OTHER[self.given.base]
            try:
                self.write(spare, other)
                merges[other] = self.line(f"merged into {other}", self.seen(spare))
            except (ValueError, OSError) as error:
                print(f"          not compared with {other}: {error}")
        return [*told, *(merges[kind] for kind in ("dequantised", "original") if kind in merges)]

    def table_of_written(self, spare: Path) -> list[Line]:
        """The table of OUT as it stands there, and into its facts.

        Raises ValueError where it cannot be made; OUT stays.
        """
        import torch

        try:
            lines = self.table(self.given.out, spare)
            self.write_facts(self.given.out, lines)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            raise ValueError(
                f"the table could not be made ({error}); {self.given.out} is whole and stays: "
                "glassloop evaluate measures the adapter, --no-table merges without comparing"
            ) from error
        return lines

    def seen(self, folder: Path) -> Seen:
        from glassloop.base.reading import DTYPES
        from glassloop.use.merge.table import look_at_folder

        config = self.trained.config
        precision = (
            "fp32"
            if self.device.type == "cpu" and config.execution.precision == "fp16"
            else config.execution.precision
        )
        return look_at_folder(
            folder, self.rows.rows, self.device, DTYPES[precision], config.model.trust_remote_code
        )

    def line(self, name: str, seen: Seen) -> Line:
        from glassloop.use.merge.table import line

        assert self.reference is not None
        return line(name, seen, self.reference, len(self.rows.rows))

    def to_4_bits(self, folder: Path) -> None:
        """Round the merged weights to NF4 in place."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        from glassloop.base.cache import save_pretrained_here

        dtype, _ = self.dtypes()
        double = self.trained.config.model.double_quantization
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": self.device}, quantization_config=settings
        )
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            path.unlink()
        save_pretrained_here(model, folder)

    def write_facts(self, folder: Path, lines: list[Line]) -> None:
        """glassloop_merge.json."""
        import dataclasses

        from glassloop.disk.publish import replace_file
        from glassloop.use.trained import adapter_hash

        state = self.trained.state
        facts = {
            "schema": 1,
            "made_by": "glassloop merge",
            "merged_into": self.given.base,
            "bits": self.given.bits,
            "update": state.update,
            "adapter": adapter_hash(self.trained),
            "base": self.source.name if self.source.commit else Path(self.source.name).name,
            "base_commit": self.source.commit,
            "base_hash": state.base_hash,
            "scale": self.trained.scale,
            "table": [dataclasses.asdict(line) for line in lines],
        }
        replace_file(folder / "glassloop_merge.json", (json.dumps(facts, indent=1) + "\n").encode())

    def finish(self, folder: Path, lines: list[Line]) -> None:
        """Facts of the merge, the Modelfile, how to serve."""
        from glassloop.use.merge.folder import adds_bos, read_json
        from glassloop.use.merge.modelfile import modelfile
        from glassloop.use.merge.serve import commands

        self.write_facts(folder, lines)
        generation = read_json(folder / "generation_config.json")
        # a longer context than 32,768 costs memory that few need
        context = min(
            int(read_json(folder / "config.json").get("max_position_embeddings") or 4096), 32768
        )
        no_ollama = (
            "Ollama does not read NF4 weights: merge into 16 bits for it"
            if self.given.bits == 4
            else None
        )
        try:
            if no_ollama is None:
                bos = adds_bos(self.tokenizer)
                text = modelfile(
                    self.tokenizer, generation, adds_bos=bos, source=".", context=context
                )
                (folder / "Modelfile").write_text(text, encoding="utf-8")
        except ValueError as error:
            no_ollama = str(error)
        lines_of_serve = commands(
            self.given.out.absolute(),
            self.trained.checkpoint.absolute(),
            base=self.source.name,
            revision=self.source.commit,
            r=self.trained.config.lora.r,
            nf4=self.quantised,
            generation=generation,
            context=context,
            opens_think=self.template.opens_think,
            no_ollama=no_ollama,
        )
        (folder / "SERVE.txt").write_text("\n".join(lines_of_serve) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors makes its files private

    def say_how_to_serve(self) -> None:
        for line in (self.given.out / "SERVE.txt").read_text(encoding="utf-8").splitlines():
            print(
                f"serve     {line}"
                if not line.startswith("#")
                else f"          {line.removeprefix('# ')}:"
            )


class PeakMemory:
    """The most resident memory since it was made, in GiB; of the whole process where the system does not let it be counted anew."""

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def gib(self) -> float:
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
