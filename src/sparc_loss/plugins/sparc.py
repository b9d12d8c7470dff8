"""`--loss sparc`: the objective, and what it measures and draws of validation pairs between epochs."""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import open_clip
from torch import nn

from sparc_loss._checks import check_number
from sparc_loss.functional import ALIGNMENTS, DIRECTIONS, REDUCTIONS
from sparc_loss.losses import SparcLoss
from sparc_loss.monitoring import probe_every
from sparc_loss.monitoring.guard import training_goes_on
from sparc_loss.monitoring.validation_pairs import check_launcher
from sparc_loss.open_clip_versions import logs_diagnostics
from sparc_loss.plugins.checks import model_without_weights
from sparc_loss.plugins.flags import (
    Flag,
    add_old_flag,
    number_of_at_least_0,
    whole_number_of_at_least_0,
    whole_number_of_at_least_1,
)
from sparc_loss.plugins.objective_plugin import ObjectivePlugin
from sparc_loss.plugins.recipes import RECIPES, RecipeAction, flags_of
from sparc_loss.regions import REGION_WORDS
from sparc_loss.regions.mask import check_share

FLAGS = (
    Flag(
        "threshold",
        "sigma, below which a normalised similarity is dropped (default: 1 / number of patches)",
        check=lambda name, value: check_number(name, value, 0, 1),
    ),
    Flag("alignment", "the paper's sparse weights, or its ablations", choices=ALIGNMENTS),
    Flag(
        "reduction",
        "mean over all tokens of the batch (Listing 1), or per caption and then over captions (Eq. 6)",
        choices=REDUCTIONS,
    ),
    Flag(
        "image_negatives",
        "contrast each caption's alignment with its own image against that with K other images of the batch; "
        "not in the paper (default: off)",
        convert=int,
        check=whole_number_of_at_least_0,
        metavar="K",
    ),
    Flag("image_contrastive_weight", "weight of that contrast", check=number_of_at_least_0),
    Flag(
        "image_contrastive_threshold",
        "sigma of that contrast; 1 keeps the highest patch alone (default: --sparc-threshold)",
        check=lambda name, value: check_number(name, value, 0, 1),
    ),
    Flag(
        "image_contrastive_direction",
        "whether only captions choose among images, or images among captions too",
        choices=DIRECTIONS,
    ),
)
FLAGS_OF_THE_RUN = (
    Flag(
        "regions",
        "let words use the patches of their objects' boxes only, from the column boxes of a CSV, or from the entry "
        "boxes of the json of each WebDataset sample (default: every word may use every patch)",
        choices=("boxes",),
        default=None,
    ),
    Flag(
        "region_words",
        "with --sparc-regions, whether words of no box use every patch, or only words of a box count",
        choices=REGION_WORDS,
        default="all",
    ),
    Flag(
        "region_share",
        "with --sparc-regions, the share of a patch that a box must cover; the patch at its centre always belongs",
        check=check_share,
        default=0.5,
    ),
    Flag(
        "start",
        "train only the global loss for the first N epochs, counting those before a --resume (default: none)",
        convert=int,
        check=whole_number_of_at_least_0,
        metavar="N",
        default=0,
    ),
    Flag(
        "probe_every",
        "after every N epochs, measure on validation pairs whether the fine-grained loss uses the image "
        "(default: never)",
        convert=int,
        check=whole_number_of_at_least_1,
        metavar="N",
        default=0,
    ),
    Flag(
        "show_every",
        "after every N epochs, draw what words select in a few validation pairs, to the run's folder and to "
        "--report-to (default: never)",
        convert=int,
        check=whole_number_of_at_least_1,
        metavar="N",
        default=0,
    ),
    Flag(
        "diagnostics",
        "log fine_grained_accuracy, patches_kept and alignment_entropy of some pairs (default: on from open_clip 4, "
        "whose training can log them)",
        default=None,
    ),
)


# Setting -> those that change nothing without it.
_NEED = {
    "regions": ("region_words", "region_share"),
    "image_negatives": (
        "image_contrastive_weight",
        "image_contrastive_threshold",
        "image_contrastive_direction",
    ),
}


