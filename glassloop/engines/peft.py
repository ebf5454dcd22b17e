"""The engine: a frozen base, LoRA adapters beside its linear layers, and a forward pass that ends in loss sums.

Legend: B rows, T tokens, H hidden size, V vocabulary, R rank of the adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from glassloop.base.checks import check_devices, check_dtypes, check_plain_head, check_unpatched
from glassloop.base.host_pages import HostPages
from glassloop.base.layer_file import NotStreamable
from glassloop.base.quantised import LoadReport, load_base
from glassloop.base.source import loading_errors, resolve_source
from glassloop.base.streamed import load_streamed
from glassloop.config.config import LoraConfig, ModelConfig
from glassloop.data.rows import Pass
from glassloop.engines.adapters import attach_lora, load_adapter
from glassloop.engines.norms import fuse_norms
from glassloop.formula.loss import token_loss_sums
from glassloop.plan.honoured import GROUPS

if TYPE_CHECKING:
    from glassloop.engines.fused.engine import FusedEngine


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.id`, at the same commit as its weights.

    Where it names no pad token, EOS is used for padding: masks go by length here, so the two are never confused.
    Raises ValueError naming model.id where there is no tokenizer or it has no EOS.
    """
    source = resolve_source(model)
    with loading_errors(model):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=model.trust_remote_code
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.id = {model.id} has a tokenizer without an EOS token: no row could teach it to stop; take another model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_engine(
    model: ModelConfig,
    lora: LoraConfig,
    *,
    precision: str,
    checkpointing: bool,
    seed: int,
    device: torch.device,
    first: Callable[[], AbstractContextManager[Any]],
    engine: str = "peft",
    longest_row: int | None = None,
    memory_base: str | int = "auto",
) -> Engine:
    """Load the base onto `device`, attach adapters in fp32, and check what must be true before training.

    Args:
        precision: bf16 | fp16 | fp32, the dtype of the base and of its matrix products. Autocast is the caller's.
        checkpointing: recompute each decoder layer in the backward pass.
        seed: of the fresh adapters' A matrices; equal on all ranks, so that their adapters are equal.
        first: context in which one rank of a host goes before the others (it downloads and quantises).
        engine: peft | fused | unsloth. longest_row: tokens; None: as many as the model has positions (unsloth has to know).
        memory_base: memory.base, for the engine fused.

    Returns:
        The engine, in training mode.

    Raises:
        ValueError: for a model, target, adapter folder or launch that cannot train as asked; names the field and the cure.
    """
    assert engine in ("peft", "fused", "unsloth"), engine
    shared: dict[str, Any] = dict(precision=precision, device=device, first=first)
    only_on_cpu: tuple[str, ...] = ()
    pages = None
    if engine == "unsloth":
        from glassloop.engines import unsloth

        hf, report = unsloth.load_with_unsloth(
            model,
            lora,
            load_tokenizer(model),
            checkpointing=checkpointing,
            seed=seed,
            longest_row=longest_row,
            **shared,
        )
        only_on_cpu = unsloth.ON_CPU
    else:
        base, report, pages = _load(model, engine, memory_base, shared)
        check_unpatched(base, engine)
        check_plain_head(base, device, report.name)
        fuse_norms(base)
        hf = attach_lora(base, lora, seed=seed, base_name=report.name, commit=report.commit)
        if checkpointing and engine == "peft":
            recompute_layers(base, model.id)
    if model.init_adapter is not None:
        load_adapter(hf, model.init_adapter, lora, base_name=report.name, commit=report.commit)  # type: ignore[arg-type]
    check_devices(hf, device, but=only_on_cpu)
    check_dtypes(hf, precision)
    if engine == "fused":
        return _fused_engine(hf, report, checkpointing, pages).train()
    return (PeftEngine(hf, report) if engine == "peft" else _unsloth_engine(hf, report)).train()


