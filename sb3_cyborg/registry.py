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

    :param what: Noun for error messages, e.g. ``"encoder"``.
    :param arguments: Parameters that every class takes; all other parameters of a class are its options.
    """

    def __init__(self, what: str, arguments: tuple[str, ...]) -> None:
        super().__init__()
        self.what, self.arguments = what, arguments

    def add(self, name: str, model_class: Callable[..., SequenceModel], reserved: Iterable[str] = ()) -> None:
        """
        Add a class; an existing class of the same name is replaced.

        :param name: Name of the class in the registry.
        :param model_class: Class of a sequence model.
        :param reserved: Names that its options must not have.
        :raises ValueError: for a signature that lacks one of the arguments, has ``*args`` or ``**kwargs`` (options cannot be
            read from them), or has an option with a reserved name.
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
        """
        :param name: Name of the class in the registry.
        :return: A decorator that adds a class under that name; see :meth:`add` for the errors.
        """

        def decorate(model_class: ModelClass) -> ModelClass:
            self.add(name, model_class)
            return model_class

        return decorate

    def options(self, name: str) -> dict[str, Parameter]:
        """
        :param name: Name of a registered class.
        :return: The options of the class, by name, with their defaults.
        :raises ValueError: for an unknown name.
        """
        if not isinstance(name, str) or name not in self:
            raise unknown_name(self.what, name, self)
        parameters = inspect.signature(self[name]).parameters
        return {option: parameter for option, parameter in parameters.items() if option not in self.arguments}

    def build(self, name: str, *arguments: Any, **options: Any) -> SequenceModel:
        """
        :param name: Name of a registered class.
        :param arguments: Values of the arguments that every class takes, in order.
        :param options: Options of the class.
        :return: An instance of the class.
        :raises ValueError: for an unknown name or option, and for values that the class rejects.
        """
        check_options(f"{self.what} {name!r}", options, self.options(name))
        return self[name](*arguments, **options)


def with_options_of(inner: Callable[..., Any]) -> Callable[[ModelClass], ModelClass]:
    """
    Add the keyword-only options of ``inner`` to the signature of a class that passes its ``**options`` on to ``inner``.

    :param inner: The class that receives the options.
    :return: A decorator. Options that the decorated class names itself keep their own defaults.
    """

    def decorate(model_class: ModelClass) -> ModelClass:
        own = [p for p in inspect.signature(model_class).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        named = {parameter.name for parameter in own}
        passed_on = [
            parameter
            for parameter in inspect.signature(inner).parameters.values()
            if parameter.kind is Parameter.KEYWORD_ONLY and parameter.name not in named
        ]
        setattr(model_class, "__signature__", inspect.Signature([*own, *passed_on]))  # noqa: B010  # typeshed lacks it
        return model_class

    return decorate


ENCODERS = Registry("encoder", ("hidden_dim", "num_layers"))
"""All encoder modes by name; :func:`~sb3_cyborg.register_encoder` adds one."""

MEMORIES = Registry("memory", ("input_dim",))
"""All kinds of memory by name; :func:`~sb3_cyborg.register_memory` adds one."""
