"""Evaluation on two ranks equals one process, ends with uneven answers, and changes nothing."""

from evaluation_checks import CHECKS
from launching import HERE, launch


def test_every_check_holds_on_two_ranks():
    output = launch(HERE / "evaluation_checks.py")
    assert [check.__name__ for check in CHECKS if f"ok {check.__name__}" not in output] == []
