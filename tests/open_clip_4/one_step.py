"""One training step of every loss on given weights and a given batch, by whichever open_clip this process finds.

`python one_step.py FOLDER OUT [LEAVE_OUT]` saves the terms and gradients to OUT; LEAVE_OUT is a place of sys.path to
look nowhere in. FOLDER has the models "clip" and "coca" as `launching.write_model` writes them.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path not in sys.argv[3:]]

from argparse import ArgumentParser, Namespace

import open_clip
import torch
from torch import Tensor, nn

from sparc_loss.open_clip_versions import major_version
from sparc_loss.plugins.baselines import FILIP, FLAIR, GLORIA, MGCA, PACL
from sparc_loss.plugins.objective_plugin import ObjectivePlugin
from sparc_loss.plugins.sparc import SPARC

# Of each: the plug-in, and the flags of open_clip that bring in another global loss.
CASES: dict[str, tuple[ObjectivePlugin, dict[str, object]]] = {
    "sparc": (SPARC, {}),
    "filip": (FILIP, {}),
    "pacl": (PACL, {}),
    "gloria": (GLORIA, {}),
    "mgca": (MGCA, {}),
    "flair": (FLAIR, {}),
    "sparc, siglip": (SPARC, {"siglip": True}),
    "sparc, distill": (SPARC, {"distill": True}),
    "sparc, coca": (SPARC, {"model": "coca"}),
}
Step = dict[str, dict[str, Tensor]]


def one_step(folder: Path, plugin: ObjectivePlugin, flags: dict[str, object]) -> Step:
    """The terms of the loss, and the gradient of every parameter."""
    args = parsed(folder, plugin, flags)
    bias = {"init_logit_bias": -10.0} if args.siglip else {}
    model, teacher = (filled(open_clip.create_model(args.model, output_dict=True, **bias), seed) for seed in (1, 2))
    torch.manual_seed(3)  # of the learned heads of MGCA and FLAIR
    model = plugin.prepare_model(model, args).train()
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    words = torch.randint(1, 300, (4, 14), generator=generator)
    ends = torch.full((4, 1), 49407)
    texts = torch.cat([ends - 1, words[:, :9], ends, torch.zeros(4, 5, dtype=torch.long)], dim=1)
    torch.manual_seed(5)  # of the patches and tokens that FILIP leaves out
    terms = terms_of(args, plugin, model, teacher.eval(), images, texts)
    sum(terms.values()).backward()
    return {
        "terms": {name: term.detach() for name, term in terms.items()},
        "gradients": {name: each.grad for name, each in model.named_parameters() if each.grad is not None},
    }


def terms_of(
    args: Namespace, plugin: ObjectivePlugin, model: nn.Module, teacher: nn.Module, images: Tensor, texts: Tensor
) -> dict[str, Tensor]:
    """The terms of the loss, computed as the open_clip_train of this major version does (its train.py)."""
    if major_version(open_clip.__version__) == 3:
        output = model(images, texts)
        if args.distill:
            with torch.no_grad():
                output.update({f"dist_{name}": value for name, value in teacher(images, texts).items()})
        return plugin.create_loss(args)(**output, output_dict=True)

    from sparc_loss.hooks.open_clip_4 import with_loss

    task = open_clip.create_task(args, model, dist_model=teacher)
    losses, _ = with_loss(task, lambda: plugin.create_loss(args)).train()({"image": images, "text": texts})
    return {name: term for name, term in losses.items() if name.endswith("_loss")}


def parsed(folder: Path, plugin: ObjectivePlugin, flags: dict[str, object]) -> Namespace:
    """The arguments of one process that a loss is made of."""
    parser = ArgumentParser()
    plugin.add_arguments(parser)
    args = dict(
        model="clip",
        cache_dir=None,
        force_context_length=None,
        batch_size=8,
        accum_freq=1,
        force_quick_gelu=False,
        force_custom_text=False,
        force_patch_dropout=None,
        force_image_size=None,
        distill=False,
        siglip=False,
        loss_dist_impl=None,
        coca_caption_loss_weight=2.0,
        coca_contrastive_loss_weight=1.0,
        local_loss=False,
        gather_with_grad=False,
        horovod=False,
        fsdp=False,
        rank=0,
        world_size=1,
    )
    args = parser.parse_args([], Namespace(**{**args, **flags}))
    args.model = f"local-dir:{folder / args.model}"
    return args


def filled(model: nn.Module, seed: int) -> nn.Module:
    """The model with weights that depend on their names and `seed` alone."""
    for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
        if name not in ("logit_scale", "logit_bias"):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {name: one_step(Path(sys.argv[1]), *case) for name, case in CASES.items()}
    torch.save({"version": open_clip.__version__, **results}, sys.argv[2])
