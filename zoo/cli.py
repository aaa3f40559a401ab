"""The command `zoo`: finds the verb, and answers what a person got wrong in one line."""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

# Verb to the module whose `main(arguments) -> exit code` it is; imported when used, so that help comes at once.
VERBS = {
    "train": "zoo.commands.train",
    "sample": "zoo.commands.sample",
    "eval": "zoo.commands.evaluate",
    "export": "zoo.commands.export",
    "convert": "zoo.commands.convert",
    "eject": "zoo.commands.eject",
    "list": "zoo.commands.list",
    "doctor": "zoo.commands.doctor",
}

HELP = """\
usage: zoo VERB ...

  zoo train RECIPE [flags]   train a recipe; --run FOLDER names the run, and resumes it if it exists
  zoo sample RUN [flags]     draw from a trained model, or from a published diffusion pipeline
  zoo eval RUN [flags]       held-out figures of a run
  zoo export RUN FOLDER      a trained model as a published folder, with tokenizer and card
  zoo convert FOLDER OUT     weights of transformers' former Flax classes, as safetensors
  zoo eject FAMILY           one family and its layers as a file of your own
  zoo list                   recipes, models and their presets
  zoo doctor                 devices, versions and what is missing on this machine

  zoo VERB --help            the flags of a verb (zoo train RECIPE --help: of a recipe)
  --debug                    with any verb: a full traceback on errors

To begin: zoo train gpt-nano
"""

OUT_OF_MEMORY = "raise --accumulate, lower --batch-size, or shard with --mesh fsdp=N"

BUG = 1
USER_ERROR = 2
INTERRUPTED = 130
UNREAD = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code: 2 where a person can mend it, 1 for a bug, 130 if interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        from zoo import __version__

        print(f"flaxzoo {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        nearest = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.0)[0]
        print(f"zoo: unknown verb {verb!r}: did you mean {nearest}? (zoo --help)", file=sys.stderr)
        return USER_ERROR
    try:
        return importlib.import_module(VERBS[verb]).main(rest)
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return _leave(INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left (zoo list | head); what Python still flushes at exit goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except Exception as error:
        if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
            error = MemoryError(f"{str(error).splitlines()[0]} ({OUT_OF_MEMORY})")
        mine = not _is_for_a_person(error)
        if mine or debug:
            traceback.print_exc()
        else:
            print(f"zoo: {' '.join(str(error).split())}", file=sys.stderr)
        return _leave(BUG if mine else USER_ERROR)


def _leave(code: int) -> int:
    """Exit code `code`, at once if other processes take part: JAX would wait minutes for them to end as well."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _is_for_a_person(error: Exception) -> bool:
    """UserError, ValueErrors of our own classes, what the system says of files (a full disk), and too little memory."""
    if isinstance(error, OSError | MemoryError):
        return True
    ours = type(error).__module__.partition(".")[0] == "zoo"
    return ours and (isinstance(error, ValueError) or type(error).__name__ == "UserError")
