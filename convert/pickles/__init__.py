"""The closed pickle reader: a training checkpoint's tensors and settings, without running anything that it names.

`pickle.load` imports and calls what a file asks for, so a pickle from the network is a program. This reader promises:

* Nothing is imported and nothing is called. A name in the stream is looked up in `names.CONSTRUCTORS`, and among the
  names that stand for themselves (dtypes, storage types). A known name becomes an inert record: the place of a tensor,
  a dict, a number, a date. A module of OpenAI's DALL-E becomes a record of its attributes.
* A file with any other name is refused. The machine reads on behind such a name, so that one error lists them all.
  Lightning and mmengine keep objects of their own beside the weights; in their files these are passed over unread, and
  named (`refusals.passed_over`). Among the weights, and in all other files, they are refused.
* The machine knows the opcodes that protocols 2 to 5 write for data. Any other opcode is an error.
* Memory and time are bounded: by `machine.MAX_PICKLE` bytes of pickle, as many more that opcodes make out of fewer,
  and `machine.MAX_OPCODES` opcodes. Keys of dicts are text, booleans, None or small integers, whose hashes nobody can
  make collide; a key that stands twice is an error.
* Depth is harmless: the machine and the walk over a module keep lists instead of calling themselves. Settings are kept
  down to 32 levels and up to 10,000 values an entry, and left out beyond.
* Tensor bytes are not here. torch's containers, a zip archive or the older consecutive pickles, hold them beside the
  pickle. `..files.torch_file` checks the place of every tensor against its storage before it reads a byte.

`names` is what a stream may mention, `distributed` the same of torch.distributed.checkpoint's records and `arrays` of
NumPy's arrays, `machine` runs the opcodes, `module` reads a pickled module as a state dict, `state` finds the weights
among the entries of a training checkpoint (`wrappers`), `settings` keeps the others, and `refusals` says what is not
read. May import: the ground of `beit_jax`.
"""
