"""The fused engine: the whole model as one autograd node.

Its backward pass is written out layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassloop.base.host_pages import HostPages
from glassloop.base.packed import Packed
from glassloop.base.streamed import put_weights
from glassloop.data.rows import Pass
from glassloop.engines.fused import chunked
from glassloop.engines.fused import layer as layers
from glassloop.engines.fused.building import build_layer, multiplier
from glassloop.engines.fused.choosing import tiers_for
from glassloop.engines.fused.exchange import rows_of_all
from glassloop.engines.fused.host import HostRoom, on_host
from glassloop.engines.fused.linear import Scratch
from glassloop.engines.fused.loss import head_loss
from glassloop.engines.fused.matrices import Moves
from glassloop.engines.fused.norm import add_norm, norm_backward
from glassloop.engines.fused.parts import Saved, Where, join, part
from glassloop.engines.fused.positions import where_of
from glassloop.engines.fused.stream import LayerStream
from glassloop.engines.fused.supported import describe_supported
from glassloop.formula.loss import sums_by_row
from glassloop.predict.choice import Asked
from glassloop.predict.tiers import SLOTS, Tiers, away_bytes, away_widths


@dataclass
class PassState:
    """A pass between forward and backward."""

    where: Where
    saved: list[Saved]
    tiers: Tiers
    chunk: int  # places that products take at a time; 0: all
    end: Tensor  # (S, H): the last layer's output, at supervised places
    grad_normed: Tensor  # (S, H): gradient of the loss sum at the last norm's output


class FusedEngine(nn.Module):
    """A supported family's decoder over the storage of a PEFT model.

    Attributes:
        of: its description.
        name: as in execution.engine.
        hf: the PEFT model over the same weights and adapters; generation and saving go through it.
        report: how the base was loaded.
        tiers: what memory is spent on; `use_tiers` changes it between passes.
    """

    name = "fused"
    attention = "fused"  # it brings its own

    def __init__(
        self, hf: nn.Module, report: Any, *, keep: bool = False, pages: HostPages | None = None
    ):
        """Keep every layer whole, or recompute every layer.

        `pages`: the base's layers on the host, over which `hf` was built; None: it lies on the
        device. Raises ValueError naming the part of the model that is not supported.
        """
        super().__init__()
        self.hf, self.report = hf, report
        base: Any = hf.get_base_model()  # type: ignore[operator]
        self.embedding = base.get_input_embeddings().weight  # (V, H)
        self.head = base.get_output_embeddings().weight  # (V, H)
        self.of = describe_supported(base.config, base, self.embedding.dtype)
        decoder = base.get_decoder()
        self.norm, self.rotary = multiplier(decoder.norm.weight, self.of), decoder.rotary_emb
        self.pages = pages
        self.layers = [
            build_layer(one, self.of, self.embedding.dtype, index, self.packed(index))
            for index, one in enumerate(decoder.layers)
        ]
        self.stream = None if pages is None else LayerStream(pages, self.embedding.device)
        self.scratch = Scratch()
        streamed = 0 if pages is None else len(self.layers) - len(pages.on_card)
        self.tiers = Tiers(len(self.layers) if keep else 0, streamed=streamed)
        if self.stream is not None:
            self.stream.open(min(SLOTS, streamed))
        self.embedding_away = False
        self.host = HostRoom(self.embedding.device)
        self.trained = [p for p in self.parameters() if p.requires_grad]
        self.adapted: list[Any] = [module for module in hf.modules() if hasattr(module, "lora_A")]
        self.places: list[int] = []
        self.inward: Moves | None = None
        self.outward: list[Moves] = []
        # Explicit reduction only: DDP would reduce zeros.
        self._ddp_params_and_buffers_to_ignore: list[str] = []

    def packed(self, index: int) -> dict[str, Packed] | None:
        """A layer's weights on the host or the card; None without `pages`."""
        if self.pages is None:
            return None
        return self.pages.file.packed(index, self.pages.seen(index), self.pages.shared)

    def use_tiers(self, tiers: Tiers) -> None:
        """Spend memory by `tiers` from the next pass on.

        An embedding that has gone to the host stays there.
        """
        assert not (tiers.streamed and tiers.held), "streamed layers hold no weights in 16 bits"
        if tiers.streamed != self.tiers.streamed:
            self.place_layers(tiers.streamed)
        for index, one in enumerate(self.layers):
            for linear in one.linears:
                linear.hold() if index < tiers.held else linear.release()
        if tiers.host == "nothing":
            self.host.open(0, 0)
        else:
            self.send_embedding_away()
        self.tiers, self.places = tiers, []  # where adapters are rounded to has moved,
        self.inward, self.outward = None, []  # and what knew of it would keep its memory

    def send_embedding_away(self) -> None:
        """Keep an embedding that is not the head on the host."""
        if self.embedding is not self.head and not self.embedding_away:
            self.embedding.data, self.embedding_away = on_host(self.embedding.data), True

    def place_layers(self, streamed: int) -> None:
        """Put the first `streamed` layers on the host, others on the card."""
        assert self.pages is not None and self.stream is not None, "this base is on the card"
        decoder = self.hf.get_base_model().get_decoder()  # type: ignore[operator, union-attr]
        for index, (one, module) in enumerate(zip(self.layers, decoder.layers, strict=True)):
            away, was = index < streamed, index < self.tiers.streamed
            if away == was:
                continue
            self.pages.send_back(index) if away else self.pages.bring(index)
            found = self.packed(index)
            assert found is not None
            for linear in one.linears:
                linear.packed = found[linear.group]
                names = self.of.groups[linear.group]
                put_weights(
                    module,
                    names,
                    linear.packed,
                    self.embedding.dtype,
                    double=linear.packed.nested,
                )
        self.stream.open(min(SLOTS, streamed))

    def visit(self, index: int) -> None:
        """Have a streamed layer's weights ready for what comes next."""
        if index < self.tiers.streamed:
            assert self.stream is not None
            self.stream.fill(index, self.layers[index], self.scratch)

    def visits(self, *, backward: bool) -> list[int]:
        """Streamed layers in the order in which a pass copies them.

        It turns at the last one.
        """
        streamed = self.tiers.streamed
        if not backward:
            return list(range(streamed))
        return list(reversed(range(min(streamed, len(self.layers) - 1))))

    def choose_tiers(self, asked: Asked) -> Tiers:
        """Choose tiers by what is free. On a CPU everything is kept."""
        return tiers_for(self, asked)

    @property
    def movable_bytes(self) -> int:
        """Bytes of the embedding, if it may lie on the host."""
        return 0 if self.embedding is self.head else self.embedding.nbytes

    def make_room(self, tiers: Tiers, tokens: int) -> None:
        """Make room on the host for passes of `tokens` slot tokens.

        Raises ValueError naming memory.host_gib where the system does not lock so much.
        """
        self.host.most_tokens = tokens
        layers = 0 if tiers.host == "nothing" else len(self.layers) - tiers.kept
        self.host.open(layers, away_bytes(self.layers[0].sizes, tokens, tiers.host))

    def forward(self, p: Pass) -> tuple[Tensor, Tensor]:
        """Summed token cross-entropy of a pass, this rank's alone.

        A pass that ranks share needs all of them here, and in backward. Rank 0 has its rows then.

        Returns loss_sum () fp32 with gradient and row_loss_sums (rows,) fp32 without. The gradient
        is added to the adapters' `.grad`, which must exist.
        """
        with torch.autocast(p.input_ids.device.type, enabled=False):
            if torch.is_grad_enabled():
                return _Pass.apply(self.trained[0], self, p)  # type: ignore[return-value]
            loss_sum, row_loss_sums, _ = self.run_forward(p, training=False)
            return loss_sum, row_loss_sums

    def run_forward(self, p: Pass, *, training: bool) -> tuple[Tensor, Tensor, PassState | None]:
        """The pass, and what its backward needs."""
        if not len(p.places):  # nothing to learn, and nothing to add
            none = torch.zeros(len(p.row_ids), device=p.input_ids.device)
            return none.sum(), none, None
        self.refresh(training)
        where = where_of(p, self.of, self.rotary, self.embedding.dtype, self.scratch)
        x: Tensor = self.embedded(p.input_ids.flatten())  # (T, H)
        y, saved, tiers = None, [], self.tiers
        recomputed = len(self.layers) - tiers.kept
        # All ranks that share a pass take one path, though their places differ by one.
        places = len(x) if p.part is None else max(p.part.places)
        chunk = tiers.chunk if places > tiers.chunk else 0
        if training and tiers.host != "nothing":
            widths = away_widths(self.layers[0].sizes, tiers.host)
            self.host.begin(recomputed, len(x), widths, x.dtype)
        if self.stream is not None:
            self.stream.begin(self.visits(backward=False), self.visits(backward=training))
        for index, one in enumerate(self.layers):
            self.visit(index)
            last = index == len(self.layers) - 1
            keep = index >= recomputed if training else None
            away = tiers.host if training and index < recomputed else "nothing"
            wanted = p.places if last else None
            if chunk:
                x, y, kept = chunked.forward(
                    one, x, y, where, chunk, training=training, away=away, places=wanted
                )
            else:
                x, y, kept = layers.forward(one, x, y, where, keep=keep, away=away, places=wanted)
            if away != "nothing":
                assert kept is not None
                kept, large = part(kept)
                self.host.put(index, large)
                del large  # or it would live a layer longer
            saved.append(kept)
        normed = torch.empty_like(x)  # (S, H): supervised places are all that is left
        end = add_norm(x, y, self.norm, self.of.eps, normed)
        del x, y
        labels = p.targets.flatten().index_select(0, p.places)  # (S,)
        losses, grad_normed = head_loss(
            normed,
            self.head,
            labels,
            wants_grad=training,
            scale=self.of.logit_scale,
            cap=self.of.logit_cap,
        )
        owner = p.row_of.flatten().index_select(0, p.places)
        state = None
        if p.part is not None and p.part.idle:  # a place that stands in
            losses.zero_()
        if grad_normed is not None:
            if p.part is not None and p.part.idle:
                grad_normed.zero_()
            state = PassState(where, saved, tiers, chunk, end, grad_normed)  # type: ignore[arg-type]
        by_row = sums_by_row(losses, owner, len(p.row_ids))
        return losses.sum(), by_row if p.part is None else rows_of_all(by_row, p.part), state

    def run_backward(self, state: PassState, grad: Tensor) -> None:
        """Add the gradient of `grad` x loss sum to the adapters' own."""
        room, hidden = (
            max(linear.rank for one in self.layers for linear in (one.o, one.down)),
            state.end.shape[1],
        )
        out = torch.zeros(
            len(state.end), hidden + room, dtype=state.end.dtype, device=state.end.device
        )
        slope = state.grad_normed.mul_(grad.to(out.dtype))
        norm_backward(slope, state.end, self.norm, self.of.eps, out[:, :hidden])
        del slope, state.end, state.grad_normed  # or they would live as long as the layers
        recomputed = (
            0 if state.tiers.host == "nothing" else len(self.layers) - state.tiers.kept
        )  # layers that left theirs on the host
        if self.stream is not None:
            self.stream.begin(self.visits(backward=True), self.visits(backward=False))
        for index in reversed(range(len(self.layers))):
            self.visit(index)
            saved = state.saved.pop()
            if index < recomputed:
                saved = join(self.layers[index], saved, self.host.take(index))
            if 0 < index <= recomputed:
                self.host.fetch(index - 1)  # comes while this layer computes
            how = self.layers[index], out, saved, state.where
            if state.chunk:
                out = chunked.backward(*how, state.chunk, first=index == 0)
            else:
                out = layers.backward(*how, first=index == 0)
            self.outward[index].carry_out(add=True)

    def refresh(self, training: bool) -> None:
        """Round the adapters, and note the addresses of their gradients.

        Both may have moved since the last pass.
        """
        self.scratch.forget()
        places = [p.data_ptr() for p in self.trained]
        places += (
            [p.grad.data_ptr() for p in self.trained if p.grad is not None] if training else []
        )
        if places != self.places:
            linears = [one.linears for one in self.layers]
            self.inward = Moves(
                [move for four in linears for linear in four for move in linear.inward()]
            )
            self.outward = (
                [
                    Moves([m for linear in four for m in linear.outward(self.scratch)])
                    for four in linears
                ]
                if training
                else []
            )
            self.places = places
        assert self.inward is not None
        self.inward.carry_out(add=False)
        if self.adapted[0].disable_adapters:  # by hf.disable_adapter(): the base alone
            assert not training, "there is nothing to train without adapters"
            for one in self.layers:
                for linear in one.linears:
                    linear.b[:, : linear.adapted].zero_()

    def embedded(self, ids: Tensor) -> Tensor:
        """(T, H): the first layer's input of ids (T,)."""
        x, scale = F.embedding(ids, self.embedding), self.of.embedding_scale
        if scale == 1:
            return x
        return x * (x.new_tensor(scale) if self.of.embedding_rounds else scale)


class _Pass(torch.autograd.Function):
    """The model between a pass and its loss sum.

    It has one input for autograd's sake; gradients are added in place.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, engine: FusedEngine, p: Pass):  # type: ignore[override]
        loss_sum, row_loss_sums, ctx.state = engine.run_forward(p, training=True)
        ctx.engine = engine
        ctx.mark_non_differentiable(row_loss_sums)
        return loss_sum, row_loss_sums

    @staticmethod
    def backward(ctx, grad: Tensor, _):  # type: ignore[override]
        if ctx.state is not None:
            ctx.engine.run_backward(ctx.state, grad)
        ctx.state = None
        return None, None, None
