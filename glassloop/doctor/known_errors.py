"""Known error messages around this kind of training: their causes and cures."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """pattern: found in the message, any case. cause, cure: for a person."""

    pattern: str
    cause: str
    cure: str


KNOWN = (
    Known(
        r"out of memory|OutOfMemoryError",
        "A pass needs more GPU memory than is free.",
        "`glassloop plan` prints a setting for each card that fits with the same rows an update: "
        "recomputed activations, a smaller batch.size beside batch.rows_per_update. Do not prepare "
        "the model for k-bit training: it makes fp32 copies of embedding and head.",
    ),
    Known(
        r"No executable batch size found|reached zero",
        "A helper halved the batch on every failure and never made up for it with more "
        "accumulation.",
        "Set batch.size yourself and keep the rows of an update with batch.rows_per_update; "
        "glassloop never changes them.",
    ),
    Known(
        r"exitcode: -9|Signal 9|SIGKILL",
        "The kernel ended a process, nearly always because the host's memory was full: each rank "
        "reads the base on its own.",
        "Let the quantised copy be made once by one rank (`--num_processes 1` for the first "
        "start), close other programs, or add swap.",
    ),
    Known(
        r"loaded in (8|4)-bit.*different device|device_map\s*=\s*['\"]auto['\"]|Expected all "
        r"tensors to be on the same device",
        "device_map='auto' splits one model over all GPUs, which leaves a single rank; or a part "
        "of the model lies on another card.",
        "Start one process a GPU with accelerate_configs/ddp_2gpu.yaml: each loads the whole 4-bit "
        "model onto its own card, which is checked.",
    ),
    Known(
        r"mark a variable ready only once",
        "Under DDP, reentrant checkpointing runs a layer's backward hooks twice (with "
        "find_unused_parameters on).",
        "glassloop recomputes without reentrance and searches for no unused parameters; in other "
        "code set use_reentrant=False.",
    ),
    Known(
        r"expect_autograd_hooks_|static_graph",
        "DDP's static_graph does not go with accumulation: it fails, and where it does not fail it "
        "stops reducing.",
        "Leave static_graph off. execution.reduction=explicit uses no DDP at all.",
    ),
    Known(
        r"finished reduction in the prior iteration|did not receive grad",
        "DDP waits for the gradient of a parameter that this pass did not use, or a forward pass "
        "went around the wrapped model.",
        "Use execution.reduction=explicit, or call the wrapped model; every adapter must take part "
        "in each pass.",
    ),
    Known(
        r"None of the inputs have requires_grad|does not require grad and does not have a grad_fn",
        "Reentrant checkpointing saw only frozen inputs, so no gradient reaches the adapters.",
        "Use non-reentrant checkpointing (glassloop does), or enable_input_require_grads() in "
        "other code. Check lora.targets as well.",
    ),
    Known(
        r"flatten tensors with uniform dtype",
        "FSDP joins tensors of one dtype; 4-bit bytes, 16-bit norms and fp32 adapters are three.",
        "Use accelerate_configs/ddp_2gpu.yaml: in NF4 an 8B model fits each 24 GB card whole. FSDP "
        "would need bnb_4bit_quant_storage=bf16 and bf16 adapters.",
    ),
    Known(
        r"unscale FP16 gradients",
        "fp16's loss scaler refuses gradients that are fp16 themselves: the adapters were loaded "
        "in fp16.",
        "Train adapters in fp32 (glassloop always does; PEFT: autocast_adapter_dtype=True), or use "
        "bf16 where the card has it.",
    ),
    Known(
        r"unscale_cuda.*not implemented for 'BFloat16'",
        "bf16 adapters meet fp16's loss scaler.",
        "Use execution.precision=bf16 on cards that have it, else fp16 with fp32 adapters.",
    ),
    Known(
        r"Unexpected key.*(absmax|quant_map|quant_state)|(absmax|quant_map).*[Uu]nexpected",
        "A checkpoint of the whole 4-bit model was saved; bitsandbytes writes scales that it "
        "cannot read back.",
        "Save and load the adapter alone. glassloop's checkpoints hold no base weight, only its "
        "hash; resume with --resume RUN.",
    ),
    Known(
        r"doesn't support faster communication broadband|P2P or IB",
        "Consumer cards (RTX 40) have no peer-to-peer copies, and this driver claims that they do.",
        "export NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1, or update the driver (550.40.07 or newer). "
        "`glassloop doctor` tries it.",
    ),
    Known(
        r"Watchdog caught collective|collective operation timeout|NCCL "
        r"(operations|communicator).*(failed|timed out|aborted)|Timeout\(ms\)",
        "A rank waited for others that did something else (evaluating or saving alone) or could "
        "not be reached over NVLink, PCIe or the network.",
        "`glassloop doctor` times a small all-reduce. If that hangs: NCCL_P2P_DISABLE=1, then "
        "NCCL_IB_DISABLE=1. If a first download takes longer than the limit: "
        "execution.collective_timeout_s.",
    ),
    Known(
        r"No backend type associated with device type cpu|Tensors must be CUDA and dense",
        "NCCL was given a tensor on the CPU: a buffer of the model stayed there.",
        "Let glassloop load the model (it checks that every parameter and buffer is on the rank's "
        "card); gloo: execution.backend=gloo.",
    ),
    Known(
        r"Num GPUs( used)? = 1|Total train batch size.*=|using.*DataParallel",
        "Several GPUs are visible, no launcher ran: either one GPU is used, or the batch is "
        "silently multiplied by their number.",
        "Start with accelerate launch --config_file accelerate_configs/ddp_2gpu.yaml. glassloop "
        "refuses the other start, and holds the run to batch.ranks.",
    ),
    Known(
        r"lr_scheduler\.step\(\)` before|learning rate.*(too fast|is 0)",
        "A scheduler that Accelerate prepared advances once per rank: with 2 ranks the learning "
        "rate is 0 half-way.",
        "glassloop prepares no scheduler; lr(u) stands in plan.json for each update.",
    ),
    Known(
        r"loss.{0,6}0\.0\b.*nan|grad_norm.{0,4}nan|non-?finite|NaN or Inf",
        "A value left fp16's range, a kernel gave NaN, or a window had no supervised token (0 / "
        "0).",
        "`glassloop replay RUN --update N --bisect` names the first rank, row and layer. Cures: "
        "bf16; model.attention=eager to rule out a kernel; look at the rows with `glassloop data`.",
    ),
    Known(
        r"unsloth.*(requires|depends|incompatible)|ResolutionImpossible",
        "unsloth 2026.10 admits only torch < 2.15, transformers <= 5.17, trl <= 1.15 and datasets "
        "< 5.",
        "Give unsloth an environment of its own: pip install glassloop[unsloth] without "
        "constraints.txt.",
    ),
    Known(
        r"does(n't| not) support bf16|bf16.*not supported|has no bf16 units",
        "bf16 needs a card of compute capability 8.0 or higher (Ampere).",
        "Set execution.precision=fp16 on older cards: glassloop then scales the loss.",
    ),
    Known(
        r"driver version is insufficient|driver on your system is too old",
        "torch was built for a newer CUDA than the driver knows.",
        "Update the driver (580 or newer for CUDA 13, 525 or newer for CUDA 12), or install torch "
        "for an older CUDA.",
    ),
    Known(
        r"no kernel image is available",
        "torch or bitsandbytes holds no code for this card's compute capability.",
        "Install a torch built for a CUDA that knows the card (torch.cuda.get_arch_list() lists "
        "what it has).",
    ),
    Known(
        r"compiled without GPU support|libbitsandbytes_(cpu|cuda)|CUDA Setup failed",
        "bitsandbytes found no library for torch's CUDA version.",
        "pip install --upgrade bitsandbytes; check that torch itself has CUDA: `glassloop doctor`.",
    ),
    Known(
        r"Step (must only increase|cannot be set|\d+ (is )?(<|less))|steps? must be monotonically",
        "wandb's own step only grows, so values of updates that are redone after a resume are "
        "dropped.",
        "glassloop binds every metric to `update` and keeps all of it in metrics.jsonl.",
    ),
    Known(
        r"gated repo|GatedRepo|403 .*resolve|401 Client Error|is not a valid model "
        r"identifier|Invalid user token",
        "The hub asks for a login, or for its licence to be accepted, or the name is misspelt.",
        "`hf auth login`, accept the licence on the model's page, check model.id. "
        "DeepSeek-R1-Distill-Llama-8B is not gated.",
    ),
    Known(
        r"couldn't connect to|offline mode is enabled|LocalEntryNotFound|Max retries exceeded|Name "
        r"or service not known",
        "The hub cannot be reached and the files are not on this machine.",
        "Connect, unset HF_HUB_OFFLINE, or set model.id and data.source to local folders and "
        "files.",
    ),
    Known(
        r"No space left on device|Errno 28",
        "A disk is full. Checkpoints appear whole or not at all: the last complete one is sound.",
        "Make room or move run.dir, model.cache_dir or HF_HOME; lower checkpoint.keep or "
        "record.capsules_gib; resume with --resume RUN.",
    ),
    Known(
        r"EADDRINUSE|[Aa]ddress already in use",
        "Another run holds the launcher's port.",
        "Use the files of accelerate_configs (main_process_port: 0 takes a free one).",
    ),
    Known(
        r"sequence length is longer than the specified maximum",
        "A row is longer than the model's context.",
        "data.max_tokens bounds rows; data.too_long says whether longer ones are dropped (default) "
        "or cut (a cut row teaches no EOS).",
    ),
    Known(
        r"Setting `pad_token_id` to `eos_token_id`|never stops|pad_token.*eos_token",
        "Padding and EOS share an id; masks made from ids then hide the EOS that teaches the model "
        "to stop.",
        "Nothing to do here: masks go by length, and the EOS of every whole row is supervised "
        "(`glassloop data --show 3`).",
    ),
    Known(
        r"trust_remote_code",
        "The model brings Python code of its own.",
        "Set model.trust_remote_code=true if you trust it, or take a model that transformers "
        "knows.",
    ),
    Known(
        r"no longer equal|replicas (differ|disagree)",
        "Ranks hold different adapters: one rank stepped alone, or its memory is faulty.",
        "The message names update and matrix; resume from the last checkpoint with --resume RUN, "
        "and look at that host.",
    ),
)


def explain(message: str) -> tuple[Known, ...]:
    """Look up an error message; entries come in the table's order."""
    text = " ".join(message.split())
    return tuple(known for known in KNOWN if re.search(known.pattern, text, re.IGNORECASE))
