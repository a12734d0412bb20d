"""Attention kernels in Triton; nothing here is imported before a call is about to use it.

A program takes one tile of queries (or, for the gradients of keys, of keys) of one head and walks
over what that tile meets, addressed in the maps by coordinates: nothing is gathered in memory, no
scores are kept, no atomics. `rectangles` serves windows, halos and neighborhoods, `tiles` serves
routed regions and groups; `inner` holds what they share.
"""
