import os
import sys

import pytest
from launching import run_python

import sparc_loss
from sparc_loss import cli, train


def test_train_hands_its_arguments_to_the_launcher_and_returns_its_code(monkeypatch):
    monkeypatch.setattr(train, "main", lambda argv: argv and 7)
    assert cli.main(["train", "--loss", "sparc"]) == 7


@pytest.mark.parametrize(("argv", "found"), [([], "no command given"), (["trian"], "unknown command 'trian'")])
def test_anything_else_is_one_error_with_the_commands(argv, found, capsys):
    assert cli.main(argv) == 2
    assert f"sparc-loss: error: {found}; expected train, evaluate or show" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "train an open_clip model with a loss plug-in" in printed
    assert "measure an open_clip model on a CSV" in printed


def test_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sparc-loss {sparc_loss.__version__}\n"


def test_show_hands_its_arguments_to_the_command_and_returns_its_code(monkeypatch):
    from sparc_loss.show import command

    monkeypatch.setattr(command, "main", lambda argv: argv and 7)
    assert cli.main(["show", "image.png", "a dog"]) == 7


def test_show_without_its_extra_is_one_error_with_the_pip_command(monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith("sparc_loss.show"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("sparc_loss.show", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["show", "image.png", "a dog"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparc-loss show: error: ")
    assert "matplotlib" in error
    assert error.endswith("pip install 'sparc-loss[show]'\n")


@pytest.mark.slow
@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given, found):
    code = "import os, sys; from sparc_loss import cli; cli.main(['evaluate', '--list-suites']); import torch; "
    finished = run_python("-c", code + "print(os.environ['OMP_WAIT_POLICY'])", env=given)
    assert finished.stdout.splitlines()[-1] == found


def test_a_process_that_has_torch_already_is_left_alone(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    cli.main(["evaluate", "--list-suites"])
    assert "OMP_WAIT_POLICY" not in os.environ
