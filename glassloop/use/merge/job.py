"""A merge, step by step: weights, files beside them, and its cost."""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from glassloop.base.dropped import free_dropped
from glassloop.base.hashing import base_hash
from glassloop.base.layer_file import LayerFile, NotStreamable
from glassloop.base.quantised import find_base
from glassloop.base.reading import DTYPES
from glassloop.base.saving import save_pretrained_here
from glassloop.base.source import resolve_source
from glassloop.base.streamed import layer_folder
from glassloop.disk.cache import cache_root
from glassloop.disk.publish import replace_file
from glassloop.plan.support import groups_of
from glassloop.use.heldout import rows_of
from glassloop.use.loaded import check_base, device_here, load
from glassloop.use.merge.folder import adds_bos, check_room, original_folder, read_json, write_rest
from glassloop.use.merge.layer_weights import LayerWeights
from glassloop.use.merge.merge import pairs_of, shards_of, write_merged
from glassloop.use.merge.modelfile import modelfile
from glassloop.use.merge.serve import commands
from glassloop.use.merge.table import Line, Seen, line, look, look_at_folder
from glassloop.use.merge.weights import Weights
from glassloop.use.trained import Trained, adapter_hash, adapter_weights

GIB = 2**30


OTHER = {"original": "dequantised", "dequantised": "original"}


class Job:
    """One merge: what is read, where from, and what was seen."""

    def __init__(
        self,
        given: argparse.Namespace,
        trained: Trained,
        tokenizer: Any,
        template: Any,
        columns: dict[str, str],
    ) -> None:
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
            cure = "name rows with --data FILE, or merge without the table: --no-table"
            self.rows = rows_of(
                trained,
                template,
                source=given.data,
                rows=given.rows,
                columns=columns,
                cure=cure,
            )
            for note in self.rows.notes:
                print(f"          {note}")

    def dtypes(self) -> tuple[Any, str]:
        """Dtype that 32-bit tensors are rounded to, and its name in config.json.

        It is the run's own 16 bits, bf16 for an fp32 run.
        """

        return (
            (torch.float16, "float16")
            if self.trained.config.execution.precision == "fp16"
            else (torch.bfloat16, "bfloat16")
        )

    def weights(self, kind: str) -> tuple[Any, Path]:
        """The base's weights of that kind, and the folder with its config.

        Raises ValueError for another base than the run's.
        """

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
        # The copy that training here would read.
        if self.trained.config.execution.engine == "fused":
            with suppress(NotStreamable):
                return self.layer_weights()
        found = find_base(model, precision=precision, device=self.device, first=nullcontext)
        assert found.folder is not None
        weights = Weights(Path(found.folder), DTYPES[precision])
        if any(".experts." in name for name in weights):
            raise ValueError(
                "--base dequantised: training rounds this model's experts to NF4 after it has read "
                "them, and no file holds them so: --base original"
            )
        return weights, Path(found.folder)

    def layer_weights(self) -> tuple[LayerWeights, Path]:
        """The base's file of layers, which the engine `fused` trains over."""
        model, dtype = self.trained.config.model, DTYPES[self.trained.config.execution.precision]
        files_hash = base_hash(self.source, cache_root(model.cache_dir) / "file_hashes.json")
        folder, _ = layer_folder(self.source, files_hash, model, groups_of, dtype, self.device)
        return LayerWeights(LayerFile.open(folder), dtype), folder

    def write(self, folder: Path, kind: str) -> None:
        """Merged weights of that kind and all that stands beside them."""

        weights, base = self.weights(kind)
        dtype, name = self.dtypes()
        most = int(self.given.shard_gib * GIB)
        needed = sum(shard.bytes for shard in shards_of(weights, most))
        if kind == self.given.base:  # the other one comes later, beside it
            check_room(
                self.given.out, needed, with_table=self.quantised and not self.given.no_table
            )
        started, peak, changed = time.perf_counter(), PeakMemory(), 0
        pairs = pairs_of(adapter_weights(self.trained), self.trained.config.lora)
        for shard, merged in write_merged(weights, pairs, folder, dtype=dtype, most_bytes=most):
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
        """Measure the adapter as trained, then both merges.

        One merge is written for good, the other for the comparison only.
        """

        loaded = load(self.trained, self.device)
        rows = self.rows.rows
        self.reference = look(loaded.hf.get_base_model(), rows, loaded.device, loaded.autocast)
        with loaded.hf.disable_adapter():
            base = look(loaded.hf.get_base_model(), rows, loaded.device, loaded.autocast)
        del loaded
        free_dropped(self.device)  # before 16-bit weights take its place
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

        try:
            lines = self.table(self.given.out, spare)
            self.write_facts(self.given.out, lines)
        except (ValueError, OSError, RuntimeError) as error:  # a lack of memory has many names
            raise ValueError(
                f"the table could not be made ({error}); {self.given.out} is whole and stays: "
                "glassloop evaluate measures the adapter, --no-table merges without comparing"
            ) from error
        return lines

    def seen(self, folder: Path) -> Seen:
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
        assert self.reference is not None
        return line(name, seen, self.reference, len(self.rows.rows))

    def to_4_bits(self, folder: Path) -> None:
        """Round the merged weights to NF4 in place."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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
            r=self.trained.config.lora.most_rank,
            trains_tokens=bool(self.trained.config.lora.trainable_token_indices),
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
        lines = (self.given.out / "SERVE.txt").read_text(encoding="utf-8").splitlines()
        for text in lines:
            print(
                f"serve     {text}"
                if not text.startswith("#")
                else f"          {text.removeprefix('# ')}:"
            )


class PeakMemory:
    """Peak of resident memory since it was made, in GiB.

    It is the whole process's if the system cannot count anew.
    """

    def __init__(self) -> None:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def gib(self) -> float:
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
