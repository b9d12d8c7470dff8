"""The baselines as loss plug-ins: `--loss filip`, `flair`, `gloria`, `mgca` and `pacl`."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial

from torch import nn

from sparc_loss._checks import check_positive
from sparc_loss.losses import FilipLoss, FlairHeads, FlairLoss, GloriaLoss, MgcaHeads, MgcaLoss, PaclLoss
from sparc_loss.losses.filip import check_token_dropping
from sparc_loss.losses.pacl import WEIGHTINGS
from sparc_loss.plugins.flags import Flag, number_of_at_least_0
from sparc_loss.plugins.learned_heads import add_heads
from sparc_loss.plugins.objective_plugin import ObjectivePlugin


class LearnedHeadsPlugin(ObjectivePlugin):
    """A baseline that also adds its learned heads to the model."""

    @property
    def heads(self) -> str:
        """As `ObjectivePlugin.heads`."""
        return f"{self.name}_heads"

    def check_args(self, args: Namespace) -> None:
        """As `ObjectivePlugin.check_args`.

        Raises:
            ValueError: also --fsdp.
        """
        super().check_args(args)
        if getattr(args, "fsdp", False):
            raise ValueError(
                f"--fsdp is set; expected it off with --loss {self.name}: FSDP2 gathers a checkpoint into a new dict, "
                f"which loses the metadata, and {self.title}'s own parameters with it"
            )

    def prepare_model(self, model: nn.Module, args: Namespace) -> nn.Module:
        """As `ObjectivePlugin.prepare_model`, and add the submodule `NAME_heads`."""
        prepared: nn.Module = add_heads(super().prepare_model(model, args), self.heads, self.make_heads(args))
        return prepared

    def make_heads(self, args: Namespace) -> Callable[[int], nn.Module]:
        """Size of the embeddings -> the heads."""
        raise NotImplementedError


class MgcaPlugin(LearnedHeadsPlugin):
    """MGCA and its heads, which see the pairs of their own rank."""

    def make_heads(self, args: Namespace) -> Callable[[int], nn.Module]:
        """As `LearnedHeadsPlugin.make_heads`."""
        return MgcaHeads


class FlairPlugin(LearnedHeadsPlugin):
    """FLAIR and its heads, which see the captions of all ranks."""

    def check_args(self, args: Namespace) -> None:
        """As `LearnedHeadsPlugin.check_args`.

        Raises:
            ValueError: also --accum-freq above 1.
        """
        super().check_args(args)
        if getattr(args, "accum_freq", 1) > 1:
            raise ValueError(
                f"--accum-freq is {args.accum_freq}; expected 1 with --loss flair: its attention pools the patches of "
                "an image for every caption of the batch, and an accumulated batch is never in memory at once"
            )

    def make_heads(self, args: Namespace) -> Callable[[int], nn.Module]:
        """As `LearnedHeadsPlugin.make_heads`."""
        return partial(FlairHeads, world_size=args.world_size)


FLAIR = FlairPlugin(
    "flair",
    "FLAIR",
    "Patches pooled for each caption by learned attention (arXiv 2412.03561).",
    FlairLoss,
)
FILIP = ObjectivePlugin(
    "filip",
    "FILIP",
    "Late interaction of patches and tokens (arXiv 2111.07783).",
    FilipLoss,
    [Flag("token_dropping", "share of patches and tokens dropped at random in training", check=check_token_dropping)],
)
GLORIA = ObjectivePlugin(
    "gloria",
    "GLoRIA",
    "Attention of tokens to patches, matched by a soft maximum.",
    GloriaLoss,
    [Flag("matching_scale", "1/temperature of the soft maximum over tokens", check=check_positive)],
)
MGCA = MgcaPlugin(
    "mgca",
    "MGCA",
    "Token and prototype alignment (arXiv 2210.06044).",
    MgcaLoss,
    [Flag("prototype_weight", "weight of the prototype alignment", check=number_of_at_least_0)],
)
PACL = ObjectivePlugin(
    "pacl",
    "PACL",
    "Patches pooled for each caption (arXiv 2212.04994).",
    PaclLoss,
    [Flag("weighting", "weights of the patches, from their cosine with the caption", choices=WEIGHTINGS)],
)
