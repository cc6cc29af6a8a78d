"""Parts that all commands share: errors and warnings as one line, exit codes, settings of the parser."""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import gymnasium as gym
import typer
from typer.core import TyperCommand, TyperGroup

from sb3_cyborg.memory_ppo.rank_error import RankError
from sb3_cyborg.trainers.launch import WorkerError, report_error

TRACEBACK_VARIABLE = "SB3_CYBORG_TRACEBACK"
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

CONTEXT: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def fail(message: object, code: int) -> NoReturn:
    """
    Print an error and exit.

    :param message: The error, printed as one line on the standard error.
    :param code: The exit code.
    """
    line = " ".join(str(message).split())
    if not report_error(line, isinstance(message, RankError)):
        print(f"sb3-cyborg: error: {line}", file=sys.stderr)
    raise typer.Exit(code)


@contextlib.contextmanager
def errors_as_lines(value_error: int = BAD_INPUT) -> Iterator[None]:
    """
    Print errors as one line and exit. With ``SB3_CYBORG_TRACEBACK=1`` they are raised instead.

    :param value_error: Exit code for a ``ValueError``: before training its cause is the input, during training the run.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except RankError as error:
        fail(error, FAILED)
    except WorkerError as error:
        _end(error, str(error), error.exit_code)
    except (ValueError, AssertionError) as error:  # SB3 checks input with assertions
        _end(error, str(error), value_error)
    except (ImportError, RuntimeError, OSError, gym.error.Error) as error:
        # The first line: that of a worker process is followed by its traceback.
        _end(error, next(iter(str(error).strip().splitlines()), ""), FAILED)
    except Exception as error:  # of environments and libraries; the type tells more than the text, which may be a mere key
        _end(error, f"{type(error).__name__}: {error} ({TRACEBACK_VARIABLE}=1 shows where)", FAILED)


def _end(error: Exception, text: str, code: int) -> NoReturn:
    if os.environ.get(TRACEBACK_VARIABLE):
        raise error
    fail(text.strip() or type(error).__name__, code)


@contextlib.contextmanager
def output_as_lines() -> Iterator[None]:
    """Print warnings, and errors of threads, as one line each. Characters that the output cannot show are escaped."""

    def show_warning(message: object, *_: Any, **__: Any) -> None:
        print(f"sb3-cyborg: warning: {' '.join(str(message).split())}", file=sys.stderr)

    def show_error(error: threading.ExceptHookArgs) -> None:
        # TensorBoard's thread, for example. The error is raised again where training writes next.
        print(f"sb3-cyborg: warning: a thread has failed: {' '.join(str(error.exc_value).split())}", file=sys.stderr)

    if (reconfigure := getattr(sys.stdout, "reconfigure", None)) is not None:
        reconfigure(errors="backslashreplace")
    before = warnings.showwarning, threading.excepthook
    if not os.environ.get(TRACEBACK_VARIABLE):
        warnings.showwarning, threading.excepthook = show_warning, show_error
    try:
        yield
    finally:
        warnings.showwarning, threading.excepthook = before


class OneLineErrors:
    """A mixin for commands of typer: wrong usage is one line as well, and a closed pipe is silent."""

    def main(self, *args: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """
        Run the command, and exit.

        :param args: As in typer.
        :param standalone_mode: Whether to exit; otherwise errors are raised, as in typer.
        :param options: As in typer.
        """
        run: Any = super()
        if not standalone_mode:
            return run.main(*args, standalone_mode=False, **options)
        with output_as_lines():
            try:
                code = run.main(*args, standalone_mode=False, **options)
                sys.stdout.flush()
            except BrokenPipeError:
                # Python flushes the output once more at its end, which would print the error.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                code = FAILED
            except OSError as error:
                print(f"sb3-cyborg: error: {error}", file=sys.stderr)
                code = FAILED
            except Exception as error:
                if not hasattr(error, "format_message"):  # of typer: wrong usage
                    raise
                code = _show_usage_error(error)
        sys.exit(code or 0)


def _show_usage_error(error: Any) -> int:
    """:return: The exit code of an error of typer, which is printed."""
    if "\n" in error.format_message() and type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # the help
    else:
        command = f" See `{error.ctx.command_path} --help`." if getattr(error, "ctx", None) else ""
        print(f"sb3-cyborg: error: {' '.join(error.format_message().split())}{command}", file=sys.stderr)
    return int(error.exit_code)


class Group(OneLineErrors, TyperGroup):
    """The command ``sb3-cyborg``."""


class Command(OneLineErrors, TyperCommand):
    """A command that is run on its own."""


TRUST_HELP = "Also load pickled objects of the file and import the modules it names: that can run any code."
Trust = Annotated[bool, typer.Option("--trust", help=TRUST_HELP)]
