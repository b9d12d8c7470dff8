"""The baselines as loss plug-ins: `--loss filip`, `gloria`, `mgca` and `pacl`."""

from argparse import Namespace

from torch import nn

from sparc_loss._checks import check_positive
from sparc_loss.losses import FilipLoss, GloriaLoss, MgcaLoss, PaclLoss
from sparc_loss.losses.filip import check_token_dropping
from sparc_loss.losses.pacl import WEIGHTINGS
from sparc_loss.plugins.flags import Flag, number_of_at_least_0
from sparc_loss.plugins.mgca_heads import add_heads
from sparc_loss.plugins.objective_plugin import ObjectivePlugin


class MgcaPlugin(ObjectivePlugin):
    """MGCA, which also adds its learned heads to the model."""

    def check_args(self, args: Namespace) -> None:
        """As `ObjectivePlugin.check_args`.

        Raises:
            ValueError: also --fsdp.
        """
        super().check_args(args)
        if getattr(args, "fsdp", False):
            raise ValueError(
                "--fsdp is set; expected it off with --loss mgca: FSDP2 gathers a checkpoint into a new dict, which "
                "loses the metadata, and MGCA's own parameters with it"
            )

    def prepare_model(self, model: nn.Module, args: Namespace) -> nn.Module:
        """As `ObjectivePlugin.prepare_model`, and add `mgca_heads`."""
        return add_heads(super().prepare_model(model, args))


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