def _load(
    model: ModelConfig, engine: str, memory_base: str | int, shared: dict[str, Any]
) -> tuple[PreTrainedModel, LoadReport, HostPages | None]:
    """The base; for fused over a file of layers, if its weights have that form."""
    if engine != "fused" or model.quantization != "nf4":
        return *load_base(model, **shared), None
    locking = {"gpu": "no", "auto": "try"}.get(str(memory_base), "must")
    try:
        return load_streamed(model, GROUPS, **shared, locking=locking)  # type: ignore[arg-type]
    except NotStreamable as error:
        if locking == "must":
            raise ValueError(
                f"memory.base = {memory_base}: the base cannot stream ({error}): set it to gpu"
            ) from error
        return *load_base(model, **shared), None


def _fused_engine(
    hf: nn.Module, report: LoadReport, checkpointing: bool, pages: HostPages | None
) -> FusedEngine:
    """glassloop's own path over the same storage. Recomputed layers are the least that it needs; room.py may let it keep some."""
    try:
        from glassloop.engines.fused.engine import FusedEngine
    except ImportError as error:
        raise ValueError(
            f"execution.engine = fused needs triton, which cannot be imported here ({error}): pip install triton, or set execution.engine=peft"
        ) from error
    return FusedEngine(hf, report, keep=not checkpointing, pages=pages)


def _unsloth_engine(hf: nn.Module, report: LoadReport) -> PeftEngine:
    """Unsloth's decoder under the reference's loss; see unsloth_engine.py."""
    from glassloop.engines import unsloth

    return PeftEngine(
        hf,
        report,
        name="unsloth",
        packed_bounds=unsloth.packed_bounds,
        before_training_pass=unsloth.train_again,
    )


