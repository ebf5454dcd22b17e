"""The reference engine: transformers, PEFT and bitsandbytes under the loop's own loss.

Legend: B rows, T tokens, H hidden size, V vocabulary, R rank of the adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from glassloop.base.checks import logit_factors
from glassloop.base.quantised import LoadReport
from glassloop.data.rows import Pass
from glassloop.formula.loss import TrainedRows, token_loss_sums


class PeftEngine(nn.Module):
    """A PEFT model under our loss.

    transformers, PEFT and bitsandbytes make the reference engine, `peft`; Unsloth's model makes
    `unsloth`.

    Attributes:
        name: as in execution.engine.
        hf: the PEFT model; generation and saving go through it.
        report: how the base was loaded.
        packed_bounds: rows' lengths -> the decoder's own arguments for a packed pass; None: as
            transformers has them.
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
        # DistributedDataParallel would send rank 0's base over the others': half of it, since NF4's
        # scales are no parameters. Bases are compared instead. The name is DDP's own.
        self._ddp_params_and_buffers_to_ignore = [
            name for name, p in self.named_parameters() if not p.requires_grad
        ]
        self._ddp_params_and_buffers_to_ignore += [name for name, _ in self.named_buffers()]

    @property
    def attention(self) -> str:
        """Implementation of attention.

        It is transformers' choice, or the engine's name if it brings its own.
        """
        return self.hf.config._attn_implementation if self.name == "peft" else self.name  # type: ignore[union-attr, return-value]

    def forward(self, p: Pass) -> tuple[Tensor, Tensor]:
        """Summed token cross-entropy of a pass, this rank's alone.

        Returns loss_sum () fp32 with gradient and row_loss_sums (rows,) fp32 without.
        """
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
        head, trained = head_of(self.hf)
        scale, cap = logit_factors(self.hf.config.get_text_config())  # type: ignore[union-attr, operator]
        return token_loss_sums(
            hidden,
            head.weight,
            head.bias,
            p.targets,
            p.row_of,
            len(p.row_ids),
            places=p.places,
            scale=scale,
            cap=cap,
            trained=trained,
        )

    def hidden_states(
        self, input_ids: Tensor, positions: Tensor | None = None, lengths: tuple[int, ...] = ()
    ) -> Tensor:
        """(B, T, H): the decoder's output after its last norm.

        `positions` (1, T) and `lengths` are given for packed passes only. Padding is to the right:
        under causal attention no row's place sees it, so no mask is given and attention may take
        its fastest kernel. In a packed pass positions restart at each row, and transformers makes
        every layer's block-diagonal causal mask of that (sliding windows included);
        flash_attention_2 takes the rows' bounds instead.
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
        """Raise ValueError unless rows of a packed pass are apart.

        Tried once, on two short rows. Exchanging the first row's tokens may not move the second row
        by a bit, and the second row gives about what it gives alone (another shape takes another
        kernel, and a deep model amplifies bf16's rounding).
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
                f"execution.layout = packed: {name} lets rows of one pass see each other (a row "
                f"moves by {moved:.1e} with the tokens "
                f"of another, and differs by {off:.1e} from the row alone): {cure}"
            )
        self._packing_checked = True


def head_of(hf: nn.Module) -> tuple[Any, TrainedRows | None]:
    """The head's linear layer, and rows of it that train.

    They are the embedding's, of a model whose head is its embedding.
    """
    head = hf.get_base_model().get_output_embeddings()  # type: ignore[operator]
    tokens = getattr(head, "token_adapter", None)
    if tokens is None:
        return head, None
    if tokens.disable_adapters:  # by hf.disable_adapter(): the base alone
        return tokens.base_layer, None
    (name,) = tokens.active_adapters
    places = torch.tensor(tokens.token_indices[name], device=tokens.base_layer.weight.device)
    return tokens.base_layer, TrainedRows(places, tokens.trainable_tokens_delta[name])


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
