"""Memory, cards and time of an outlook, as lines."""

from __future__ import annotations

from glassloop.plan.outlook import CardTime, Outlook
from glassloop.plan.work import chooses_passes
from glassloop.predict.cards import CONTEXT_GIB, FRAGMENTATION, NCCL_GIB, Verdict
from glassloop.predict.fused_time import hidden_tokens
from glassloop.predict.longest import LONG
from glassloop.predict.spend import HIDING_TOKENS
from glassloop.predict.terms import GIB, layer_bytes
from glassloop.predict.time_checks import CALIBRATED_ON, errors

LABEL = 10  # columns before a line's text
KEPT = "kept: layers that keep their activations; in 16 bits: layers that hold their weights so"


def memory_lines(outlook: Outlook) -> list[str]:
    assert (
        outlook.ledger is not None and outlook.other_ledger is not None and outlook.work is not None
    )
    work = outlook.work
    fused = outlook.config.execution.engine == "fused"
    asked, other = outlook.ledger_names
    per_phase = [outlook.ledger.phases, outlook.other_ledger.phases]
    what = (
        f"memory.profile: {asked}, and {other}"
        if fused
        else f"base in {asked} as asked, and in {other}"
    )
    lines = [
        f"{'memory':<{LABEL}}GiB of a GPU by phase, predicted; {what}; heaviest pass {work.rows} "
        f"x {work.tokens:,}",
        f"{'':<{LABEL}}{'phase':<12}{asked:>10}{other:>10}",
    ]
    lines += [
        f"{'':<{LABEL}}{phase:<12}" + "".join(f"{one[phase] / GIB:>10.2f}" for one in per_phase)
        for phase in per_phase[0]
    ]
    phases = per_phase[0]
    peak = max(phases, key=lambda phase: phases[phase] if phase != "peak" else 0)
    largest = sorted(
        (term for term in outlook.ledger.terms if peak in term.phases),
        key=lambda term: -term.size_bytes,
    )[:5]
    lines.append(f"{'':<{LABEL}}most of the peak ({peak}):")
    lines += [f"{'':<{LABEL}}  {term.size_bytes / GIB:>7.2f}  {term.what}" for term in largest]
    paged = (
        round(2 * (outlook.trainable or 0) / 2**20) if work.optimizer == "paged_adamw_8bit" else 0
    )
    pinned = (
        "layers' large tensors and the embedding, where the card cannot hold them (see rows)"
        if fused
        else ""
    )
    host = (
        f"{paged:,} MiB of paged optimizer state"
        if paged
        else pinned or "nothing pinned but a pass's ids"
    )
    return [*lines, f"{'':<{LABEL}}host memory beside libraries: {host}"]


def card_lines(outlook: Outlook) -> list[str]:
    """A table of need and use by card.

    Columns: the least that works, what is asked, what that leaves.
    """
    nccl = f" + {NCCL_GIB} NCCL" if outlook.plan.ranks > 1 else ""
    blank = " " * LABEL
    lines = [
        f"{'cards':<{LABEL}}GiB a rank = peak + {FRAGMENTATION:.0%} fragmentation + {CONTEXT_GIB} "
        f"CUDA context{nccl}; rows an update stay {outlook.plan.rows_per_update}",
        f"{blank}least: one row a pass, as few activations kept as possible"
        f"{_on_host(outlook)}; asked: {_asked(outlook)}",
        *([f"{blank}{KEPT}"] if outlook.config.execution.engine == "fused" else []),
        f"{blank}{'card':<9}{'has':>6}{'least':>7}{'asked':>7}{'spare':>7}",
    ]
    for one in outlook.verdicts:
        least = "-" if one.least_gib is None else f"{one.least_gib:.1f}"
        numbers = f"{one.has_gib:>6.1f}{least:>7}{one.needed_gib:>7.1f}{one.spare_gib:>7.1f}"
        lines.append(f"{blank}{one.card:<9}{numbers}  {_judgement(one, outlook)}")
    return lines


def _on_host(outlook: Outlook) -> str:
    """What else the column `least` supposes."""
    config = outlook.config
    may = config.execution.engine == "fused" and config.model.quantization == "nf4"
    return ", the base on the host" if may and config.memory.base == "auto" else ""


def _asked(outlook: Outlook) -> str:
    """The request that the column `asked` is computed for."""
    config = outlook.config
    if config.execution.engine == "fused" and config.execution.checkpointing:
        return f"memory.profile={config.memory.profile}"
    return f"activations {'recomputed' if config.execution.checkpointing else 'stored'}"


def _judgement(one: Verdict, outlook: Outlook) -> str:
    """A card's verdict: fit, layers kept, fields that change it."""
    note = f"; {one.note}" if one.note else ""
    if one.fits:
        text = "fits"
        if one.kept is not None and outlook.shapes is not None:
            held = f", {one.held} in 16 bits" if one.held else ""
            streamed = f", {one.streamed} streamed" if one.streamed else ""
            text += f": {one.kept}/{outlook.shapes.layers} kept{held}{streamed}"
        if chooses_passes(outlook.config) and one.pass_tokens:
            text += f", passes of {one.pass_tokens:,}"
        return text + (f"; also {one.faster} ({one.faster_gib:.1f})" if one.faster else "") + note
    if one.cure:
        return f"does NOT fit; {one.cure} does ({one.cure_gib:.1f}){note}"
    return f"does NOT fit, nor any smaller pass: lower data.max_tokens{note}"


