"""The project's own log messages."""

import pytest

from sora_train.log import log, progress, set_verbosity


@pytest.fixture(autouse=True)
def _as_before():
    yield
    set_verbosity()


def test_information_is_plain_and_warnings_say_so(capsys: pytest.CaptureFixture[str]):
    log.info("100% of {it}")
    log.warning("low")
    log.debug("hidden")
    assert capsys.readouterr() == ("100% of {it}\n", "warning: low\n")


def test_quiet_leaves_warnings_only(capsys: pytest.CaptureFixture[str]):
    set_verbosity(quiet=True)
    log.info("done")
    progress("1 of 2")
    log.warning("low")
    assert capsys.readouterr() == ("", "warning: low\n")


def test_verbose_adds_time_and_module(capsys: pytest.CaptureFixture[str]):
    set_verbosity(verbose=True)
    log.debug("seen")
    assert capsys.readouterr().out.endswith(" test_log: seen\n")
