"""Adapters: small changes of large kernels, as products of two thin matrices (LoRA, DoRA).

`kernel` is an adapted kernel as a value with a product of its own, with which the models multiply. `low_rank` says
which kernels are adapted, how factors are named, drawn and merged. `file` keeps factors beside a native checkpoint.
May import: the ground, `weights`.
"""