def row_lines(outlook: Outlook) -> list[str]:
    """The longest row of each card; empty if the engine is silent."""
    config, work = outlook.config, outlook.work
    known = [one for one in outlook.verdicts if one.longest_tokens is not None]
    if not known or work is None:
        return []
    blank = " " * LABEL
    has = f"memory.host_gib={config.memory.host_gib}"
    if config.memory.host_gib == "auto":
        each = " a rank" if work.ranks > 1 else ""
        has += f": {work.host_has_gib:.0f} GiB{each} of a host that is not here"
    lines = [
        f"{'rows':<{LABEL}}the longest that trains, alone in its pass{_together(outlook)}, every "
        "token supervised; "
        f"the same under min and fill; host GiB a rank locks then ({has})",
        f"{blank}{'card':<9}{'tokens':>9}{'host':>7}",
    ]
    for one in known:
        lines.append(
            f"{blank}{one.card:<9}{one.longest_tokens:>9,}{one.longest_host_gib:>7.1f}  "
            + (one.longest_tiers if one.longest_tokens else "none")
        )
    return [*lines, *_beyond_positions(known, outlook), *_speed_lines(known, outlook)]


def _beyond_positions(known: list[Verdict], outlook: Outlook) -> list[str]:
    """A line on rows beyond the positions of the model."""
    positions = None if outlook.shapes is None else outlook.shapes.positions
    if positions is None or all((one.longest_tokens or 0) <= positions for one in known):
        return []
    return [
        f"{' ' * LABEL}the model has {positions:,} positions (max_position_embeddings): longer "
        "rows train, but it was not made for them"
    ]


def _together(outlook: Outlook) -> str:
    """How many cards share a row; empty for one."""
    split = 1 if outlook.work is None else outlook.work.split
    return f", over {split} such cards" if split > 1 else ""


def _speed_lines(known: list[Verdict], outlook: Outlook) -> list[str]:
    """Predicted tokens/s of long rows by card; empty without rates."""
    known = [one for one in known if one.rows]
    if not known:
        return []
    blank = " " * LABEL
    lengths = "".join(f"{tokens:>10,}" for tokens in LONG)
    split = 1 if outlook.work is None else outlook.work.split
    where = "on one card" if split == 1 else f"on {split} cards without their exchange"
    lines = [
        f"{blank}predicted tokens/s of such rows, one an update, {where}",
        f"{blank}{'card':<9}{lengths}{'longest':>10}",
    ]
    for one in known:
        *shorter, longest = one.rows
        found = {row.tokens: f"{row.tokens_per_s:,.0f}" for row in shorter}
        cells = [found.get(tokens, "-") for tokens in LONG] + [f"{longest.tokens_per_s:,.0f}"]
        lines.append(f"{blank}{one.card:<9}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def base_lines(outlook: Outlook) -> list[str]:
    """Cards that layers stream to; empty if all stay on the card."""
    shapes, work, config = outlook.shapes, outlook.work, outlook.config
    streaming = [one for one in outlook.verdicts if one.fits and one.streamed]
    if not streaming or shapes is None or work is None:
        return []
    blank = " " * LABEL
    gib = layer_bytes(shapes, work) * shapes.layers / GIB
    lines = [
        f"{'base':<{LABEL}}4-bit layers that a card does not hold stream from its host "
        f"(memory.base={config.memory.base}); host memory: {gib:.1f} GiB, once a machine",
    ]
    for one in streaming:
        assert one.streamed is not None and one.pass_tokens is not None
        text = f"{one.streamed} of {shapes.layers} stream"
        hidden = hidden_tokens(
            shapes,
            one.card,
            row_tokens=outlook.row_tokens,
            streamed=one.streamed,
            r=work.r,
            targets=work.targets,
        )
        if hidden is not None:
            text += f", hidden behind passes of {hidden:,} tokens and more"
            if one.pass_tokens < hidden:
                text += f" (the heaviest here has {one.pass_tokens:,}: {_longer(outlook)})"
        lines.append(f"{blank}{one.card:<9}{text}")
    return lines


def _longer(outlook: Outlook) -> str:
    """What makes passes longer."""
    if outlook.config.execution.layout == "literal":
        return "execution.layout=packed makes longer ones"
    return f"execution.pass_tokens={HIDING_TOKENS} makes longer ones"


def time_lines(outlook: Outlook) -> list[str]:
    exact = (
        "rows counted"
        if outlook.tokens
        else "if every row had that many: an upper bound"
        if outlook.row_tokens == outlook.config.data.max_tokens
        else "as given"
    )
    lines = [
        f"{'time':<{LABEL}}predicted, not measured; {outlook.row_tokens:,.0f} tokens a row "
        f"({exact}); training alone, all ranks"
        + (", without their exchange" if _together(outlook) else "")
    ]
    lines += [f"{'':<{LABEL}}{_card_time(one)}" for one in outlook.times]
    checked = "; ".join(
        f"{check.card}, {check.what}: "
        f"{error:+.0%}{' (fitted to it)' if check in CALIBRATED_ON else ''}"
        for check, _, error in errors(outlook.config.execution.engine)
    )
    return [*lines, f"{'':<{LABEL}}checked: {checked}. Other cards: never."]


def _card_time(one: CardTime) -> str:
    bound = ", bound by its host" if one.host_bound else ""
    if one.waits_share >= 0.005:
        bound += f", {one.waits_share:.0%} of it waiting for its host"
    return f"{one.card:<9}{one.tokens_per_s:>8,.0f} tokens/s  {duration(one.run_s):>9}{bound}"


def duration(seconds: float) -> str:
    """35 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
