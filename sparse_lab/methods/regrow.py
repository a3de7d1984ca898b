"""Regrowth after pruning: start sparser than the target, then grow back to it, in a phase of its own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from sparse_lab.config import Config, MethodConfig, RegrowConfig
from sparse_lab.errors import UserError, nearest
from sparse_lab.methods import phases
from sparse_lab.methods.base import FROM_GRADIENTS, WITHOUT_DATA, Component, Site, When, often
from sparse_lab.sparsity.clock import Clock
from sparse_lab.sparsity.schedules import Regrowth, Schedule

if TYPE_CHECKING:
    from sparse_lab.algorithms.base import Algorithm
    from sparse_lab.methods.networks import Structure


def _grows(config: Config) -> bool:
    return _settings(config).score != "none"


SOMETHING = "a method.regrow.score other than none"


class Regrow(Component):
    part = "regrow"
    read_when: ClassVar = {
        "budget": When(lambda config: _settings(config).start != "target", "method.regrow.start=sparser"),
        "distribution": When(_grows, SOMETHING),
        "ssim_layers": When(
            lambda config: _grows(config) and _settings(config).distribution == "ssim",
            "method.regrow.distribution=ssim",
        ),
        "given": When(
            lambda config: _grows(config) and _settings(config).distribution == "given",
            "method.regrow.distribution=given",
        ),
        "score_on": When(
            lambda config: _settings(config).score not in ("none", "random"),
            "a method.regrow.score that looks at a network",
        ),
        "reference": When(lambda config: _settings(config).score == "reference", "method.regrow.score=reference"),
        "value": When(_grows, SOMETHING),
        "batches": When(
            lambda config: (
                _grows(config)
                and (_settings(config).score not in WITHOUT_DATA or _settings(config).distribution == "ssim")
            ),
            "a method.regrow.score that looks at training images, or method.regrow.distribution=ssim",
        ),
    }
    needs = ("prune",)
    not_with = ("filters", "drop_and_grow", "elastic_mutation")
    schedules = ("one_shot", "iterative", "cubic", "constant")
    in_place_of = ("prune",)  # which the run that it starts from has done

    def reads(self, config: Config) -> tuple[str, ...]:
        return ("training.regrow",)

    def starts(self, config: Config) -> dict[str, Config]:
        settings = _settings(config)
        found = {"parent": phases.one_way(config, phases.regrowth_start(config))}
        if settings.score == "reference" and settings.reference is None:
            found["reference"] = phases.one_way(config, config.sparsity.target)
        return found if settings.score == "none" else found | {"dense": phases.dense(config)}

    def check(self, config: Config, structure: Structure) -> None:
        settings = _settings(config)
        if config.method.init_from in (None, "dense"):
            raise UserError(f"method {config.method.name!r}: method.init_from must name the pruning method before it")
        _check_start(config, structure, settings)
        _check_score(settings)
        if settings.distribution == "given":
            _check_given(config, structure, settings)

    def sparsity(self, config: Config, clock: Clock) -> Schedule | None:
        start, end = phases.regrowth_start(config), phases.final_sparsity(config)
        return Regrowth(start, end, _settings(config).steps, clock.steps_a_round)

    def build(self, site: Site) -> list[Algorithm]:
        from sparse_lab.algorithms import regrow
        from sparse_lab.sparsity.masks import layers

        settings = _settings(site.config)
        if settings.score == "none":
            return []
        assert site.masks is not None
        reference = None
        if settings.score == "reference":
            reference = {name: layer.weight.detach() for name, layer in layers(site.network("reference")).items()}
        return [
            regrow.Regrow(
                site.model,
                site.masks,
                site.schedule,
                site.network("dense"),
                score=settings.score,
                score_on=settings.score_on,
                distribution=settings.given if settings.distribution == "given" else settings.distribution,
                ssim_layers=settings.ssim_layers,
                value=settings.value,
                reference=reference,
                batches=partial(site.images.fixed, settings.batches),
                probe=site.probe,
                seed=site.config.seed,
                changed=site.changed,
            )
        ]

    def dense_gradients(self, method: MethodConfig, in_rounds: bool) -> str | None:
        assert method.regrow is not None
        return often(method.regrow.steps) if method.regrow.score in FROM_GRADIENTS else None


def _settings(config: Config) -> RegrowConfig:
    assert config.method.regrow is not None
    return config.method.regrow


def _check_start(config: Config, structure: Structure, settings: RegrowConfig) -> None:
    target, start = config.sparsity.target, phases.regrowth_start(config)
    if start >= 1.0:
        raise UserError(
            f"regrowth of {settings.steps} x {settings.budget} down to sparsity.target={target:.12g} "
            f"would have to start at {start:.12g}: use a smaller method.regrow.budget or a lower sparsity.target"
        )
    if settings.score != "none" and settings.start != "target":
        _check_growth(config, structure, settings)
    if settings.start == "target" and settings.score != "none":
        raise UserError(
            f"method.regrow.start=target leaves nothing to regrow: method.regrow.score=none, not {settings.score}"
        )


def _check_growth(config: Config, structure: Structure, settings: RegrowConfig) -> None:
    from sparse_lab.sparsity.masks import num_kept

    total = structure.size(config).total
    growth = num_kept(config.sparsity.target, total) - num_kept(phases.regrowth_start(config), total)
    if growth < settings.steps:
        raise UserError(
            f"method.regrow.budget={settings.budget}, steps={settings.steps}: {growth:,} of {total:,} weights regrow, "
            "less than one a step"
        )


def _check_score(settings: RegrowConfig) -> None:
    """Can this regrowth look at what it asks for?"""
    from sparse_lab.sparsity.scores import OF_WEIGHTS, SCORES

    if settings.score == "none":
        return
    if settings.score not in SCORES:
        raise UserError(f"unknown method.regrow.score {settings.score!r}; {nearest(settings.score, [*SCORES, 'none'])}")
    if settings.score_on == "sparse" and settings.score in OF_WEIGHTS:
        raise UserError(
            f"method.regrow.score={settings.score} on the sparse network scores every pruned weight 0: "
            "use method.regrow.score_on=dense, or score=gradient"
        )


def _check_given(config: Config, structure: Structure, settings: RegrowConfig) -> None:
    from sparse_lab.sparsity.choose import own_shares
    from sparse_lab.sparsity.masks import layers, num_kept

    sizes = {name: shape.numel() for name, shape in structure.weights.items()}
    if not settings.given:
        raise UserError("method.regrow.distribution=given needs method.regrow.given=[LAYER, ...]")
    if len(set(settings.given)) < len(settings.given):
        raise UserError(f"method.regrow.given={list(settings.given)} names a layer twice")
    if unknown := [name for name in settings.given if name not in sizes]:
        raise UserError(f"method.regrow.given: unknown layer {unknown[0]!r}; {nearest(unknown[0], sizes)}")
    total, found = sum(sizes.values()), layers(structure.hollow)
    ends = [num_kept(sparsity, total) for sparsity in (config.sparsity.target, phases.regrowth_start(config))]
    own = [own_shares(found, kept, total) for kept in ends]
    if both := [name for name in settings.given if name in own[0]]:
        raise UserError(f"method.regrow.given: {both[0]!r} regrows by sparsity.layers: name it in one of them")
    growth = ends[0] - ends[1] - round(sum(own[0].values()) - sum(own[1].values()))
    room = sum(sizes[name] for name in set(settings.given))
    if room < growth:
        raise UserError(
            f"method.regrow.given={list(settings.given)} have {room} weights, {growth} are to regrow: name more"
        )
