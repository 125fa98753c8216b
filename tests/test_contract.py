"""Every solver by every way of calling, against one oracle; compilations, memory, constants."""

import json

import pytest

from tests import contract
from tests.test_scale import outputs_of, start


@pytest.mark.parametrize("case", contract.covering_cases(contract.WAYS), ids=str)
def test_every_solver_by_every_way_of_calling(case):
    contract.check(case)


def test_every_solver_on_several_devices():
    report = json.loads(outputs_of(start("contract"))[0])
    assert report["devices"] == contract.DEVICES
    known = [
        str(case)
        for case in contract.CASES_OF_DEVICES
        if case.derivative and case[:2] in contract.UNDIFFERENTIABLE
    ]
    # As strict as an xfail: what is mended leaves the list.
    assert sorted(report["failed"]) == sorted(known), report["failed"]
