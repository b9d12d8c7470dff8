"""Discovery of loss plug-ins: real distributions on sys.path, as pip leaves them."""

import logging
import sys

import pytest

from sparc_loss.plugins import discovery as plugin

WORKING = "def add_arguments(parser): ...\ndef prepare_model(model, args): ...\ndef create_loss(args): ..."


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution on sys.path that registers the loss `loss` with the given module code."""

    def install(name: str, loss: str, code: str, version: str = "1.0", folder: str | None = None) -> None:
        site = tmp_path / (folder or name)
        module = f"{name.replace('-', '_')}_plugin"
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[{plugin.GROUP}]\n{loss} = {module}\n", encoding="utf-8")
        (site / f"{module}.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(site)
        installed.append(module)

    installed: list[str] = []
    yield install
    for module in installed:
        sys.modules.pop(module, None)


def test_another_packages_loss_is_found_by_its_name(install):
    install("toy-loss", "toy", WORKING)
    assert callable(plugin.load_loss("toy").create_loss)


def test_only_the_named_loss_is_imported(install):
    install("toy-loss", "toy", WORKING)
    install("loud-loss", "loud", "raise AssertionError('imported')")
    plugin.load_loss("toy")
    assert "loud" in plugin.registered_losses()


def test_an_object_can_be_the_plugin(install, tmp_path):
    install("toy-loss", "toy", "class Plugin:\n    add_arguments = prepare_model = create_loss = print\nit = Plugin()")
    entry_points = tmp_path / "toy-loss" / "toy_loss-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text(f"[{plugin.GROUP}]\ntoy = toy_loss_plugin:it\n", encoding="utf-8")
    assert type(plugin.load_loss("toy")).__name__ == "Plugin"


def test_an_unknown_name_answers_with_the_known_and_the_nearest(install):
    install("toy-loss", "toy", WORKING)
    with pytest.raises(plugin.PluginError) as raised:
        plugin.load_loss("spark")
    assert (
        str(raised.value)
        == "unknown loss 'spark'; known: clip, filip, flair, gloria, mgca, pacl, sparc, toy; did you mean 'sparc'?"
    )


def test_a_name_like_no_other_gets_no_suggestion():
    with pytest.raises(plugin.PluginError, match=r"known: clip, filip, flair, gloria, mgca, pacl, sparc$"):
        plugin.load_loss("xyz")


def test_a_broken_plugin_is_an_error_with_its_cause_when_asked_for(install):
    install("broken-loss", "broken", "import a_package_that_is_not_there")
    with pytest.raises(plugin.PluginError) as raised:
        plugin.load_loss("broken")
    assert "loss 'broken' (broken_loss_plugin of broken-loss 1.0) cannot be loaded: ModuleNotFoundError" in str(
        raised.value
    )
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_a_broken_plugin_is_a_warning_at_discovery(install, caplog):
    install("broken-loss", "broken", "import a_package_that_is_not_there")
    with caplog.at_level(logging.WARNING):
        losses = plugin.load_all_losses()
    assert "sparc" in losses
    assert "broken" not in losses
    assert "loss 'broken' (broken_loss_plugin of broken-loss 1.0) cannot be loaded" in caplog.text


def test_a_plugin_without_all_three_callables_is_refused_by_what_it_lacks(install):
    install("half-loss", "half", "def create_loss(args): ...")
    with pytest.raises(plugin.PluginError, match="lacks add_arguments, prepare_model; expected add_arguments, prep"):
        plugin.load_loss("half")


def test_two_packages_of_one_name_are_warned_about_and_both_named(install, caplog):
    install("second-loss", "toy", WORKING)
    install("first-loss", "toy", WORKING)
    with caplog.at_level(logging.WARNING):
        loss = plugin.load_loss("toy")
    assert "--loss toy is registered by first-loss 1.0 and by second-loss 1.0; the one of first-loss 1.0 is taken" in (
        caplog.text
    )
    assert loss.__name__ == "first_loss_plugin"


def test_one_package_seen_twice_is_no_clash(install, caplog):
    install("toy-loss", "toy", WORKING, folder="one")
    install("toy-loss", "toy", WORKING, folder="two")
    with caplog.at_level(logging.WARNING):
        plugin.load_loss("toy")
    assert caplog.text == ""
