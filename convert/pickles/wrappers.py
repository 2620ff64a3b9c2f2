"""Entries under which training programs keep weights."""

WRAPPERS = ("state_dict", "model", "module", "model_ema", "state_dict_ema", "student", "teacher")
_TRAINED = ("state_dict", "model", "module")
SETS = {"model": _TRAINED, "raw": _TRAINED, "ema": ("model_ema", "state_dict_ema", "teacher")}
"""The names that training loops give to the trained weights and to their moving average (DINO, iBOT: the teacher)."""
