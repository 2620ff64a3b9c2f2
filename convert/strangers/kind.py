"""A kind of file that is not read, the ways out that several have, and kinds with several marks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stranger:
    """A kind of file: `what` it is, with the program that made it, and the `way` to weights that are read."""

    what: str
    way: str

    def __str__(self) -> str:
        return f"{self.what}; {self.way}"


ORIGINAL = "convert the checkpoint that it was made of"
NOTHING = "nothing here computes it"
BESIDE = "give the model's file beside it"
KERAS = "load it in Keras, and model.save('NEW.keras') keeps the names of its layers beside the weights"
UNPACK = "unpack it, and give what is in it"
AGAIN = "download it again"

PADDLE_PROGRAM = Stranger(
    "a program of Paddle for inference (paddle.jit.save), whose weights are numbered and have no names",
    "convert the .pdparams that it was made of: with its model in Paddle, paddle.save(model.state_dict(), "
    "'NEW.pdparams') writes them",
)
PADDLE_PARTS = Stranger(
    "a checkpoint of paddle.distributed, in parts",
    "in Paddle, paddle.save(paddle.distributed.load_merged_state_dict('DIRECTORY'), 'NEW.pdparams') joins them",
)
PADDLE_OPTIMIZER = Stranger("the state of an optimizer of Paddle, no weights", "give the .pdparams beside it")
ZERO = Stranger(
    "a part of DeepSpeed's ZeRO state, whose weights are spread over all of its files",
    "python zero_to_fp32.py CHECKPOINT_DIRECTORY OUTPUT, which DeepSpeed puts beside it, joins them",
)
