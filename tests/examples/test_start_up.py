"""The times of the commands, as `make bench` prints them."""

import pytest

from examples import start_up

pytestmark = pytest.mark.slow


def test_each_command_is_timed_and_printed(capsys, monkeypatch):
    chosen = ("import torch", "sparc-loss --help", "sparc-loss nothing")
    monkeypatch.setattr(start_up, "COMMANDS", {name: start_up.COMMANDS[name] for name in chosen})
    results = start_up.start_up(rounds=2)
    assert [each["command"] for each in results] == list(chosen)
    start_up.show_start_up(results)
    printed = capsys.readouterr().out.splitlines()
    assert all(line.strip().startswith(name) for line, name in zip(printed[2:], chosen, strict=True))


def test_a_command_that_ends_otherwise_than_expected_is_no_time(monkeypatch):
    monkeypatch.setattr(start_up, "COMMANDS", {"broken": ("-c", "raise SystemExit('no torch')")})
    with pytest.raises(RuntimeError, match=r"broken ended with code 1: no torch"):
        start_up.start_up(rounds=1)
