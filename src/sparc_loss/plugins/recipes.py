"""`--sparc-recipe NAME`: settings that were measured to work, as one flag. The defaults stay the paper's."""

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

_HIGHEST_PATCHES = {
    "image_negatives": 3,
    "image_contrastive_threshold": 1.0,
    "image_contrastive_direction": "both",
}
RECIPES: dict[str, dict[str, Any]] = {
    # docs/study.md, "The recipe": from scratch, five seeds, a few kinds of objects.
    "highest-patches": {"fine_grained_weight": 0.3, **_HIGHEST_PATCHES},
    # docs/study.md, "A tenth of the weights": from scratch, five seeds, hundreds of kinds.
    "highest-patches-light": {
        "fine_grained_weight": 0.03,
        "fine_grained_scale": 10.0,
        "image_contrastive_weight": 0.1,
        **_HIGHEST_PATCHES,
    },
}


def flags_of(settings: Mapping[str, Any]) -> str:
    """The flags of some settings."""
    return " ".join(f"--sparc-{name.replace('_', '-')} {value}" for name, value in settings.items())


class RecipeAction(Action):
    """Sets the flags of a recipe, but for those that were given before; those given after it replace its values."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, values)
        given = {action.dest for action in parser._actions if getattr(action, "given", False)}
        for name, value in RECIPES[values].items():
            if f"sparc_{name}" not in given:
                setattr(namespace, f"sparc_{name}", value)
