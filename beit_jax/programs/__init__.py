"""Programs for serving: a model as StableHLO or as ONNX, with its weights and its image processor beside it.

`manifest` is the page that says what a StableHLO program is: inputs, outputs, versions, digests. `program` loads and
calls one; it imports JAX, NumPy and safetensors alone, no Flax and no model of this library. `signature` says what the
program of a model takes and gives, `stablehlo` writes it by `jax.export`, and `onnx_model` writes ONNX by PyTorch.
May import: the ground, images, weights, models, `convert` and `inference`.
"""
