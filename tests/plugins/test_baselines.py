"""The plug-ins of the baselines, and what holds of SPARC's too, called the way open_clip's training calls them."""

import pytest
from open_clip.loss import SigLipLoss
from plugin_arguments import parse

from sparc_loss import losses
from sparc_loss.plugins import discovery as plugin
from sparc_loss.plugins.baselines import FILIP, FLAIR, GLORIA, MGCA, PACL
from sparc_loss.plugins.sparc import SPARC

PLUGINS = {
    "filip": (FILIP, losses.FilipLoss),
    "flair": (FLAIR, losses.FlairLoss),
    "gloria": (GLORIA, losses.GloriaLoss),
    "mgca": (MGCA, losses.MgcaLoss),
    "pacl": (PACL, losses.PaclLoss),
    "sparc": (SPARC, losses.SparcLoss),
}
# What each adds to the flags that all have: flag, value, attribute.
OWN = {
    "filip": [("token-dropping", 0.4, "token_dropping")],
    "gloria": [("matching-scale", 4.0, "matching_scale")],
    "mgca": [("prototype-weight", 0.5, "prototype_weight")],
    "pacl": [("weighting", "softmax", "weighting")],
}


@pytest.mark.parametrize("name", PLUGINS)
def test_is_registered(name):
    assert plugin.load_loss(name) is PLUGINS[name][0]


@pytest.mark.parametrize("name", PLUGINS)
def test_the_defaults_are_those_of_the_loss(name):
    module, loss_class = PLUGINS[name]
    assert repr(module.create_loss(parse(module))) == repr(loss_class())


@pytest.mark.parametrize("name", PLUGINS)
def test_every_flag_reaches_the_loss(name):
    module, _ = PLUGINS[name]
    values = {"global-weight": 2, "fine-grained-weight": 3, "fine-grained-scale": 20}
    values |= {flag: value for flag, value, _ in OWN.get(name, ())}
    flags = [f"--{name}-{flag}={number}" for flag, number in values.items()]
    loss = module.create_loss(parse(module, *flags, siglip=True))
    assert (loss.global_weight, loss.fine_grained_weight, loss.fine_grained_scale) == (2, 3, 20)
    assert all(getattr(loss, attribute) == value for _, value, attribute in OWN.get(name, ()))
    assert type(loss.global_loss) is SigLipLoss


@pytest.mark.parametrize("name", PLUGINS)
def test_prepare_model_surfaces_the_same_object_and_gathers_with_gradient_over_several_processes(name, model):
    module, _ = PLUGINS[name]
    args = parse(module, world_size=8)
    assert module.prepare_model(model, args) is model
    assert hasattr(model, "encode_patches")
    assert args.local_loss
    assert args.gather_with_grad


@pytest.mark.parametrize("name", PLUGINS)
def test_what_cannot_work_is_refused_by_the_name_of_the_loss(name, model):
    module, _ = PLUGINS[name]
    with pytest.raises(ValueError, match=f"--horovod is set; expected it off with --loss {name}: "):
        module.prepare_model(model, parse(module, horovod=True))


@pytest.mark.parametrize("name", ["mgca", "flair"])
def test_sharded_weights_are_refused_where_heads_are_learned(name):
    module, _ = PLUGINS[name]
    with pytest.raises(ValueError, match=f"--fsdp is set; expected it off with --loss {name}: FSDP2 gathers"):
        module.check_args(parse(module, fsdp=True))


def test_flair_refuses_an_accumulated_batch():
    with pytest.raises(ValueError, match="--accum-freq is 2; expected 1 with --loss flair: its attention pools"):
        FLAIR.check_args(parse(FLAIR, accum_freq=2))


@pytest.mark.parametrize(
    ("name", "flag", "message"),
    [
        ("filip", "--filip-token-dropping=1", "'1' given; expected a number below 1"),
        ("filip", "--filip-token-dropping=2", "'2' given; expected a number between 0 and 1"),
        ("gloria", "--gloria-matching-scale=0", "'0' given; expected a number above 0"),
        ("mgca", "--mgca-prototype-weight=-1", "'-1' given; expected a number of at least 0"),
        ("pacl", "--pacl-weighting=max", "invalid choice: 'max'"),
        ("pacl", "--pacl-fine-grained-scale=x", "'x' given; expected a number"),
    ],
)
def test_a_bad_value_is_one_error_naming_the_flag(name, flag, message, capsys):
    with pytest.raises(SystemExit):
        parse(PLUGINS[name][0], flag)
    assert f"argument {flag.split('=')[0]}: {message}" in capsys.readouterr().err
