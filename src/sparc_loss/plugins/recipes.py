"""`--sparc-recipe NAME`: settings that were measured to work, as one flag. The defaults stay the paper's."""

from argparse import Action, ArgumentParser, Namespace
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # docs/study.md, "The recipe": from scratch, five seeds.
    "highest-patches": {
        "fine_grained_weight": 0.3,
        "image_negatives": 3,
        "image_contrastive_threshold": 1.0,
        "image_contrastive_direction": "both",
    },
}


def flags_of(recipe: str) -> str:
    """The flags that a recipe stands for."""
    return " ".join(f"--sparc-{name.replace('_', '-')} {value}" for name, value in RECIPES[recipe].items())


class RecipeAction(Action):
    """Sets the flags of a recipe, but for those that were given another value than their default before."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, values)
        for name, value in RECIPES[values].items():
            argument = f"sparc_{name}"
            if getattr(namespace, argument) == parser.get_default(argument):
                setattr(namespace, argument, value)
