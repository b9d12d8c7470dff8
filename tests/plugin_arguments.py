"""The arguments of a run, as open_clip's training hands them to a plug-in."""

from argparse import ArgumentParser, Namespace

from sparc_loss.plugins.objective_plugin import ObjectivePlugin


def parse(plugin: ObjectivePlugin, *argv: str, **open_clip_args: object) -> Namespace:
    """The plug-in's own flags from `argv`, beside those of open_clip that plug-ins read, for one process."""
    parser = ArgumentParser()
    plugin.add_arguments(parser)
    args = dict(
        model="ViT-B-32",
        cache_dir=None,
        force_context_length=None,
        torchscript=False,
        trace=False,
        horovod=False,
        distill=False,
        siglip=False,
        loss_dist_impl=None,
        coca_caption_loss_weight=2.0,
        coca_contrastive_loss_weight=1.0,
        local_loss=False,
        gather_with_grad=False,
        rank=0,
        world_size=1,
        batch_size=8,
        accum_freq=1,
        force_quick_gelu=False,
        force_custom_text=False,
        force_patch_dropout=None,
        force_image_size=None,
    )
    return parser.parse_args(list(argv), Namespace(**{**args, **open_clip_args}))
