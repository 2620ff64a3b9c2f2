"""What training costs, counted and not measured: `estimate` by formulas, `hlo` from a compiled program's text.

May import: the ground and models of `beit_jax`.
"""
