"""`zoo convert FOLDER OUT`: a checkpoint of transformers' former Flax classes, as safetensors."""

from collections.abc import Sequence
from pathlib import Path

from zoo.train.experiment import UserError

HELP = """\
usage: zoo convert FOLDER OUT

Reads config.json and flax_model.msgpack of a BERT, GPT-2 or T5 in FOLDER, as Hugging Face transformers 4 wrote them,
and writes the folder OUT with the same weights as safetensors, which zoo.from_pretrained and transformers 5 load.
docs/migrating.md says what becomes of the classes.

  zoo convert my-flax-bert my-bert
"""


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if len(arguments) != 2:
        raise UserError(f"zoo convert takes a folder to read and one to write, and got {len(arguments)} arguments")
    source, target = map(Path, arguments)
    # Imported here because it needs JAX, which the help above does not.
    from zoo.flax_checkpoints import convert

    fields = convert(source, target)
    print(f"{target} holds a {fields['architectures'][0]}: zoo.from_pretrained({str(target)!r}) loads it")
    return 0
