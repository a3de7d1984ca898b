"""On which images an epoch's weights are selected, and whether they can tell epochs apart."""

from __future__ import annotations

from sparse_lab.config import Config
from sparse_lab.errors import UserError

SELECTED_ON = {"validation_best": "validation", "last": "last epoch", "test_best": "test"}


def selects(config: Config) -> bool:
    """Do any images select an epoch, or end a phase?"""
    return config.training.select != "last" or _patient(config)


def _patient(config: Config) -> bool:
    recipes = (config.training, config.training.finetune, config.training.regrow)
    return any(recipe.patience is not None for recipe in recipes)


def check_selection(config: Config, images: dict[str, tuple[int, int]]) -> None:
    """Raise UserError where fewer images than classes would select an epoch, or end a phase, and nobody said so.

    Args:
        images: as `data.Data.images`: of each part how many images are used, of how many.
    """
    choosing = {"validation_best": ["validation"], "test_best": ["test"], "last": []}[config.training.select]
    patient = ["validation"] if _patient(config) else []
    for part in dict.fromkeys([*choosing, *patient]):
        used, classes = images[part][0], config.dataset.classes
        if used < classes and not config.training.select_on_few:
            way = f"training.select={config.training.select}" if part in choosing else "training.patience"
            raise UserError(
                f"{way} would judge epochs by {used} {part} image(s) of {classes} classes, which is next to chance: "
                "use more (dataset.validation, dataset.eval_limit, training.limit_batches), training.select=last, or "
                "training.select_on_few=true where that is meant"
            )
