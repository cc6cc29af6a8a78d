"""Registries of encoders and memories: classes by name, whose options are read from their signatures."""

import inspect
from collections.abc import Callable, Iterable
from inspect import Parameter
from typing import Any, TypeVar

from sb3_cyborg.checks import check_options, unknown_name
from sb3_cyborg.sequence_model import SequenceModel

ModelClass = TypeVar("ModelClass", bound=Callable[..., SequenceModel])


class Registry(dict[str, Callable[..., SequenceModel]]):
    """
    Classes of sequence models by name.

    :param what: Noun for messages, e.g. ``"encoder"``.
    :param arguments: Names of the arguments that every class takes; all other parameters of a class are its options.
    """

    def __init__(self, what: str, arguments: tuple[str, ...]) -> None:
        super().__init__()
        self.what, self.arguments = what, arguments

    def add(self, name: str, model_class: Callable[..., SequenceModel], reserved: Iterable[str] = ()) -> None:
        """
        Add a class; a name that is taken is replaced.

        :param name: Its name.
        :param model_class: The class.
        :param reserved: Names that its options may not have.
        :raises ValueError: for a signature without one of the arguments, with options that cannot be read from it
            (``*args``, ``**kwargs``), or with a reserved name.
        """
        label = getattr(model_class, "__name__", repr(model_class))
        parameters = inspect.signature(model_class).parameters
        if missing := [argument for argument in self.arguments if argument not in parameters]:
            raise ValueError(f"{label} takes no `{missing[0]}`: the constructor of every {self.what} takes {self.arguments}.")
        if open_ended := [p for p in parameters.values() if p.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)]:
            raise ValueError(
                f"{label} takes `{open_ended[0]}`, so its options cannot be read from its signature: name each option, or use "
                "`sb3_cyborg.registry.with_options_of`."
            )
        if taken := sorted(set(parameters) & set(reserved)):
            raise ValueError(f"{label} takes an option `{taken[0]}`, a name that is reserved; rename it.")
        self[name] = model_class

    def register(self, name: str) -> Callable[[ModelClass], ModelClass]:
        """:return: A decorator that adds a class under ``name``."""

        def decorate(model_class: ModelClass) -> ModelClass:
            self.add(name, model_class)
            return model_class

        return decorate

    def options(self, name: str) -> dict[str, Parameter]:
        """
        :param name: A name.
        :return: Options of its class, by name, with their defaults.
        :raises ValueError: for an unknown name.
        """
        if name not in self:
            raise unknown_name(self.what, name, self)
        parameters = inspect.signature(self[name]).parameters
        return {option: parameter for option, parameter in parameters.items() if option not in self.arguments}

    def build(self, name: str, *arguments: Any, **options: Any) -> SequenceModel:
        """
        :param name: A name.
        :param arguments: The arguments that every class takes.
        :param options: Options of the class.
        :return: The model.
        :raises ValueError: for an unknown name or option, and for values that the class refuses.
        """
        check_options(f"{self.what} {name!r}", options, self.options(name))
        return self[name](*arguments, **options)


def with_options_of(inner: Callable[..., Any]) -> Callable[[ModelClass], ModelClass]:
    """
    Show the keyword options of ``inner`` in the signature of a class that passes its ``**options`` on to it.

    :param inner: The class that the options go to.
    :return: A decorator; options that the class names itself keep its own defaults.
    """

    def decorate(model_class: ModelClass) -> ModelClass:
        own = [p for p in inspect.signature(model_class).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        named = {parameter.name for parameter in own}
        passed_on = [
            parameter
            for parameter in inspect.signature(inner).parameters.values()
            if parameter.kind is Parameter.KEYWORD_ONLY and parameter.name not in named
        ]
        setattr(model_class, "__signature__", inspect.Signature([*own, *passed_on]))  # noqa: B010  # mypy knows no such name
        return model_class

    return decorate


ENCODERS = Registry("encoder", ("hidden_dim", "num_layers"))
"""All encoder modes by name; add to it with :func:`~sb3_cyborg.register_encoder`."""

MEMORIES = Registry("memory", ("input_dim",))
"""All kinds of memory by name; add to it with :func:`~sb3_cyborg.register_memory`."""