class PeftEngine(nn.Module):
    """A PEFT model and our loss: transformers + PEFT + bitsandbytes is the reference engine, Unsloth's model the engine `unsloth`.

    Attributes:
        name: as in execution.engine.
        hf: the PEFT model; generation and saving go through it.
        report: how the base was loaded.
        packed_bounds: rows' lengths -> the decoder's own arguments for a packed pass; None: as transformers has them.
        before_training_pass: called with `hf` before a pass in training mode.
    """

    def __init__(
        self,
        hf: nn.Module,
        report: LoadReport,
        *,
        name: str = "peft",
        packed_bounds: Callable[[tuple[int, ...]], dict[str, Any]] | None = None,
        before_training_pass: Callable[[nn.Module], None] | None = None,
    ):
        super().__init__()
        self.hf = hf
        self.report = report
        self.name = name
        self.packed_bounds = packed_bounds
        self.before_training_pass = before_training_pass
        self._packing_checked = False
        # DistributedDataParallel would send rank 0's base over the others': half of it, since NF4's scales are no parameters.
        # Bases are compared instead. The name is DDP's own.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, p in self.named_parameters() if not p.requires_grad
        ]
        self._ddp_params_and_buffers_to_ignore += [name for name, _ in self.named_buffers()]

    @property
    def attention(self) -> str:
        """What computes attention: transformers' choice, or the engine's name where it brings its own."""
        return self.hf.config._attn_implementation if self.name == "peft" else self.name  # type: ignore[union-attr, return-value]

    def forward(self, p: Pass) -> tuple[Tensor, Tensor]:
        """Summed token cross-entropy of a pass: loss_sum () fp32 with gradient, row_loss_sums (rows,) fp32 without. One rank's own sums."""
        if self.training and self.before_training_pass is not None:
            self.before_training_pass(self.hf)
        if p.packed:
            self.check_packing()
            hidden = self.hidden_states(p.input_ids, p.position_ids, p.lengths)  # (1, T, H)
        else:
            hidden = self.hidden_states(p.input_ids)  # (B, T, H)
        assert hidden.shape[:2] == p.input_ids.shape, (
            f"{self.name} cut a pass of {tuple(p.input_ids.shape)} places"
        )
        head = self.hf.get_base_model().get_output_embeddings()  # type: ignore[operator]
        return token_loss_sums(
            hidden, head.weight, head.bias, p.targets, p.row_of, len(p.row_ids), places=p.places
        )

    def hidden_states(
        self, input_ids: Tensor, positions: Tensor | None = None, lengths: tuple[int, ...] = ()
    ) -> Tensor:
        """(B, T, H): the decoder's output after its last norm. `positions` (1, T) and `lengths` are given for packed passes only.

        Padding is to the right: under causal attention no row's place sees it, so no mask is given and attention may take its fastest
        kernel. In a packed pass positions restart at each row, and transformers makes every layer's block-diagonal causal mask of that
        (sliding windows included); flash_attention_2 takes the rows' bounds instead.
        """
        where: dict[str, Any] = {}
        if positions is not None:
            where["position_ids"] = positions
            if self.packed_bounds is not None:
                where |= self.packed_bounds(lengths)
            elif self.hf.config._attn_implementation == "flash_attention_2":  # type: ignore[union-attr]
                ends = [0, *accumulate(lengths)]
                bounds = torch.tensor(ends, dtype=torch.int32).to(
                    input_ids.device, non_blocking=True
                )
                where |= {
                    "cu_seq_lens_q": bounds,
                    "cu_seq_lens_k": bounds,
                    "max_length_q": max(lengths),
                    "max_length_k": max(lengths),
                }
        decoder = self.hf.get_base_model().get_decoder()  # type: ignore[operator]
        return decoder(input_ids=input_ids, use_cache=False, **where).last_hidden_state

    @torch.no_grad()
    def check_packing(self) -> None:
        """Raise ValueError unless rows of a packed pass are apart. Tried once, on two short rows.

        Exchanging the first row's tokens may not move the second row by a bit, and the second row gives about what it gives alone
        (about: another shape takes another kernel, and a deep model amplifies bf16's rounding).
        """
        if self._packing_checked:
            return
        name = type(self.hf.get_base_model()).__name__  # type: ignore[operator]
        cure = "set execution.layout=literal"
        device = next(self.parameters()).device
        size = self.hf.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        ids = (
            torch.arange(3, 19, device=device).unsqueeze(0) % size
        )  # (1, 16): rows of 9 and 7 tokens
        other = torch.cat([ids[:, :9].flip(1), ids[:, 9:]], dim=1)
        positions = torch.tensor([[*range(9), *range(7)]], device=device)
        was_training = self.training
        self.eval()
        try:
            packed, beside_other = (
                self.hidden_states(tokens, positions, (9, 7))[:, 9:].float()
                for tokens in (ids, other)
            )
        except TypeError as error:
            raise ValueError(
                f"execution.layout = packed: {name} takes no position_ids ({error}): {cure}"
            ) from error
        else:
            alone = self.hidden_states(ids[:, 9:]).float()
        finally:
            self.train(was_training)
        moved, off = (float((packed - one).norm() / alone.norm()) for one in (beside_other, alone))
        if not (moved < 1e-4 and off < 0.2):
            raise ValueError(
                f"execution.layout = packed: {name} lets rows of one pass see each other (a row moves by {moved:.1e} with the tokens "
                f"of another, and differs by {off:.1e} from the row alone): {cure}"
            )
        self._packing_checked = True


Engine = Union[PeftEngine, "FusedEngine"]  # what the loop calls: the same forward, hf and report


def recompute_layers(base: PreTrainedModel, model_id: str = "") -> None:
    """Recompute every decoder layer in the backward pass, by non-reentrant checkpointing.

    Raises ValueError if the model's class does not support it.
    """
    if not base.supports_gradient_checkpointing:
        raise ValueError(
            f"execution.checkpointing = True: {type(base).__name__} ({model_id}) cannot recompute "
            "its layers: set it to false"
        )
    # transformers 5.2x renamed the method; the old name warns there
    enable = (
        getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    # transformers lets the embeddings' output require grad, which only reentrant needs
    base.disable_input_require_grads()


def store_layers(base: PreTrainedModel) -> None:
    """Store every decoder layer's activations: the reverse of `recompute_layers`."""
    disable = (
        getattr(base, "activation_checkpointing_disable", None)
        or base.gradient_checkpointing_disable
    )
    disable()
