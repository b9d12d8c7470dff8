"""Our plug-in, called the way open_clip's training calls it."""

import logging
import re
from argparse import Namespace
from functools import partial

import plugin_arguments
import pytest
from open_clip.loss import ClipLoss, CoCaLoss, DistillClipLoss, SigLipLoss

from sparc_loss.plugins.checks import check_accumulation
from sparc_loss.plugins.recipes import flags_of
from sparc_loss.plugins.sparc import SPARC

parse = partial(plugin_arguments.parse, SPARC)


def test_every_flag_reaches_the_loss():
    flags = "--sparc-global-weight 2 --sparc-fine-grained-weight 3 --sparc-threshold 0.25 --sparc-alignment dense"
    flags += " --sparc-reduction sample --sparc-fine-grained-scale 20"
    flags += " --sparc-image-negatives 3 --sparc-image-contrastive-weight 0.5"
    flags += " --sparc-image-contrastive-threshold 1 --sparc-image-contrastive-direction both"
    loss = SPARC.create_loss(parse(*flags.split()))
    assert (loss.global_weight, loss.fine_grained_weight, loss.threshold) == (2, 3, 0.25)
    assert (loss.alignment, loss.reduction, loss.fine_grained_scale) == ("dense", "sample", 20)
    assert (loss.image_negatives, loss.image_contrastive_weight) == (3, 0.5)
    assert (loss.image_contrastive_threshold, loss.image_contrastive_direction) == (1, "both")


HIGHEST_PATCHES = {
    "fine_grained_weight": 0.3,
    "image_negatives": 3,
    "image_contrastive_threshold": 1.0,
    "image_contrastive_direction": "both",
}


def of_loss(*flags, names=HIGHEST_PATCHES):
    loss = SPARC.create_loss(parse(*flags))
    return {name: getattr(loss, name) for name in names}


def test_a_recipe_is_the_flags_that_it_stands_for():
    assert of_loss("--sparc-recipe", "highest-patches") == HIGHEST_PATCHES
    flags = "--sparc-fine-grained-weight 0.3 --sparc-image-negatives 3 --sparc-image-contrastive-threshold 1.0 "
    flags += "--sparc-image-contrastive-direction both"
    assert flags_of(HIGHEST_PATCHES) == flags
    assert of_loss(*flags.split()) == HIGHEST_PATCHES


def test_the_light_recipe_has_a_tenth_of_the_weights_and_a_temperature_of_its_own():
    names = (*HIGHEST_PATCHES, "image_contrastive_weight", "fine_grained_scale")
    light = {
        **HIGHEST_PATCHES,
        "fine_grained_weight": 0.03,
        "fine_grained_scale": 10,
        "image_contrastive_weight": 0.1,
    }
    assert of_loss("--sparc-recipe", "highest-patches-light", names=names) == light
    assert of_loss("--sparc-recipe", "highest-patches", names=names)["image_contrastive_weight"] == 1


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("image_negatives", 7),
        ("image_negatives", 0),
        ("fine_grained_weight", 1.0),
        ("image_contrastive_direction", "text_to_image"),
    ],
)
def test_a_flag_beside_a_recipe_wins_wherever_it_stands_also_with_its_default(first, setting, value):
    recipe, flag = ("--sparc-recipe", "highest-patches"), (f"--sparc-{setting.replace('_', '-')}", str(value))
    flags = (*flag, *recipe) if first else (*recipe, *flag)
    assert of_loss(*flags) == {**HIGHEST_PATCHES, setting: value}


def test_a_recipe_is_logged_with_the_flags_of_the_run(model, caplog):
    with caplog.at_level(logging.INFO):
        SPARC.prepare_model(model, parse("--sparc-recipe", "highest-patches", "--sparc-image-negatives", "7"))
    flags = flags_of({**HIGHEST_PATCHES, "image_negatives": 7})
    assert f"--sparc-recipe highest-patches is {flags}" in caplog.messages


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sparc-region-words only", "--sparc-region-words is only without --sparc-regions, and changes nothing"),
        ("--sparc-region-share 0.3", "--sparc-region-share is 0.3 without --sparc-regions, and changes nothing"),
        (
            "--sparc-image-contrastive-weight 2",
            "--sparc-image-contrastive-weight is 2.0 without --sparc-image-negatives, and changes nothing",
        ),
    ],
)
def test_a_flag_that_changes_nothing_without_another_is_refused(flags, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}; expected both or neither$"):
        SPARC.check_args(parse(*flags.split()))


