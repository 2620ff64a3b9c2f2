# %% [markdown]
# # Convert a checkpoint and check that it computes the same
#
# A PyTorch checkpoint of BEiT or Data2Vec-Vision is read, converted to Flax, compared with transformers stage by stage,
# and given back to PyTorch.
#
# `SOURCE = None` uses the checkpoint that this package contains: a BEiT of four blocks that transformers trained on
# handwritten digits. It is a real PyTorch checkpoint in Hugging Face's format, but its activations are small; what
# holds for it is evidence for the code, not for the one checkpoint that you are going to use. Give that one's name
# instead: every cell below is the same.

# %%
import subprocess
import sys

REPOSITORY = ""  # in Colab: where this package is cloned from, such as "https://host/name/beit-jax.git"
JAX = "jax"  # in Colab: "jax[cuda12]" on a runtime with a GPU, "jax[tpu]" on one with a TPU
if "google.colab" in sys.modules:
    if not REPOSITORY:
        raise SystemExit("Say where this package is cloned from: fill in REPOSITORY above, and run this cell again.")
    package = f"beit-jax[plot,torch] @ git+{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package, JAX], check=True)
# %matplotlib inline

# %%
SOURCE = None  # such as "microsoft/beit-base-patch16-224", "facebook/data2vec-vision-base-ft1k", or a directory

# %% [markdown]
# ## What it is
#
# `inspect` reads names and shapes, no tensor, and says whether all of them are accounted for.

# %%
from importlib.resources import files
from pathlib import Path

from beit_jax.cli.inspection import inspect
from beit_jax.hub import Source, resolve

digits = Source(Path(str(files("beit_jax") / "digits")), "embedded digits classifier")
source = resolve(SOURCE) if SOURCE else digits
print(*inspect(source).lines, sep="\n")

# %% [markdown]
# ## Convert
#
# Every tensor of the source is used or known to be derived, every parameter of the model is set exactly once, and every
# shape is checked before a byte is copied; otherwise there is an error that names the tensors, and no directory. On the
# command line: `beit-jax convert SOURCE native`.

# %%
from beit_jax import weights
from beit_jax.convert import importer

importer.convert(source, Path("native"), overwrite=True)
for file in sorted(Path("native").iterdir()):
    print(f"{file.stat().st_size:>12,} bytes  {file.name}")
print("provenance:", weights.read_metadata(Path("native") / weights.WEIGHTS)["provenance"])

# %% [markdown]
# ## Check
#
# `parity.check` runs transformers and the converted model on the same two images of noise in float32, matrix products
# in full precision, and compares the embeddings, the output of every block, and what follows. The tolerance is 1e-5,
# times the largest magnitude of the stage where that exceeds 1: published checkpoints have hidden states in the
# hundreds, and float32 has seven digits.

# %%
from beit_jax.convert import parity
from beit_jax.looking import visualize

stages = parity.check(source)
for stage in stages:
    print(f"{stage.name:<18} error {stage.max_error:.1e}   tolerance {stage.tolerance:.1e}   scale {stage.scale:.3g}")
assert all(stage.passed for stage in stages)
visualize.parity_errors([stage.as_dict() for stage in stages])

# %% [markdown]
# Errors of the order of 1e-7 times the scale are what a different order of float32 additions leaves. An error of
# conversion looks different: it is about as large as the activations themselves, from the first stage that it touches
# on. To see one, the heads of the second block's queries, keys and values are read in the wrong order.

# %%
import jax
import jax.numpy as jnp
import numpy as np

import beit_jax
from beit_jax.tree import unflatten

checkpoint = weights.load(Path("native"))
size = (2, *checkpoint.config.image_size, checkpoint.config.num_channels)
pixels = jnp.asarray(np.random.default_rng(0).standard_normal(size), jnp.float32)
run = jax.jit(lambda model, pixels: model(pixels, output_hidden_states=True).hidden_states)


def hidden_states(params):
    return run(beit_jax.build_model(checkpoint.config, unflatten(params)), pixels)


name = next(name for name in checkpoint.params if name.endswith("attention/qkv_kernel"))
wrong = np.array(checkpoint.params[name])  # [blocks, d, 3, heads, head_dim]
wrong[1] = wrong[1][..., ::-1, :]
right = hidden_states(dict(checkpoint.params))
damaged = hidden_states(dict(checkpoint.params) | {name: wrong})
damage = [float(abs(one - other).max()) for one, other in zip(right, damaged, strict=True)]
for place, error in enumerate(damage):
    print(f"{'embeddings' if place == 0 else f'block {place}':<18} error {error:.1e}")

# %% [markdown]
# ## Give it back
#
# The export goes through the same tables backwards. The tensors are the same bits, and transformers, loading the
# exported directory, agrees with the Flax model again.

# %%
from safetensors.numpy import load_file

from beit_jax.convert import exporter

exporter.export(checkpoint, Path("for-torch"), "hf", overwrite=True)
returned = load_file("for-torch/model.safetensors")
original = source.directory / "model.safetensors"
if original.is_file():  # a single file, not shards or a pickle
    given = load_file(original)
    equal = [name for name in returned if name in given and np.array_equal(returned[name], given[name])]
    print(f"{len(equal)} of {len(returned)} exported tensors equal the source's bit for bit")
again = parity.check(resolve("for-torch"))
print("transformers on the export:", "equal" if all(stage.passed for stage in again) else "DIFFERENT")

# %% [markdown]
# ## With a published checkpoint
#
# Set `SOURCE` and run all cells; a base model's file has 350 MB. `microsoft/beit-base-patch16-224-pt22k` and other
# models for masked image modelling are compared with 40 % of their patches hidden. transformers has no class for
# data2vec's pre-training head; exporting such a model to it is refused with that reason.