class SparcPlugin(ObjectivePlugin):
    """SPARC, with what it does before and after epochs."""

    def add_arguments(self, parser: ArgumentParser) -> Any:
        """As `ObjectivePlugin.add_arguments`, and the flags of the run."""
        group = super().add_arguments(parser)
        for flag in FLAGS_OF_THE_RUN:
            flag.add_to(group, self.name, self.loss)
        group.add_argument(
            "--sparc-recipe",
            action=RecipeAction,
            choices=RECIPES,
            help="set several flags, for which others given win; "
            + "; ".join(f"{name}: {flags_of(settings)}" for name, settings in RECIPES.items())
            + " (default: the paper's settings)",
        )
        for old, new, value in (
            ("--sparc-metrics", "--sparc-diagnostics", True),
            ("--no-sparc-metrics", "--no-sparc-diagnostics", False),
        ):
            add_old_flag(parser, old, new, nargs=0, const=value)
        return group

    def check_args(self, args: Namespace) -> None:
        """Refuse what cannot be trained, measured or drawn before anything is written.

        Raises:
            ValueError: as `ObjectivePlugin.check_args`; a flag that changes nothing without another; more
                --sparc-image-negatives than any batch has, --sparc-start, --sparc-probe-every or --sparc-show-every
                without their requirements, --sparc-diagnostics with an open_clip that would add diagnostics to the
                loss; as `sparc_loss.regions.checks.check_regions`.
            TypeError: a model or tokenizer that cannot be surfaced.
            ImportError: --sparc-show-every without the extra `show`.
        """
        super().check_args(args)
        _check_used(args)
        if args.sparc_regions:
            from sparc_loss.regions.checks import check_regions

            check_launcher("--sparc-regions")
            check_regions(args, model_without_weights(args))
        pairs = args.batch_size * args.accum_freq
        is_naflex = getattr(args, "use_naflex", False)  # its batches vary in size
        if args.sparc_image_negatives >= pairs and not is_naflex:
            raise ValueError(
                f"--sparc-image-negatives is {args.sparc_image_negatives} with batches of {pairs} pairs on each "
                f"process (--batch-size x --accum-freq); expected at most {pairs - 1}, the other images of a batch"
            )
        if args.sparc_start:
            check_launcher("--sparc-start")
        if args.sparc_probe_every:
            probe_every.check_run(args)
        if args.sparc_show_every:
            from sparc_loss.monitoring.show_every import check_run

            check_run(args)
        if args.sparc_diagnostics and not logs_diagnostics(open_clip.__version__):
            raise ValueError(
                f"--sparc-diagnostics is set; expected it off with open_clip {open_clip.__version__}: its training "
                "adds up everything that a loss returns, diagnostics included"
            )

    def prepare_model(self, model: nn.Module, args: Namespace) -> nn.Module:
        """As `ObjectivePlugin.prepare_model`; logs the flags of a recipe, with the values of those given beside it."""
        if args.sparc_recipe and args.rank == 0:
            settings = {name: getattr(args, f"sparc_{name}") for name in RECIPES[args.sparc_recipe]}
            logging.info(f"--sparc-recipe {args.sparc_recipe} is {flags_of(settings)}")
        model = super().prepare_model(model, args)
        if args.sparc_regions:
            from sparc_loss.regions.behind_texts import sizes_for, take_regions

            self.region_sizes = sizes_for(model)
            take_regions(model, self.region_sizes)
        return model

    def create_data(
        self, get_data: Callable[..., dict[str, Any]], args: Namespace, transforms: tuple[Any, Any], **others: Any
    ) -> dict[str, Any]:
        """open_clip's data; with `--sparc-regions`, with the masks of their regions behind the texts of training."""
        if not args.sparc_regions or not args.train_data:
            return get_data(args, transforms, **others)
        from sparc_loss.regions.training_data import data_with_regions

        settings = {"share": args.sparc_region_share, "words": args.sparc_region_words}
        return data_with_regions(get_data, args, transforms, sizes=self.region_sizes, **settings, **others)

    def further_settings(self, args: Namespace) -> dict[str, Any]:
        """Diagnostics, which are on by default where training can log them."""
        chosen = args.sparc_diagnostics
        return {"diagnostics": logs_diagnostics(open_clip.__version__) if chosen is None else chosen}

    def before_epoch(self, loss: SparcLoss, epoch: int, args: Namespace) -> None:
        """Switch the fine-grained terms off in the first epochs, as `--sparc-start` says."""
        started = epoch >= args.sparc_start
        loss.fine_grained_weight = args.sparc_fine_grained_weight if started else 0.0
        loss.image_contrastive_weight = args.sparc_image_contrastive_weight if started else 0.0
        if args.sparc_start and args.rank == 0:
            logging.info(f"--sparc-start {args.sparc_start}: epoch {epoch} trains {loss}")

    def after_epoch(self, model: nn.Module, data: dict[str, Any], epoch: int, args: Namespace, tb_writer: Any) -> None:
        """Probe, and draw what words select, as `--sparc-probe-every` and `--sparc-show-every` say."""
        if args.rank != 0:
            return
        if args.sparc_probe_every and epoch % args.sparc_probe_every == 0:
            with training_goes_on(f"--sparc-probe-every after epoch {epoch}"):
                probe_every.probe_validation_pairs(model, data, epoch, args, tb_writer)
        if args.sparc_show_every and epoch % args.sparc_show_every == 0:
            with training_goes_on(f"--sparc-show-every after epoch {epoch}"):
                from sparc_loss.monitoring.show_every import show_validation_pairs

                show_validation_pairs(model, data, epoch, args, tb_writer)

    def try_after_epoch(self, model: nn.Module, data: dict[str, Any], args: Namespace) -> None:
        """Probe two validation images and draw one, before an epoch is spent; report nothing."""
        if args.rank != 0:
            return
        if args.sparc_probe_every:
            with training_goes_on("--sparc-probe-every, tried before training,"):
                probe_every.try_probe(model, args)
        if args.sparc_show_every:
            with training_goes_on("--sparc-show-every, tried before training,"):
                from sparc_loss.monitoring.show_every import draw_validation_pairs

                draw_validation_pairs(model, args, number=1)


def _check_used(args: Namespace) -> None:
    """Raise ValueError for a flag that changes nothing without another."""
    flags = {flag.setting: flag for flag in (*FLAGS, *FLAGS_OF_THE_RUN)}
    for needed, settings in _NEED.items():
        if getattr(args, f"sparc_{needed}"):
            continue
        for setting in settings:
            value = getattr(args, f"sparc_{setting}")
            if value != flags[setting].default_of(SparcLoss):
                name, other = (f"--sparc-{each.replace('_', '-')}" for each in (setting, needed))
                raise ValueError(f"{name} is {value} without {other}, and changes nothing; expected both or neither")


SPARC = SparcPlugin(
    "sparc",
    "SPARC",
    "Fine-grained alignment of patches and tokens within each pair (arXiv 2401.09865).",
    SparcLoss,
    FLAGS,
)
