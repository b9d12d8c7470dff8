"""One of our objectives as a loss plug-in."""

import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import open_clip
from torch import nn

from sparc_loss._checks import check_positive
from sparc_loss.embeddings import surface_embeddings
from sparc_loss.embeddings.token_mask import TOKENS
from sparc_loss.losses.objective import Objective
from sparc_loss.plugins.checks import check_accumulation, check_flags, launched
from sparc_loss.plugins.flags import Flag, add_old_flag, number_of_at_least_0


class ObjectivePlugin:
    """The contract of `sparc_loss.plugins.contract` for one objective.

    Args:
        name: of the loss on the command line, and the prefix of its flags.
        title: heading of its flags in the help.
        description: of the objective, in one sentence.
        loss: its class.
        flags: its own flags, beside those of every objective.
    """

    def __init__(
        self, name: str, title: str, description: str, loss: type[Objective], flags: Sequence[Flag] = ()
    ) -> None:
        self.name, self.title, self.description, self.loss = name, title, description, loss
        self.flags = (
            Flag(
                "global_weight",
                "lambda_g, weight of open_clip's own contrastive loss",
                check=number_of_at_least_0,
            ),
            Flag("fine_grained_weight", "lambda_f, weight of the fine-grained loss", check=number_of_at_least_0),
            *flags,
            Flag(
                "fine_grained_scale",
                "fixed 1/temperature of the fine-grained loss (default: the model's learned logit_scale)",
                check=check_positive,
            ),
        )

    @property
    def heads(self) -> str | None:
        """Name of the submodule that the objective adds to the model; None if it adds none."""
        return None

    def add_arguments(self, parser: ArgumentParser) -> Any:
        """Add the `--NAME-*` flags in a group of their own, and return the group."""
        group = parser.add_argument_group(self.title, self.description)
        for flag in self.flags:
            flag.add_to(group, self.name, self.loss)
        add_old_flag(parser, f"--{self.name}-scale", f"--{self.name}-fine-grained-scale")
        group.add_argument(
            f"--{self.name}-tokens",
            choices=TOKENS,
            default="words",
            help="valid tokens: words, or all but padding (default: %(default)s)",
        )
        return group

    def check_args(self, args: Namespace) -> None:
        """Refuse what cannot be trained before anything is written.

        Raises:
            TypeError, ValueError: as `sparc_loss.plugins.checks.check_flags`.
        """
        check_flags(args, self.name)

    def prepare_model(self, model: nn.Module, args: Namespace) -> nn.Module:
        """The model with patch and token embeddings; turns on the flags for exact gradients over several processes.

        Raises:
            ValueError: --accum-freq where the number of patches or of text tokens differs between batches; without
                the launcher, also the errors of `check_args`.
            TypeError: a model that cannot be surfaced.
        """
        if not launched():
            self.check_args(args)
        check_accumulation(model, args, self.name)
        if args.world_size > 1 and not (args.local_loss and args.gather_with_grad):
            args.local_loss = args.gather_with_grad = True
            if args.rank == 0:
                logging.info(
                    f"--loss {self.name}: {args.world_size} processes, turning on --local-loss --gather-with-grad, "
                    "with which gradients equal those of one process on the whole batch."
                )
        tokenizer = open_clip.get_tokenizer(
            args.model, cache_dir=args.cache_dir, context_length=args.force_context_length
        )
        return surface_embeddings(model, tokenizer, tokens=self.of(args, "tokens"))

    def create_loss(self, args: Namespace) -> Objective:
        """The objective around the loss that open_clip makes from the same flags (such as --siglip)."""
        settings = {flag.setting: self.of(args, flag.setting) for flag in self.flags}
        return self.loss(
            **settings,
            **self.further_settings(args),
            global_loss=open_clip.create_loss(args),
            local_loss=args.local_loss,
            gather_with_grad=args.gather_with_grad,
            rank=args.rank,
            world_size=args.world_size,
        )

    def further_settings(self, args: Namespace) -> dict[str, Any]:
        """Arguments of the loss that no flag sets; none here."""
        return {}

    def of(self, args: Namespace, setting: str) -> Any:
        """The value of the flag `--NAME-SETTING`."""
        return getattr(args, f"{self.name}_{setting}")
