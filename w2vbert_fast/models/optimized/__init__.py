"""What swaps a block for a faster one: other classes of the same blocks, and the layers as graphs.

A block is swapped once, by `swap`; the model's own code in `models` does not know of it. Whatever
is attached to a block later (hooks, LoRA, offloading) is seen at each call, and then the block
computes as the class that it was swapped from.
"""
