"""The models, as Flax modules, and the model of a configuration.

Forward pass  `encoder` (pixels to hidden states), `layers` (one block), `attention` (the formula), `classifier`
Other heads   `masked_image_modeling`; `segmenter`, with `dense` for its layers on feature maps
Parts         `activations`; `position`: position tables at any input size; `interface`: what all models take and return
Machines      `one_cpu`: the faster forms of one CPU; `partition`: the placement of activations on a mesh of devices
Around them   `build`: the model of a configuration; `adapt`: a checkpoint for other sizes; `heads`: for other classes

Each textbook form stands in the module of its name; `one_cpu`, and `kernels` below this room, ask for the machine. May
import: the ground, which is the modules directly in `beit_jax`, `adapters`, `kernels`, `kernels.cpu.calls`, and
`beit_jax.weights.leaves`.
"""
