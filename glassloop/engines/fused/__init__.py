"""glassloop's own engine for the Llama family.

It uses the base's NF4 bytes and PEFT's adapters, with forward and backward written out. Each file
has one concept: its kernel in Triton and, beside it, the same in plain torch under the same name
with `_reference`. The torch form is what a CPU runs and what the kernel is held to.

Legend: T tokens of a pass (all its rows end to end), H hidden size, I width of the MLP, N and K
rows and columns of a weight, R columns of all adapters of a group, D head size.
"""
