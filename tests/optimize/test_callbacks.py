"""Whoever hears a search."""

from autoquant.optimize.callbacks import Silent


def test_whoever_says_nothing_can_stand_for_any_reporter():
    quiet = Silent()
    assert quiet.say("anything") is None
    assert quiet.preflight(None) is None
    assert quiet.begin("study", None, [], None) is None
    assert quiet.trial(None, None) is None
    assert quiet.step(0, 1, 2) is None
    assert quiet.trained(None) is None
    assert quiet.checked(None) is None
    assert vars(quiet) == {}
