"""What MGCA and FLAIR learn beyond the model's own parameters: trained with them, saved beside them."""

import io

import open_clip
import pytest
import torch
from tiny_models import ToyTokenizer, captions, clip, custom_text_clip, hf_clip, images_for
from tiny_tokenizers import bert

from sparc_loss import surface_embeddings
from sparc_loss.losses import FlairHeads, FlairLoss, MgcaHeads, MgcaLoss
from sparc_loss.plugins.learned_heads import add_heads, check_heads

MODELS = [clip, custom_text_clip]


LOSSES = {"mgca": MgcaLoss, "flair": FlairLoss}
HEADS = {"mgca": MgcaHeads, "flair": FlairHeads}


def prepared(make=clip, name="mgca"):
    return add_heads(surface_embeddings(make(), ToyTokenizer()), f"{name}_heads", HEADS[name])


def saved_and_loaded(state_dict):
    """As a checkpoint comes back from the disk."""
    file = io.BytesIO()
    torch.save({"state_dict": state_dict}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["state_dict"]


def heads_of(model):
    return {name: value for name, value in model.named_parameters() if "_heads." in name}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("make", MODELS)
def test_the_optimizer_sees_the_heads_and_every_one_gets_a_gradient(make, name):
    model = prepared(make, name).train()
    heads = heads_of(model)
    assert len(heads) == {"mgca": 9, "flair": 11}[name]
    LOSSES[name]()(**model(images_for(model), captions())).backward()
    # The bias of keys adds the same to every logit but that of FLAIR's zero patch, so it counts.
    assert all(parameter.grad.any() for parameter in heads.values())


def test_a_hugging_face_text_tower_gets_heads_of_its_size(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    model = surface_embeddings(hf_clip(tmp_path / "model"), bert(tmp_path / "tokenizer"))
    assert add_heads(model, "mgca_heads", MgcaHeads).mgca_heads.prototypes.shape == (500, 16)


def test_evaluation_is_the_models_own():
    model = prepared().eval()
    assert set(model(images_for(model), captions())) == {"image_features", "text_features", "logit_scale"}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("make", MODELS)
def test_the_state_dict_has_the_keys_of_the_plain_model_and_loads_there(make, name):
    model, plain = prepared(make, name), make()
    state_dict = saved_and_loaded(model.state_dict())
    assert state_dict.keys() == plain.state_dict().keys()
    plain.load_state_dict(state_dict)


def test_a_checkpoint_file_loads_in_plain_open_clip(tmp_path):
    model, plain = prepared(), clip()
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, tmp_path / "epoch_1.pt")
    with torch.no_grad():
        plain.logit_scale.zero_()
    open_clip.load_checkpoint(plain, str(tmp_path / "epoch_1.pt"))
    assert plain.logit_scale == model.logit_scale


@pytest.mark.parametrize("name", HEADS)
def test_the_heads_come_back_from_a_saved_state_dict(name):
    first, second = prepared(name=name), prepared(name=name)
    with torch.no_grad():
        for parameter in heads_of(first).values():
            parameter.normal_()
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    for name, parameter in heads_of(first).items():
        assert torch.equal(heads_of(second)[name], parameter)


def test_they_come_back_through_a_wrapper_that_prefixes_the_keys():
    first, second = torch.nn.Sequential(prepared()), torch.nn.Sequential(prepared())
    with torch.no_grad():
        first[0].mgca_heads.prototypes.normal_()
    second.load_state_dict(saved_and_loaded(first.state_dict()))
    assert torch.equal(second[0].mgca_heads.prototypes, first[0].mgca_heads.prototypes)


def test_saving_leaves_the_model_and_its_heads_as_they_are():
    model = prepared()
    before = {name: parameter.clone() for name, parameter in heads_of(model).items()}
    model.state_dict()
    assert all(torch.equal(heads_of(model)[name], value) for name, value in before.items())
    assert len(before) == 9


@pytest.mark.parametrize(
    "lost", [lambda model: clip().state_dict(), lambda model: dict(model.state_dict())], ids=["of clip", "copied"]
)
def test_a_state_dict_without_heads_is_refused_by_the_missing_names(lost):
    model = prepared()
    with pytest.raises(RuntimeError, match=r'Missing key.*"mgca_heads.prototypes"'):
        model.load_state_dict(lost(model))


@pytest.mark.parametrize(
    ("model", "heads", "world_size", "message"),
    [
        (clip, None, 1, None),
        (prepared, "mgca_heads", 1, None),
        (lambda: in_a_wrapper(prepared()), "mgca_heads", 2, None),
        (clip, "mgca_heads", 1, r"has no parameters of mgca_heads; expected .* the same --loss, or --pretrained"),
        (prepared, "flair_heads", 1, r"has the parameters of mgca_heads, which this loss has not; expected"),
        (prepared, None, 1, r"has the parameters of mgca_heads, which this loss has not; expected"),
        (lambda: in_a_wrapper(prepared()), "mgca_heads", 1, r"is of several processes, .*; expected several"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_refused_before_a_model_is_made(model, heads, world_size, message):
    checkpoint = {"optimizer": {}, "state_dict": saved_and_loaded(model().state_dict())}
    if message is None:
        check_heads(checkpoint, heads, world_size)
        return
    with pytest.raises(ValueError, match=message):
        check_heads(checkpoint, heads, world_size)


def test_a_checkpoint_with_heads_can_be_evaluated_without_them():
    checkpoint = {"optimizer": {}, "state_dict": saved_and_loaded(prepared().state_dict())}
    check_heads(checkpoint, None, 1, trains=False)
    check_heads(checkpoint["state_dict"], None, 1)  # without an optimizer


def in_a_wrapper(model):
    """Its keys begin with "module.", as those of DistributedDataParallel."""
    wrapper = torch.nn.Module()
    wrapper.add_module("module", model)
    return wrapper
