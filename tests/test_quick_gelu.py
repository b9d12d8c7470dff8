"""QuickGELU has no parameter, so weights load without it and every figure is wrong: it is set, told or refused."""

from argparse import ArgumentParser

import pytest

from sparc_loss.model_loading import add_model_flags, complete_from_run


def completed(*argv):
    parser = ArgumentParser()
    add_model_flags(parser)
    args = parser.parse_args([str(part) for part in argv])
    complete_from_run("prog", args)
    return args


@pytest.fixture
def run(tmp_path):
    """Write a run with these arguments; returns its checkpoint."""

    def write(**params):
        (tmp_path / "params.txt").write_text("".join(f"{name}: {value}\n" for name, value in params.items()))
        checkpoint = tmp_path / "checkpoints" / "epoch_1.pt"
        checkpoint.parent.mkdir()
        checkpoint.write_bytes(b"weights")
        return checkpoint

    return write


def test_weights_that_want_it_get_it_and_this_is_said(capsys):
    assert completed("--model", "ViT-B/16", "--pretrained", "openai").force_quick_gelu is True
    assert capsys.readouterr().err == (
        "prog: ViT-B-16 has GELU, and the weights 'openai' want QuickGELU, which is taken\n"
    )


@pytest.mark.parametrize(
    ("model", "tag"), [("ViT-B-16-quickgelu", "openai"), ("ViT-B-16", "laion2b_s34b_b88k"), ("ViT-B-16", "unknown")]
)
def test_weights_that_fit_are_left_alone(capsys, model, tag):
    assert completed("--model", model, "--pretrained", tag).force_quick_gelu is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("tag", "flag", "activation"),
    [("openai", "--no-force-quick-gelu", "GELU"), ("laion2b_s34b_b88k", "--force-quick-gelu", "QuickGELU")],
)
def test_who_insists_is_warned(capsys, tag, flag, activation):
    args = completed("--model", "ViT-B-16", "--pretrained", tag, flag)
    assert args.force_quick_gelu is (activation == "QuickGELU")
    assert capsys.readouterr().err == (
        f"prog: warning: the weights {tag!r} were not trained with {activation}, which is taken\n"
    )


def test_a_checkpoint_under_the_plain_name_of_its_model_is_refused(run, tmp_path):
    checkpoint = run(model="ViT-B-16-quickgelu", pretrained="openai")
    with pytest.raises(ValueError, match="argument --model") as error:
        completed("--model", "ViT-B-16", "--pretrained", checkpoint)
    assert str(error.value) == (
        f"argument --model: ViT-B-16 has GELU, and {tmp_path}/params.txt says that the checkpoint was trained as "
        "ViT-B-16-quickgelu with QuickGELU: every figure would be wrong; leave --model out, or give "
        "--no-force-quick-gelu to insist"
    )
    assert completed("--pretrained", checkpoint).model == "ViT-B-16-quickgelu"
    assert completed("--model", "ViT-B-16", "--pretrained", checkpoint, "--no-force-quick-gelu").model == "ViT-B-16"
    assert completed("--model", "ViT-B-16", "--pretrained", checkpoint, "--force-quick-gelu").force_quick_gelu


def test_a_checkpoint_without_it_under_the_name_of_one_with_it_is_refused(run):
    checkpoint = run(model="ViT-B-16")
    with pytest.raises(
        ValueError, match=r"ViT-B-16-quickgelu has QuickGELU, and .* was trained as ViT-B-16 with GELU"
    ):
        completed("--model", "ViT-B-16-quickgelu", "--pretrained", checkpoint)


def test_a_run_with_the_flag_is_opened_with_it(run, capsys):
    checkpoint = run(model="ViT-B-16", pretrained="openai", force_quick_gelu=True)
    assert completed("--pretrained", checkpoint).force_quick_gelu is True
    assert capsys.readouterr().err == ""


def test_a_run_from_such_weights_as_a_plain_model_is_doubted(run, capsys):
    checkpoint = run(model="ViT-B-16", pretrained="openai", force_quick_gelu=False)
    assert completed("--pretrained", checkpoint).force_quick_gelu is False
    assert capsys.readouterr().err == (
        "prog: warning: the checkpoint was trained from 'openai', which has QuickGELU, as ViT-B-16; open_clip 2.29 "
        "and later trained it with GELU, which is taken; if an earlier one did, give --force-quick-gelu\n"
    )


def test_a_checkpoint_without_its_run_says_what_cannot_be_known(tmp_path, capsys):
    (tmp_path / "weights.pt").write_bytes(b"weights")
    completed("--model", "ViT-B-16", "--pretrained", tmp_path / "weights.pt")
    assert capsys.readouterr().err == (
        f"prog: {tmp_path}/weights.pt has no params.txt of its run: whether it was trained with QuickGELU, and with "
        "which image size and normalisation, cannot be known; those of ViT-B-16 are taken\n"
    )


def test_another_image_size_than_that_of_the_run_is_told(run, capsys, tmp_path):
    checkpoint = run(model="ViT-B-16", force_image_size=384)
    completed("--pretrained", checkpoint, "--force-image-size", "224")
    assert capsys.readouterr().err == (
        f"prog: warning: --force-image-size is [224], {tmp_path}/params.txt has 384; the command's is taken\n"
    )
