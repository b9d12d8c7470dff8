"""The flags of our objectives: each sets one argument of the loss, with its default and its check."""

import inspect
import sys
import warnings
from argparse import SUPPRESS, Action, ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparc_loss._checks import check_number, check_whole_number

Check = Callable[[str, Any], None]
"""Raises TypeError or ValueError, "NAME is VALUE; expected ...", for a wrong value of the named argument."""

number_of_at_least_0: Check = partial(check_number, minimum=0)
whole_number_of_at_least_0: Check = partial(check_whole_number, minimum=0)
whole_number_of_at_least_1: Check = partial(check_whole_number, minimum=1)


@dataclass(frozen=True)
class Flag:
    """The flag `--NAME-SETTING` of a loss NAME.

    Attributes:
        setting: the argument of the loss, such as "token_dropping".
        help: what it does; the default is appended unless the text names it.
        convert: makes the value from text: float or int.
        check: the check of the loss for this value; None for choices.
        choices: the values, instead of `convert` and `check`.
        metavar: stands for the value in the help.
        default: of a flag that sets no argument of the loss.
    """

    setting: str
    help: str
    convert: Callable[[str], Any] = float
    check: Check | None = None
    choices: Sequence[str] | None = None
    metavar: str = "X"
    default: Any = inspect.Parameter.empty

    def default_of(self, loss: type) -> Any:
        """The default: that of the loss's argument, unless the flag has its own."""
        if self.default is inspect.Parameter.empty:
            return inspect.signature(loss).parameters[self.setting].default
        return self.default

    def add_to(self, group: Any, name: str, loss: type) -> None:
        """Add the flag to an argument group."""
        text = self.help if "(default" in self.help else f"{self.help} (default: %(default)s)"
        options: dict[str, Any] = {"default": self.default_of(loss), "help": text, "action": StoreGiven}
        if self.choices is not None:
            options["choices"] = self.choices
        elif self.check is not None:
            options |= {"type": checked(self.convert, self.check), "metavar": self.metavar}
        else:
            options["action"] = BooleanOptionalAction
        group.add_argument(f"--{name}-{self.setting.replace('_', '-')}", **options)


class StoreGiven(Action):
    """Stores a value, and remembers that it was given, also where it is the default."""

    given = False

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, values)
        self.given = True


def checked(convert: Callable[[str], Any], check: Check) -> Callable[[str], Any]:
    """A `type` for add_argument that converts the text and applies the loss's own check."""

    def value_of(text: str) -> Any:
        value: Any
        try:
            value = convert(text)
        except ValueError:
            value = text
        try:
            check("value", value)
        except (TypeError, ValueError) as error:
            raise ArgumentTypeError(f"{text!r} given; {str(error).partition('; ')[2]}") from error
        return value

    return value_of


def add_old_flag(parser: ArgumentParser, old: str, new: str, nargs: int | None = None, const: Any = None) -> None:
    """Accept the flag `old` for `new` with a warning. `nargs=0` is for a flag without a value, which sets `const`."""
    known = next((action for action in parser._actions if new in action.option_strings), None)
    assert known is not None, f"{old}: there is no flag {new}"

    class OldFlag(Action):
        def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, *_: Any) -> None:
            message = f"{old} is now {new}; the old name goes with the next release"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            print(f"{parser.prog}: warning: {message}", file=sys.stderr)
            setattr(namespace, self.dest, const if nargs == 0 else values)

    options: dict[str, Any] = {} if nargs == 0 else {"type": known.type}
    parser.add_argument(old, action=OldFlag, dest=known.dest, nargs=nargs, default=SUPPRESS, help=SUPPRESS, **options)
