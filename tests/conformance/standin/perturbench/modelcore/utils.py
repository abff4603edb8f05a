"""Objects from configurations that name what they depend on."""

from omegaconf import DictConfig


class ContextError(TypeError):
    """The configuration is of another form, or what it depends on does not fit."""


def instantiate_with_context(cfg, context=None):
    """Call ``conf`` of a configuration ``{conf, dependencies}`` with the entries of the context that it asks for."""
    if not isinstance(cfg, DictConfig):
        raise ContextError(f"expected a configuration, found {type(cfg).__name__}")
    arguments = {argument: context[name] for argument, name in (cfg.dependencies or {}).items()}
    try:
        return cfg.conf(**arguments)
    except TypeError as error:
        raise ContextError(f"{cfg.conf} does not take {list(arguments)}") from error
