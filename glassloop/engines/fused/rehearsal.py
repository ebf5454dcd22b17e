"""Kernels compiled before they are needed, from a config alone.

The engine runs once over a model without memory: tensors on torch's meta device have shapes, dtypes
and strides, and `launch` compiles what it is given of them. So exactly the kernels of a run are
compiled, and there is no second list of them. A run lets this work beside the loading of its base.

Nothing is computed and no bit of a run depends on it. A kernel that was not foreseen is compiled
at its first launch.
"""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from glassloop.base.card_errors import first_line
from glassloop.base.packed import SCALE_BLOCK, Packed
from glassloop.config import LoraConfig
from glassloop.data.batches import build_pass
from glassloop.data.rows import Row
from glassloop.engines.adapters import attach_lora
from glassloop.engines.fused.engine import FusedEngine
from glassloop.plan.support import description_of, fields_of
from glassloop.predict.tiers import Tiers

META = torch.device("meta")
LENGTHS = (9, 16, 16)  # tokens of the rows


@dataclass(frozen=True)
class Quantised:
    """How a base's weights lie in 4 bits."""

    nested: bool = True
    blocksize: int = 64


class Shapes(FusedEngine):
    """A fused engine over a model on the meta device."""

    def __init__(self, hf: nn.Module, quantised: Quantised):
        self.quantised = quantised
        super().__init__(hf, SimpleNamespace(name="shapes"), keep=True)

    def packed(self, index: int) -> dict[str, Packed]:
        base: Any = self.hf.get_base_model()  # type: ignore[operator]
        layer, found = base.get_decoder().layers[index], {}
        for group, names in self.of.groups.items():
            plain = [layer.get_submodule(name) for name in names]
            plain = [getattr(one, "base_layer", one) for one in plain]
            rows = tuple(one.out_features for one in plain)
            found[group] = shapes_of(rows, plain[0].in_features, self.quantised)
        return found


def shapes(config: Any, lora: LoraConfig, dtype: torch.dtype, quantised: Quantised) -> Shapes:
    """Build the engine of a model on the meta device.

    Random numbers stay as they were. Not for a second thread: transformers changes torch's default
    dtype while it builds a model.

    Args:
        config: transformers' config of the model. dtype: of its 16- or 32-bit weights.

    Raises:
        ValueError: the fused engine does not support the model.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng([]):
        with META:
            base = AutoModelForCausalLM.from_config(shortened(config), dtype=dtype)
        base.eval().requires_grad_(False)
        hf = attach_lora(base, lora, seed=0, base_name="shapes", commit=None)
    engine = Shapes(hf, quantised)
    for parameter in engine.trained:
        parameter.grad = torch.empty_like(parameter)
    return engine


def rehearse(engine: Shapes) -> None:
    """Compile the kernels of short rows' passes, forward and backward."""
    rows = [Row(str(n), (0,) * n, (False, *(True,) * (n - 1))) for n in LENGTHS]
    for packed, kept in ((True, len(engine.layers)), (False, 0)):
        engine.use_tiers(Tiers(kept))
        p = build_pass(rows, packed=packed, pad_id=0, device=META)
        with torch.no_grad():
            *_, state = engine.run_forward(p, training=True)
            assert state is not None
            engine.run_backward(state, torch.ones((), dtype=torch.float32, device=META))


def shortened(config: Any) -> Any:
    """Copy a config, with as few layers as have every kind.

    At least two, if there are: the last one differs.
    """
    text = config.get_text_config()
    kinds, count = description_of(fields_of(config)).kinds, int(text.num_hidden_layers)
    fewest = next(n for n in range(1, count + 1) if set(kinds[:n]) == set(kinds))
    fewest = min(count, max(2, fewest))
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, value[:fewest])
    text.num_hidden_layers = fewest
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config


def shapes_of(rows: tuple[int, ...], columns: int, of: Quantised) -> Packed:
    """A group's weights without memory."""
    blocks = [height * columns // of.blocksize for height in rows]

    def fp32(count: int) -> torch.Tensor:
        return torch.empty(count if of.nested else 0, dtype=torch.float32, device=META)

    return Packed(
        codes=torch.empty(sum(rows) * columns // 2, dtype=torch.uint8, device=META),
        absmax=torch.empty(
            sum(blocks), dtype=torch.uint8 if of.nested else torch.float32, device=META
        ),
        scales=fp32(sum(-(-one // SCALE_BLOCK) for one in blocks)),
        table=fp32(256),
        offsets=fp32(len(rows)),
        levels=torch.empty(16, dtype=torch.float32, device=META),
        rows=rows,
        columns=columns,
        blocksize=of.blocksize,
    )


class Rehearsal:
    """A rehearsal in a thread of its own, beside other work.

    Attributes:
        seconds: it took; None: it has not ended well.
    """

    def __init__(self, engine: Shapes, device: torch.device):
        self.engine, self.device = engine, device
        self.seconds: float | None = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="kernels", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        started = time.monotonic()
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # a thread begins on the first card
            rehearse(self.engine)
        except Exception as error:  # `end` says it
            self.error = error
        else:
            self.seconds = time.monotonic() - started

    def end(self) -> str:
        """Wait for it.

        Returns a note on what kept it from its end, or "".
        """
        self.thread.join()
        if self.error is None:
            return ""
        why = f"{type(self.error).__name__}: {first_line(self.error)}"
        return f"kernels compile at their first launch ({why})"
