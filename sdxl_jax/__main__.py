"""The command line: runs a command, and turns its errors into messages and exit codes. What a command parses and does
is in commands/.

Exit code 0 when done; 2 when the input is at fault, 1 when the machine is, with one message on stderr and no traceback
unless --debug; 143 and 130 for `train`, `finetune`, `evaluate`, `data encode` and `data build` that SIGTERM or Ctrl-C
stopped with work left.
"""

import sys
import time
import traceback
from collections.abc import Callable, Sequence

from sdxl_jax.allocator import keep_freed_memory
from sdxl_jax.commands import pipes, signals
from sdxl_jax.errors import REPORTED, InputError, exit_code, fault, nearest_first

_BEGAN = time.monotonic()


# Each imports what it needs when it is called, so that `--help` is quick.


def _quickstart(arguments: list[str]) -> None:
    from sdxl_jax.commands import quickstart

    quickstart.run(arguments)


def _train(arguments: list[str]) -> None:
    with signals.end_at_once():  # until the loop takes them over
        from sdxl_jax.commands import train

        train.run(arguments, _BEGAN)


def _finetune(arguments: list[str]) -> None:
    with signals.end_at_once():  # until the loop takes them over
        from sdxl_jax.commands import finetune

        finetune.run(arguments, _BEGAN)


def _compile(arguments: list[str]) -> None:
    from sdxl_jax.commands import compile

    compile.run(arguments)


def _sample(arguments: list[str]) -> None:
    from sdxl_jax.commands import sample

    sample.run(arguments)


def _serve(arguments: list[str]) -> None:
    from sdxl_jax.commands import serve

    serve.run(arguments)


def _convert(arguments: list[str]) -> None:
    from sdxl_jax.commands import convert

    convert.run(arguments)


def _status(arguments: list[str]) -> None:
    from sdxl_jax.commands import status

    status.run(arguments)


def _data(arguments: list[str]) -> None:
    from sdxl_jax.commands import data

    data.run(arguments)


def _evaluate(arguments: list[str]) -> None:
    from sdxl_jax.commands import evaluate

    evaluate.run(arguments)


def _lora(arguments: list[str]) -> None:
    from sdxl_jax.commands import lora

    lora.run(arguments)


_COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "quickstart": (_quickstart, "train a small SDXL on embedded images, and sample from it"),
    "train": (_train, "train a model from a configuration file, or resume a run"),
    "finetune": (_finetune, "train a LoRA, a new token or all of a model on a folder of images"),
    "status": (_status, "steps done and to do, last checkpoint, where the time went; running, finished or failed"),
    "compile": (_compile, "compile it ahead of time for TPU slices: memory per chip, estimated time"),
    "sample": (_sample, "sample images from a model: text to image, image to image, inpainting"),
    "evaluate": (_evaluate, "metrics: FID, KID, CLIP score and more, of images, a model, an autoencoder"),
    "serve": (_serve, "sample images on a web page"),
    "convert": (_convert, "convert a model to another layout: diffusers, a single file, Orbax"),
    "lora": (_lora, "adapter files (LoRA and its kin): list, extract, merge, resize, convert"),
    "data": (_data, "build: shards from folders, tars, tables; inspect: what training sees; encode: latents once"),
}

_COMPUTING = ("quickstart", "train", "finetune", "sample", "serve", "evaluate", "data encode", "data class-images")


def computes(arguments: Sequence[str]) -> bool:
    """Whether the command runs a network, many times."""
    words = [argument for argument in arguments if argument != "--debug"]
    return any(" ".join(words[:length]) in _COMPUTING for length in (1, 2))


def _usage() -> str:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in _COMMANDS.items())
    return (
        f"usage: sdxl-jax COMMAND ...\n\nSDXL, trained and sampled in JAX.\n\n{commands}\n\n"
        "`sdxl-jax COMMAND --help` lists its options. --debug with any command shows the traceback of an error."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    try:
        if given[0] not in _COMMANDS:
            nearest = ", ".join(nearest_first(given[0], _COMMANDS))
            raise InputError(f"There is no command {given[0]!r}. Known, nearest first: {nearest}")
        _COMMANDS[given[0]][0](given[1:])
        sys.stdout.flush()
    except REPORTED as error:
        if debug:
            traceback.print_exc()
        _report(f"error: {error}")
        return error.code
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("sdxl_jax"):  # our own mistake
            raise
        if debug:
            traceback.print_exc()
        _report(f"error: the package {error.name} is not installed. Install it, e.g. with pip")
        return exit_code(error)
    except Exception as error:
        if not isinstance(error, OSError) and fault(error) is InputError:
            raise  # our own mistake
        if debug:
            traceback.print_exc()
        # Libraries raise many types for a full disk.
        _report(f"error: {error}. Check that the path exists, is writable, and has free space")
        return exit_code(error)
    return 0


def _report(error: str) -> None:
    from sdxl_jax.progress import report_error

    report_error(error)


def program() -> None:
    """`main` as a process, which ends even while a step is being compiled in the background."""
    pipes.may_close()
    signals.print_stacks_on_sigusr1()
    if computes(sys.argv[1:]):
        keep_freed_memory()
    try:
        code = main()
    except SystemExit as stopped:  # SIGTERM or Ctrl-C once all is saved; --help; invalid options
        code = exit_code(stopped)
    except (Exception, KeyboardInterrupt) as error:
        traceback.print_exc()
        code = exit_code(error)
    if "sdxl_jax.training.compilation" in sys.modules:
        from sdxl_jax.training.compilation import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
