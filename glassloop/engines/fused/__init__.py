"""glassloop's own engine for the Llama family: the base's NF4 bytes and PEFT's adapters, with a forward and a backward pass written out.

Each file has one concept, its kernel in Triton and, beside it, the same in plain torch under the same name with `_reference`: the torch form
is what a CPU runs and what the kernel is held to. Legend of shapes: T tokens of a pass (all its rows end to end), H hidden size, I width of the
MLP, N and K rows and columns of a weight, R columns of all adapters of a group, D head size.
"""
