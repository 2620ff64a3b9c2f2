"""Every tolerance of the test suite, and why. A failing one means: find the operation; never loosen it."""

MODEL = 1e-5
"""Largest absolute difference of any hidden state or logit (of magnitude 3) of a float32 model up to base size."""

SEGMENTATION = 1e-4
"""As MODEL, of segmentation logits of magnitude 3: the blocks are followed by sums over up to 3840 x 9 inputs."""

STATISTICS = 1e-5
"""Of running statistics of magnitude 1 after one step."""

EXPORT = 1e-6
"""Logits of a model that went to Flax and back: the tensors are the same bits, the program is the same."""

GRADIENT = 1e-4
"""Of a gradient leaf: largest absolute difference over the largest magnitude in the reference's leaf."""

STEP = 1e-4
"""Of one AdamW step, as a share of the learning rate, where the gradient stands clear of float32 noise."""

RESIZE = 1e-5
"""Resampled tables with values of magnitude 1 to 3, in float32."""

SPLINE = 1e-12
"""Resampling matrices against SciPy's in float64."""

BFLOAT16 = 0.05
"""Largest difference of a bfloat16 model's logits over the largest logit: eight bits of mantissa, a few layers."""

MARGIN = 1e-4
"""Between the best and the second best visual token: above it, which one is best is no matter of rounding."""

HALF = 2e-3
"""Of the largest logit of a float16 model: a few of its roundings (2^-11 each) in another order."""

TRAINING = 1e-4
"""Of losses, relatively, and of weights after twenty steps, over the largest way that a weight of their leaf went: each
step adds rounding of a gradient, and the optimizer of that comparison does not magnify it."""