@pytest.mark.parametrize(
    ("flags", "global_loss"),
    [
        ({}, ClipLoss),
        ({"siglip": True}, SigLipLoss),
        ({"distill": True}, DistillClipLoss),
        ({"model": "coca_ViT-B-32"}, CoCaLoss),
    ],
)
def test_the_global_loss_is_what_open_clip_makes_of_the_flags(flags, global_loss):
    assert type(SPARC.create_loss(parse(**flags)).global_loss) is global_loss


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sparc-global-weight=-1", "argument --sparc-global-weight: '-1' given; expected a number of at least 0"),
        ("--sparc-fine-grained-weight=x", "argument --sparc-fine-grained-weight: 'x' given; expected a number"),
        ("--sparc-threshold=1.5", "argument --sparc-threshold: '1.5' given; expected a number between 0 and 1"),
        ("--sparc-fine-grained-scale=0", "argument --sparc-fine-grained-scale: '0' given; expected a number above 0"),
        (
            "--sparc-fine-grained-scale=nan",
            "argument --sparc-fine-grained-scale: 'nan' given; expected a finite number above 0",
        ),
        ("--sparc-alignment=hard", "argument --sparc-alignment: invalid choice: 'hard'"),
        ("--sparc-reduction=mean", "argument --sparc-reduction: invalid choice: 'mean'"),
        ("--sparc-tokens=none", "argument --sparc-tokens: invalid choice: 'none'"),
        (
            "--sparc-image-negatives=-1",
            "argument --sparc-image-negatives: '-1' given; expected a whole number of at least 0",
        ),
        (
            "--sparc-image-contrastive-weight=-1",
            "argument --sparc-image-contrastive-weight: '-1' given; expected a number of at least 0",
        ),
        ("--sparc-start=-1", "argument --sparc-start: '-1' given; expected a whole number of at least 0"),
        ("--sparc-probe-every=x", "argument --sparc-probe-every: 'x' given; expected a whole number"),
        ("--sparc-show-every=0", "argument --sparc-show-every: '0' given; expected a whole number of at least 1"),
        ("--sparc-show-every=1.5", "argument --sparc-show-every: '1.5' given; expected a whole number"),
    ],
)
def test_a_bad_value_is_one_error_naming_the_flag(flag, message, capsys):
    with pytest.raises(SystemExit):
        parse(flag)
    assert message in capsys.readouterr().err


def test_one_process_leaves_open_clips_flags_alone(model):
    args = parse()
    SPARC.prepare_model(model, args)
    assert not args.local_loss
    assert not args.gather_with_grad


def test_several_processes_gather_with_gradient_and_say_so(model, caplog):
    args = parse(world_size=8)
    with caplog.at_level(logging.INFO):
        SPARC.prepare_model(model, args)
    assert args.local_loss
    assert args.gather_with_grad
    assert "8 processes, turning on --local-loss --gather-with-grad" in caplog.text


@pytest.mark.parametrize("flag", ["torchscript", "trace", "horovod"])
def test_what_cannot_work_is_refused_with_the_reason(model, flag):
    with pytest.raises(ValueError, match=f"--{flag} is set; expected it off with --loss sparc: "):
        SPARC.prepare_model(model, parse(**{flag: True}))


def test_several_processes_keep_gather_with_gradient_and_get_local_loss(model):
    """Either of open_clip's two flags alone is not enough."""
    for given in ({"gather_with_grad": True}, {"local_loss": True}):
        args = parse(world_size=8, **given)
        SPARC.prepare_model(model, args)
        assert args.local_loss
        assert args.gather_with_grad


@pytest.mark.parametrize(("batch_size", "accum_freq", "negatives"), [(8, 1, 8), (8, 2, 16), (1, 1, 1), (4, 1, 100)])
def test_more_image_negatives_than_a_batch_has_are_refused(model, batch_size, accum_freq, negatives):
    args = parse("--sparc-image-negatives", str(negatives), batch_size=batch_size, accum_freq=accum_freq)
    message = f"--sparc-image-negatives is {negatives} with batches of {batch_size * accum_freq} pairs on each process"
    with pytest.raises(ValueError, match=re.escape(message)):
        SPARC.check_args(args)
    args.sparc_image_negatives = batch_size * accum_freq - 1
    SPARC.check_args(args)


def test_naflex_batches_may_have_fewer_images_than_negatives(model):
    SPARC.check_args(parse("--sparc-image-negatives", "8", use_naflex=True, naflex_seq_lens=[16]))


@pytest.mark.parametrize(("epoch", "weights"), [(0, (0, 0)), (1, (0, 0)), (2, (0.3, 0.2)), (7, (0.3, 0.2))])
def test_the_fine_grained_terms_begin_with_the_epoch_that_sparc_start_names(epoch, weights):
    args = parse(
        *("--sparc-start", "2", "--sparc-fine-grained-weight", "0.3"),
        *("--sparc-image-negatives", "1", "--sparc-image-contrastive-weight", "0.2"),
    )
    loss = SPARC.create_loss(args)
    SPARC.before_epoch(loss, epoch, args)
    assert (loss.fine_grained_weight, loss.image_contrastive_weight) == weights
    assert loss.global_weight == 0.5


def test_without_the_launcher_sparc_start_is_refused(model):
    with pytest.raises(ValueError, match=r"--sparc-start is set; expected it off, or python -m sparc_loss.train"):
        SPARC.prepare_model(model, parse("--sparc-start", "2"))


def test_accumulating_captions_of_variable_length_is_refused(model):
    check_accumulation(model, Namespace(accum_freq=1, variable_text=True), "sparc")
    with pytest.raises(ValueError, match="--accum-freq is 2 with captions of variable length; expected 1 with --loss"):
        check_accumulation(model, Namespace(accum_freq=2, variable_text=True), "sparc")
