import inspect
import re

import pytest

import bench.errors
import heads.errors
import server.errors
import training.errors
from server.errors import EuryaleError, HeadsCheckpointError, HeadsMismatchError
from server.kv.block_manager import OutOfBlocksError

MODULES = (heads.errors, server.errors, training.errors, bench.errors)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_errors_of_ours_have_one_root(module: object) -> None:
    for _, error in inspect.getmembers(module, inspect.isclass):
        assert issubclass(error, EuryaleError)
    assert issubclass(OutOfBlocksError, EuryaleError)


@pytest.mark.parametrize("module", MODULES[:3], ids=lambda module: module.__name__)
def test_the_tree_in_the_docstring_has_every_error(module: object) -> None:
    drawn = set(re.findall(r"\w+Error", inspect.getdoc(module) or ""))
    assert {name for name, _ in inspect.getmembers(module, inspect.isclass)} <= drawn


def test_errors_of_heads_are_the_same_in_the_server() -> None:
    assert HeadsMismatchError is heads.errors.HeadsMismatchError
    assert issubclass(HeadsMismatchError, HeadsCheckpointError)
    classes = {name for name, _ in inspect.getmembers(server.errors, inspect.isclass)}
    assert classes == set(server.errors.__all__)
